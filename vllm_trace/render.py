"""A summary as text for a terminal of 80 columns. Everything here returns rich renderables."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from vllm_trace.doctor import Diagnosis
from vllm_trace.hooks.resolve import Resolution
from vllm_trace.summary import Kernel, KernelStep, RequestLife, Step, Summary

MAX_ROWS = 12
"""Rows of a table before the middle is left out, in a summary for reading."""

MAX_NAME = 22
"""Characters of a request's name in a table."""


def plain(what: RenderableType, width: int = 80) -> str:
    """As text for a file or a pipe: no colour, no blanks at the end of a line."""
    text = io.StringIO()
    Console(file=text, width=width, highlight=False, color_system=None).print(what)
    return "".join(line.rstrip() + "\n" for line in text.getvalue().splitlines())


def table(*columns: str, title: str = "", left: Sequence[int] = (0,)) -> Table:
    """A plain table; columns are right-aligned but those whose index is in ``left``."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index in left else "right", header_style="dim")
    return made


def duration(ns: float) -> str:
    """Three significant digits with a unit: ``1.53 ms``, ``48.0 µs``."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= size * 0.9995:  # what rounds to 1000 of a unit is 1 of the next
            value = ns / size
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{ns:.0f} ns"


def short_name(name: str, limit: int = MAX_NAME) -> str:
    """A long name without its middle: ``cmpl-5d70e5a5…0-b2c81d3e``."""
    if len(name) <= limit:
        return name
    tail = limit // 2
    return f"{name[: limit - tail - 1]}…{name[-tail:]}"


def shorten(rows: Sequence[Any], limit: int = MAX_ROWS) -> list[Any]:
    """The rows, or their head and tail with a None between."""
    if len(rows) <= limit:
        return list(rows)
    head = limit * 2 // 3
    return [*rows[:head], None, *rows[len(rows) - (limit - head - 1) :]]


def ids(blocks: Iterable[int], limit: int = 10) -> str:
    """Block ids with runs folded: ``1–5 9 12``; the null block is ``·``."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1 and block:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    words = ["·" if not a else f"{a}" if a == b else f"{a}–{b}" for a, b in runs]
    if len(words) > limit:
        words = [*words[: limit - 2], "…", words[-1]]
    return " ".join(words)


def engine(summary: Summary) -> RenderableType:
    """Which engine it was, and which attention backend it chose and why."""
    header, config = summary.header, summary.engine
    lines = [
        f"vLLM {header.get('vllm')} on {header.get('platform')}, torch {header.get('torch')},"
        f" traced at level {header.get('level')}"
    ]
    if config:
        model = str(config["model"]).rstrip("/").rsplit("/", 1)[-1]
        lines.append(
            f"{escape(model)} ({config['dtype']}): {config['num_blocks']} blocks of"
            f" {config['block_size']} tokens (block 0 is the null block),"
            f" prefix caching {'on' if config['enable_prefix_caching'] else 'off'}"
        )
        lines.append(
            f"up to {config['max_num_seqs']} requests and {config['max_num_batched_tokens']}"
            f" tokens a step, {config['policy']}"
            + (", async scheduling" if config["async_scheduling"] else "")
        )
    for group in summary.groups if len(summary.groups) > 1 else ():
        window = f", window {group['sliding_window']}" if group["sliding_window"] else ""
        lines.append(
            f"KV group of {group['num_layers']} layers: {group['kind']},"
            f" {group['block_size']} tokens a block{window}"
        )
    for backend in summary.backends:
        lines.append(_why(backend))
    return Text.from_markup("\n".join(lines))


def _why(backend: dict[str, Any]) -> str:
    sizes = ", ".join(backend["settings"].get("block_sizes", ()))
    rejected = [c for c in backend["candidates"] if c[0] != backend["backend"]]
    if rejected:
        why = "; ".join(f"{name}: {escape(reason)}" for name, reason in rejected)
        why = f"chosen before {why}"
    elif backend["backend"].startswith("CPU"):
        why = "the only one that the CPU platform has"
    elif backend["settings"].get("asked_for") or backend["backend"].startswith("PAGED"):
        why = "asked for"
    else:
        why = "the first that was valid"
    kinds = f"; takes blocks of {sizes}" if sizes else ""
    return (
        f"attention backend [bold]{backend['backend']}[/] for {len(backend['layers'])} layers"
        f" ({escape(why)}{kinds})"
    )


def steps(rows: Sequence[Step], limit: int = MAX_ROWS) -> Table:
    """One line a step: how long each stage took, what it computed, what was left."""
    made = table(
        "step",
        "sched",
        "forward",
        "post",
        "prefill",
        "decode",
        "run",
        "wait",
        "free",
        "",
        left=(9,),
    )
    for step in shorten(rows, limit):
        if step is None:
            made.add_row(*["…"] * 9, "")
            continue
        marks = [
            f"+{step.num_joined}" if step.num_joined else "",
            f"-{step.num_left}" if step.num_left else "",
            f"preempted {step.num_preempted}" if step.num_preempted else "",
        ]
        made.add_row(
            str(step.step),
            duration(step.schedule_ns),
            duration(step.forward_ns) if step.forward_ns else "–",
            duration(step.sample_ns + step.postprocess_ns),
            str(step.num_prefill_tokens or "–"),
            str(step.num_decode_tokens or "–"),
            str(step.num_running),
            str(step.num_waiting or "–"),
            str(step.num_free_blocks),
            " ".join(mark for mark in marks if mark),
        )
    return made


def requests(rows: Sequence[RequestLife], limit: int = MAX_ROWS) -> Table:
    """One line a request, with its block table as logical → physical."""
    made = table(
        "request", "prompt", "hit", "out", "steps", "pre", "end", "logical → physical blocks",
        left=(0, 6, 7),
    )  # fmt: skip
    for life in shorten(rows, limit):
        if life is None:
            made.add_row("…")
            continue
        made.add_row(
            escape(short_name(life.name)),
            str(life.num_prompt_tokens),
            str(life.num_hit_tokens + life.num_resume_hit_tokens or "–"),
            str(life.num_output_tokens),
            str(life.num_steps),
            str(life.num_preemptions or "–"),
            life.reason or "–",
            mapping(life.table),
        )
    return made


def mapping(table: Sequence[Sequence[int]], limit: int = 6) -> str:
    """``0→1–3 3→9``: runs of logical blocks and where they are; groups separated by ``|``."""
    groups = []
    for row in table:
        parts: list[str] = []
        start = 0
        while start < len(row):
            end = start
            while end + 1 < len(row) and row[end + 1] == row[end] + 1 and row[start]:
                end += 1
            parts.append(f"{start}→{ids(row[start : end + 1])}")
            start = end + 1
        if len(parts) > limit:
            parts = [*parts[: limit - 1], f"… {parts[-1]}"]
        groups.append(" ".join(parts))
    return " | ".join(groups)


def kernels(rows: Sequence[Kernel], copy_rate: int = 0) -> Table:
    """Time by kernel and variant; with a measured copy rate the share of it that reading K and V reached."""
    if not copy_rate:
        columns = ("attention kernel", "variant", "steps", "calls", "total", "a call", "clock")
        made = table(*columns, left=(0, 1, 6))
    else:
        columns = ("attention kernel", "variant", "calls", "a call", "median", "of copy", "clock")
        made = table(*columns, left=(0, 1, 6))
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


def size(num_bytes: float) -> str:
    """Three significant digits with a unit: ``1.50 MB``."""
    for unit, bytes_of in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= bytes_of:
            value = num_bytes / bytes_of
            return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"
    return f"{num_bytes:.0f} B"


def kernel_steps(rows: Sequence[KernelStep], copy_rate: int = 0, limit: int = MAX_ROWS) -> Table:
    """One line a step and kernel: batch, context, time of a call, bytes of K and V."""
    made = table(
        "step", "kernel", "variant", "seqs", "longest", "a call", "K and V", "of copy",
        left=(1, 2),
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
        left=(0, 1),
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


def kernels_view(summary: Summary, limit: int = MAX_ROWS) -> RenderableType:
    """All that a trace says of attention kernels: by variant, by size, by step, and by whose rule."""
    rate = copy_rate_of(summary)
    parts: list[RenderableType] = [_titled("By variant", kernels(summary.kernels, rate))]
    if summary.kernel_steps:
        parts += [
            _titled("By batch and context", kernel_sizes(summary.kernel_steps, rate)),
            _titled("By step", kernel_steps(summary.kernel_steps, rate, limit)),
        ]
    said = [*kernel_notes(summary), *rule(summary), *shadow(summary)]
    if said:
        parts += [_titled("What they show", Text("\n".join(said)))]
    return Group(*parts)


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


def diagnosis(found: Diagnosis) -> RenderableType:
    """What ``doctor`` prints."""
    lines = Table.grid(padding=(0, 2))
    for what, said in (
        ("vllm_trace", f"{found.vllm_trace}, Python {found.python}"),
        ("vLLM", f"{found.vllm or 'of no known release'} in {found.where}" if found.where else "–"),
        ("hook tables", "vLLM " + "; ".join(found.tables)),
        ("plugin", found.plugin),
        *found.packages.items(),
    ):
        lines.add_row(Text(what, style="dim"), Text(said, overflow="fold"))
    parts: list[RenderableType] = [lines]
    if found.problem:
        parts += [
            "",
            Text(found.problem, style="red"),
            Text(f"  {found.hint}" if found.hint else ""),
        ]
    if found.rows:
        parts += ["", hooks(found.rows)]
    return Group(*parts)


def hooks(rows: Sequence[Resolution]) -> RenderableType:
    """Every hook by class with its state, and what its absence costs."""
    styles = {"ok": "green", "changed": "yellow", "incompatible": "red", "missing": "red"}
    parts: list[RenderableType] = []
    for owner, group in groupby(rows, key=_owner):
        body = Table.grid(padding=(0, 2))
        for width in (29, 4, 12):
            body.add_column(width=width, overflow="fold")
        for row in group:
            gives = row.hook.emits.replace(" ", ", ")
            if not row.usable:
                gives = f"{row.detail}: {row.hook.without}"
            elif row.detail:
                gives += f" ({row.detail})"
            name = row.hook.qualname.rpartition(".")[2] + ("*" if row.hook.required else "")
            state = Text(row.state, style=styles[row.state])
            body.add_row(f"  {name}", row.hook.platform or "all", state, gives)
        parts += [Text(owner, style="bold"), body]
    return Group(*parts, "", Text("* required: without it nothing is hooked at all", style="dim"))


def _owner(row: Resolution) -> str:
    module = row.hook.module.removeprefix("vllm.")
    return f"{module} {row.hook.qualname.rpartition('.')[0]}"


def findings(summary: Summary) -> list[str]:
    """Hits, evictions and preemptions in sentences, and whether the workers agree."""
    facts = summary.facts()
    prompt = sum(r.num_prompt_tokens for r in summary.requests)
    said = []
    if facts["hit_tokens"] or facts["resume_hit_tokens"]:
        resumed = (
            f", and {facts['resume_hit_tokens']} of their own tokens by resumed requests"
            if facts["resume_hit_tokens"]
            else ""
        )
        said.append(
            f"prefix cache: {facts['hit_requests']} of {facts['requests']} requests hit"
            f" {facts['hit_tokens']} of {prompt} prompt tokens{resumed};"
            f" {facts['shared_blocks'] or 'no'} blocks stood in several tables at once"
        )
    elif summary.header.get("level") == "light":
        said.append("block tables, prefix hits and evictions are not recorded at level light")
    elif summary.engine.get("enable_prefix_caching") and summary.requests:
        said.append("prefix cache: no request hit")
    if facts["evictions"]:
        said.append(f"evictions: {facts['evictions']} cached blocks were handed out anew")
    if facts["preemptions"]:
        names = [short_name(r.name) for r in summary.requests if r.num_preemptions]
        said.append(
            f"preemptions: {facts['preemptions']}, of {', '.join(names[:4])}"
            + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        )
    elif summary.requests:
        said.append("preemptions: none")
    if summary.worker.num_rows:
        who = "worker" if summary.num_workers <= 1 else f"{summary.num_workers} workers"
        said.append(
            summary.worker.first_difference
            or f"{who}: {summary.worker.num_rows} table rows and {summary.worker.num_slots}"
            " slots as the kernels received them, all equal to the manager's"
        )
    said += [*rule(summary), *shadow(summary)]
    if summary.worker.num_unplanned:
        said.append(
            f"{summary.worker.num_unplanned} table rows of workers were not compared: the"
            " scheduler's side of their steps is not in this trace"
        )
    if summary.engine and summary.header.get("level") != "light":
        held = facts["blocks_in_use_at_end"]
        said.append(f"at the end {held or 'no'} blocks were held")
    return said


def report(summary: Summary, *, limit: int = MAX_ROWS) -> RenderableType:
    """The whole summary, as ``run`` prints it."""
    parts: list[RenderableType] = [engine(summary), ""]
    if summary.steps:
        parts += [_titled(f"Steps ({len(summary.steps)})", steps(summary.steps, limit))]
    if summary.requests:
        title = f"Requests ({len(summary.requests)})"
        parts += [_titled(title, requests(summary.requests, limit))]
    if summary.kernels:
        parts += [_titled("Kernels", kernels(summary.kernels))]
    parts += [_titled("What happened", Text("\n".join(findings(summary))))]
    if summary.problems:
        text = Text("\n".join(summary.problems), style="yellow")
        parts += [_titled("What this trace does not hold", text)]
    return Group(*parts)


def excerpt(summary: Summary, *, limit: int = MAX_ROWS) -> RenderableType:
    """Some steps and requests of a trace."""
    return Group(
        _titled(f"Steps ({len(summary.steps)})", steps(summary.steps, limit)),
        _titled(f"Requests ({len(summary.requests)})", requests(summary.requests, limit)),
    )


def _titled(title: str, body: RenderableType) -> RenderableType:
    return Group(Text(title, style="bold"), Padding(body, (0, 0, 1, 2)))
