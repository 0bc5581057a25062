"""The pictures that are charts: what rows waste, what each scheme reserves, what was measured."""

from __future__ import annotations

from typing import Any

from vllm_trace.benchmark import plot as bench_plot
from vllm_trace.memory.calculate import Setting, wastes
from vllm_trace.memory.shapes import GPUS, MODELS
from vllm_trace.memory.workload import drawn
from vllm_trace.pictures.facts import moment
from vllm_trace.plotting import INK, new_figure

MAX_ROWS = 14


def kv_cache_problem(sources: Any, ink: INK) -> Any:
    """A row of max_model_len for each request: what of it is used now, later, never."""
    found = moment(sources.trace("mixed"), lambda one: len(one.held))
    names = list(found.held)[:MAX_ROWS]
    length = found.max_model_len
    made, axes = new_figure(1, 1, size=(9.5, 4.6))
    for row, name in enumerate(names):
        held, final = found.held[name], found.final.get(name, found.held[name])
        prompt = min(held, found.prompt[name])
        axes.barh(row, prompt, color=ink.used)
        axes.barh(row, held - prompt, left=prompt, color=ink.shared)
        axes.barh(row, final - held, left=held, color=ink.faint)
        axes.barh(row, length - final, left=final, color=ink.empty)
    total = sum(found.held[name] for name in names)
    never = sum(length - found.final.get(name, found.held[name]) for name in names)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, length)
    axes.set(
        title=f"The requests of step {found.step} of `mixed`, if each had a row of {length:,} tokens:\n"
        f"{total / (len(names) * length):.0%} of it holds tokens, {never / (len(names) * length):.0%} never will",
        xlabel="tokens",
    )
    colours = {
        "prompt": ink.used,
        "output so far": ink.shared,
        "output to come": ink.faint,
        "reserved, never used": ink.empty,
    }
    _legend(axes, colours, columns=4)
    return made


def _legend(axes: Any, colours: dict[str, str], columns: int) -> None:
    from matplotlib.patches import Patch

    handles = [Patch(color=colour, label=label) for label, colour in colours.items()]
    axes.legend(handles=handles, loc="upper center", ncols=columns, bbox_to_anchor=(0.5, -0.12))


def memory_comparison(sources: Any, ink: INK) -> Any:
    """The calculator's four ways to reserve, for 1,000 requests of ShareGPT's lengths."""
    # As docs/comparison.md has it.
    setting = Setting(GPUS["a100-40gb"], MODELS["opt-13b"], utilization=0.9).checked()
    work = drawn("sharegpt", 1000, setting.length, seed=0)
    schemes = wastes(setting, work)
    made, (memory, users) = new_figure(1, 2, size=(10, 4.2), width_ratios=(3, 2))
    made.suptitle(
        f"{setting.model.name} on {setting.gpu.name}: 1,000 requests, {work.mean:.0f} tokens on average, "
        f"{setting.length:,} at most"
    )
    said = {
        "reserved": "reserved:\nthe longest",
        "pow2": "pow2: output\nrounded up",
        "exact": "exact: known\nbeforehand",
        "paged": "paged:\nblock by block",
    }
    names = [said[one.scheme] for one in schemes]
    used = [one.gib * (1 - one.at_end) for one in schemes]
    empty = [one.gib * one.at_end for one in schemes]
    memory.barh(names, used, color=ink.used, label="holds tokens")
    memory.barh(names, empty, left=used, color=ink.empty, label="empty")
    for index, one in enumerate(schemes):
        memory.annotate(f" {one.at_end:.1%} empty", (one.gib, index), va="center")
    memory.invert_yaxis()
    memory.grid(axis="x")
    memory.grid(visible=False, axis="y")
    memory.set_xlim(0, max(one.gib for one in schemes) * 1.3)
    memory.set(title="Memory reserved for all of them", xlabel="GiB")
    memory.legend(loc="lower right")
    colours = [ink.empty_line if one.scheme == "reserved" else ink.used for one in schemes]
    users.bar([one.scheme for one in schemes], [one.users for one in schemes], color=colours)
    for index, one in enumerate(schemes):
        users.annotate(str(one.users), (index, one.users), ha="center", va="bottom")
    users.margins(y=0.12)
    users.set(title="Requests that fit at the same time")
    return made


def performance_comparison(sources: Any, ink: INK) -> Any:
    """What ``bench`` measured: speed, and how many requests ran at the same time."""
    told = sources.figures()
    about = told["about"]
    made, (speed, lines, peaks) = new_figure(1, 3, size=(13, 4.2))
    made.suptitle(
        f"{about['model']} on {about['device']}, {about['budget']:,} tokens of KV cache each "
        f"(vLLM {about['versions']['vLLM']}, {str(about['date'])[:10]})"
    )
    bench_plot.bars(speed, told["throughput"], ink)
    bench_plot.speeds(lines, told["scaling"], ink)
    bench_plot.peaks(peaks, told["scaling"], ink)
    return made
