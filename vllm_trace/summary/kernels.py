"""The part of a summary that is about attention: kernels, whose rule chose them, and the shadow."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from vllm_trace.decode_rule import DecodeChoice, choose
from vllm_trace.events import AttentionCalled, AttentionPlanned, SlotsMapped
from vllm_trace.summary.model import Kernel, KernelStep, Step, Summary

IN_FLIGHT = 8
"""Steps that a worker may be behind the scheduler, with room to spare."""


class KernelReading:
    """Takes in what workers tell of their attention calls; ``done`` puts it in order."""

    def __init__(
        self, made: Summary, step_of: Callable[[int], Step], name_of: Callable[[int], str]
    ) -> None:
        self.made, self.step_of, self.name_of = made, step_of, name_of
        self.kernels: dict[tuple[str, str], Kernel] = {}
        self.steps_of: dict[tuple[str, str], set[int]] = {}
        self.rows: dict[tuple[int, str, str], KernelStep] = {}
        self.plans: dict[tuple[int, int], dict[str, AttentionPlanned]] = {}
        """(process, step) → kernel → its plan."""
        self.batches: dict[tuple[int, int], list[SlotsMapped]] = {}
        self.ruler: int | None = None
        """The worker whose choices are counted: every one of a tensor-parallel group makes the same."""
        self.last_choice: DecodeChoice | None = None

    def done(self, steps: dict[int, Step]) -> None:
        made = self.made
        made.kernel_steps = sorted(self.rows.values(), key=lambda row: row.step)
        times: dict[tuple[str, str], list[float]] = {}
        for row in made.kernel_steps:
            row.mode = steps[row.step].mode if row.step in steps else ""
            if row.num_calls:
                a_call = row.total_ns / row.num_calls
                times.setdefault((row.kernel, row.variant), []).append(a_call)
        for key, kernel in self.kernels.items():
            kernel.num_steps = len(self.steps_of[key])
            kernel.median_ns = median(times.get(key, [0]))
        made.kernels = sorted(self.kernels.values(), key=lambda kernel: -kernel.total_ns)

    # The rule ---------------------------------------------------------------------------

    def planned(self, process: int, event: AttentionPlanned) -> None:
        self.plans.setdefault((process, event.step), {})[event.kernel] = event
        self.plans.pop((process, event.step - IN_FLIGHT), None)
        step = self.step_of(event.step)
        decides = event.variant in ("V1", "V2")
        if decides or not step.variant:
            step.variant = event.variant
        if decides:
            self.made.rule.counterfactual = False
            n = event.numbers
            choice = choose(n["max_seq_len"], n["num_seqs"], n["num_heads"])
            self._chosen(process, event.step, choice)

    def mapped(self, process: int, event: SlotsMapped) -> None:
        """The batch that calls of this step will have, and what the rule would say of its rows that decode."""
        self.batches.setdefault((process, event.step), []).append(event)
        self.batches.pop((process, event.step - IN_FLIGHT), None)
        heads = self.made.engine.get("num_query_heads")
        lens = [n for n, q in zip(event.seq_lens, event.query_lens, strict=True) if q == 1]
        if heads and lens and self.made.rule.counterfactual:
            self._chosen(process, event.step, choose(max(lens), len(lens), heads))

    def _chosen(self, process: int, step: int, choice: DecodeChoice) -> None:
        if self.ruler is None:
            self.ruler = process
        if process != self.ruler:
            return
        rule, before = self.made.rule, self.last_choice
        if choice.variant == "V1":
            rule.num_v1 += 1
        else:
            rule.num_v2 += 1
        if before is not None and before.variant != choice.variant:
            rule.changes.append((step, before.variant, choice.variant, choice.reason))
        self.last_choice = choice

    # Calls ------------------------------------------------------------------------------

    def called(self, process: int, event: AttentionCalled) -> None:
        plans = self.plans.get((process, event.step), {})
        plan = plans.get(event.kernel)
        if plan is None and len(plans) == 1:
            plan = next(iter(plans.values()))
        key = (plan.kernel, plan.variant) if plan else (event.kernel, "")
        kernel = self.kernels.setdefault(key, Kernel(*key, clock=event.clock))
        self.steps_of.setdefault(key, set()).add(event.step)
        row = self.rows.setdefault(
            (event.step, *key), KernelStep(event.step, *key, clock=event.clock)
        )
        row.reason = plan.reason if plan else ""
        num_bytes = self._measure(process, event, row)
        for total in (kernel, row):
            total.num_calls += len(event.dur_ns)
            total.total_ns += sum(event.dur_ns)
            total.num_bytes += num_bytes
        if event.tolerance:
            self._shadowed(event)

    def _measure(self, process: int, event: AttentionCalled, row: KernelStep) -> int:
        """Batch and context of a call, from the batch that the worker was given; returns its bytes of K and V."""
        num_bytes = 0
        batches = self.batches.get((process, event.step), ())
        for batch in batches:
            both = zip(batch.seq_lens, batch.query_lens, strict=True)
            lens = [length for length, query in both if _is_of(row.variant, query)]
            row.num_seqs = max(row.num_seqs, len(lens))
            row.max_seq_len = max([row.max_seq_len, *lens])
            row.num_tokens = max(row.num_tokens, sum(lens))
            group = self.made.groups[batch.group] if batch.group < len(self.made.groups) else None
            if group and group["page_size_bytes"]:
                share = sum(lens) * group["page_size_bytes"] // group["block_size"]
                num_bytes += share * (len(event.dur_ns) // max(1, len(batches)))
        return num_bytes

    # The shadow -------------------------------------------------------------------------

    def _shadowed(self, event: AttentionCalled) -> None:
        check = self.made.shadow
        check.tolerance = event.tolerance
        for layer, found in zip(event.layers, event.worst, strict=False):
            absolute, relative, request, position = found
            check.num_calls += 1
            check.num_beyond += relative > event.tolerance
            check.max_absolute = max(check.max_absolute, absolute)
            if relative > check.max_relative or check.layer < 0:
                check.max_relative, check.step, check.layer = relative, event.step, layer
                check.request, check.position = self.name_of(request), position
        if event.beyond and not check.beyond:
            check.beyond = event.beyond | {
                "step": event.step,
                "kernel": event.kernel,
                "request": self.name_of(event.beyond["request"]),
            }
            check.num_beyond = max(check.num_beyond, 1)


def _is_of(variant: str, query: int) -> bool:
    """Whether a row with so many query tokens is the business of a kernel's variant."""
    if variant in ("V1", "V2"):
        return query == 1
    return variant != "prefill" or query > 1
