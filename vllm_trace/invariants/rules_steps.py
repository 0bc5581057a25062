"""Rules of the schedule: the budget, preemption, and which kernel runs."""

from __future__ import annotations

from vllm_trace.decode_rule import choose
from vllm_trace.events import (
    AttentionPlanned,
    PrefixCacheReset,
    PrefixLookedUp,
    RequestPreempted,
    SlotsMapped,
    SlotsRefused,
    StepScheduled,
)
from vllm_trace.invariants.books import Books
from vllm_trace.invariants.registry import Violation, invariant


@invariant(
    "preempt-needed",
    "A request is preempted only after the pool refused blocks to a running one.",
    needs=("full",),
    releases=">=0.11,<0.34",
    doc="Each preemption has a refusal of its own before it in the same schedule;"
    " reset_prefix_cache may preempt everybody.",
    mutation="the scheduler preempts although everybody fits",
    built_in=True,
)
class PreemptNeeded:
    def __init__(self) -> None:
        self.refused = False
        self.doubtful: Violation | None = None

    def before_slots_refused(self, books: Books, event: SlotsRefused) -> None:
        # A waiting request has no table yet: it waits on, and nobody is preempted for it.
        self.refused = self.refused or event.request in books.tables

    def request_preempted(self, books: Books, event: RequestPreempted) -> None:
        if not self.refused and self.doubtful is None:
            self.doubtful = books.violation(
                f"{books.name(event.request)} loses {event.num_computed_tokens} tokens, and nobody "
                f"was refused blocks; {event.num_free_blocks} are free now",
                request=event.request,
                step=books.step + 1,
            )
        self.refused = False

    def prefix_reset(self, books: Books, event: PrefixCacheReset) -> None:
        self.doubtful = None

    def step_scheduled(self, books: Books, event: StepScheduled) -> Violation | None:
        self.refused = False
        doubtful, self.doubtful = self.doubtful, None
        return doubtful

    def end(self, books: Books) -> Violation | None:
        return self.doubtful


@invariant(
    "refusal-needed",
    "The pool refuses only what does not fit.",
    needs=("full", "known-groups"),
    releases=">=0.11,<0.34",
    doc="Needed blocks are counted from the table, the tokens asked for and the hits, for a waiting"
    " request from its whole length when it must fit as a whole. Not where a window frees blocks.",
    mutation="allocate_slots refuses although there is room",
    built_in=True,
)
class RefusalNeeded:
    def __init__(self) -> None:
        self.lookup: PrefixLookedUp | None = None

    def prefix_looked_up(self, books: Books, event: PrefixLookedUp) -> None:
        self.lookup = event

    def before_slots_refused(self, books: Books, event: SlotsRefused) -> Violation | None:
        if books.windowed:
            return None
        table = books.tables.get(event.request)
        if table is not None:
            books.catch_up()
            tokens = books.computed.get(event.request, 0) + event.num_new_tokens
            extra = 0
        else:
            tokens, extra = self._waiting(books, event)
        tokens = min(tokens + books.num_lookahead, books.max_model_len)
        needed = extra
        for group, size in enumerate(books.block_sizes):
            has = len(table[group]) if table else event.num_hit_tokens // size
            needed += max(0, -(-tokens // size) - has)
        if needed > event.num_free_blocks:
            return None
        return books.violation(
            f"{books.name(event.request)} is refused blocks for {event.num_new_tokens} tokens: it needs "
            f"{needed}, and {event.num_free_blocks} are free",
            request=event.request,
            step=books.step + 1,
        )

    def _waiting(self, books: Books, event: SlotsRefused) -> tuple[int, int]:
        """(tokens that must have room, blocks beside those: free hits and the watermark)."""
        tokens, extra = event.num_hit_tokens + event.num_new_tokens, 0
        lookup = self.lookup
        if lookup is not None and lookup.request == event.request:
            if books.settings.get("full_sequence_must_fit"):
                tokens = max(tokens, lookup.num_tokens)
            # A hit that nobody holds is taken out of the free queue.
            extra = sum(
                block not in books.ref_cnts for row in lookup.blocks for block in row if block
            )
        if books.tables:
            extra += books.settings.get("watermark_blocks") or 0
        return tokens, extra


@invariant(
    "token-budget",
    "A step keeps to its budget of tokens and requests, and nobody outgrows the model.",
    releases=">=0.11",
    doc="max_num_scheduled_tokens, max_num_batched_tokens, max_num_seqs, max_model_len.",
    mutation="the scheduler is given more tokens for a step than it was configured with",
    built_in=True,
)
class TokenBudget:
    def __init__(self) -> None:
        self.most_tokens = self.most_requests = 0

    def step_scheduled(self, books: Books, event: StepScheduled) -> Violation | None:
        if not self.most_tokens:
            self._read(books)
        counts = event.num_tokens or ()
        total = sum(counts)
        if total > self.most_tokens:
            return books.violation(
                f"step {event.step} schedules {total} tokens; the budget is {self.most_tokens}",
                requests=(event.requests or [])[:8],
            )
        if len(counts) > self.most_requests or event.num_running > self.most_requests:
            return books.violation(
                f"step {event.step} runs {max(len(counts), event.num_running)} requests; "
                f"max_num_seqs is {self.most_requests}",
                requests=(event.requests or [])[:8],
            )
        if books.max_model_len - total < 0 or max(books._ends, default=0) > books.max_model_len:
            return self._too_long(books, event)
        return None

    def _read(self, books: Books) -> None:
        limits = [
            books.settings.get(name)
            for name in ("max_num_scheduled_tokens", "max_num_batched_tokens")
        ]
        self.most_tokens = min((limit for limit in limits if limit), default=1 << 62)
        self.most_requests = books.settings.get("max_num_seqs") or (1 << 62)

    def _too_long(self, books: Books, event: StepScheduled) -> Violation | None:
        plan = books.plans.get(event.step)
        for request, end in plan.ends.items() if plan else ():
            if end > books.max_model_len:
                return books.violation(
                    f"{books.name(request)} has {end} tokens after step {event.step}; max_model_len is "
                    f"{books.max_model_len}",
                    request=request,
                )
        return None


@invariant(
    "kernel-variant",
    "The kernel's variant follows its rule, from the numbers of the batch that it gets.",
    needs=("full", "attention"),
    releases=">=0.11,<0.34",
    doc="CPU: split-kv exactly when the plan has reduction splits. Triton: 3D exactly when everybody"
    " decodes and there are few sequences. PagedAttention: V1 and V2 by its rule, for the requests of one"
    " new token. The numbers are those of slots.mapped.",
    mutation="the metadata that the variant is chosen from are of another batch",
    built_in=True,
)
class KernelVariant:
    def __init__(self) -> None:
        self.batches: dict[tuple[int, int], SlotsMapped] = {}

    def slots_mapped(self, books: Books, event: SlotsMapped) -> None:
        self.batches[books.process, event.group] = event

    def attention_planned(self, books: Books, event: AttentionPlanned) -> Violation | None:
        numbers = event.numbers
        splits = numbers.get("reduction_splits")
        if splits is not None:
            wanted = "split-kv" if splits > 0 else "whole"
            if event.variant.rpartition("/")[2] != wanted:
                return self._other(books, event, wanted, f"reduction_splits is {splits}")
        threshold = numbers.get("seq_threshold_3D")
        if threshold is not None:
            three = numbers.get("max_query_len") == 1 and numbers.get("num_seqs", 0) <= threshold
            if event.variant != ("3D" if three else "2D"):
                why = f"{numbers.get('num_seqs')} sequences, threshold {threshold}"
                return self._other(books, event, "3D" if three else "2D", why)
        if event.variant in ("V1", "V2") and {"max_seq_len", "num_seqs", "num_heads"} <= {*numbers}:
            choice = choose(*(numbers[n] for n in ("max_seq_len", "num_seqs", "num_heads")))
            if event.variant != choice.variant:
                return self._other(books, event, choice.variant, choice.reason)
        batch = self.batches.get((books.process, event.group))
        if batch is None or batch.step != event.step or not batch.requests:
            return None
        return self._numbers(books, event, batch)

    def _numbers(
        self, books: Books, event: AttentionPlanned, batch: SlotsMapped
    ) -> Violation | None:
        numbers = event.numbers
        # A CUDA graph is planned for the size it was captured with: as large as the batch or larger.
        exact = "reduction_splits" in numbers
        rows = _rows_of(event.variant, batch)
        for name, own in (
            ("num_actual_tokens", len(batch.slots)),
            ("num_seqs", len(rows)),
            ("max_query_len", max((query_len for query_len, _ in rows), default=0)),
            ("max_seq_len", max((seq_len for _, seq_len in rows), default=0)),
        ):
            given = numbers.get(name, own)
            if given < own or (exact and given != own):
                return books.violation(
                    f"{event.kernel} is planned in step {event.step} for {name} {given}; the batch has "
                    f"{own} (group {event.group})",
                    step=event.step,
                )
        return None

    def _other(self, books: Books, event: AttentionPlanned, wanted: str, why: str) -> Violation:
        return books.violation(
            f"{event.kernel} runs as {event.variant!r} in step {event.step}; {why}, so it is {wanted} "
            f"by its rule (group {event.group})",
            step=event.step,
        )


def _rows_of(variant: str, batch: SlotsMapped) -> list[tuple[int, int]]:
    """(new tokens, length) of the requests that a kernel gets: PagedAttention's those of one new token,
    the one for prefill the others, any other kernel all."""
    rows = zip(batch.query_lens, batch.seq_lens)
    if variant in ("V1", "V2"):
        return [row for row in rows if row[0] == 1]
    return [row for row in rows if variant != "prefill" or row[0] > 1]
