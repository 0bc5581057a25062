"""A hooked function, wrapped or woven, is the original for everybody who calls it or looks at it."""

import functools
import inspect
import traceback

import pytest

from vllm_trace.errors import HookError
from vllm_trace.events import BlocksFreed, BlocksTaken, ProbeFailed, RequestFreed
from vllm_trace.hooks.table import Hook, Probe, probe
from vllm_trace.hooks.weave import is_woven

CALLS = "vllm.v1.core.calls:Calls"
POOL = "vllm.v1.core.block_pool:BlockPool"


def silent(result):
    pass


class Way:
    woven = False


@pytest.fixture(autouse=True, params=["wrapped", "woven"])
def way(request, monkeypatch):
    monkeypatch.setattr(Way, "woven", request.param == "woven")
    return request.param


def hook(target, a_probe, **more):
    return Hook(target, a_probe, emits="", without="", each_step=Way.woven, **more)


def outcome(function, args, kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


METHODS = (
    "plain",
    "keyword_only",
    "positional_only",
    "only_positional_only",
    "variable",
    "everything",
    "fails",
)
ARGUMENTS = [
    ((), {}),
    ((1,), {}),
    ((1, 2), {}),
    ((1, 2, 4, 5), {}),
    ((), {"first": 1}),
    ((1,), {"second": 2}),
    ((1,), {"third": 4}),
    ((1,), {"key": 2}),
    ((1,), {"key": 2, "other": 4}),
    ((1, 2), {"key": 3, "more": 4}),
    ((1, 2, 3), {"key": 3, "other": 5, "first": 6, "args": 7, "kwargs": 8}),
    ((1,), {"nobody": 2}),
]


@pytest.mark.parametrize("name", METHODS)
def test_every_way_to_call_gives_what_the_original_gives(fake, name):
    cls = fake.cls("Calls")
    original = getattr(cls, name)
    fake.install(hook(f"{CALLS}.{name}", Probe(silent)))
    assert original is not getattr(cls, name), "it was not wrapped"
    assert Way.woven == is_woven(getattr(cls, name))
    expected = [outcome(original, (cls(), *args), kwargs) for args, kwargs in ARGUMENTS]
    assert expected == [outcome(getattr(cls(), name), args, kwargs) for args, kwargs in ARGUMENTS]
    assert {} == fake.recorder.failures


@pytest.mark.parametrize("name", [*METHODS, "annotated"])
def test_it_looks_like_the_original(fake, name):
    cls = fake.cls("Calls")
    original = getattr(cls, name)
    fake.install(hook(f"{CALLS}.{name}", Probe(silent)))
    wrapper = getattr(cls, name)
    for attribute in ("__name__", "__qualname__", "__module__", "__doc__", "__annotations__"):
        assert getattr(original, attribute) == getattr(wrapper, attribute)
    assert inspect.signature(original) == inspect.signature(wrapper)
    assert inspect.getsource(original) == inspect.getsource(wrapper)
    plain = [
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(f, follow_wrapped=False).parameters.values()
        ]
        for f in (original, wrapper)
    ]
    assert plain[0] == plain[1], "its own parameters, without __wrapped__"


def test_defaults_are_the_same_objects(fake):
    cls = fake.cls("Calls")
    default = cls().plain(1)[1]
    fake.install(hook(f"{CALLS}.plain", Probe(silent)))
    assert default is cls().plain(1)[1]


def test_what_the_original_raises_passes_through_untouched(fake):
    seen = []

    @probe()
    def never(append, result):
        append(RequestFreed(1))

    cls = fake.cls("Calls")
    error = LookupError("the very one")
    fake.install(hook(f"{CALLS}.fails", never))
    with pytest.raises(LookupError) as caught:
        cls().fails(error)
    assert error is caught.value.args[0]
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "raise LookupError(first)" == lines[-1]
    if Way.woven:
        assert 2 == len(lines), "only vLLM's own frame"
    else:
        assert "result = _original(self, first)" == lines[-2], (
            "a traceback can show the wrapper's lines"
        )
    assert None is caught.value.__context__
    assert ([], {}) == (seen, fake.recorder.failures)
    assert [] == fake.events(), "a call that did not return is not a fact"


def test_a_probe_reads_result_and_parameters_by_name(fake):
    @probe()
    def read(append, numbers, result, self, num_blocks):
        """Its docstring is not pasted."""
        append(BlocksTaken([num_blocks, len(self.free), *result]))
        append(RequestFreed(numbers["r"]))

    fake.install(hook(f"{POOL}.get_new_blocks", read))
    pool = fake.cls("BlockPool")(8)
    assert [0, 1, 2] == pool.get_new_blocks(num_blocks=3)
    taken, _, freed = fake.events()
    assert (BlocksTaken([3, 5, 0, 1, 2]), RequestFreed(0)) == (taken, freed)


def test_times_are_taken_around_the_call_and_nothing_else(fake):
    @probe()
    def timed(append, started, ended):
        append(BlocksTaken([started, ended]))

    from time import monotonic_ns

    fake.install(hook(f"{POOL}.get_new_blocks", timed))
    before = monotonic_ns()
    fake.cls("BlockPool")(8).get_new_blocks(1)
    after = monotonic_ns()
    ((started, ended),) = [event.blocks for event in fake.events()]
    assert before <= started <= ended <= after


def _free_before(self, ordered_blocks):
    return len(self.free), ordered_blocks


def test_before_reads_what_the_call_changes(fake):
    @probe(before=_free_before)
    def compare(append, seen, result):
        append(BlocksTaken([seen[0], result]))

    fake.install(hook(f"{POOL}.free_blocks", compare))
    assert 6 == fake.cls("BlockPool")(4).free_blocks([1, 2])
    assert [BlocksTaken([4, 6])] == fake.events()


def _raises(self):
    return self.no_such_attribute


def test_a_before_that_raises_is_counted_and_the_call_goes_on(fake):
    @probe(before=_raises)
    def read(append, seen):
        append(BlocksTaken([1] if seen is None else [2]))

    fake.install(hook(f"{POOL}.free_blocks", read))
    assert 5 == fake.cls("BlockPool")(4).free_blocks([1])
    assert {f"{POOL}.free_blocks": 1} == fake.recorder.failures
    assert [BlocksTaken([1])] == [e for e in fake.events() if not isinstance(e, ProbeFailed)]


@pytest.mark.parametrize("given", [iter, reversed, tuple, list], ids=lambda f: f.__name__)
def test_an_argument_that_can_be_read_once_is_read_by_both(fake, given):
    @probe(as_list=("ordered_blocks",))
    def freed(append, ordered_blocks):
        append(BlocksFreed(list(ordered_blocks), []))

    fake.install(hook(f"{POOL}.free_blocks", freed))
    pool = fake.cls("BlockPool")(0)
    expected = list(given([7, 8, 9]))
    assert 3 == pool.free_blocks(given([7, 8, 9]))
    assert expected == pool.free
    assert [BlocksFreed(expected, [])] == fake.events()


def test_a_list_is_handed_on_as_the_very_list(fake):
    @probe(as_list=("first",))
    def same(append, first):
        append(RequestFreed(len(first)))

    fake.install(hook(f"{CALLS}.plain", same))
    blocks = [1, 2]
    assert blocks is fake.cls("Calls")().plain(blocks)[0]


def test_the_end_of_a_step_is_one_batch(fake):
    @probe()
    def small(append):
        append(RequestFreed(1))

    @probe(flush=True)
    def step(append):
        append(RequestFreed(2))

    fake.install(hook(f"{POOL}.get_new_blocks", small), hook(f"{POOL}.free_blocks", step))
    pool = fake.cls("BlockPool")(4)
    pool.get_new_blocks(1)
    assert not fake.folder.exists()
    pool.free_blocks([1])
    assert [] == fake.recorder.pending
    pool.get_new_blocks(1)
    assert 1 == len(fake.recorder.pending)
    assert [RequestFreed(1), RequestFreed(2), RequestFreed(1)] == fake.events()


def test_a_probe_that_raises_on_every_call_changes_no_result_is_named_once_and_is_taken_off(
    fake, capfd
):
    @probe()
    def broken(append, result):
        append(RequestFreed(1))
        raise RuntimeError("a probe of ours")

    cls = fake.cls("BlockPool")
    original = vars(cls)["get_new_blocks"]
    fake.install(hook(f"{POOL}.get_new_blocks", broken))
    pool = cls(8)
    assert [[0], [1], [2], [3], [4]] == [pool.get_new_blocks(1) for _ in range(5)]
    with pytest.raises(ValueError, match="no 9 free blocks"):
        pool.get_new_blocks(9)
    assert original is vars(cls)["get_new_blocks"], "taken off after three failures"
    assert {f"{POOL}.get_new_blocks": 3} == fake.recorder.failures
    said = capfd.readouterr().err.splitlines()
    assert [
        f"vllm-trace: the probe of {POOL}.get_new_blocks failed"
        " (RuntimeError: a probe of ours); the engine is not affected",
        f"vllm-trace: the probe of {POOL}.get_new_blocks failed 3 times and is taken off",
    ] == said
    failed = [event for event in fake.events() if isinstance(event, ProbeFailed)]
    assert [ProbeFailed(f"{POOL}.get_new_blocks", "RuntimeError: a probe of ours")] == failed


def undecodable(rec, result):
    raise RuntimeError("a decoder of ours")


@probe()
def deferring(defer, result):
    defer(undecodable, result)


def test_a_decoder_that_raises_on_every_call_takes_its_hook_off_too(fake, capfd):
    cls = fake.cls("BlockPool")
    original = vars(cls)["get_new_blocks"], vars(cls)["free_blocks"]
    fake.install(
        hook(f"{POOL}.get_new_blocks", deferring), hook(f"{POOL}.free_blocks", Probe(silent))
    )
    pool = cls(8)
    for number in range(5):
        assert [number] == pool.get_new_blocks(1)
        fake.recorder.flush()
    assert original[0] is vars(cls)["get_new_blocks"]
    assert original[1] is not vars(cls)["free_blocks"], "only its own"
    assert {"undecodable": 3} == fake.recorder.failures
    assert 2 == len(capfd.readouterr().err.splitlines())


def test_a_closed_stderr_is_no_reason_to_fail(fake, monkeypatch):
    class Closed:
        def write(self, text):
            raise ValueError("I/O operation on closed file")

    @probe()
    def broken(result):
        raise RuntimeError("x")

    fake.install(hook(f"{POOL}.get_new_blocks", broken))
    pool = fake.cls("BlockPool")(8)
    monkeypatch.setattr("sys.stderr", Closed())
    assert [0, 1] == pool.get_new_blocks(2)
    monkeypatch.undo()
    assert {f"{POOL}.get_new_blocks": 1} == fake.recorder.failures


def test_a_parameter_with_a_name_that_the_wrapper_needs_is_an_error(fake):
    cls = fake.cls("Calls")
    done = fake.install(hook(f"{CALLS}.named_result", Probe(silent)))
    assert {f"{CALLS}.named_result"} == set(done.skipped)
    assert "has a parameter named 'result'" in done.skipped[f"{CALLS}.named_result"]
    assert 3 == cls().named_result(3)


def test_a_probe_that_returns_is_an_error_because_its_body_is_pasted(fake):
    @probe()
    def returning(append, result):
        if not result:
            return
        append(RequestFreed(1))

    cls = fake.cls("BlockPool")
    with pytest.raises(HookError, match="the probe returning must not return"):
        fake.install(hook(f"{POOL}.get_new_blocks", returning, required=True))
    assert [0] == cls(1).get_new_blocks(1)


def test_a_parameter_that_this_release_does_not_have_stands_for_what_the_probe_says(fake):
    @probe(otherwise={"num_blocks": 99, "since_later": 7})
    def read(append, result, num_blocks, since_later):
        append(BlocksTaken([num_blocks, since_later, *result]))

    assert () == read.reads, "its absence makes no row incompatible"
    fake.install(hook(f"{POOL}.get_new_blocks", read))
    fake.cls("BlockPool")(8).get_new_blocks(2)
    assert [BlocksTaken([2, 7, 0, 1])] == list(fake.events())


def test_defaults_under_a_decorator_are_those_of_the_signature(fake):
    """As with ``torch.inference_mode``: what is hooked takes ``*args`` itself and has no default of its own."""
    cls = fake.cls("Calls")
    inner = cls.keyword_only

    @functools.wraps(inner)
    def decorated(*args, **kwargs):
        return inner(*args, **kwargs)

    cls.keyword_only = decorated
    expected = [outcome(decorated, (cls(), *args), kwargs) for args, kwargs in ARGUMENTS]
    fake.install(hook(f"{CALLS}.keyword_only", Probe(silent)))
    assert cls.keyword_only is not decorated
    found = [outcome(cls.keyword_only, (cls(), *args), kwargs) for args, kwargs in ARGUMENTS]
    assert [one for one in expected if type(one[0]) is not type] == [
        one for one in found if type(one[0]) is not type
    ]
    assert inspect.signature(cls.keyword_only) == inspect.signature(inner)
