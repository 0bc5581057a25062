"""Replay of the golden traces, where no vLLM is needed, and of traces that were tampered with."""

import ast
from pathlib import Path

import msgspec
import pytest
from helpers import write_trace

from vllm_trace import events as ev
from vllm_trace.errors import TraceError
from vllm_trace.replay import MODES, again, replay
from vllm_trace.replay.segments import OF_WORKERS
from vllm_trace.trace import Record, Trace, read_trace
from vllm_trace.tracefile import TraceFile
from vllm_trace.tracewriter import TraceWriter

GOLD = sorted((Path(__file__).parent / "gold").glob("*.vtrace"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("path", GOLD, ids=lambda path: path.stem)
def test_every_scenario_replays_without_a_divergence(path, mode):
    result = replay(read_trace(path), mode)
    assert result.divergence is None
    assert result.not_judged == []
    assert result.num_consumed == result.num_events > 0
    assert result.num_compared > 0
    assert result.passed


def test_there_is_a_golden_trace_of_every_scenario():
    from vllm_trace import scenario

    assert sorted(scenario.names()) == [path.stem for path in GOLD]


class Tampered(Trace):
    """A golden trace with its events changed by a function on the way."""

    def __init__(self, name, change):
        super().__init__([TraceFile(Path(__file__).parent / "gold" / f"{name}.vtrace")])
        self.change = change

    def records(self):
        change = self.change()
        for record in super().records():
            for event in change(record.event):
                yield record._replace(event=event)


def once(kind, change, when=lambda event: True):
    """A maker of functions that change the first event of a kind for which ``when`` holds."""

    def make():
        done = []

        def apply(event):
            if not done and type(event) is kind and when(event):
                done.append(True)
                return change(event)
            return [event]

        return apply

    return make


def altered(event, **fields):
    return [msgspec.structs.replace(event, **fields)]


TAMPERINGS = {
    "order": (
        "preempt",
        once(
            ev.BlocksTaken, lambda e: altered(e, blocks=e.blocks[::-1]), lambda e: len(e.blocks) > 1
        ),
    ),
    "eviction": ("evict", once(ev.BlockEvicted, lambda e: altered(e, block=e.block + 1))),
    "hash": (
        "prefix",
        once(
            ev.PrefixLookedUp,
            lambda e: altered(e, num_hit_tokens=e.num_hit_tokens - 32, blocks=[e.blocks[0][:-1]]),
            lambda e: e.num_hit_tokens > 0,
        ),
    ),
    "off by one": (
        "batch",
        once(ev.SlotsAllocated, lambda e: altered(e, num_free_blocks=e.num_free_blocks - 1)),
    ),
    "lost event": ("batch", once(ev.BlocksTaken, lambda e: [])),
    "schedule": (
        "chunked",
        once(
            ev.StepScheduled,
            lambda e: altered(e, num_tokens=[n + 3 for n in e.num_tokens]),
            lambda e: len(e.requests) > 1,
        ),
    ),
}


@pytest.mark.parametrize("wanted", TAMPERINGS)
def test_the_first_divergence_is_found_and_classified(wanted):
    name, change = TAMPERINGS[wanted]
    result = replay(Tampered(name, change), "engine")
    assert not result.passed
    assert result.divergence is not None
    found = result.divergence
    assert found.kind == wanted
    assert found.recorded != found.mini
    assert found.story and found.recorded_state.free_list and found.mini_state.free_list
    compile(found.script, "script", "exec")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", [one for one in TAMPERINGS if one != "schedule"])
def test_the_script_of_a_divergence_shows_it_again(wanted, mode, capsys):
    """What mini did in the replay is among what it tells in the script."""
    name, change = TAMPERINGS[wanted]
    found = replay(Tampered(name, change), mode).divergence
    exec(compile(found.script, "script", "exec"), {})
    *told, recorded, mini = capsys.readouterr().out.splitlines()
    assert recorded.startswith("recorded: ") and mini.startswith("mini: ")
    assert max(map(len, found.script.splitlines())) <= again.WIDTH, "a terminal would break it"
    facts = [ast.literal_eval(line) for line in told if line.startswith("(")]
    assert found.mini in [" ".join(map(str, fact)) for fact in facts]


def test_long_lines_of_a_script_are_folded_where_python_allows_it(capsys):
    numbers, said = [*range(10**6, 10**6 + 60)], "blocks.taken " + "[1, 2, 3] " * 40
    lines = [f"numbers = {numbers}", f"# {'why, ' * 40}", f"names = {{'a, b': {numbers}}}"]
    program = again._folded([*lines, *again._printed("mini:    ", said)])
    assert max(map(len, program.splitlines())) <= again.WIDTH + 2
    found: dict = {}
    exec(program, found)
    assert (numbers, {"a, b": numbers}) == (found["numbers"], found["names"])
    assert f"mini:     {said}\n" == capsys.readouterr().out


def test_the_script_of_another_plan_plans_the_step_again(capsys):
    name, change = TAMPERINGS["schedule"]
    found = replay(Tampered(name, change), "engine").divergence
    exec(compile(found.script, "script", "exec"), {})
    *_, planned, _, _ = capsys.readouterr().out.splitlines()
    assert found.mini == f"scheduled tokens {[*ast.literal_eval(planned).values()]}"


def swap_slots(event):
    return altered(event, slots=[event.slots[0] + 1, *event.slots[1:]])


def test_a_wrong_slot_in_a_worker_is_a_divergence_of_the_manager_replay():
    result = replay(Tampered("batch", once(ev.SlotsMapped, swap_slots)), "manager")
    assert result.divergence is not None
    assert result.divergence.recorded.startswith("slots")


def test_a_light_trace_is_not_judged():
    trace = read_trace(GOLD[0])
    trace.files[0].header["level"] = "light"
    result = replay(trace, "manager")
    assert not result.passed and result.divergence is None
    assert "level light" in result.not_judged[0]


def test_an_unknown_release_is_not_judged_and_names_the_known_ones():
    trace = read_trace(GOLD[0])
    trace.files[0].header["vllm"] = "0.99.0"
    result = replay(trace, "engine")
    assert not result.passed and result.divergence is None
    assert "0.99.0" in result.not_judged[0] and "0.32.0" in result.not_judged[0]


@pytest.mark.parametrize("mode", MODES)
def test_an_engine_that_behaves_like_another_release_is_told_by_its_rules(mode):
    trace = read_trace(Path(__file__).parent / "gold" / "preempt.vtrace")
    trace.files[0].header["vllm"] = "0.20.2"
    found = replay(trace, mode).divergence
    assert found is not None and found.kind == "configuration"
    assert found.note == (
        "recorded with vLLM 0.20.2, but by the rules of 0.32.0 both sides agree to the end"
    )


@pytest.mark.parametrize("mode, name", [("engine", "policy"), ("manager", "max_model_len")])
def test_a_setting_that_the_trace_does_not_say_is_one_line_and_no_pass(mode, name):
    def unsaid(event):
        return altered(event, settings={k: v for k, v in event.settings.items() if k != name})

    result = replay(Tampered("batch", once(ev.EngineConfigured, unsaid)), mode)
    assert not result.passed and result.divergence is None
    assert result.not_judged == [
        f"engine.configured does not say {name}: mini cannot be set up like this engine"
    ]


@pytest.mark.parametrize("inside", [True, False])
def test_an_engine_whose_worker_was_not_traced_is_not_a_pass(tmp_path, inside):
    """On a single CUDA device EngineCore is its own worker, and its file is the whole trace."""
    told = [e for e in read_trace(GOLD[0]).events() if inside or type(e) not in OF_WORKERS]
    path = write_trace(tmp_path, "engine", 1, [told[:9], [], told[9:]], vllm="0.32.0")
    result = replay(read_trace(path), "manager")
    assert result.divergence is None and inside == result.passed
    assert inside or "0 of 1 worker" in result.not_judged[0]


def test_a_trace_cut_before_its_engine_says_that_it_is_cut(tmp_path):
    path = tmp_path / "cut.vtrace"
    path.write_bytes((Path(__file__).parent / "gold" / "mixed.vtrace").read_bytes()[:20_000])
    with pytest.raises(TraceError, match=r"no engine in it: .*truncated"):
        replay(read_trace(path), "manager")


def test_silent_calls_are_replayed_and_counted_apart():
    """What the trace only counts (``num_kept``) is judged too: mini makes every one of those calls."""
    path = Path(__file__).parent / "gold" / "mixed.vtrace"
    silent = sum(e.num_kept for e in read_trace(path).events() if type(e) is ev.StepScheduled)
    assert silent > 0
    assert [silent, silent] == [replay(read_trace(path), mode).num_silent for mode in MODES]


def test_a_silent_call_that_should_have_filled_a_block_is_found():
    lost = once(ev.BlocksCached, lambda event: [], lambda event: len(event.blocks) == 1)
    result = replay(Tampered("long", lost), "manager")
    assert result.divergence is not None
    assert "16 blocks are full, 15 hashes known" in result.divergence.mini


@pytest.mark.parametrize("mode", MODES)
def test_calls_that_the_end_of_the_file_cuts_are_no_divergence(mode, tmp_path):
    """Batches need not end with a step: the last events may be half a call."""
    whole = read_trace(Path(__file__).parent / "gold" / "mixed.vtrace")
    events = list(whole.events())
    for number, length in enumerate(range(2900, 2960, 7)):
        path = tmp_path / f"{number}.vtrace"
        writer = TraceWriter(path, whole.header)
        writer.write(events[:length])
        writer.close({"ended": "killed"})
        result = replay(read_trace(path), mode)
        assert result.divergence is None and result.not_judged
        assert length - 60 < result.num_consumed <= length


def test_a_truncated_trace_is_not_a_pass(tmp_path):
    whole = (Path(__file__).parent / "gold" / "mixed.vtrace").read_bytes()
    path = tmp_path / "cut.vtrace"
    path.write_bytes(whole[:-40])
    result = replay(read_trace(path), "manager")
    assert result.divergence is None and not result.passed
    assert "truncated" in " ".join(result.not_judged)


def side_by_side(*names):
    """The golden traces of several scenarios as the schedulers of one run, at the same time."""
    files = [TraceFile(Path(__file__).parent / "gold" / f"{name}.vtrace") for name in names]
    starts = [
        next(e.at_ns for e in Trace([file]).events() if type(e) is ev.EngineConfigured)
        for file in files
    ]
    for number, (file, start) in enumerate(zip(files, starts)):
        file.header["host"] = f"rank-{number}"
        file.header["clock"] = {"unix_ns": 0, "monotonic_ns": start}
    return Trace(files)


@pytest.mark.parametrize("mode", MODES)
def test_engines_of_a_data_parallel_run_are_replayed_each_by_itself(mode):
    trace = side_by_side("preempt", "evict", "batch")
    order = [record.process for record in trace.records()]
    assert order != sorted(order), "they do not overlap"
    result = replay(trace, mode)
    assert result.divergence is None and result.not_judged == []
    assert result.num_consumed == result.num_events == len(order)


def test_a_difference_in_one_of_several_engines_is_found():
    trace = side_by_side("preempt", "batch")
    records = trace.records

    def tampered():
        change = TAMPERINGS["off by one"][1]()
        for record in records():
            events = change(record.event) if record.process == 1 else [record.event]
            yield from (record._replace(event=event) for event in events)

    trace.records = tampered
    found = replay(trace, "manager").divergence
    assert found is not None and "slots.allocated" in found.recorded


class Several(Trace):
    """Golden traces one behind the other, as one process tells them."""

    def __init__(self, names, *, stopped):
        gold = Path(__file__).parent / "gold"
        super().__init__([TraceFile(gold / f"{name}.vtrace") for name in names])
        self.stopped = stopped

    def records(self):
        number = 0
        for file in self.files:
            for event in Trace([file]).events():
                if type(event) is not ev.EngineStopped or self.stopped:
                    number += 1
                    yield Record(number, 0, event)


@pytest.mark.parametrize("stopped", [True, False])
def test_engines_that_follow_each_other_in_a_process_are_replayed(stopped):
    result = replay(Several(["hello", "prefix"], stopped=stopped), "engine")
    assert result.divergence is None and result.passed


def test_a_difference_with_two_engines_of_one_process_says_that_they_may_be_mixed_up():
    class Mixed(Several):
        def records(self):
            lost = False
            for record in super().records():
                if type(record.event) is ev.BlocksTaken and record.number > 400 and not lost:
                    lost = True
                    continue
                yield record

    result = replay(Mixed(["hello", "batch"], stopped=False), "manager")
    assert result.divergence is not None and not result.passed
    assert "cannot be told apart" in result.not_judged[0]
