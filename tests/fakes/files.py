"""Small trace files for tests of the writer and the reader."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vllm_trace.events import SCHEMA_VERSION, BlocksTaken, Event
from vllm_trace.tracefile import SUFFIX, TAIL_SUFFIX, TraceFile
from vllm_trace.tracewriter import TraceWriter

HEADER = {"schema": SCHEMA_VERSION, "role": "test", "pid": 1}
SMALL_TAIL = 1024


def write(
    path: Path, batches: Iterable[list[Event]], tail_size: int = SMALL_TAIL, close: bool = True
) -> TraceWriter:
    """The writer of a file with these batches."""
    writer = TraceWriter(path, HEADER, tail_size)
    for batch in batches:
        writer.write(batch)
    if close:
        writer.close({"dropped": writer.dropped})
    return writer


def write_steady(writer: TraceWriter, record: tuple[int, ...]) -> bool:
    """What the probes of level light do in a steady step: the words of a record, the step last."""
    run = writer.steady_run
    if run.at >= run.end:
        return False
    at = run.at
    for index in range(1, 8):
        run.words[at + index] = record[index]
    run.words[at] = record[0]
    run.at = at + 8
    return True


def taken(*numbers: int) -> list[Event]:
    """A batch with an event for each number."""
    return [BlocksTaken([number]) for number in numbers]


def read(path: Path) -> tuple[list[Event], TraceFile]:
    """All events, and the file with what a reading to its end has found out."""
    file = TraceFile(path)
    return list(file.events()), file


def files_of(folder: Path) -> dict[str, tuple[list[Event], TraceFile]]:
    """Every file of a trace by its name, read."""
    return {path.name: read(path) for path in sorted(folder.glob(f"*{SUFFIX}"))}


def tail_of(path: Path) -> Path:
    return path.with_name(path.name + TAIL_SUFFIX)
