"""Four plots of a calculation, as one PNG or SVG. matplotlib is imported only here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError
from vllm_trace.memory.calculate import Calculation, sharing, users
from vllm_trace.plotting import INK, figure, new_figure, save

__all__ = ["plot"]


def plot(made: Calculation, path: Path, theme: str = "light") -> None:
    """Write the four plots: memory, waste, users, sharing.

    Raises: ``UsageError`` without matplotlib, or when the file cannot be written.
    """
    if not made.wastes:
        raise UsageError("nothing to draw")
    with figure(theme) as ink:
        drawn, ((memory, lengths), (counts, saved)) = new_figure(2, 2, size=(11, 7.6))
        drawn.suptitle(
            f"{made.setting.model.name} on {made.setting.gpu.name}, "
            f"blocks of {made.setting.block_size} tokens"
        )
        _memory(memory, made, ink)
        _lengths(lengths, made, ink)
        _counts(counts, made, ink)
        _saved(saved, made, ink)
        save(drawn, path)


def _memory(axes: Any, made: Calculation, ink: INK) -> None:
    names = [one.scheme for one in made.wastes]
    used = [one.gib * (1 - one.at_end) for one in made.wastes]
    empty = [one.gib * one.at_end for one in made.wastes]
    axes.bar(names, used, color=ink.used, label="holds tokens")
    axes.bar(names, empty, bottom=used, color=ink.empty, label="empty at the end")
    for index, one in enumerate(made.wastes):
        axes.annotate(f"{one.at_end:.1%}", (index, one.gib), ha="center", va="bottom")
    axes.margins(y=0.12)
    axes.set(
        title=f"Memory given to {len(made.workload.requests):,} requests (share empty)",
        ylabel="GiB",
    )
    axes.legend()


def _lengths(axes: Any, made: Calculation, ink: INK) -> None:
    held = sorted((request.held for request in made.workload.requests), reverse=True)
    held = held[:: -(-len(held) // 200)]  # as many as there are columns of pixels to show them
    axes.fill_between(
        range(len(held)), made.setting.length, color=ink.empty, step="mid", label="reserved"
    )
    axes.fill_between(range(len(held)), held, color=ink.used, step="mid", label="tokens held")
    axes.set(title="The requests, longest first", ylabel="tokens", xticks=[])
    axes.set_xlim(0, max(1, len(held) - 1))
    axes.set_ylim(0, made.setting.length * 1.05)
    axes.legend(loc="upper right", frameon=True, facecolor=ink.page, edgecolor=ink.faint)


def _counts(axes: Any, made: Calculation, ink: INK) -> None:
    """Users against the memory of the GPU, with the chosen one marked."""
    setting = made.setting
    needed = (setting.gpu.memory_gib - setting.kv_bytes / (1 << 30) / setting.utilization) * 1.02
    sizes = [needed + (setting.gpu.memory_gib * 1.5 - needed) * step / 24 for step in range(1, 25)]
    for scheme, colour in (("reserved", ink.empty_line), ("paged", ink.used)):
        counts = [
            users(
                replace(setting, gpu=replace(setting.gpu, memory_gib=gib)),
                scheme,
                made.workload.requests,
            )
            for gib in sizes
        ]
        axes.plot(sizes, counts, color=colour, label=scheme, linewidth=2)
    axes.axvline(setting.gpu.memory_gib, color=ink.faint, linestyle=":")
    axes.annotate(
        setting.gpu.name,
        (setting.gpu.memory_gib, 0.97),
        xytext=(3, 0),
        textcoords="offset points",
        xycoords=axes.get_xaxis_transform(),
        rotation=90,
        va="top",
    )
    axes.set(
        title=f"Users that fit, {setting.length:,} tokens at most",
        xlabel="GiB of GPU memory",
        ylabel="users",
    )
    axes.set_ylim(bottom=0)
    axes.legend()


def _saved(axes: Any, made: Calculation, ink: INK) -> None:
    one = made.sharing
    counts = sorted({1, 2, 5, 10, 20, 50, 100, 200, one.users})
    results = [sharing(count, one.prefix, one.own, one.block_size) for count in counts]
    axes.plot(
        counts, [r.apart for r in results], color=ink.empty_line, label="each alone", linewidth=2
    )
    axes.plot(
        counts, [r.shared for r in results], color=ink.used, label="prefix cache", linewidth=2
    )
    axes.annotate(
        f"{one.saved:.1%} saved",
        (one.users, one.shared),
        xytext=(0, 14),
        textcoords="offset points",
        ha="right",
    )
    axes.set(
        title=f"{one.prefix} shared tokens, {one.own} of one's own",
        xlabel="users",
        ylabel="blocks",
    )
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper left")
