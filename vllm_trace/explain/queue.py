"""Why a request was not in a step: what the pool refused, who stood before it, what was spent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_trace.events import BlockIds, SlotsRefused, StepScheduled
from vllm_trace.state import KVState

PLAIN_GROUPS = ("FullAttentionSpec", "MLAAttentionSpec", "SlidingWindowSpec")
"""Groups whose need for blocks follows from the number of tokens alone."""


@dataclass(frozen=True)
class Refusal:
    """One ``slots.refused``, with how many blocks it was about."""

    event: int
    request: int
    num_free: int
    running: bool
    num_new: int | None = None
    """Blocks to be taken from the free queue; None when the trace does not say."""
    num_queued_hits: int = 0
    """Hits that lie in the free queue themselves: taking them leaves fewer for the others."""

    @property
    def num_wanted(self) -> int | None:
        return None if self.num_new is None else self.num_new + self.num_queued_hits


def refusal_of(
    state: KVState, number: int, event: SlotsRefused, num_tokens: int, hits: BlockIds
) -> Refusal:
    """Work out what was refused from the state before it.

    ``num_tokens`` and ``hits`` are those of the request's last prefix lookup. vLLM admits a
    waiting request only when its whole sequence fits (``full_sequence_must_fit``, since 0.20).
    Source: vLLM 0.32 ``KVCacheManager.allocate_slots``, ``get_num_blocks_to_allocate``.
    """
    held = state.tables.get(event.request)
    made = Refusal(
        number, event.request, event.num_free_blocks, bool(held), event.num_wanted_blocks or None
    )
    config = state.config
    if config is None or any(group.kind not in PLAIN_GROUPS for group in config.groups):
        return made
    limit = config.settings.get("max_model_len") or 1 << 62
    ahead = config.settings.get("num_lookahead_tokens", 0)
    sizes = [group.block_size for group in config.groups] or [config.block_size]
    spare = 0
    if held:
        goal = min(state.computed.get(event.request, 0) + event.num_new_tokens + ahead, limit)
        new = sum(max(0, -(-goal // size) - len(row)) for size, row in zip(sizes, held))
        queued = 0
    else:
        if any(group.sliding_window for group in config.groups):
            return made
        goal = min(event.num_hit_tokens + event.num_new_tokens + ahead, limit)
        if config.settings.get("full_sequence_must_fit"):
            goal = max(goal, min(num_tokens, limit))
        hits = hits or [[] for _ in sizes]
        new = sum(max(0, -(-goal // size) - len(row)) for size, row in zip(sizes, hits))
        queued = sum(block not in state.ref_cnts for row in hits for block in row if block)
        spare = config.settings.get("watermark_blocks", 0)
    if new + queued + spare <= event.num_free_blocks:
        return made  # refused for something that is not recorded
    return Refusal(number, event.request, event.num_free_blocks, bool(held), new, queued)


@dataclass(frozen=True)
class Reason:
    """Why a waiting request was not admitted in a step."""

    kind: str
    """``refused``, ``preempting``, ``behind``, ``full``, ``budget`` or ``unknown``."""
    wanted: int | None = None
    num_queued_hits: int = 0
    by: int = -1
    """``behind``: the waiting request that the pool refused."""


def reason_of(
    step: StepScheduled,
    own: Refusal | None,
    others: Sequence[Refusal],
    preempted: Sequence[int],
    settings: dict[str, Any],
) -> Reason:
    """Follow the order in which ``Scheduler.schedule`` gives up on its waiting queue.

    It does not look at the queue at all in a step that preempted someone. A refusal ends the
    loop, so a full batch or a spent budget is the reason only when there was none.
    """
    if own is not None:
        return Reason("refused", own.num_wanted, own.num_queued_hits)
    if preempted:
        return Reason("preempting")
    for other in others:
        if not other.running:
            return Reason("behind", other.num_wanted, by=other.request)
    if step.num_running >= settings.get("max_num_seqs", 1 << 62):
        return Reason("full")
    if is_spent(step, settings):
        return Reason("budget")
    return Reason("unknown")


def is_spent(step: StepScheduled, settings: dict[str, Any]) -> bool:
    """Whether the step has as many tokens as a step may have."""
    limit = settings.get("max_num_scheduled_tokens") or settings.get("max_num_batched_tokens")
    return limit is not None and sum(step.num_tokens or ()) >= limit
