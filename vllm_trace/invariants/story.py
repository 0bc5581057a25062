"""Events in words, and which of them a violation is about."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from vllm_trace.events import (
    AttentionPlanned,
    BlockEvicted,
    BlocksCached,
    BlocksFreed,
    BlocksTaken,
    BlocksTouched,
    EngineConfigured,
    Event,
    KVEventsTaken,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    RequestFreed,
    RequestPreempted,
    SlotsAllocated,
    SlotsMapped,
    SlotsRefused,
    StepExecuted,
    StepScheduled,
    StepUpdated,
    TableRowChanged,
    to_dict,
)
from vllm_trace.invariants.registry import Violation
from vllm_trace.invariants.words import many

Names = dict[int, str]


def concerns(event: Event, violation: Violation) -> bool:
    """Whether an event is part of the story: of its requests or blocks, or of its very step."""
    requests, blocks = violation.requests, violation.blocks
    own, block = violation.request, violation.block
    kind = type(event)
    if own is None and block is None and not requests and not blocks and kind in _OF_THE_POOL:
        return True
    if kind in _OF_ONE_REQUEST:
        request = event.request  # type: ignore[attr-defined]
        if request == own or request in requests:
            return True
        if kind is not BlocksCached:
            return False
    if kind is BlockEvicted:
        one = event.block  # type: ignore[attr-defined]
        return one == block or one in blocks
    if kind in _OF_BLOCKS:
        found = event.blocks  # type: ignore[attr-defined]
        return block in found or any(one in found for one in blocks)
    if kind is StepScheduled:
        return _step_concerns(event, violation)  # type: ignore[arg-type]
    if kind is TableRowChanged:
        return event.step == violation.step and (  # type: ignore[attr-defined]
            event.request == own or event.request in requests  # type: ignore[attr-defined]
        )
    if kind is SlotsMapped or kind is AttentionPlanned:
        return event.step == violation.step  # type: ignore[attr-defined]
    return kind is PrefixCacheReset


_OF_ONE_REQUEST = {
    RequestArrived, RequestFinished, RequestPreempted, RequestFreed, PrefixLookedUp, SlotsAllocated,
    SlotsRefused, BlocksCached,
}  # fmt: skip
_OF_BLOCKS = {BlocksTaken, BlocksTouched, BlocksFreed, BlocksCached}
_OF_THE_POOL = {
    BlocksTaken, BlocksTouched, BlocksFreed, SlotsAllocated, SlotsRefused, RequestFreed,
    RequestPreempted,
}  # fmt: skip
"""What a violation is about that names neither a request nor a block."""


def _step_concerns(event: StepScheduled, violation: Violation) -> bool:
    if event.step == violation.step:
        return True
    wanted = {violation.request, *violation.requests}
    return any(
        request in wanted
        for requests in (event.new, event.resumed, event.preempted, event.finished)
        for request in requests
    )


def describe(event: Event, names: Names) -> str:
    """One event as a sentence."""
    telling = _TELL.get(type(event))
    if telling is None:
        fields = to_dict(event)
        kind = fields.pop("kind")
        return f"{kind} {fields}"[:160]
    return telling(event, names)


def _who(request: int, names: Names) -> str:
    return names.get(request, f"#{request}")


def _list(numbers: Iterable[int], most: int = 10) -> str:
    shown = [*numbers]
    text = ", ".join(map(str, shown[:most]))
    return (text or "none") if len(shown) <= most else f"{text} … ({len(shown)} in all)"


def _blocks(rows: Any) -> str:
    rows = [row for row in rows if row]
    return " | ".join(_list(row) for row in rows) or "none"


def _arrived(event: RequestArrived, names: Names) -> str:
    return f"{event.request_id} arrives: {event.num_prompt_tokens} tokens, up to {event.max_tokens} more"


def _finished(event: RequestFinished, names: Names) -> str:
    return f"{_who(event.request, names)} finishes ({event.reason}) after {event.num_output_tokens} tokens"


def _preempted(event: RequestPreempted, names: Names) -> str:
    return (
        f"{_who(event.request, names)} is preempted and loses {event.num_computed_tokens} tokens; "
        f"{event.num_free_blocks} blocks are free"
    )


def _freed(event: RequestFreed, names: Names) -> str:
    return f"{_who(event.request, names)} has given its blocks back"


def _noun(number: int) -> str:
    return "block" if number == 1 else "blocks"


def _tokens(number: int) -> str:
    return f"{number} token{'' if number == 1 else 's'}"


def _looked_up(event: PrefixLookedUp, names: Names) -> str:
    hit = f"hits {event.num_hit_tokens} tokens in {_noun(sum(map(len, event.blocks)))} {_blocks(event.blocks)}"
    if not event.num_hit_tokens:
        hit = "hits nothing"
    return f"{_who(event.request, names)} looks its {event.num_tokens} tokens up and {hit}"


def _allocated(event: SlotsAllocated, names: Names) -> str:
    hits = f", hits {_blocks(event.hit_blocks)}" if any(event.hit_blocks) else ""
    return (
        f"{_who(event.request, names)} gets {_noun(sum(map(len, event.blocks)))} {_blocks(event.blocks)}{hits} for "
        f"{_tokens(event.num_new_tokens)}; {event.num_free_blocks} are free"
    )


def _refused(event: SlotsRefused, names: Names) -> str:
    wanted = f" ({event.num_wanted_blocks} wanted)" if event.num_wanted_blocks else ""
    return (
        f"{_who(event.request, names)} is refused blocks{wanted} for {_tokens(event.num_new_tokens)}; "
        f"{event.num_free_blocks} are free"
    )


def _counts(event: BlocksTouched | BlocksFreed, what: str) -> str:
    verb = "is" if len(event.blocks) == 1 else "are"
    refs = "reference" if event.ref_cnts == [1] else "references"
    said = f"{_noun(len(event.blocks))} {_list(event.blocks)} {verb} {what}"
    return f"{said}, then {'counts' if verb == 'is' else 'count'} {_list(event.ref_cnts)} {refs}"


def _cached(event: BlocksCached, names: Names) -> str:
    return (
        f"{_noun(len(event.blocks))} {_list(event.blocks)} can be hit, for {_who(event.request, names)} from position "
        f"{event.first} (group {event.group})"
    )


def _scheduled(event: StepScheduled, names: Names) -> str:
    said = []
    for what in ("new", "resumed", "preempted", "finished"):
        requests = getattr(event, what)
        if requests:
            said.append(f"{what} {', '.join(_who(r, names) for r in requests[:6])}")
    return (
        f"step {event.step} is planned: {len(event.requests or ())} requests, "
        f"{sum(event.num_tokens or ())} tokens, {event.num_free_blocks} blocks free"
        + (f"; {'; '.join(said)}" if said else "")
    )


def _row(event: TableRowChanged, names: Names) -> str:
    return (
        f"a worker's row of {_who(event.request, names)} in step {event.step} is "
        f"{_list(event.blocks)} from position {event.first} on (group {event.group})"
    )


def _mapped(event: SlotsMapped, names: Names) -> str:
    return (
        f"step {event.step} runs {', '.join(_who(r, names) for r in event.requests[:6])} with slots "
        f"{_list(event.slots, 6)} (group {event.group})"
    )


def _planned(event: AttentionPlanned, names: Names) -> str:
    numbers = ", ".join(f"{name} {value}" for name, value in event.numbers.items())
    return f"step {event.step} uses {event.kernel} {event.variant} for {numbers}"


def _kv(event: KVEventsTaken, names: Names) -> str:
    said = [
        f"{what} {_list((h % 0x10000 for h in hashes), 3)}" for what, hashes in event.events[:4]
    ]
    return f"vLLM hands over {many(len(event.events), 'KV event')}: {'; '.join(said)}"


_TELL: dict[type[Event], Callable[[Any, Names], str]] = {
    EngineConfigured: lambda e, n: (
        f"an engine is made: {e.num_blocks} blocks of {e.block_size} tokens"
    ),
    RequestArrived: _arrived,
    RequestFinished: _finished,
    RequestPreempted: _preempted,
    RequestFreed: _freed,
    PrefixLookedUp: _looked_up,
    SlotsAllocated: _allocated,
    SlotsRefused: _refused,
    BlocksTaken: lambda e, n: (
        f"{_noun(len(e.blocks))} {_list(e.blocks)} {'is' if len(e.blocks) == 1 else 'are'} taken from the free queue"
    ),
    BlockEvicted: lambda e, n: f"block {e.block} is evicted from the prefix cache",
    BlocksTouched: lambda e, n: _counts(e, "touched"),
    BlocksFreed: lambda e, n: _counts(e, "given back"),
    BlocksCached: _cached,
    PrefixCacheReset: lambda e, n: f"the prefix cache is {'reset' if e.ok else 'not reset'}",
    StepScheduled: _scheduled,
    StepExecuted: lambda e, n: f"rank {e.rank} has executed step {e.step}",
    StepUpdated: lambda e, n: f"the results of step {e.step} are in",
    TableRowChanged: _row,
    SlotsMapped: _mapped,
    AttentionPlanned: _planned,
    KVEventsTaken: _kv,
}
