"""A short program over ``mini`` that shows a divergence again.

Both sides agree up to the call in which they differ, so the recorded side's state before it is ``mini``'s: the
program puts it into a fresh manager and makes that call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm_trace.events import (
    BlocksCached,
    EngineConfigured,
    Event,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestFreed,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.mini.kv_cache_manager import KVCacheManager, RequestBlocks
from vllm_trace.replay.recorded import Known, Recorded

CALL_ENDS = frozenset(
    {PrefixLookedUp, SlotsAllocated, SlotsRefused, RequestFreed, PrefixCacheReset}
    | {StepScheduled, StepUpdated}
)
"""Events that are told when a call of the manager or the scheduler returns."""
WIDTH = 76
"""Columns of the program."""
HEAD = 64
"""Blocks at the head of the free queue whose order and hashes are told; no call here takes more."""


def restore(
    manager: KVCacheManager,
    free: Sequence[int],
    tables: Mapping[Any, Sequence[Sequence[int]]],
    hashes: Mapping[int, tuple[int, int]],
) -> None:
    """Put a manager into a recorded state.

    ``free`` is its queue, the next to be handed out first; ``tables`` are the ids of each group by request;
    ``hashes`` has (hash, group) by block, in the order in which they were cached.
    """
    pool = manager.block_pool
    queue = pool.free_block_queue
    queue.popleft_n(len(queue))
    for request, groups in tables.items():
        held = RequestBlocks([[pool.blocks[block] for block in ids] for ids in groups])
        full = [place for place, block in enumerate(groups[0]) if block in hashes]
        held.num_cached_blocks = full[-1] + 1 if full else 0
        manager.requests[request] = held
        for block in (block for table in held.tables for block in table):
            block.ref_cnt += not block.is_null
    for block_id, (block_hash, group) in hashes.items():
        block, cached = pool.blocks[block_id], pool.cached_block_hash_to_block[group]
        block.block_hash, block.group_id = block_hash, group
        if cached.setdefault(block_hash, block) is not block:
            cached.add_duplicate(block_hash, block)
    queue.append_n([pool.blocks[block] for block in free])


def script(before: Recorded, end: Event | None, difference: Any, name: Any, settings: Any) -> str:
    """The program. ``before`` is the state at the beginning of the call that ``end`` is told of."""
    config = before.kv.config
    if config is None or end is None:
        return _only_said(difference)
    if type(end) is StepScheduled:
        body = _schedule(before, settings, name)
        wanted = {h for known in before.requests.values() for h in known.hashes}
    else:
        key = getattr(end, "request", None)
        known = before.requests.get(key) if key is not None else None
        if known is None and type(end) is not PrefixCacheReset:
            return _only_said(difference)
        body = _call(end, key, known, before, settings, name)
        wanted = set(known.hashes) if known else set()
    state = [*_manager(config, settings), *_restored(before, wanted, name)]
    return _folded([*_imports(body), "", *state, *body, *_said(difference)])


def _only_said(difference: Any) -> str:
    """Where there is no call to make again: a difference in what a worker received."""
    return _folded(_said(difference))


def _said(difference: Any) -> list[str]:
    return [
        *_printed("recorded:", _plain(difference.recorded)),
        *_printed("mini:    ", _plain(difference.mini)),
    ]


def _printed(title: str, said: str) -> list[str]:
    """A call of ``print``, its text on as many lines as it takes."""
    if len(said) + len(title) < WIDTH - 15:
        return [f"print({title!r}, {said!r})"]
    size = WIDTH - 8
    pieces = [said[at : at + size] for at in range(0, len(said), size)]
    return ["print(", f"    {title!r},", *(f"    {piece!r}" for piece in pieces), ")"]


def _folded(lines: Iterable[str]) -> str:
    """A program that a narrow terminal shows as it is: long lines go on, indented, behind a comma."""
    folded = []
    for line in "\n".join(lines).split("\n"):
        more = "# " if line.startswith("#") else "    "
        while len(line) > WIDTH:
            cut = line.rfind(", ", 0, WIDTH)
            if cut < len(more) or line.count("'", 0, cut) % 2 or '"' in line:
                break  # it would be within a text
            folded.append(line[: cut + 1])
            line = more + line[cut + 2 :]
        folded.append(line)
    return "\n".join([*folded, ""])


def _imports(body: list[str]) -> list[str]:
    lines = [
        "from vllm_trace.mini.kv_cache_manager import (",
        "    FullAttentionSpec, KVCacheManager, SlidingWindowSpec,",
        ")",
        "from vllm_trace.mini.request import Request, RequestStatus",
        "from vllm_trace.mini.rules import rules_for",
    ]
    if any("Scheduler(" in line for line in body):
        lines.append("from vllm_trace.mini.scheduler import Scheduler, SchedulerConfig")
    return [*lines, "from vllm_trace.replay.again import restore"]


def _manager(config: EngineConfigured, settings: Any) -> list[str]:
    groups = ", ".join(
        f"SlidingWindowSpec({group.block_size}, {group.sliding_window})"
        if group.kind == "SlidingWindowSpec"
        else f"FullAttentionSpec({group.block_size})"
        for group in config.groups
    )
    options = [f"enable_caching={settings['enable_prefix_caching']}"]
    for ours, theirs in (
        ("max_in_flight_tokens", "max_in_flight_tokens"),
        ("retention_interval", "retention_interval"),
    ):
        if settings.get(theirs) is not None:
            options.append(f"{ours}={settings[theirs]}")
    return [
        f"manager = KVCacheManager(\n    {config.num_blocks}, [{groups}], {settings['max_model_len']},",
        f"    {', '.join(options)}, rules=rules_for({settings['release']!r}), tell=print,\n)",
        f"manager.watermark_blocks = {settings.get('watermark_blocks', 0)}",
    ]


def _restored(before: Recorded, wanted: set[int], name: Any) -> list[str]:
    """The state; of hashes those that the call can come upon."""
    queue = [*before.queue]
    near = {*queue[:HEAD], *(b for rows in before.kv.tables.values() for row in rows for b in row)}
    hashes = {
        block: (known[-1], before.group_of.get(block, 0))
        for block, known in before.kv.hashes.items()
        if known and (block in near or known[-1] in wanted)
    }
    tables = {name(request): rows for request, rows in before.kv.tables.items()}
    lines = ["# Both sides agree up to here. The free queue, the next block first"]
    lines[0] += " (behind the first ones its order does not matter):" if queue[HEAD:] else ":"
    return [
        *lines,
        f"free = {_listed(queue[:HEAD] + sorted(queue[HEAD:]))}",
        f"tables = {tables!r}",
        f"hashes = {hashes!r}",
        "restore(manager, free, tables, hashes)",
    ]


def _request(key: Any, known: Known, before: Recorded, name: Any) -> list[str]:
    arrival, computed = known.arrival, before.kv.computed.get(key, 0)
    running = key in before.kv.tables
    status = "RUNNING" if running else "PREEMPTED" if known.preempted else "WAITING"
    num_tokens = arrival.num_prompt_tokens + known.num_output_tokens
    return [
        f"request = Request(\n    {name(key)!r}, num_prompt_tokens={arrival.num_prompt_tokens}, "
        f"max_tokens={arrival.max_tokens}, priority={arrival.priority},",
        f"    arrival_time={arrival.arrival_unix}, block_hashes={known.hashes},\n)",
        f"request.num_tokens, request.num_computed_tokens = {num_tokens}, {computed if running else 0}",
        f"request.status = RequestStatus.{status}",
    ]


def _call(
    end: Any, key: Any, known: Known | None, before: Recorded, settings: Any, name: Any
) -> list[str]:
    """The call that ``end`` tells of."""
    if known is None:
        return ["# mini's answer:", "print(manager.reset_prefix_cache())"]
    lines = [*_request(key, known, before, name), "# mini's answer:"]
    if type(end) is PrefixLookedUp:
        return [*lines, "manager.get_computed_blocks(request)"]
    if type(end) is RequestFreed:
        return [*lines, "manager.free(request)"]
    num_tokens = 1 if type(end) is BlocksCached else end.num_new_tokens
    if key in before.kv.tables:
        return [*lines, f"manager.allocate_slots(request, {num_tokens})"]
    return [
        *lines,
        "hits, num_hit_tokens, _ = manager.get_computed_blocks(request)",
        f"manager.allocate_slots(request, {num_tokens}, num_hit_tokens, hits,",
        f"    full_sequence_must_fit={bool(settings.get('full_sequence_must_fit'))})",
    ]


def _schedule(before: Recorded, settings: Any, name: Any) -> list[str]:
    """The whole step: who runs in the order of the last step, who waits in the order of arrival."""
    running = [key for key in before.running if key in before.kv.tables]
    running += [key for key in before.kv.tables if key not in running]
    lines = [
        "scheduler = Scheduler(manager, SchedulerConfig(",
        f"    max_num_batched_tokens={settings['max_num_scheduled_tokens']},",
        f"    max_num_seqs={settings['max_num_seqs']}, policy={settings['policy']!r},",
        f"    enable_chunked_prefill={settings['enable_chunked_prefill']},",
        f"    long_prefill_token_threshold={settings['long_prefill_token_threshold']},",
        f"    scheduler_reserve_full_isl={settings['full_sequence_must_fit']},",
        "))",
    ]
    waiting = sorted(
        (key for key in before.requests if key not in before.kv.tables),
        key=lambda key: not before.requests[key].preempted,
    )
    for key in running + waiting:
        if key in before.requests:
            lines += _request(key, before.requests[key], before, name)
            queue = "running" if key in before.kv.tables else "waiting"
            lines.append("scheduler.requests[request.request_id] = request")
            lines.append(f"scheduler.{queue}.append(request)")
    return [*lines, "# mini's answer:", "print(scheduler.schedule().num_scheduled_tokens)"]


def _listed(blocks: Sequence[int]) -> str:
    """``[3, *range(5, 400)]``."""
    words: list[str] = []
    at = 0
    while at < len(blocks):
        end = at
        while end + 1 < len(blocks) and blocks[end + 1] == blocks[end] + 1:
            end += 1
        if end - at > 2:
            words.append(f"*range({blocks[at]}, {blocks[end] + 1})")
            at = end + 1
        else:
            words.append(str(blocks[at]))
            at += 1
    return f"[{', '.join(words)}]"


def _plain(fact: Any) -> str:
    return "nothing" if fact is None else " ".join(map(str, fact))
