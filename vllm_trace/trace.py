"""A trace: the files of all processes of one run, read as one stream.

Processes of one host share the monotonic clock, so their events merge by time. Facts of a call
come before the call itself in a file ("inner before outer"), so an event without a time of its
own takes the beginning of the next one that has it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vllm_trace.errors import TraceError
from vllm_trace.events import (
    Event,
    RequestArrived,
    RequestSeen,
)
from vllm_trace.tracefile import SUFFIX, TraceFile


class Record(NamedTuple):
    """An event with its place in the trace."""

    number: int
    """Position in the merged stream, from 1: the "event N" of every message."""
    process: int
    """Index into ``Trace.files``."""
    event: Event


class Trace:
    """All processes of one run.

    ``problems`` says what is missing and is complete when ``records`` was read to its end.
    """

    def __init__(self, files: list[TraceFile]) -> None:
        self.files = files
        self.names: dict[int, str] = {}
        """Request number → name, filled while reading."""

    @property
    def level(self) -> str:
        """``light`` when any process recorded at that level."""
        levels = {file.header.get("level", "full") for file in self.files}
        return "light" if "light" in levels else "full"

    @property
    def header(self) -> dict[str, Any]:
        """The header of the process that scheduled, or of the first."""
        roles = {str(file.header.get("role")): file for file in reversed(self.files)}
        return (roles.get("engine") or roles.get("main") or self.files[0]).header

    @property
    def problems(self) -> list[str]:
        """What keeps this trace from being the whole truth, in sentences."""
        return [sentence for file in self.files for sentence in self.problems_of(file)]

    @staticmethod
    def problems_of(file: TraceFile) -> list[str]:
        """Those of one process."""
        said = []
        who = f"{file.header.get('role')}-{file.header.get('pid')}"
        if file.dropped:
            said.append(f"{who}: {file.dropped} events were dropped")
        if file.truncated:
            said.append(f"{who}: truncated ({file.truncated})")
        for hook in file.header.get("hooks", ()):
            if hook["state"] in ("missing", "incompatible"):
                without = hook.get("without", "what it tells is missing")
                said.append(f"{who}: {hook['target']} {hook['state']}: {without}")
        for hook, times in file.footer.get("failures", {}).items():
            said.append(f"{who}: the probe of {hook} failed {times} times")
        return said

    def engines(self) -> list[Trace]:
        """A trace for each scheduler (data parallel: one a rank), with the workers that it started.

        A worker's header names its parent. Where that is no scheduler of this trace, nothing is taken apart.
        """
        parts = {
            (file.header.get("host"), file.header.get("pid")): [file]
            for file in self.files
            if file.header.get("role") == "engine"
        }
        if len(parts) < 2:
            return [self]
        for file in self.files:
            if file.header.get("role") == "engine":
                continue
            part = parts.get((file.header.get("host"), file.header.get("parent")))
            if part is None:
                return [self]
            part.append(file)
        return [Trace(files) for files in parts.values()]

    def path_of(self, process: int) -> Path:
        """The file of one process, which is a trace by itself."""
        return self.files[process].path

    def events(self) -> Iterator[Event]:
        """Every event, merged."""
        return (record.event for record in self.records())

    def records(self) -> Iterator[Record]:
        """Every event with its number and process, merged; requests are numbered alike."""
        self.names.clear()
        if len(self.files) == 1:
            yield from self._single()
            return
        offsets = self._clock_offsets()
        streams = [
            _timed(index, file, offset)
            for index, (file, offset) in enumerate(zip(self.files, offsets, strict=True))
        ]
        renumber = _Renumber(self.names, len(self.files))
        merged = heapq.merge(*streams, key=lambda item: item[0])
        for number, (_, index, event) in enumerate(merged, 1):
            yield Record(number, index, renumber(index, event))

    def _single(self) -> Iterator[Record]:
        number = 0
        names = self.names
        for batch in self.files[0].batches():
            for event in batch:
                number += 1
                if type(event) is RequestArrived or type(event) is RequestSeen:
                    names[event.request] = event.request_id
                yield Record(number, 0, event)

    def _clock_offsets(self) -> list[int]:
        """Nanoseconds to add to a file's times; not 0 only for files of another host."""
        first = self.files[0].header
        offsets = []
        for file in self.files:
            clock, base = file.header.get("clock", {}), first.get("clock", {})
            if file.header.get("host") == first.get("host") or not (clock and base):
                offsets.append(0)
                continue
            there = clock["unix_ns"] - clock["monotonic_ns"]
            offsets.append(there - (base["unix_ns"] - base["monotonic_ns"]))
        return offsets


def read_trace(path: Path | str) -> Trace:
    """Open a trace: a folder of ``.vtrace`` files (or one that holds ``trace/``), or one file.

    Raises: ``TraceError`` when there is none or a header cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return Trace([TraceFile(path)])
    if not path.is_dir():
        raise TraceError(
            f"there is no file or folder {str(path)!r}",
            hint="Give a trace file or the folder of a run",
        )
    for folder in (path, path / "trace"):
        found = sorted(folder.glob(f"*{SUFFIX}"))
        if found:
            files = [TraceFile(file) for file in found]
            files.sort(key=lambda f: (f.header.get("role") == "worker", f.header.get("pid", 0)))
            return Trace(files)
    raise TraceError(
        f"{path} holds no {SUFFIX} file", hint="Was tracing on? Try: vllm-trace doctor"
    )


def time_of(event: Event) -> int | None:
    """When the event began, or None when it has no time of its own."""
    at = getattr(event, "started_ns", None)
    if at is None:
        return getattr(event, "at_ns", None)
    return at if type(at) is int else (at[0] if at else None)


def _timed(index: int, file: TraceFile, offset: int) -> Iterator[tuple[int, int, Event]]:
    """(time, process, event) with times that never go back within a file."""
    last = 0
    for batch in file.batches():
        times: list[int] = [0] * len(batch)
        upcoming: int | None = None
        for place in range(len(batch) - 1, -1, -1):
            own = time_of(batch[place])
            if own is not None:
                upcoming = own if upcoming is None else min(own, upcoming)
            times[place] = -1 if upcoming is None else upcoming
        for at, event in zip(times, batch, strict=True):
            last = max(last, at + offset) if at >= 0 else last
            yield last, index, event


class _Renumber:
    """Gives each request one number in the whole trace, found by its name."""

    def __init__(self, names: dict[int, str], num_files: int) -> None:
        self.names = names
        self.latest: dict[str, int] = {}
        self.local: list[dict[int, str]] = [{} for _ in range(num_files)]
        self.owned: list[dict[int, int]] = [{} for _ in range(num_files)]

    def __call__(self, index: int, event: Event) -> Event:
        if type(event) is RequestArrived:
            number = self._introduce(event.request_id)
            self.owned[index][event.request] = number
        elif type(event) is RequestSeen:
            self.local[index][event.request] = event.request_id
            if event.request_id not in self.latest:
                self._introduce(event.request_id)
        return renumbered(event, lambda number: self._number(index, number))

    def _introduce(self, name: str) -> int:
        number = len(self.names)
        self.names[number] = name
        self.latest[name] = number
        return number

    def _number(self, index: int, number: int) -> int:
        owned = self.owned[index].get(number)
        if owned is not None:
            return owned
        name = self.local[index].get(number)
        return number if name is None else self.latest[name]


REQUEST_LISTS = ("requests", "new", "resumed", "preempted", "finished", "kept")
"""Fields that are lists of request numbers."""


def renumbered(event: Event, number: Any) -> Event:
    """Replace every request number in the event, in place."""
    fields = event.__struct_fields__
    if "request" in fields:
        event.request = number(event.request)  # type: ignore[attr-defined]
    for name in REQUEST_LISTS:
        if name in fields:
            setattr(event, name, [number(request) for request in getattr(event, name)])
    if "num_running" in fields:
        event.num_spec_tokens = {  # type: ignore[attr-defined]
            number(r): n
            for r, n in event.num_spec_tokens.items()  # type: ignore[attr-defined]
        }
    return event


def kinds(records: Iterable[Record]) -> dict[str, int]:
    """How many events there are of each kind."""
    counted: dict[str, int] = {}
    for record in records:
        counted[record.event.kind] = counted.get(record.event.kind, 0) + 1
    return counted
