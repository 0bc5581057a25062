"""A trace that is still being written, read a little at a time: each look takes in what is new.

The writer is not asked and not waited for, and no event is read twice, however long the engine runs.
The writer's rules (see ``tracefile``) are enough: a frame holds what stood in the tail of the generation
before it, in the same bytes, so what was read from the tail is skipped in the frame; and a tail is
emptied only after its frame is in the file, so what was read is right if no frame has come in the
meantime. Files that appear later (a worker that starts after the engine) are found.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from pathlib import Path

import zstandard

from vllm_trace.errors import TraceError
from vllm_trace.events import Event
from vllm_trace.trace import Trace, time_of
from vllm_trace.tracefile import (
    BATCHES,
    MAX_RAW,
    SIZE,
    SUFFIX,
    TAIL,
    TAIL_MAGIC,
    TAIL_SUFFIX,
    UNREADABLE,
    TraceFile,
    batches_in,
    decode_batch,
    is_running,
    read_frame,
    same_run,
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
        self._tail_at = BATCHES
        self.inode = path.stat().st_ino
        self.ended = False
        """The footer was read: nothing comes any more."""
        self.broken = ""
        """Why it is read no further."""

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
                    seen, self._tail_at = self._tail_at - BATCHES, BATCHES
                    self.num_frames += 1
                    yield from self._decode_frame(raw[seen:])
                else:
                    raise TraceError(f"{self.path} has a frame of unknown kind {kind!r}")

    def _new_in_tail(self) -> Iterator[list[Event]]:
        try:
            with open(self._tail_path, "rb") as file:
                head = file.read(BATCHES)
                if len(head) < BATCHES or not head.startswith(TAIL_MAGIC):
                    return
                _, generation, self.dropped, _ = TAIL.unpack(head[: TAIL.size])
                if generation != self.num_frames:
                    return
                file.seek(self._tail_at)
                data, area = file.read(MAX_RAW), same_run(file, head)
            if self._frame_has_come():
                return  # the tail may have been emptied while it was read
        except OSError:
            return
        for body in list(batches_in(data, 0, self._tail_at, area)):
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
    """The files of a run, as many as there are by now.

    One that is damaged is read no further, and the others go on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[GrowingFile] = []
        self.lost: list[str] = []
        """What happened to files that were read and are not there any more."""
        self._unread: dict[Path, str] = {}
        """Files whose header cannot be read: it is being written, or they are none of ours."""

    def new_batches(self) -> Iterator[tuple[GrowingFile, list[Event]]]:
        """(file, events) of all that came since the last call, merged by when each batch began."""
        self._look()
        heap: list[_Head] = []
        for index, file in enumerate([*self.files]):
            _push(heap, 0, index, file, self._unless_damaged(file))
        while heap:
            at, index, file, events, stream = heapq.heappop(heap)
            yield file, events
            _push(heap, at, index, file, stream)

    @staticmethod
    def _unless_damaged(file: GrowingFile) -> Iterator[list[Event]]:
        if not file.broken:
            try:
                yield from file.new_batches()
            except (TraceError, OSError) as error:
                file.broken = str(error)

    def _look(self) -> None:
        """Find files that are new; forget those that are gone or were begun anew."""
        found = {path: inode for path in self._paths() if (inode := _inode_of(path))}
        for file in [*self.files]:
            if found.get(file.path) != file.inode:
                what = "begun anew" if file.path in found else "removed"
                self.lost.append(f"{file.path} was {what} while it was read")
                self.files.remove(file)
        known = {file.path for file in self.files}
        self._unread.clear()
        for path in found:
            if path not in known:
                try:
                    self.files.append(GrowingFile(path))
                except (TraceError, OSError) as error:
                    self._unread[path] = str(error)

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
        return bool(self.files) and all(file.ended for file in self.files)

    @property
    def is_written(self) -> bool:
        """Whether any process may still write."""
        return any(file.is_written for file in self.files if not file.broken)

    @property
    def problem(self) -> str:
        """Why nothing, or no more, can be read just now; empty when all is well."""
        if not self.files:
            unread = next(iter(self._unread.values()), "")
            return unread or f"no {SUFFIX} file in {self.path} yet"
        return next((file.broken for file in self.files if file.broken), "")

    @property
    def problems(self) -> list[str]:
        """What keeps this trace from being the whole truth."""
        broken = [file.broken for file in self.files if file.broken]
        of_files = [sentence for file in self.files for sentence in Trace.problems_of(file)]
        return [*self.lost, *self._unread.values(), *broken, *of_files]


_Head = tuple[int, int, GrowingFile, list[Event], Iterator[list[Event]]]
"""(when it began, number of the file, file, the batch, what follows in it)."""


def _push(
    heap: list[_Head], at: int, index: int, file: GrowingFile, stream: Iterator[list[Event]]
) -> None:
    """The next batch of a file, which began at ``at`` if none of its events tells."""
    events = next(stream, None)
    if events is not None:
        began = next((time for time in map(time_of, events) if time is not None), at)
        heapq.heappush(heap, (max(at, began), index, file, events, stream))


def _inode_of(path: Path) -> int:
    """0 when it is gone."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0
