"""Every fact that a replay compares, changed in one event of a long trace: it is found, and at that very event.

Steps are compared many at once, and most requests are passed over in most steps: none of that may lose anything.
"""

from pathlib import Path

import msgspec
import pytest

from vllm_trace import events as ev
from vllm_trace.replay import replay
from vllm_trace.trace import read_trace
from vllm_trace.tracewriter import TraceWriter

MIXED = Path(__file__).parents[1] / "gold" / "mixed.vtrace"
BOTH = ("manager", "engine")
COMPARED = [
    (ev.BlockEvicted, BOTH, ("block", "hashes", None)),
    (ev.BlocksCached, BOTH, ("blocks", "first", "group", None)),
    (ev.BlocksFreed, BOTH, ("blocks", "ref_cnts", None)),
    (ev.BlocksTaken, BOTH, ("blocks", None)),
    (ev.BlocksTouched, BOTH, ("blocks", "ref_cnts", None)),
    (ev.PrefixLookedUp, BOTH, ("blocks", "num_hit_tokens", "num_tokens")),
    (ev.PrefixLookedUp, ("engine",), ("request", None)),
    (ev.SlotsAllocated, BOTH, ("blocks", "num_hit_tokens", "num_free_blocks")),
    (ev.SlotsAllocated, ("engine",), ("request", "num_new_tokens", None)),
    (ev.SlotsRefused, BOTH, ("num_hit_tokens", "num_free_blocks", "num_wanted_blocks")),
    (ev.SlotsRefused, ("engine",), ("request", "num_new_tokens", None)),
    (ev.RequestFreed, ("engine",), ("request",)),
    (ev.RequestFinished, BOTH, ("num_output_tokens", "num_preemptions")),
    (ev.RequestPreempted, BOTH, ("request", "num_computed_tokens", "num_free_blocks")),
    (ev.RequestPreempted, ("engine",), (None,)),
    (ev.StepScheduled, BOTH, ("num_free_blocks",)),
    (ev.StepScheduled, ("manager",), ("num_kept",)),
    (ev.StepScheduled, ("engine",), (
        "requests", "num_tokens", "new", "resumed", "preempted", "finished", "num_running", "num_waiting",
    )),
    (ev.SlotsMapped, ("manager",), ("slots", "block_size")),
]  # fmt: skip
"""(kind, modes, fields); None: the event is lost."""
CASES = [
    pytest.param(kind, field, mode, id=f"{kind.kind}-{field or 'lost'}-{mode}")
    for kind, modes, fields in COMPARED
    for field in fields
    for mode in modes
]


def another(value):
    if isinstance(value, int):
        return value + 1
    if not value:
        return [1]
    return [another(value[0]), *value[1:]]


@pytest.fixture(scope="module")
def whole():
    """(header, batches) as the recorder wrote them: a batch is a step."""
    file = read_trace(MIXED).files[0]
    return file.header, [*file.batches()]


@pytest.mark.parametrize("kind, field, mode", CASES)
def test_a_changed_fact_is_found_at_its_event(kind, field, mode, whole, tmp_path):
    header, batches = whole
    places = [
        (number, place)
        for number, batch in enumerate(batches)
        for place, event in enumerate(batch)
        if type(event) is kind and (field != "blocks" or any(event.blocks))
    ]
    number, place = places[len(places) * 3 // 5]
    event = batches[number][place]
    new = [] if field is None else [
        msgspec.structs.replace(event, **{field: another(getattr(event, field))})
    ]  # fmt: skip
    changed = batches[number][:place] + new + batches[number][place + 1 :]
    writer = TraceWriter(tmp_path / "main-1.vtrace", header)
    for batch in [*batches[:number], changed, *batches[number + 1 :]]:
        writer.write(batch)
    writer.close({"dropped": 0, "failures": {}})
    found = replay(read_trace(tmp_path), mode, release=header["vllm"]).divergence
    assert found is not None
    at = sum(map(len, batches[:number])) + place + 1
    # Of a lost hash mini learns only where it needs it: in the same step.
    last = at + len(changed) if (kind, field) == (ev.BlocksCached, None) else at
    assert at <= found.event <= last


@pytest.mark.parametrize("mode", BOTH)
def test_a_count_that_the_probe_did_not_know_is_not_compared(mode, whole, tmp_path):
    header, batches = whole
    writer = TraceWriter(tmp_path / "main-1.vtrace", header)
    refused = 0
    for batch in batches:
        told = [event for event in batch if type(event) is ev.SlotsRefused]
        refused += len(told)
        writer.write(
            [
                msgspec.structs.replace(event, num_wanted_blocks=0) if event in told else event
                for event in batch
            ]
        )
    writer.close({"dropped": 0, "failures": {}})
    assert refused
    assert replay(read_trace(tmp_path), mode).passed
