"""Export of spans: events a second to OTLP protobuf on one core, memory, and what ``--otlp`` adds to a step.

``spans`` turns a recorded run of the real scheduler into OTLP protobuf in a fresh process, at two
sizes: what memory it needs must not depend on them. ``kinds`` does it with recorded runs of other
sorts. ``streaming`` is the scheduler-only step with a
sidecar that follows the trace and sends to a receiver, one that is there and one that is gone, in
pairs with the same traced step while the sidecar is stopped.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import count as count_up
from pathlib import Path
from typing import Any

import msgspec

from bench import overhead
from vllm_trace.events import Event, RequestArrived
from vllm_trace.trace import time_of
from vllm_trace.tracefile import TraceFile
from vllm_trace.tracewriter import TraceWriter

EXPORT = """
import sys, time
from pathlib import Path
from vllm_trace.export.otlp import encoded, SpanFold
from vllm_trace.trace import read_trace
trace, size, spans = read_trace(Path(sys.argv[1])), 0, 0
began = time.process_time()
for data, count in encoded(trace, SpanFold()):
    size += len(data)
    spans += count
took = time.process_time() - began
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(trace.files[0].num_events, spans, size, took, peak)
"""


@dataclass(frozen=True)
class Exporting:
    """A trace as OTLP protobuf, on one core."""

    num_events: int
    num_spans: int
    num_bytes: int
    seconds: float
    """CPU time, reading included."""
    peak_mb: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"events_per_s": self.num_events / self.seconds}


def export_spans(path: Path) -> Exporting:
    """Export in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, str(path)], capture_output=True, text=True, check=True
    )
    events, spans, size, took, peak = done.stdout.split()
    return Exporting(int(events), int(spans), int(size), float(took), int(peak) / 1024)


def spans(path: Path, counts: tuple[int, ...], folder: Path) -> list[dict[str, Any]]:
    """The trace prolonged to each of these numbers of events."""
    found = []
    for count in counts:
        big = prolonged(path, count, folder / f"{count}-spans.vtrace")
        found.append(export_spans(big).to_dict())
        big.unlink()
    return found


GOLD = Path(__file__).resolve().parents[1] / "tests" / "gold"
KINDS = {
    "engine and worker": "mixed",
    "preemptions": "preempt",
    "shared prefixes": "prefix",
    "long outputs": "long",
}
"""Sort → the golden trace that is of it, with all that a worker tells."""


def kinds(num_events: int, folder: Path, repeat: int = 3) -> dict[str, dict[str, Any]]:
    """Golden traces of engines with their workers, prolonged to so many events; the best of several."""
    found = {}
    for sort, name in KINDS.items():
        big = prolonged(GOLD / f"{name}.vtrace", num_events, folder / f"{name}.vtrace")
        runs = [export_spans(big).to_dict() for _ in range(repeat)]
        found[sort] = max(runs, key=lambda run: run["events_per_s"])
        big.unlink()
    return found


def prolonged(path: Path, num_events: int, made: Path) -> Path:
    """The same run again and again in one process: steps, requests and the clock go on, as in a real one."""
    trace = TraceFile(path)
    writer = TraceWriter(made, trace.header)
    times = [time for event in trace.events() if (time := time_of(event)) is not None]
    first, last = min(times), max(times)
    step = max(getattr(event, "step", 0) for event in trace.events())
    request = 1 + max(e.request for e in trace.events() if isinstance(e, RequestArrived))
    for number in count_up():
        shift = Shift(number * step, number * request, number * (last - first + 10**9))
        for batch in trace.batches():
            writer.write([shift.moved(event) for event in batch])
        if writer.num_events >= num_events:
            break
    writer.close({"dropped": 0, "failures": {}})
    return made


@dataclass(frozen=True)
class Shift:
    """How far the numbers of an event are from those that it had."""

    step: int
    request: int
    ns: int

    def moved(self, event: Event) -> Event:
        moved = {}
        for name in event.__struct_fields__:
            by = {"step": self.step, "request": self.request}.get(name, 0)
            if name in ("at_ns", "started_ns", "forward_ns"):
                by = self.ns
            elif name in ("requests", "new", "resumed", "preempted", "finished", "kept"):
                by = self.request
            value = getattr(event, name)
            if by and value:
                many = isinstance(value, list)
                moved[name] = [one + by for one in value] if many else value + by
            elif by and name in ("step", "request"):
                moved[name] = value + by
        return msgspec.structs.replace(event, **moved)


# Streaming --------------------------------------------------------------------------------

STEPS = 128
"""In a stretch. The sidecar that goes on finds what grew while it was stopped, and works at once."""

PAIRS_PER_FILL = 5
"""No more than the requests have tokens for: a step without any measures nothing."""

START_S = 2.0
"""A sidecar is up and waiting after this; an engine takes longer to start."""


@contextmanager
def receiver(cores: set[int]) -> Iterator[str]:
    """A gRPC receiver in a process of its own, so that its work is nobody's here."""
    code = (
        "import sys; sys.path.append('.')\n"
        "from tests.export.receiver import Inbox, grpc_receiver\n"
        "class Sink(Inbox):\n"
        "    def take(self, request, headers): return True\n"
        "with grpc_receiver(Sink()) as url:\n"
        "    print(url, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    os.sched_setaffinity(process.pid, cores)
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate()


@dataclass(frozen=True)
class Streaming:
    """A traced step with a sidecar, against the same without one. Ratios of CPU time in a pair."""

    arm: str
    rounds: int
    step_us: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratio_error: float
    """Standard error of the median."""
    pairs: list[tuple[float, float]]
    """µs of a step with and without, to which a later measurement adds its own."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def pinned() -> Iterator[set[int]]:
    """This process on one core; yields the cores for all others, the same ones if there is but one."""
    before = os.sched_getaffinity(0)
    own = {min(before)}
    os.sched_setaffinity(0, own)
    try:
        yield (before - own) or own
    finally:
        os.sched_setaffinity(0, before)


def paired(engine: Any, url: str, others: set[int], pairs: int) -> list[tuple[float, float]]:
    """CPU time of a traced step in µs, with the sidecar at work and with it stopped, in turn.

    Stretches are short, so that a processor that gets slower or faster does it to both of a pair.
    What grew while the sidecar was stopped it has to read when it goes on: it works twice as hard.
    Without a URL nobody is there to be stopped: the noise.
    """
    from bench.engine import NUM_REQUESTS
    from vllm_trace import hooks, sidecar
    from vllm_trace.options import Options

    found = []
    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as folder:
        hooks.attach(Options(dir=folder))
        beside = sidecar.start(Path(folder), url) if url else None

        def stretch(signal_number: int) -> float:
            if beside is not None:
                beside.process.send_signal(signal_number)
            began = time.process_time_ns()
            for _ in range(STEPS):
                engine.step()
            return (time.process_time_ns() - began) / STEPS / 1000

        try:
            if beside is not None:
                os.sched_setaffinity(beside.process.pid, others)
                time.sleep(START_S)
            for number in range(pairs):
                if number % PAIRS_PER_FILL == 0:
                    engine.fill()
                    for _ in range(overhead.WARM_UP):
                        engine.step()
                order = [signal.SIGCONT, signal.SIGSTOP]
                if (
                    number + number // PAIRS_PER_FILL
                ) % 2:  # each goes first as often, also in a fill
                    order.reverse()
                taken = {one: stretch(one) for one in order}
                running = len(engine.core.scheduler.running)
                assert running == NUM_REQUESTS, "requests ended within a stretch"
                found.append((taken[signal.SIGCONT], taken[signal.SIGSTOP]))
            return found
        finally:
            hooks.detach()
            if beside is not None:
                beside.abandon()


ARMS = {"nothing": "", "--otlp": "URL", "--otlp, nobody there": "http://127.0.0.1:9"}
"""``URL`` is the receiver's."""


def streaming(
    pairs: int,
    tell: Callable[[str], None] = lambda text: None,
    arms: Iterable[str] = ARMS,
    before: Iterable[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """What ``--otlp`` adds to a step, with a receiver and without; ``before`` was measured earlier."""
    from bench.engine import Engine, settle_heap

    engine = Engine()
    known = {one["arm"]: [(us, base) for us, base in one["pairs"]] for one in before}
    with pinned() as others, receiver(others) as url:
        settle_heap()
        for arm in arms:
            tell(f"streaming: {arm}")
            target = url if ARMS[arm] == "URL" else ARMS[arm]
            known[arm] = known.get(arm, []) + paired(engine, target, others, pairs)
    engine.empty()
    return [_summary(arm, known[arm]).to_dict() for arm in ARMS if arm in known]


def _summary(arm: str, pairs: list[tuple[float, float]]) -> Streaming:
    ratios = [us / base for us, base in pairs]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    us = statistics.median(us for us, _ in pairs)
    error = (high - low) / 1.35 * 1.25 / len(pairs) ** 0.5  # as in ``overhead``
    kept = [(round(us, 2), round(base, 2)) for us, base in pairs]
    return Streaming(arm, len(pairs), us, statistics.median(ratios), low, high, error, kept)


def measure(quick: bool, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """All figures of this part."""
    from bench import arms
    from bench.engine import Engine

    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as folder:
        tell("recording a run for the export")
        engine = Engine()
        made = arms.trace_of(lambda: engine.serve(500 if quick else 4000), Path(folder) / "run")
        tell("spans")
        counts = (50_000, 200_000) if quick else (100_000, 1_000_000)
        found: dict[str, Any] = {"spans": spans(made, counts, Path(folder))}
        found["kinds"] = kinds(counts[0], Path(folder))
    return found | {"streaming": streaming(60 if quick else 1500, tell)}


def rows(figures: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, figure, target)."""
    small, large = figures["spans"]
    made = [
        ("spans to OTLP protobuf", f"{large['events_per_s'] / 1e3:.0f} k events/s", "≥ 200 k/s"),
        (
            "memory of it",
            f"{small['peak_mb']:.0f} MB at {small['num_events']:,} events, "
            f"{large['peak_mb']:.0f} MB at {large['num_events']:,}",
            "the same",
        ),
    ]
    for sort, one in figures.get("kinds", {}).items():
        made.append(
            (f"the same: {sort}", f"{one['events_per_s'] / 1e3:.0f} k events/s", "≥ 200 k/s")
        )
    for arm in figures["streaming"]:
        text = f"{100 * (arm['ratio'] - 1):+.2f} % of a traced step's CPU time, "
        text += f"95 % sure to ± {196 * arm['ratio_error']:.2f} %, {arm['rounds']} pairs"
        made.append(
            (f"step: {arm['arm']}", text, "≤ 0.5 %" if "otlp" in arm["arm"] else "the noise")
        )
    return made


def main() -> None:
    """``python -m bench.export_spans [--quick]``, or ``--more ARM PAIRS``: add to what the report has."""
    if "--more" not in sys.argv:
        for row in rows(measure("--quick" in sys.argv)):
            print(" | ".join(row))
        return
    from bench.__main__ import ROOT, write_spans

    arm, pairs = sys.argv[sys.argv.index("--more") + 1 :][:2]
    folder = ROOT / "reports" / "bench"
    figures = json.loads((folder / "export_spans.json").read_text())
    before = [one for one in figures["streaming"] if one.get("pairs")]
    figures["streaming"] = streaming(int(pairs), print, [arm], before)
    write_spans(figures, folder)


if __name__ == "__main__":
    main()
