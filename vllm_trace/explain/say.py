"""The sentences of ``explain``: each takes what was found and says it as a colleague would."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from vllm_trace.events import (
    EngineConfigured,
    PrefixLookedUp,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    SlotsAllocated,
    StepScheduled,
)
from vllm_trace.explain.cache import Miss
from vllm_trace.explain.queue import Refusal
from vllm_trace.explain.words import flat, groups, ids, listed, many, span, steps, times

if TYPE_CHECKING:
    from vllm_trace.explain.life import Chunk, Decoding, Loss, Waiting

MAX_CHUNKS = 8
"""Chunks that get a line each; of more the middle is told in one."""
MAX_NEW = 4
"""Blocks got while decoding that are named one by one."""


def arrived(event: RequestArrived, ahead: Sequence[str]) -> str:
    behind = f"behind {listed(ahead)}" if ahead else "nobody waits before it"
    said = f"arrived, {behind}"
    if event.lora:
        said += f"; with LoRA {event.lora}, so it shares blocks only with others of that LoRA"
    if event.salted:
        said += "; with a cache salt, so it shares blocks only with others of that salt"
    return said


# The prefix cache -----------------------------------------------------------------------


def looked_up(
    event: PrefixLookedUp, miss: Miss, name: Callable[[int], str], config: EngineConfigured | None
) -> str:
    """``prefix cache: 3 of 5 blocks hit: 1–3 (96 of 170 tokens); …``."""
    why = missing(miss, name, config)
    if miss.cause == "cache off":
        return f"prefix cache: {why}"
    if not miss.num_full_blocks:
        return f"prefix cache: nothing to look up: {why}"
    said = f"prefix cache: {miss.num_hit_blocks} of {many(miss.num_full_blocks, 'block')} hit"
    if event.num_hit_tokens:
        said += f": {groups(event.blocks)} ({event.num_hit_tokens} of {event.num_tokens} tokens)"
    return f"{said}; {why}" if why else said


def missing(miss: Miss, name: Callable[[int], str], config: EngineConfigured | None) -> str:
    """The cause of the first missing block."""
    which = f"block {miss.index} (tokens {miss.first_token}–{miss.last_token})"
    if miss.cause == "all hit":
        return ""
    if miss.cause == "cache off":
        return "off in this engine, every token is computed"
    if miss.cause == "short":
        size = config.block_size if config else 0
        return f"it is shorter than a block of {size} tokens"
    if miss.cause == "logits":
        return (
            f"{which} is computed in any case: the last token has to run for its logits, "
            "and hits come in whole blocks"
        )
    if miss.cause == "none shared":
        if miss.index:
            return f"nobody had cached a block that goes on like its {which}"
        return f"nobody had cached its first block (tokens 0–{miss.last_token})"
    if miss.cause in ("lora", "salt"):
        return f"{name(miss.other)} has the same tokens in {which}, but {miss.under}"
    if miss.cause == "unread":
        return (
            f"{which} was in the cache (block {miss.block}, from {name(miss.cached_by)} at event "
            f"{miss.cached_event}) and was not taken: a request may ask for that, for instance "
            "with prompt_logprobs"
        )
    if miss.cause == "unknown":
        return f"why {which} was not there cannot be told" if miss.index >= 0 else "cause unknown"
    return _lost(miss, which, name, config)


def _lost(
    miss: Miss, which: str, name: Callable[[int], str], config: EngineConfigured | None
) -> str:
    only = ""
    if miss.cause == "group":
        kind = config.groups[miss.group].kind if config else ""
        only = f" in KV group {miss.group} ({kind}), though other groups still have it"
        if not miss.lost_event:
            return f"{which} was never cached{only}"
    had = f"{which}, cached by {name(miss.cached_by)} in block {miss.block} (event {miss.cached_event}),"
    if miss.cause == "reset":
        return f"{had} went when the prefix cache was reset (event {miss.lost_event})"
    taker = f" when {name(miss.taker)} took that block" if miss.taker >= 0 else ""
    return f"{had} was evicted{only} at event {miss.lost_event}{taker}"


# Waiting --------------------------------------------------------------------------------


def waited(
    waiting: Waiting, name: Callable[[int], str], settings: dict[str, Any], light: bool
) -> str:
    """``steps 7–37: waited; the pool refused it 31 times (up to event 350): …``."""
    reason = waiting.reason
    said = f"{steps(waiting.first_step, waiting.last_step)}: waited"
    low, high = waiting.free
    free = f"{span(low, high)} free"
    if reason.kind == "refused":
        until = f" (up to event {waiting.last_event})" if waiting.num_steps > 1 else ""
        said += f"; the pool refused it {times(waiting.num_steps)}{until}: "
        return said + wanted(reason.wanted, reason.num_queued_hits, free)
    if reason.kind == "preempting":
        return f"{said}; nobody is admitted in a step that preempts"
    if reason.kind == "behind":
        more = f", {many(reason.wanted, 'block')} wanted and {free}" if reason.wanted else ""
        return f"{said} behind {name(reason.by)}, which the pool refused{more}"
    if reason.kind == "full":
        limit = settings.get("max_num_seqs")
        return f"{said}; no place in the batch, which is full with {limit} (max_num_seqs)"
    if reason.kind == "budget":
        limit = settings.get("max_num_scheduled_tokens") or settings.get("max_num_batched_tokens")
        return f"{said}; others had spent the step's budget of {limit} tokens"
    if light:
        return f"{said} with {free}; level light does not record why"
    return f"{said}; why is not recorded"


def wanted(number: int | None, queued: int, free: str) -> str:
    if number is None:
        return f"{free}, how many it wanted is not recorded"
    hits = f", {queued} of them its hits, which lie in the free queue" if queued else ""
    return f"{many(number, 'block')} wanted{hits}; {free}"


# In the batch ---------------------------------------------------------------------------


def got(event: SlotsAllocated) -> str:
    """``got 5 6 (logical 0–1), 2 left free``."""
    first = len(event.hit_blocks[0]) if event.hit_blocks else 0
    last = first + len(event.blocks[0]) - 1 if event.blocks else first
    new = f"got {groups(event.blocks)} (logical {span(first, last)})"
    free = f"{event.num_free_blocks} left free"
    if flat(event.hit_blocks):
        hits = groups(event.hit_blocks)
        if not flat(event.blocks):
            return f"took over {hits} from the prefix cache; {free}"
        return f"took over {hits} from the prefix cache and {new}; {free}"
    return f"{new}; {free}"


def chunks(
    made: Sequence[Chunk], goal: int, again: bool, light: bool
) -> Iterator[tuple[int, str, Sequence[Chunk]]]:
    """(event, sentence, the chunks it speaks of)."""
    if len(made) == 1:
        yield made[0].event, _only_chunk(made[0], goal, again, light), made
        return
    total, known = len(made), made[-1].first + made[-1].count >= goal
    for index, chunk in enumerate(made, 1):
        if total > MAX_CHUNKS and MAX_CHUNKS - 2 < index < total:
            if index == MAX_CHUNKS - 1:
                middle = made[index - 1 : total - 1]
                first, last = middle[0], middle[-1]
                tokens = span(first.first, last.first + last.count - 1)
                said = (
                    f"{steps(first.step, last.step)}: chunks {index}–{total - 1}: tokens {tokens}"
                )
                yield first.event, said, middle
            continue
        number = f"chunk {index} of {total}" if known else f"chunk {index}"
        said = f"step {chunk.step}: {number}: {_tokens(chunk, light)}"
        said += " again" if again else ""
        said += f"; got {ids(flat(chunk.blocks))}" if flat(chunk.blocks) else ""
        said += "; that spent the step's budget" if chunk.spent and index < total else ""
        yield chunk.event, said, [chunk]


def _tokens(chunk: Chunk, light: bool) -> str:
    if light:
        return many(chunk.count, "token")
    which = span(chunk.first, chunk.first + chunk.count - 1)
    return f"token {which}" if chunk.count == 1 else f"tokens {which}"


def _only_chunk(chunk: Chunk, goal: int, again: bool, light: bool) -> str:
    tokens = _tokens(chunk, light)
    if again:
        return f"step {chunk.step}: computed {tokens} again"
    if light:
        return f"step {chunk.step}: computed {tokens} of its prompt"
    if chunk.first + chunk.count < goal:
        return f"step {chunk.step}: computed {tokens} of its prompt"
    if chunk.first:
        return f"step {chunk.step}: computed the rest of the prompt, {tokens}"
    return f"step {chunk.step}: computed the whole prompt, {tokens}"


def decoded(made: Decoding) -> str:
    """``steps 2–61: decoded 60 tokens; new: 7 (logical 2, event 60)``."""
    said = f"{steps(made.first_step, made.last_step)}: decoded {many(made.num_tokens, 'token')}"
    if made.blocks:
        shown = made.blocks if len(made.blocks) <= MAX_NEW else made.blocks[: MAX_NEW - 1]
        parts = [
            f"{ids(blocks)} (logical {place}, event {event})" for event, place, blocks in shown
        ]
        if len(shown) < len(made.blocks):
            event, _, blocks = made.blocks[-1]
            hidden = len(made.blocks) - len(shown)
            parts.append(f"{hidden} more up to {ids(blocks)} (event {event})")
        said += f"; new on the way: {', '.join(parts)}"
    return said


def idle(first: int, last: int, spent: bool) -> str:
    why = "others had spent the step's budget" if spent else "why is not recorded"
    return f"{steps(first, last)}: in the batch, but nothing of it was scheduled; {why}"


# Preemption and the end -----------------------------------------------------------------


def preempted(
    event: RequestPreempted, why: Refusal | None, by: str | None, me: int, facts: dict[str, Any]
) -> str:
    if why is None:
        said = "preempted; for whom is not recorded"
    else:
        need = many(why.num_wanted, "block") if why.num_wanted else "blocks"
        refused = f"(refused at event {why.event}, {why.num_free} free)"
        if why.request == me:
            said = f"preempted: it needed {need} {refused} and was itself the one to give way"
        else:
            said = f"preempted for {by}, which needed {need} {refused}"
    lost = f"{many(event.num_computed_tokens, 'computed token')} given up"
    return f"{said}; {lost}{_gave_back(facts)}"


def made_room(why: Refusal, victim: str, number: int) -> str:
    need = many(why.num_wanted, "block") if why.num_wanted else "blocks"
    return f"refused: {need} wanted, {why.num_free} free; {victim} was preempted for it (event {number})"


def resumed(event: StepScheduled, loss: Loss, hit: int, light: bool) -> str:
    gone = event.step - loss.step
    said = f"step {event.step}: back in the batch, {many(gone, 'step')} after its preemption"
    if light:
        return said
    back = min(hit, loss.num_tokens)
    return (
        f"{said}; of the {loss.num_tokens} tokens given up, {back or 'none'} came back from the "
        f"prefix cache and {loss.num_tokens - back or 'none'} are computed again"
    )


def finished(event: RequestFinished, facts: dict[str, Any], status: str, light: bool) -> str:
    said = f"finished ({event.reason}) with {many(event.num_output_tokens, 'token')} generated"
    if status == "waiting" and not event.num_output_tokens:
        said = f"finished ({event.reason}) while it waited: it never ran"
    if event.num_preemptions:
        said += f", preempted {times(event.num_preemptions)}"
    table = f"; its table was {groups(facts['table'])}" if flat(facts["table"]) else ""
    return said + table + _gave_back(facts)


def _gave_back(facts: dict[str, Any]) -> str:
    said = ""
    at = f" (event {facts['freed_event']})" if facts["freed_event"] else ""
    if facts["freed"]:
        said = f"; gave back {ids(facts['freed'])}{at}"
    if facts["still_held"]:
        holders = listed(facts["holders"], 2) or "others"
        said += f"; {ids(facts['still_held'])} stay with {holders}"
    return said


def passed_on(name: str, taken: Sequence[int], found: Sequence[int], lost: Sequence[int]) -> str:
    said = []
    if taken:
        was = "" if not lost else ", evicting what it had cached there"
        if lost and len(lost) < len(taken):
            was = f", evicting what it had cached in {ids(lost)}"
        said.append(f"took {ids(taken)}{was}")
    if found:
        said.append(f"hit {ids(found)}, still cached")
    return f"next owner: {name} {'; '.join(said)}"


def never_taken(blocks: Sequence[int]) -> str:
    return f"nobody got {ids(blocks)} in the rest of the trace"


def still(status: str, table: Sequence[Sequence[int]]) -> str:
    held = f", holding {groups(table)}" if flat(table) else ""
    verb = "waits" if status == "waiting" else "runs"
    return f"the trace ends while the request {verb}{held}"
