"""The results page, made whole by the command; nothing in it is written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_trace.benchmark import view
from vllm_trace.errors import UsageError

COLUMNS = """\
*quartiles* are over the rounds; *times* is as fast as the first arm, taken within a round and then the median; *a step*
is output tokens a step; *peak* is requests at the same time; *1st* is the mean time to a request's first token;
*same* counts requests with the first arm's token ids.
"""


def write(figures: dict[str, Any], path: Path) -> Path:
    """Write the page, and the figures as JSON beside it. Returns the JSON's path.

    Raises: ``UsageError`` when it cannot be written.
    """
    beside = path.with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(markdown(figures), encoding="utf-8")
        beside.write_text(json.dumps(figures, separators=(",", ":")) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    return beside


def read(path: Path) -> dict[str, Any]:
    """Figures that another run wrote. Raises: ``UsageError`` when there are none of throughput."""
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        figures["about"]["machine"], figures["throughput"]["arms"]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise UsageError(
            f"{path} holds no figures of throughput", hint="bench.json of a run of bench"
        ) from None
    return figures


def markdown(figures: dict[str, Any]) -> str:
    """The page."""
    about = figures["about"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        "# Results",
        "",
        "A real vLLM beside a contiguous preallocated cache, on the same memory. What *tracing* costs is another",
        "measurement: [reports/bench/capture.md](../reports/bench/capture.md), by `python -m bench`.",
        "",
        f"- Command: `{about['command']}` ({about['seconds']:.0f} s)",
        f"- Date: {about['date']}",
        f"- Machine: {about['machine']}, {about['device']}",
        f"- Versions: {versions}",
        f"- Model: {about['model']}, {about['dtype']}; {about['max_model_len']} tokens a request at most, "
        f"{about['budget']:,} tokens of KV cache for every arm; seed {about['seed']}",
        "",
    ]
    if "throughput" in figures:
        lines += _throughput(figures["throughput"], about)
    if "scaling" in figures:
        lines += _scaling(figures["scaling"])
    if "memory" in figures:
        lines += _memory(figures["memory"])
    for other in figures.get("also", ()):
        lines += _elsewhere(other)
    lines += ["## What these figures do not say", ""]
    lines += [" ".join(view.cautions(figures)), ""]
    return "\n".join(lines)


def _elsewhere(figures: dict[str, Any]) -> list[str]:
    """The throughput of another machine, shorter."""
    about = figures["about"]
    versions = about["versions"]
    return [
        f"## On another machine: {about['machine'].partition(',')[0]}",
        "",
        f"<code>{about['command']}</code>, {about['date'][:10]}: {about['machine']}; vLLM {versions['vLLM']}, "
        f"torch {versions['torch']}, {about['dtype']}, {about['budget']:,} tokens of KV cache.",
        "",
        *_throughput(figures["throughput"], about, head=False),
    ]  # fmt: skip


def _throughput(figures: dict[str, Any], about: dict[str, Any], head: bool = True) -> list[str]:
    told = figures["requests"]
    return [
        *(["## Throughput", ""] if head else []),
        f"{told['count']} requests handed over at once: {told['prompt_tokens']:,} prompt and {told['output_tokens']:,} "
        f"output tokens, {told['mean_total']:.0f} a request on average, {about['repeats']} rounds.",
        "",
        *_table(view.THROUGHPUT, view.throughput_rows(figures)),
        "",
        *([COLUMNS] if head else []),
        *(_arm(arm) for arm in figures["arms"]),
        "",
    ]  # fmt: skip


def _arm(arm: dict[str, Any]) -> str:
    rate = arm["requests_s"]["median"]
    return f"- `{arm['arm']}`: {arm['what']}; {rate:.1f} requests/s, {arm['num_preemptions']} preemptions"


def _scaling(figures: dict[str, Any]) -> list[str]:
    return [
        "## Scaling",
        "",
        "More and more users with one request each, on the same memory: output tokens a second, and in brackets how "
        "many requests ran at the same time. A row's requests are the first of one list, so a long one among them "
        "shows.",
        "",
        *_table(*view.scaling_rows(figures)),
        "",
    ]


def _memory(figures: dict[str, Any]) -> list[str]:
    return [
        "## Memory",
        "",
        "Of vLLM step by step from its own trace, of the contiguous cache from the engine's own count.",
        "",
        *_table(view.MEMORY, view.memory_rows(figures)),
        "",
        *(f"- {note}" for note in view.memory_notes(figures)),
        "",
    ]


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    align = tuple("---" if index == 0 else "---:" for index in range(len(heads)))
    return ["| " + " | ".join(line) + " |" for line in (heads, align, *rows)]
