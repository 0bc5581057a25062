"""What a trace says of attention kernels: time, size, whose rule, how right."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_trace.render.basics import (
    MAX_ROWS,
    duration,
    ids,
    short_name,
    shorten,
    size,
    table,
    titled,
)
from vllm_trace.summary import Kernel, KernelStep, Summary


def kernels_view(summary: Summary, limit: int = MAX_ROWS) -> RenderableType:
    """All that a trace says of attention kernels: by variant, by size, by step, and by whose rule."""
    rate = copy_rate_of(summary)
    parts: list[RenderableType] = [titled("By variant", kernels(summary.kernels, rate))]
    if summary.kernel_steps:
        parts += [
            titled("By batch and context", kernel_sizes(summary.kernel_steps, rate)),
            titled("By step", kernel_steps(summary.kernel_steps, rate, limit)),
        ]
    said = [*kernel_notes(summary), *rule(summary), *shadow(summary)]
    if said:
        parts += [titled("What they show", Text("\n".join(said)))]
    return Group(*parts)


def kernels(rows: Sequence[Kernel], copy_rate: int = 0) -> Table:
    """Time by kernel and variant; with a measured copy rate the share of it that reading K and V reached."""
    if not copy_rate:
        columns = ("attention kernel", "variant", "steps", "calls", "total", "a call", "clock")
        made = table(*columns, left=(0, 1, 6), spare=(6, 2, 3, 4))
    else:
        columns = ("attention kernel", "variant", "calls", "a call", "median", "of copy", "clock")
        made = table(*columns, left=(0, 1, 6), spare=(6, 2, 4, 3))
        made.columns[0].overflow = "fold"
    for kernel in rows:
        mean = duration(kernel.total_ns / max(1, kernel.num_calls))
        cells = [str(kernel.num_steps), str(kernel.num_calls), duration(kernel.total_ns), mean]
        if copy_rate:
            cells = [str(kernel.num_calls), mean, duration(kernel.median_ns)]
            cells.append(share_of_copy(kernel, copy_rate))
        made.add_row(kernel.kernel, kernel.variant or "–", *cells, kernel.clock)
    return made


def share_of_copy(row: Kernel | KernelStep, copy_rate: int) -> str:
    """Bytes of K and V a second, as a share of what a copy moves (it reads and writes: both count)."""
    if not row.num_bytes or not row.total_ns:
        return "–"
    share = 100 * row.num_bytes / (row.total_ns / 1e9) / copy_rate
    return f"{share:.{1 if share < 10 else 0}f} %"


def kernel_steps(rows: Sequence[KernelStep], copy_rate: int = 0, limit: int = MAX_ROWS) -> Table:
    """One line a step and kernel: batch, context, time of a call, bytes of K and V."""
    made = table(
        "step", "kernel", "variant", "seqs", "longest", "a call", "K and V", "of copy",
        left=(1, 2), spare=(7, 6, 3, 4),
    )  # fmt: skip
    for row in shorten(rows, limit):
        if row is None:
            made.add_row("…")
            continue
        calls = max(1, row.num_calls)
        made.add_row(
            str(row.step),
            row.kernel.rpartition(".")[2],
            row.variant or "–",
            str(row.num_seqs or "–"),
            str(row.max_seq_len or "–"),
            duration(row.total_ns / calls),
            size(row.num_bytes / calls) if row.num_bytes else "–",
            share_of_copy(row, copy_rate) if copy_rate else "–",
        )
    return made


def kernel_sizes(rows: Sequence[KernelStep], copy_rate: int = 0) -> Table:
    """The same added up by variant, batch and context, each to the next power of two."""
    made = table(
        "kernel", "variant", "seqs", "longest", "calls", "a call", "K and V", "of copy",
        left=(0, 1), spare=(7, 6, 4, 2),
    )  # fmt: skip
    sums: dict[tuple[str, str, int, int], KernelStep] = {}
    for row in rows:
        key = (row.kernel, row.variant, _power(row.num_seqs), _power(row.max_seq_len))
        into = sums.setdefault(key, KernelStep(0, row.kernel, row.variant))
        into.num_calls += row.num_calls
        into.total_ns += row.total_ns
        into.num_bytes += row.num_bytes
    for (kernel, variant, seqs, longest), row in sorted(sums.items()):
        calls = max(1, row.num_calls)
        made.add_row(
            kernel.rpartition(".")[2],
            variant or "–",
            f"≤ {seqs}" if seqs else "–",
            f"≤ {longest}" if longest else "–",
            str(row.num_calls),
            duration(row.total_ns / calls),
            size(row.num_bytes / calls) if row.num_bytes else "–",
            share_of_copy(row, copy_rate) if copy_rate else "–",
        )
    return made


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length() if number > 0 else 0


def copy_rate_of(summary: Summary) -> int:
    """Bytes a second that a copy moved on the device before the run; 0 when it was not measured."""
    return int(summary.header.get("copy_rate") or 0)


def kernel_notes(summary: Summary) -> list[str]:
    """What the clock was, and what CUDA graphs hide."""
    said = []
    if rate := copy_rate_of(summary):
        said.append(
            f"of copy: K and V read once, as a share of {size(rate)}/s, which a copy moved (reads and writes counted)"
            " on this device before the run"
        )
    for mode, times in summary.replayed_ns.items():
        what = (
            "attention is inside the graph, so no call of it has a time of its own"
            if mode == "full"
            else "attention runs between the graphs and is timed by itself"
        )
        mean = duration(sum(times) / len(times))
        said.append(f"CUDA graphs, {mode}: {len(times)} forwards of {mean} on the device; {what}")
    return said


def rule(summary: Summary) -> list[str]:
    """V1 or V2: what ran by the rule, or, with an engine that has another, what the rule would have chosen."""
    found = summary.rule
    if not found.num_v1 + found.num_v2:
        return []
    if found.counterfactual:
        said = [
            f"counterfactual: PagedAttention's rule would have taken V1 in {found.num_v1} and V2 in {found.num_v2}"
            " decode steps; this engine chose by a rule of its own"
        ]
        word = "would have changed"
    else:
        said = [
            f"PagedAttention's rule took V1 in {found.num_v1} and V2 in {found.num_v2} decode steps"
        ]
        word = "changed"
    for change in shorten(found.changes, 6):
        if change is None:
            said.append("  …")
            continue
        step, before, after, reason = change
        said.append(f"  {word} from {before} to {after} at step {step}: {reason}")
    return said


def shadow(summary: Summary) -> list[str]:
    """How far the engine's attention was from ours."""
    check = summary.shadow
    if not check.num_calls:
        return []
    if not check.num_beyond:
        return [
            f"shadow: {check.num_calls} attention calls computed again from scratch, all within {check.tolerance:g}"
            f" of the largest value read; the worst is {check.max_relative:.2g} (absolute {check.max_absolute:.2g}) at"
            f" step {check.step}, layer {check.layer}, request {short_name(check.request)}, position {check.position}"
        ]
    first = check.beyond
    said = [
        f"shadow: {check.num_beyond} of {check.num_calls} attention calls are beyond {check.tolerance:g}"
    ]
    if first:
        where = (
            f"step {first['step']}, layer {first['layer']}, request {short_name(first['request'])}"
        )
        bad = first["not_finite"]
        what = (
            f"{bad['what']} holds {bad['value']} at position {bad['position']} (block {bad['block']},"
            f" slot {bad['slot']})"
            if bad
            else f"position {first['position']} is off by {first['relative']:.3g} (absolute {first['absolute']:.3g})"
        )
        said += [
            f"  first: {where}: {what}, in {first['kernel']}",
            f"  its table {ids(first['table'])}, {first['seq_len']} tokens, slots {ids(first['slots'])}",
            f"  saved: vllm-trace replay --attention TRACE/{first['file']}",
        ]
    return said
