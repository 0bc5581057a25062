"""What is read of a step: its plan, when ``schedule`` returns, and its outcome.

A *steady* step is like the one before, and its two events are written in one piece.
How probes work: ``scheduler_probes``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_trace.events import StepScheduled, StepUpdated
from vllm_trace.hooks.table import probe
from vllm_trace.packing import (
    U64,
    UPDATED,
    pack_updated,
)
from vllm_trace.recorder import Recorder

# A step is *steady* when every running request decodes one token, as many as in the step before, and
# nobody finished. Then nobody came either (there would be more) and nobody was preempted (a step that
# preempts lets nobody in, so there would be fewer): the same requests in the same order, which needs
# no comparing of names.

# Most calls of ``allocate_slots`` need no block, and where those stand among the others follows from
# the composition of the step; unless somebody was preempted, for who had been scheduled and then gave
# way is in no composition. So these calls are noted one by one only in a step that might preempt:
# one that begins with fewer free blocks than it could ask for (``recorder.tight``).


@probe()
def schedule(append, recorder, result, started, ended, self):
    if recorder.planned_of is not None:
        recorder.spell_out_planned()
    recorder.step = result.vtrace_step = step = recorder.step + 1
    free = self.kv_cache_manager.block_pool.free_block_queue.num_free_blocks
    running, scheduled = len(self.running), len(result.num_scheduled_tokens)
    pending = recorder.pending
    if (
        scheduled == recorder.steady == running == result.total_num_scheduled_tokens
        and recorder.steady_of is self
        and not result.finished_req_ids
    ):
        kept = len(recorder.kept) if recorder.tight else -1
        # The length of vLLM's queue is a call into Python.
        waiting = 0 if len(self.requests) == running else len(self.waiting)
        recorder.planned = (step, started, ended - started, running, waiting, free, kept)
        recorder.planned_of = result
        recorder.planned_at = len(pending)
        recorder.tight = free < recorder.steady_need
    else:
        append(
            StepScheduled(
                step,
                started,
                ended - started,
                running,
                len(self.waiting),
                free,
                len(recorder.kept) if recorder.tight else -1,
                *composition_of_step(recorder, result, self.requests),
                {},
                kept_in_step(recorder, result),
            )
        )
        uniform = scheduled == running == result.total_num_scheduled_tokens
        note_composition(recorder, self, scheduled if uniform else -1, free)
    if recorder.kept:
        recorder.kept.clear()
    if recorder.plans_first:
        recorder.flush()


def note_composition(rec: Recorder, scheduler: Any, decoding: int, free: int) -> None:
    """Keep what the next steps are compared with: ``decoding`` requests, one token each; -1 if it is not so."""
    # The last token of a prompt is one token too, and is followed by more.
    if any(r.num_computed_tokens < r.num_tokens for r in scheduler.running):
        decoding = -1
    rec.steady, rec.steady_of = decoding, scheduler
    rec.steady_need, need = blocks_a_step_may_need(scheduler)
    rec.tight = free < (need if decoding < 0 else rec.steady_need)


def blocks_a_step_may_need(scheduler: Any) -> tuple[int, int]:
    """Upper bounds for what the requests that run now can ask for in the next step.

    The first for when each decodes, the second for when some are within their prompt.
    """
    manager, running = scheduler.kv_cache_manager, len(scheduler.running)
    groups = len(manager.kv_cache_config.kv_cache_groups)
    ahead = scheduler.num_lookahead_tokens + getattr(scheduler, "num_spec_tokens", 0)
    smallest = min(
        (group.kv_cache_spec.block_size for group in manager.kv_cache_config.kv_cache_groups),
        default=1,
    )
    decoding = running * (2 + ahead // smallest)
    budget = -(-scheduler.max_num_scheduled_tokens // smallest)
    return groups * decoding, groups * (decoding + budget)


@probe()
def schedule_light(append, recorder, result, started, ended, self):
    if recorder.planned_of is not None:
        recorder.spell_out_planned()
    recorder.step = result.vtrace_step = step = recorder.step + 1
    free = self.kv_cache_manager.block_pool.free_block_queue.num_free_blocks
    running, scheduled = len(self.running), len(result.num_scheduled_tokens)
    run = recorder.steady_run
    if (
        scheduled == recorder.steady == running == result.total_num_scheduled_tokens
        and recorder.steady_of is self
        and not result.finished_req_ids
        and not recorder.pending
        and run.at < run.end
    ):
        words, at = run.words, run.at
        words[at + 1] = started
        words[at + 2] = ended - started
        words[at + 3] = running
        words[at + 4] = 0 if len(self.requests) == running else len(self.waiting)
        words[at + 5] = free
        recorder.planned_of = result
    else:
        uniform = scheduled == running == result.total_num_scheduled_tokens
        recorder.steady, recorder.steady_of = scheduled if uniform else -1, self
        append(
            StepScheduled(
                step,
                started,
                ended - started,
                running,
                len(self.waiting),
                free,
                0,
                *composition_of_step(recorder, result, self.requests),
            )
        )
    if recorder.plans_first:
        recorder.flush()


def composition_of_step(rec: Recorder, out: Any, known: Mapping[str, Any]) -> tuple[Any, ...]:
    """Requests, token counts, new, resumed, preempted, finished: of a ``SchedulerOutput``.

    Resumed ones stand among the new ones where the V2 runner works. ``known``: the scheduler's requests by name.
    """
    cached = out.scheduled_cached_reqs
    first = [data.req_id for data in out.scheduled_new_reqs]
    again = [name for name in first if known[name].num_preemptions]
    again += [name for name in cached.req_ids if name in cached.resumed_req_ids]
    return (
        rec.numbers_of(out.num_scheduled_tokens),
        [*out.num_scheduled_tokens.values()],
        rec.numbers_of(name for name in first if name not in again),
        rec.numbers_of(again),
        sorted(rec.numbers_of(out.preempted_req_ids or ())),
        sorted(rec.numbers_of(out.finished_req_ids)),
    )


def kept_in_step(rec: Recorder, out: Any) -> Any:
    """Whose calls needed no block, in a step where the composition does not tell.

    One that was scheduled and then had to give way is not part of the step any more.
    """
    if not out.preempted_req_ids:
        return ()
    return rec.numbers_of(request.request_id for request in rec.kept)


@probe()
def update_from_output(append, recorder, started, ended, scheduler_output, model_runner_output):
    sampled = model_runner_output.sampled_token_ids
    one_each = (
        # Nobody gets two without speculation, so it is one each when nobody got none.
        len(scheduler_output.num_scheduled_tokens) == len(sampled)
        and type(sampled) is list
        and not scheduler_output.scheduled_spec_decode_tokens
        and not recorder.with_tokens
        and all(sampled)
    )
    pending = recorder.pending
    write = recorder.write_steady_step  # not called as a method, which it is not: a slow lookup
    if (
        recorder.planned_of is scheduler_output
        and one_each
        and len(pending) == recorder.planned_at
        and write(recorder.planned, started, ended - started, pending)
    ):
        recorder.planned_of = None
        if pending:
            pending.clear()
    else:
        step = getattr(scheduler_output, "vtrace_step", 0)
        if one_each:
            append(pack_updated(UPDATED, step, U64, started, U64, ended - started))
        else:
            append(
                StepUpdated(
                    step,
                    started,
                    ended - started,
                    *outcome_of_step(recorder, scheduler_output, model_runner_output),
                )
            )
        recorder.flush()


@probe()
def update_from_output_light(append, recorder, started, ended, scheduler_output):
    if recorder.planned_of is scheduler_output and not recorder.pending:
        run = recorder.steady_run
        words, at = run.words, run.at
        words[at + 6] = started
        words[at + 7] = ended - started
        words[at] = recorder.step  # last: now it is there
        run.at = at + 8
        recorder.planned_of = None
    else:
        append(StepUpdated(getattr(scheduler_output, "vtrace_step", 0), started, ended - started))
        recorder.flush()
        recorder.begin_steady_run()


def outcome_of_step(rec: Recorder, out: Any, made: Any) -> tuple[Any, Any]:
    """Tokens that each request of the step got: their numbers, and with ``--tokens`` their ids.

    The numbers are None when each got one. vLLM cuts a request's list in place where it stopped,
    so these are the tokens that count.
    """
    sampled = made.sampled_token_ids
    if not len(sampled):
        return [0] * len(out.num_scheduled_tokens), None
    counts = [*map(len, sampled)]
    if counts.count(1) == len(out.num_scheduled_tokens) and not rec.options.tokens:
        return None, None
    if made.req_ids != [*out.num_scheduled_tokens]:
        index = made.req_id_to_index
        sampled = [sampled[index[r]] if r in index else () for r in out.num_scheduled_tokens]
        counts = [*map(len, sampled)]
    tokens = [[int(t) for t in row] for row in sampled] if rec.options.tokens else None
    return counts, tokens
