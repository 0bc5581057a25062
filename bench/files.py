"""Bytes per event, reading speed, memory of a reader: from files that a real scheduler's run made."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_trace.events import to_dict
from vllm_trace.tracefile import TraceFile
from vllm_trace.tracewriter import TraceWriter

READER = """
import sys, time
from pathlib import Path
from vllm_trace.tracefile import TraceFile
began, count = time.process_time(), 0
for event in TraceFile(Path(sys.argv[1])).events():
    count += 1
took = time.process_time() - began
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(count, took, peak)
"""


@dataclass(frozen=True)
class Size:
    num_events: int
    file_bytes: float
    """Bytes per event in the file, header and footer included."""
    json_bytes: float
    """Bytes per event as JSON lines (``events.to_dict``, no spaces)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"times_smaller": self.json_bytes / self.file_bytes}


@dataclass(frozen=True)
class Reading:
    num_events: int
    seconds: float
    """CPU time of the loop over ``TraceFile.events()``."""
    peak_mb: float
    """Resident memory of the fresh process at its highest (VmHWM)."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"events_per_s": self.num_events / self.seconds}


def size_of(path: Path) -> Size:
    count = json_bytes = 0
    for event in TraceFile(path).events():
        count += 1
        json_bytes += len(json.dumps(to_dict(event), separators=(",", ":"))) + 1
    return Size(count, path.stat().st_size / count, json_bytes / count)


def repeated(path: Path, num_events: int, made: Path) -> Path:
    """A file with the events of ``path`` over and over: at least ``num_events`` of them.

    Every step is spelled out in it, which a recorder does not do: a little harder to read.
    """
    trace = TraceFile(path)
    batches = list(trace.batches())
    writer, count = TraceWriter(made, trace.header), 0
    while count < num_events:
        for batch in batches:
            writer.write(batch)
            count += len(batch)
            if count >= num_events:
                break
    writer.close({"dropped": 0, "failures": {}})
    return made


def read(path: Path) -> Reading:
    """Read every event of a file in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, check=True
    )
    count, took, peak = done.stdout.split()
    return Reading(int(count), float(took), int(peak) / 1024)


def import_seconds(module: str, repeat: int = 7) -> float | None:
    """Time of one import in a fresh process, the best of several; None when it is not there."""
    code = (
        "import time; began = time.perf_counter()\n"
        f"import {module}\n"
        "took = time.perf_counter() - began\n"
        "import sys; assert not {'vllm', 'torch'} & sys.modules.keys(), 'imports vllm or torch'\n"
        "print(took)"
    )
    times = []
    for _ in range(repeat):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode:
            if "No module named" in done.stderr:
                return None
            raise RuntimeError(done.stderr)
        times.append(float(done.stdout))
    return min(times)
