"""All rows that can be had, or none; and every original comes back as the object it was."""

import importlib

import pytest

from vllm_trace.errors import HookError
from vllm_trace.events import BlocksTaken, RequestFreed
from vllm_trace.hooks.table import Hook, probe
from vllm_trace.hooks.wrap import make_wrapper

MODULE = "vllm.v1.core.block_pool"
POOL = f"{MODULE}:BlockPool"
METHODS = ("get_new_blocks", "free_blocks", "of_size", "size_in_tokens")


@probe()
def called(append, result):
    append(RequestFreed(1))


@probe()
def sized(append, num_blocks):
    append(BlocksTaken([num_blocks]))


def hook(target, a_probe=called, **more):
    return Hook(target, a_probe, emits="", without="it is not known", **more)


def attributes(cls):
    return {name: value for name, value in vars(cls).items() if callable(value) or name in METHODS}


def same(before, after):
    assert list(before) == list(after)
    assert [] == [name for name in before if before[name] is not after[name]]


def test_undo_restores_every_original_as_the_object_it_was(fake):
    cls = fake.cls("BlockPool")
    before = dict(vars(cls))
    done = fake.install(*(hook(f"{POOL}.{name}") for name in METHODS))
    changed = {name for name in before if before[name] is not vars(cls)[name]}
    assert set(METHODS) == changed
    assert [] == done.undo()
    same(before, dict(vars(cls)))
    assert [] == done.undo(), "twice is once"
    same(before, dict(vars(cls)))
    cls.of_size(3).get_new_blocks(1)
    assert [] == fake.events()


def test_class_and_static_methods_stay_what_they_are(fake):
    cls = fake.cls("BlockPool")

    class Heir(cls):
        pass

    fake.install(hook(f"{POOL}.of_size", sized), hook(f"{POOL}.size_in_tokens", sized))
    assert (classmethod, staticmethod) == tuple(
        type(vars(cls)[n]) for n in ("of_size", "size_in_tokens")
    )
    assert (cls, Heir) == (type(cls.of_size(2)), type(Heir.of_size(3)))
    assert (64, 64, 20) == (
        cls.size_in_tokens(4),
        cls(1).size_in_tokens(4),
        Heir.size_in_tokens(5, block_size=4),
    )
    assert [BlocksTaken([n]) for n in (2, 3, 4, 4, 5)] == fake.events()


def test_a_function_of_a_module_can_be_hooked(fake):
    module = importlib.import_module(MODULE)
    original = module.watermark
    done = fake.install(hook(f"{MODULE}:watermark", sized))
    assert 5 == module.watermark(500)
    done.undo()
    assert original is module.watermark
    assert [BlocksTaken([500])] == fake.events()


def test_objects_that_were_made_before_are_hooked_too(fake):
    pool = fake.cls("BlockPool")(4)
    fake.install(hook(f"{POOL}.get_new_blocks", sized))
    pool.get_new_blocks(2)
    assert [BlocksTaken([2])] == fake.events()


def test_rows_that_are_not_usable_are_left_out(fake):
    fake.cls("BlockPool")
    done = fake.install(hook(f"{POOL}.touch"), hook(f"{POOL}.reset"), hook(f"{POOL}.of_size"))
    assert [f"{POOL}.of_size"] == [placed.target for placed in done.placed]
    assert {} == done.skipped


# What is there in the source and not in the process
DECORATED = (
    "v1/core/block_pool.py",
    "    def free_blocks",
    "    @functools.cache\n    def free_blocks",
)
IMPORTS = (
    "v1/core/block_pool.py",
    "from vllm.v1.core.pool_base",
    "import functools\n\nfrom vllm.v1.core.pool_base",
)


def test_a_required_row_that_cannot_be_placed_takes_all_others_back(fake_with):
    fake = fake_with(DECORATED, IMPORTS)
    cls = fake.cls("BlockPool")
    before = dict(vars(cls))
    with pytest.raises(HookError) as caught:
        fake.install(
            hook(f"{POOL}.get_new_blocks"),
            hook(f"{POOL}.size_in_tokens"),
            hook(f"{POOL}.free_blocks", required=True),
            hook(f"{POOL}.of_size"),
        )
    assert str(caught.value).startswith("BlockPool.free_blocks cannot be hooked (")
    assert str(caught.value).endswith("; required: it is not known). Nothing was changed.")
    assert "Try: vllm-trace doctor" == caught.value.hint
    same(before, dict(vars(cls)))


def test_an_optional_row_that_cannot_be_placed_is_skipped_with_its_reason(fake_with):
    fake = fake_with(DECORATED, IMPORTS)
    fake.cls("BlockPool")
    target = f"{POOL}.free_blocks"
    done = fake.install(
        hook(f"{POOL}.get_new_blocks", sized), hook(target), hook(f"{POOL}.of_size")
    )
    assert {target} == set(done.skipped)
    assert "is not a plain function but" in done.skipped[target]
    assert [f"{POOL}.get_new_blocks", f"{POOL}.of_size"] == [
        placed.target for placed in done.placed
    ]


def test_what_was_wrapped_over_us_is_named_and_left(fake):
    cls = fake.cls("BlockPool")
    original = vars(cls)["of_size"]
    done = fake.install(hook(f"{POOL}.get_new_blocks", sized), hook(f"{POOL}.of_size"))
    ours = cls.get_new_blocks

    def theirs(self, num_blocks):
        return ours(self, num_blocks)

    cls.get_new_blocks = theirs
    assert [
        f"{POOL}.get_new_blocks was replaced by {__name__}."
        "test_what_was_wrapped_over_us_is_named_and_left.<locals>.theirs after us and is left as it is"
    ] == done.undo()
    assert theirs is cls.get_new_blocks
    assert original is vars(cls)["of_size"], "the others are restored"
    assert [0, 1] == cls(3).get_new_blocks(2)


def test_whatever_goes_wrong_with_a_required_row_takes_all_others_back(fake, monkeypatch):
    def fails(original, *args, **kwargs):
        if original.__name__ == "free_blocks":
            raise RecursionError("nobody foresaw this")
        return make_wrapper(original, *args, **kwargs)

    cls = fake.cls("BlockPool")
    before = dict(vars(cls))
    rows = hook(f"{POOL}.get_new_blocks"), hook(f"{POOL}.free_blocks", required=True)
    monkeypatch.setattr("vllm_trace.hooks.install.make_wrapper", fails)
    with pytest.raises(HookError, match="nobody foresaw this"):
        fake.install(*rows)
    same(before, dict(vars(cls)))


def test_a_function_that_others_wrapped_before_us_is_wrapped_as_it_is(fake):
    cls = fake.cls("BlockPool")
    original = cls.get_new_blocks
    cls.get_new_blocks = theirs = lambda self, num_blocks: original(self, num_blocks + 1)
    done = fake.install(hook(f"{POOL}.get_new_blocks", called))
    assert [0, 1, 2] == cls(4).get_new_blocks(2)
    done.undo()
    assert theirs is cls.get_new_blocks
    assert [RequestFreed(1)] == fake.events()


def test_two_rows_on_one_function_are_undone_in_the_right_order(fake):
    cls = fake.cls("BlockPool")
    original = vars(cls)["get_new_blocks"]
    done = fake.install(
        hook(f"{POOL}.get_new_blocks", sized), hook(f"{POOL}.get_new_blocks", called)
    )
    cls(4).get_new_blocks(2)
    assert [] == done.undo()
    assert original is vars(cls)["get_new_blocks"]
    assert [BlocksTaken([2]), RequestFreed(1)] == fake.events()
