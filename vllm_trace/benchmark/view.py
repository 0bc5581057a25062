"""The figures as text for a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_trace import render


def report(figures: dict[str, Any]) -> RenderableType:
    """Every test that was run, and what its figures do not say."""
    about = figures["about"]
    parts: list[RenderableType] = [
        Text(f"{about['model']} ({about['dtype']}) on {about['device']}, {about['machine']}"),
        Text(
            f"KV cache of {about['budget']:,} tokens for every arm, {about['max_model_len']} tokens a request at most"
        ),
    ]
    makers = {"throughput": throughput, "scaling": scaling, "memory": memory}
    for test, make in makers.items():
        if test in figures:
            parts += [Text(), make(figures[test])]
    parts += [Text(), *(Text(note, style="dim") for note in cautions(figures))]
    return Group(*parts)


def throughput_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    count = figures["requests"]["count"]
    tokens = figures["requests"]["output_tokens"]
    rows: list[tuple[str, ...]] = []
    for arm in figures["arms"]:
        speed, times = arm["tokens_s"], arm["times"]
        rows.append(
            (
                arm["arm"],
                f"{speed['median']:,.0f}",
                f"{speed['low']:,.0f}–{speed['high']:,.0f}",
                f"{times['median']:.2f}",
                f"{arm['num_steps']:,}",
                f"{tokens / arm['num_steps']:.1f}",
                f"{arm['peak_running']}",
                render.duration(arm["first_token_s"] * 1e9),
                f"{arm['same_tokens']}/{count}",
            )
        )
    return rows


THROUGHPUT = (
    "arm", "tokens/s", "quartiles", "times", "steps", "a step", "peak", "1st", "same",
)  # fmt: skip


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    made = render.table(*heads)
    for row in rows:
        made.add_row(*row)
    return made


def throughput(figures: dict[str, Any]) -> RenderableType:
    told = figures["requests"]
    return Group(
        Text("Throughput", style="bold"),
        Text(
            f"{told['count']} requests at once, {told['prompt_tokens']:,} prompt and "
            f"{told['output_tokens']:,} output tokens",
            style="dim",
        ),
        _table(THROUGHPUT, throughput_rows(figures)),
        Text(
            "times: as fast as the first arm; a step: output tokens; peak: requests at the", "dim"
        ),
        Text("same time; 1st: mean time to it; same: requests with the first arm's tokens", "dim"),
        *(Text(f"{arm['arm']}: {arm['what']}", style="dim") for arm in figures["arms"]),
    )


def scaling_rows(figures: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Heads and rows; a cell is ``tokens/s (peak)``."""
    names = list(figures["rows"][0]["arms"])
    rows = []
    for row in figures["rows"]:
        arms = [row["arms"][name] for name in names]
        cells = [f"{arm['tokens_s']['median']:,.0f} ({arm['peak_running']})" for arm in arms]
        rows.append((str(row["users"]), *cells))
    return ("users", *names), rows


def scaling(figures: dict[str, Any]) -> RenderableType:
    return Group(
        Text("Scaling", style="bold"),
        Text("output tokens/s (requests at the same time)", style="dim"),
        _table(*scaling_rows(figures)),
    )


def memory_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in ("contiguous", "vllm"):
        if name in figures:
            arm = figures[name]
            rows.append(
                (
                    name,
                    f"{arm['cache_bytes'] / 2**20:.2f}",
                    str(arm["peak_running"]),
                    f"{arm['fill']:.1%}",
                    f"{1 - arm['fill']:.1%}",
                )
            )
    return rows


MEMORY = ("cache", "MiB", "peak", "holds tokens", "empty")


def memory(figures: dict[str, Any]) -> RenderableType:
    return Group(
        Text("Memory, step by step from the trace", style="bold"),
        _table(MEMORY, memory_rows(figures)),
        *(Text(line, style="dim") for line in memory_notes(figures)),
    )


def memory_notes(figures: dict[str, Any]) -> list[str]:
    told = figures["vllm"]
    budget = (told["num_blocks"] - 1) * told["block_size"]
    process = figures["process"]
    return [
        "holds tokens: of what the tables of running requests have, while others wait",
        f"rows for the {told['peak_running']} requests that vLLM ran at once would take "
        f"{told['as_rows']:,} tokens; it had {budget:,}",
        f"the caches in a process that has {process['bytes'] / 2**30:.2f} GiB ({process['where']}): weights, "
        "vLLM itself and torch are the rest",
        f"blocks of {told['blocks_as_calculated']} of {told['blocks_compared']} requests are what "
        "`memory` calculates",
    ]


def _differ(figures: dict[str, Any]) -> bool:
    """Whether some arm has other token ids than the first."""
    told = figures.get("throughput")
    if told is None:
        return False
    return any(arm["same_tokens"] < told["requests"]["count"] for arm in told["arms"])


def cautions(figures: dict[str, Any]) -> list[str]:
    """What the figures must not be read as."""
    about = figures["about"]
    said = [f"Note: {note}." for note in about["notes"]]
    if about["device"] == "cpu":
        said.append(
            "A tiny model on a CPU: a step's time grows with its tokens, so a larger batch gains "
            "little speed here."
        )
        measured = any(other["about"]["device"] == "cuda" for other in figures.get("also", ()))
        said.append(
            "On a GPU a decode step reads all weights however many tokens it computes, so fewer steps "
            "are less time"
            + (": the other machine's figures." if measured else "; that was not measured here.")
        )
    if any(_differ(one) for one in (figures, *figures.get("also", ()))):
        said.append("Where token ids differ, two kernels rounded differently and one token tipped.")
    said.append("vllm against the small engine compares two programs; paged against contiguous is")
    said.append("the same program with another cache.")
    return said
