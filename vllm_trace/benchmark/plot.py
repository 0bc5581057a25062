"""Four plots of the figures: speed, users, requests at once, memory over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_trace.plotting import INK, figure, new_figure, save


def plot(figures: dict[str, Any], path: Path, theme: str = "light") -> None:
    """Write the plots of those tests that were run.

    Raises: ``UsageError`` without matplotlib, or when the file cannot be written.
    """
    panels = []
    if "throughput" in figures:
        panels += [(bars, figures["throughput"])]
    if "scaling" in figures:
        panels += [(speeds, figures["scaling"]), (peaks, figures["scaling"])]
    if "memory" in figures:
        panels += [(fill, figures["memory"])]
    about = figures["about"]
    with figure(theme) as ink:
        rows = -(-len(panels) // 2)
        columns = min(2, len(panels))
        drawn, axes = new_figure(rows, columns, size=(5.5 * columns, 3.8 * rows), squeeze=False)
        drawn.suptitle(
            f"{about['model']} on {about['device']}: {about['budget']:,} tokens of KV cache each"
        )
        places = [one for row in axes for one in row]
        for place, (panel, told) in zip(places, panels):
            panel(place, told, ink)
        for place in places[len(panels) :]:
            place.set_axis_off()
        save(drawn, path)


def _colour(name: str, ink: INK) -> str:
    return {"contiguous": ink.empty_line, "paged": ink.used}.get(name, ink.shared)


def bars(axes: Any, told: dict[str, Any], ink: INK) -> None:
    """Tokens a second with quartiles."""
    for index, arm in enumerate(told["arms"]):
        speed = arm["tokens_s"]
        middle = speed["median"]
        spread = [[middle - speed["low"]], [speed["high"] - middle]]
        axes.bar(
            index, middle, yerr=spread, color=_colour(arm["arm"], ink), ecolor=ink.text, capsize=4
        )
        axes.annotate(
            f"{arm['num_steps']} steps\n{arm['peak_running']} at once",
            (index, middle * 0.06),
            ha="center",
            color=ink.page,
        )
    axes.set_xticks(range(len(told["arms"])), [arm["arm"] for arm in told["arms"]])
    axes.set(title=f"Output tokens/s, {told['requests']['count']} requests at once")


def _lines(axes: Any, told: dict[str, Any], ink: INK, value: Any) -> None:
    users = [row["users"] for row in told["rows"]]
    for name in told["rows"][0]["arms"]:
        axes.plot(
            users,
            [value(row["arms"][name]) for row in told["rows"]],
            color=_colour(name, ink),
            marker={"contiguous": "s", "paged": "o"}.get(name, "^"),
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(users, [str(count) for count in users])
    axes.set(xlabel="users")
    axes.set_ylim(bottom=0)
    axes.legend()


def speeds(axes: Any, told: dict[str, Any], ink: INK) -> None:
    """Tokens a second by users."""
    _lines(axes, told, ink, lambda arm: arm["tokens_s"]["median"])
    axes.set(title="Output tokens/s")


def peaks(axes: Any, told: dict[str, Any], ink: INK) -> None:
    """Requests that run at the same time, by users."""
    _lines(axes, told, ink, lambda arm: arm["peak_running"])
    axes.set(title="Requests at the same time")


def fill(axes: Any, told: dict[str, Any], ink: INK) -> None:
    """Tokens held and tokens reserved, step by step."""
    steps = told["vllm"]["steps"]
    over = range(len(steps))
    axes.plot(
        over, [s[2] for s in steps], color=ink.used, label="vllm: in block tables", linewidth=1.2
    )
    axes.fill_between(
        over, [s[1] for s in steps], color=ink.used, alpha=0.45, label="vllm: tokens held"
    )
    if rows := told.get("contiguous"):
        over = range(len(rows["steps"]))
        axes.plot(
            over,
            [s[2] for s in rows["steps"]],
            color=ink.empty_line,
            label="contiguous: reserved",
            linewidth=1.2,
        )
        axes.fill_between(
            over,
            [s[1] for s in rows["steps"]],
            color=ink.empty_line,
            alpha=0.45,
            label="contiguous: tokens held",
        )
    axes.set(title="KV cache over the steps", xlabel="step", ylabel="tokens")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.3)
    axes.legend(loc="upper center", ncols=2)
