"""How fast a trace becomes tables, JSON lines and a timeline, and in how much memory.

The traces are grown from real ones, and written as a recorder writes them: a copy of all events
after the other, each with requests, steps and times of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_trace.events import (
    BackendSelected,
    EngineConfigured,
    Event,
    RequestArrived,
    StepScheduled,
    StepUpdated,
)
from vllm_trace.trace import REQUEST_LISTS, time_of
from vllm_trace.tracefile import SUFFIX, TraceFile
from vllm_trace.tracewriter import TraceWriter

ONCE = (EngineConfigured, BackendSelected)
"""What a process tells when it starts."""


def grown(path: Path, num_events: int, made: Path) -> Path:
    """A file of at least ``num_events``, with the events of ``path`` as often as it takes."""
    source = TraceFile(path)
    whole = list(source.batches())
    flat = [event for batch in whole for event in batch]
    requests = 1 + max(event.request for event in flat if type(event) is RequestArrived)
    steps = max(event.step for event in flat if type(event) is StepScheduled)
    times = [at for at in map(time_of, flat) if at is not None]
    span = max(times) - min(times) + 1_000_000
    writer, count, copy = TraceWriter(made, source.header), 0, 0
    before: dict[str, Any] = {}
    while count < num_events:
        for batch in source.batches():
            shifted = [*_shifted(batch, copy, copy * requests, copy * steps, copy * span, before)]
            if shifted:
                writer.write(shifted)
            count += len(shifted)
        copy += 1
    writer.close({"dropped": 0, "failures": {}})
    return made


def _shifted(
    batch: list[Event], copy: int, requests: int, steps: int, span: int, before: dict[str, Any]
) -> Iterator[Event]:
    for event in batch:
        if copy and isinstance(event, ONCE):
            continue
        fields = event.__struct_fields__
        if "request" in fields:
            event.request += requests
        for name in REQUEST_LISTS:
            if name in fields:
                setattr(event, name, [number + requests for number in getattr(event, name)])
        if "step" in fields:
            event.step += steps
        for name in ("at_ns", "started_ns", "forward_ns"):
            at = getattr(event, name, None)
            if at is not None:
                setattr(event, name, [a + span for a in at] if type(at) is list else at + span)
        if type(event) is RequestArrived:
            event.request_id = f"{event.request_id}-{copy}" if copy else event.request_id
        elif type(event) is StepScheduled:
            # What a recorder leaves out because it is as in the last step.
            for name in ("requests", "num_tokens"):
                own = getattr(event, name)
                if own == before.get(name):
                    setattr(event, name, None)
                before[name] = own
        elif type(event) is StepUpdated and event.num_output_tokens is not None:
            if all(number == 1 for number in event.num_output_tokens):
                event.num_output_tokens = None
        yield event


WORKER = """
import sys, tempfile, time
from pathlib import Path
from vllm_trace.export import export, format_of
from vllm_trace.trace import read_trace
name, path, small = sys.argv[1:]
format_of(name)
with tempfile.TemporaryDirectory() as folder:
    if name == "parquet":
        from vllm_trace.export import parquet
        usual, parquet.FAST_FROM = parquet.FAST_FROM, 0
    began = time.process_time()
    export(read_trace(small), name, folder + "/small")
    first = time.process_time() - began
    if name == "parquet":
        parquet.FAST_FROM = usual
    began = time.process_time()
    export(read_trace(path), name, folder + "/made")
    took = time.process_time() - began
    made = Path(folder + "/made")
    size = sum(f.stat().st_size for f in ([made] if made.is_file() else made.iterdir()))
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(took, first, peak, size)
"""
"""CPU seconds of the export; of one of a small trace before it, which loads what is compiled."""

WITHOUT_DERIVED = WORKER.replace(
    "    began = time.process_time()\n    export(read_trace(small)",
    "    parquet._makers = lambda *_: {}\n"
    "    began = time.process_time()\n    export(read_trace(small)",
)
"""The tables of events alone."""

GOLD = Path(__file__).resolve().parents[1] / "tests" / "gold"


@dataclass(frozen=True)
class Figure:
    """An export in a fresh process."""

    format: str
    trace: str
    num_events: int
    seconds: float
    """CPU, all threads."""
    slowest_seconds: float
    """Of all runs; ``seconds`` is the fastest."""
    first_seconds: float
    """CPU of the export of a small trace before it."""
    peak_mb: float
    bytes_an_event: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"events_per_s": self.num_events / self.seconds}


def figure(name: str, trace: str, path: Path, worker: str = WORKER, repeats: int = 1) -> Figure:
    """Export a file, each time in a process of its own."""
    runs = []
    for _ in range(repeats):
        done = subprocess.run(
            [sys.executable, "-c", worker, name, str(path), str(GOLD / "hello.vtrace")],
            capture_output=True,
            text=True,
            check=True,
        )
        runs.append([float(said) for said in done.stdout.split()])
    took, first, _, size = min(runs)
    peak = max(run[2] for run in runs)
    count = TraceFile(path).finish().num_events
    said = name if worker is WORKER else f"{name}, events alone"
    return Figure(said, trace, count, took, max(runs)[0], first, peak / 1024, size / count)


def sources(folder: Path, steps: int) -> dict[str, Path]:
    """What the big traces are grown from: a scheduler's run at both levels, a whole engine's."""
    from bench import arms
    from bench.engine import Engine

    engine = Engine()
    run = {
        f"scheduler, {level}": arms.trace_of(
            lambda: engine.serve(steps), folder / level, level=level
        )
        for level in ("full", "light")
    }
    return run | {"engine and worker, full": GOLD / "mixed.vtrace"}


BIG = 2_000_000
LONG = 10_000_000
"""Events of the longest trace, of which memory is the question."""


def make(folder: Path, quick: bool) -> None:
    """The traces of all sizes: ``<what it is>-<events>.vtrace``."""
    sizes = (100_000, 300_000) if quick else (100_000, BIG)
    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as runs:
        for label, source in sources(Path(runs), 300 if quick else 1500).items():
            longer = () if quick or label != "scheduler, full" else (LONG,)
            for size in (*sizes, *longer):
                grown(source, size, folder / f"{label}-{size}{SUFFIX}")


REPEATS = 3
"""Runs of what is not quick."""


def measure(
    quick: bool, tell: Any = lambda text: None, made: Path | None = None, only: str = ""
) -> list[dict[str, Any]]:
    """All figures, as plain values; of the traces in ``made`` when they were made before.

    ``only`` names the traces that are wanted by how their files begin.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as folder:
        if made is None:
            tell("recording runs for the exports")
            made = Path(folder)
            make(made, quick)
        for big in sorted(made.glob(f"{only}*{SUFFIX}"), key=_label_and_size):
            label, size = _label_and_size(big)
            jobs = [("parquet", WORKER), ("parquet", WITHOUT_DERIVED)]
            if size == 100_000 or quick:
                jobs += [("json", WORKER), ("perfetto", WORKER)]
            for name, worker in jobs[:1] if size == LONG else jobs:
                tell(f"{name} of {size:,} events, {label}")
                repeats = REPEATS if size == BIG else 1
                found.append(figure(name, label, big, worker, repeats).to_dict())
    return found


def _label_and_size(path: Path) -> tuple[str, int]:
    label, _, size = path.stem.rpartition("-")
    return label, int(size)


HEADS = ("to", "trace", "events", "events/s, one core", "peak memory", "bytes an event")


def _rates(one: dict[str, Any]) -> str:
    """Events a second: of the slowest run to the fastest, when there were several."""
    seconds = one["seconds"], one.get("slowest_seconds", one["seconds"])
    fast, slow = (one["num_events"] / took / 1e6 for took in seconds)
    return f"{fast:.2f} M" if f"{slow:.2f}" == f"{fast:.2f}" else f"{slow:.2f}–{fast:.2f} M"


def rows(found: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [
        (
            one["format"],
            one["trace"],
            f"{one['num_events']:,}",
            _rates(one),
            f"{one['peak_mb']:.0f} MB",
            f"{one['bytes_an_event']:.1f}",
        )
        for one in found
    ]


HOW = """\
Each export runs in a fresh process on a trace grown from a real one: its events over and over with
requests, steps and times of their own, written as a recorder writes them. CPU time of all threads,
reading included; imports and the loading of compiled functions are not: a small export before it does
them. `events alone` is Parquet without `blocks`, `requests` and `steps`. Target: 1 M events/s to
Parquet, memory that does not grow with the trace. Where there are two numbers it was run three times:
the slowest and the fastest. Compiling for the first time on a machine takes some seconds more, once.
With `--traces FOLDER` the traces are made by a first run and kept; with `--only NAME` those whose files
begin so are measured, and the other figures stay.
"""


def write(found: list[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    """``export_tables.json`` and ``export_tables.md``."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"schema": 1, "about": about, "figures": found}
    (folder / "export_tables.json").write_text(json.dumps(document, indent=1) + "\n")
    table = [HEADS, tuple("---" for _ in HEADS), *rows(found)]
    lines = [
        "# What an export to tables, lines and a timeline takes",
        "",
        f"- Command: `{about['command']}`",
        f"- Date: {about['date']}",
        f"- Machine: {about['machine']}; load before {about['load'][0]}",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in about['versions'].items())}",
        "",
        *("| " + " | ".join(row) + " |" for row in table),
        "",
        HOW,
    ]
    (folder / "export_tables.md").write_text("\n".join(lines))


def main() -> None:
    from bench.__main__ import ROOT, about

    quick = "--quick" in sys.argv
    told = about() | {"command": " ".join(["python -m bench.export_tables", *sys.argv[1:]])}
    made = None
    if "--traces" in sys.argv:
        made = Path(sys.argv[sys.argv.index("--traces") + 1])
        told["command"] = told["command"].replace(str(made), "FOLDER")
        if not made.is_dir():
            made.mkdir(parents=True)
            make(made, quick)
            return
    only = sys.argv[sys.argv.index("--only") + 1] if "--only" in sys.argv else ""
    found = measure(quick, lambda text: print(text, file=sys.stderr), made, only)
    folder = ROOT / "reports" / "bench"
    if only:
        told["command"] = told["command"].partition(" --only")[0] + " --only NAME"
        before = json.loads((folder / "export_tables.json").read_text())["figures"]
        new = {(one["trace"], one["num_events"]) for one in found}
        found += [one for one in before if (one["trace"], one["num_events"]) not in new]
        found.sort(key=lambda one: (one["trace"], one["num_events"]))
    write(found, told, folder)
    for row in (HEADS, *rows(found)):
        print(" | ".join(row))


if __name__ == "__main__":
    main()
