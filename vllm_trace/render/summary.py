"""The summary as ``run`` and ``show`` print it, for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_trace.render.attention import kernels, rule, shadow
from vllm_trace.render.basics import (
    MAX_ROWS,
    duration,
    mapping,
    short_name,
    shorten,
    table,
    titled,
)
from vllm_trace.summary import RequestLife, Step, Summary


def report(summary: Summary, *, limit: int = MAX_ROWS) -> RenderableType:
    """The whole summary, as ``run`` prints it."""
    parts: list[RenderableType] = [engine(summary), ""]
    if summary.steps:
        parts += [titled(f"Steps ({len(summary.steps)})", steps(summary.steps, limit))]
    if summary.requests:
        title = f"Requests ({len(summary.requests)})"
        parts += [titled(title, requests(summary.requests, limit))]
    if summary.kernels:
        parts += [titled("Kernels", kernels(summary.kernels))]
    parts += [titled("What happened", Text("\n".join(findings(summary))))]
    if summary.problems:
        text = Text("\n".join(summary.problems), style="yellow")
        parts += [titled("What this trace does not hold", text)]
    return Group(*parts)


def excerpt(summary: Summary, *, limit: int = MAX_ROWS) -> RenderableType:
    """Some steps and requests of a trace."""
    return Group(
        titled(f"Steps ({len(summary.steps)})", steps(summary.steps, limit)),
        titled(f"Requests ({len(summary.requests)})", requests(summary.requests, limit)),
    )


def engine(summary: Summary) -> RenderableType:
    """Which engine it was, and which attention backend it chose and why."""
    header, config = summary.header, summary.engine
    lines = [
        f"vLLM {header.get('vllm')} on {header.get('platform')}, torch {header.get('torch')},"
        f" traced at level {header.get('level')}"
    ]
    if config:
        model = str(config.get("model")).rstrip("/").rsplit("/", 1)[-1]
        lines.append(
            f"{model} ({config.get('dtype')}): {config['num_blocks']} blocks of"
            f" {config['block_size']} tokens (block 0 is the null block),"
            f" prefix caching {'on' if config.get('enable_prefix_caching') else 'off'}"
        )
        lines.append(
            f"up to {config.get('max_num_seqs')} requests and {config.get('max_num_batched_tokens')}"
            f" tokens a step, {config.get('policy')}"
            + (", async scheduling" if config.get("async_scheduling") else "")
        )
    for group in summary.groups if len(summary.groups) > 1 else ():
        window = f", window {group['sliding_window']}" if group["sliding_window"] else ""
        lines.append(
            f"KV group of {group['num_layers']} layers: {group['kind']},"
            f" {group['block_size']} tokens a block{window}"
        )
    return Text("\n").join([*map(Text, lines), *map(_backend, summary.backends)])


def _backend(backend: dict[str, Any]) -> Text:
    """Which backend so many layers got, and why."""
    name, settings = backend["backend"], backend["settings"]
    rejected = [f"{one}: {reason}" for one, reason in backend["candidates"] if one != name]
    if rejected:
        why = f"chosen before {'; '.join(rejected)}"
    elif name.startswith("CPU"):
        why = "the only one that the CPU platform has"
    elif settings.get("asked_for") or name.startswith("PAGED"):
        why = "asked for"
    else:
        why = "the first that was valid"
    sizes = ", ".join(map(str, settings.get("block_sizes", ())))
    kinds = f"; takes blocks of {sizes}" if sizes else ""
    return Text.assemble(
        "attention backend ", (name, "bold"), f" for {len(backend['layers'])} layers ({why}{kinds})"
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
        spare=(3, 1, 7, 6, 2),
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
        left=(0, 6, 7), spare=(5, 4, 2, 6, 3),
    )  # fmt: skip
    for life in shorten(rows, limit):
        if life is None:
            made.add_row("…")
            continue
        made.add_row(
            short_name(life.name),
            str(life.num_prompt_tokens),
            str(life.num_hit_tokens + life.num_resume_hit_tokens or "–"),
            str(life.num_output_tokens),
            str(life.num_steps),
            str(life.num_preemptions or "–"),
            life.reason or "–",
            mapping(life.table),
        )
    return made


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
