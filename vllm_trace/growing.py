"""A trace that is still being written, read a little at a time: each look takes in what is new.

The writer is not asked and not waited for, and no event is read twice, however long the engine runs.
The writer's rules (see ``tracefile``) are enough: a frame holds what stood in the tail of the generation
before it, in the same bytes, so what was read from the tail is skipped in the frame; and a tail is
emptied only after its frame is in the file, so what was read is right if no frame has come in the
meantime. Files that appear later (a worker that starts after the engine) are found.
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterator
from pathlib import Path

import zstandard

from vllm_trace.errors import TraceError
from vllm_trace.events import Event
from vllm_trace.trace import Trace, time_of
from vllm_trace.tracefile import (
    MAGIC,
    MAX_RAW,
    SIZE,
    SUFFIX,
    TAIL,
    TAIL_SUFFIX,
    UNREADABLE,
    TraceFile,
    batches_in,
    decode_batch,
    is_running,
    read_frame,
    unzip,
)


class GrowingFile(TraceFile):
    """One process's file, followed.

    Raises: ``TraceError`` when its header is not there yet, or damaged.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.begin_reading()
        self._tail_path = path.with_name(path.name + TAIL_SUFFIX)
        self.num_bytes = self._begin
        self._tail_at = TAIL.size
        self.inode = path.stat().st_ino
        self.ended = False
        """The footer was read: nothing comes any more."""

    @property
    def is_written(self) -> bool:
        """Whether somebody may still write to it."""
        return not self.ended and is_running(self.header.get("pid", 0))

    def new_batches(self) -> Iterator[list[Event]]:
        """Yield the batches that came since the last call.

        Raises: ``TraceError`` for damage.
        """
        if not self.ended:
            yield from self._new_frames()
        if not self.ended:
            yield from self._new_in_tail()

    def _new_frames(self) -> Iterator[list[Event]]:
        decompress = zstandard.ZstdDecompressor().decompress
        with open(self.path, "rb") as file:
            file.seek(self.num_bytes)
            while not self.ended:
                try:
                    kind, body = read_frame(file, self.path)
                except EOFError:
                    return
                self.num_bytes = file.tell()
                if kind == b"F":
                    self._read_footer(body)
                    self.ended = True
                elif kind == b"E":
                    raw = unzip(decompress, body, self.path, file)
                    seen, self._tail_at = self._tail_at - TAIL.size, TAIL.size
                    self.num_frames += 1
                    yield from self._decode_frame(raw[seen:])
                else:
                    raise TraceError(f"{self.path} has a frame of unknown kind {kind!r}")

    def _new_in_tail(self) -> Iterator[list[Event]]:
        try:
            with open(self._tail_path, "rb") as file:
                head = file.read(TAIL.size)
                if len(head) < TAIL.size or not head.startswith(MAGIC):
                    return
                _, generation, self.dropped, _ = TAIL.unpack(head)
                if generation != self.num_frames:
                    return
                file.seek(self._tail_at)
                data = file.read(MAX_RAW)
            if self._frame_has_come():
                return  # the tail may have been emptied while it was read
        except OSError:
            return
        for body in list(batches_in(data, 0)):
            try:
                batch = decode_batch(body)
            except UNREADABLE as error:  # its size goes in last: it is whole
                raise TraceError(f"{self.path} has an unreadable tail: {error}") from None
            self._tail_at += SIZE.size + len(body)
            yield self._whole(batch)

    def _frame_has_come(self) -> bool:
        """A whole one: a part of one is being written, or was when the process died."""
        with open(self.path, "rb") as file:
            file.seek(self.num_bytes)
            try:
                read_frame(file, self.path)
            except EOFError:
                return False
        return True


class GrowingTrace:
    """The files of a run, as many as there are by now."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[Path, GrowingFile] = {}

    def new_events(self) -> Iterator[tuple[GrowingFile, Event]]:
        """What each process has added since the last call, in the order of its file.

        Raises: ``TraceError`` when there is no trace yet, or one is damaged.
        """
        self._look()
        for file in self.files.values():
            for batch in file.new_batches():
                for event in batch:
                    yield file, event

    def _look(self) -> None:
        """Find files that are new; forget those that are gone or were begun anew."""
        found = self._paths()
        for path in list(self.files):
            if path not in found or os.stat(path).st_ino != self.files[path].inode:
                del self.files[path]
        problem: TraceError | None = None
        for path in found:
            if path not in self.files:
                try:
                    self.files[path] = GrowingFile(path)
                except TraceError as error:
                    problem = error  # its header is being written
        if not self.files:
            raise problem or TraceError(f"no {SUFFIX} file in {self.path} yet")

    def _paths(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        for folder in (self.path, self.path / "trace"):
            found = sorted(folder.glob(f"*{SUFFIX}"))
            if found:
                return found
        return []

    @property
    def ended(self) -> bool:
        """Every process has closed its file."""
        return bool(self.files) and all(file.ended for file in self.files.values())


class FollowedTrace:
    """The files of a folder, those too that are still to come."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: list[GrowingFile] = []
        self.broken: dict[Path, str] = {}
        """Files that cannot be read on, and why."""

    def poll(self) -> Iterator[tuple[int, list[Event]]]:
        """(file, events) of all that came since the last poll, merged by when each batch began."""
        self._look_for_files()
        heap: list[tuple[int, int, list[Event], Iterator[list[Event]]]] = []
        for index, file in enumerate(self.files):
            self._push(heap, 0, index, self._polled(file))
        while heap:
            at, index, events, stream = heapq.heappop(heap)
            yield index, events
            self._push(heap, at, index, stream)

    @staticmethod
    def _push(heap: list, at: int, index: int, stream: Iterator[list[Event]]) -> None:
        events = next(stream, None)
        if events is not None:
            times = [time for time in map(time_of, events) if time is not None]
            heapq.heappush(heap, (max(at, times[0] if times else at), index, events, stream))

    def _polled(self, file: GrowingFile) -> Iterator[list[Event]]:
        if file.path in self.broken:
            return
        try:
            yield from file.new_batches()
        except (TraceError, OSError) as error:
            self.broken[file.path] = str(error)

    def _look_for_files(self) -> None:
        known = {file.path for file in self.files}
        for folder in (self.folder, self.folder / "trace"):
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                if path not in known:
                    try:
                        self.files.append(GrowingFile(path))
                    except (TraceError, OSError):
                        continue  # its header is being written

    @property
    def is_written(self) -> bool:
        """Whether any process may still write."""
        return any(file.is_written for file in self.files if file.path not in self.broken)

    @property
    def problems(self) -> list[str]:
        """What keeps this trace from being the whole truth."""
        of_files = [sentence for file in self.files for sentence in Trace.problems_of(file)]
        return [*self.broken.values(), *of_files]
