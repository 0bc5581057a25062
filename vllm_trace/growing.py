"""A trace that is still being written, read a little at a time: each look takes in what is new.

No event is read twice, however long the engine runs. Files that appear later (a worker that starts
after the engine) are found; a file that another run has begun anew is begun anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import zstandard

from vllm_trace.errors import TraceError
from vllm_trace.events import Event
from vllm_trace.tracefile import (
    _SIZE,
    _TAIL,
    _UNREADABLE,
    MAGIC,
    SUFFIX,
    TAIL_SUFFIX,
    TraceFile,
    _decode,
    _read_frame,
    _unzip,
)


class GrowingFile(TraceFile):
    """The file of one process. ``new_batches`` goes on where it stopped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._start()
        self.ended = False
        """It has its footer: nothing more will come."""
        self.inode = os.stat(path).st_ino
        self.num_bytes = self._begin
        self._taken = 0
        """Bytes of the tail's batches that were read already."""
        self._decompress = zstandard.ZstdDecompressor().decompress

    def new_batches(self) -> Iterator[list[Event]]:
        """What was written since the last call.

        Raises: ``TraceError`` for damage.
        """
        if self.ended:
            return
        yield from self._new_frames()
        if not self.ended:
            for body in self._new_in_tail():
                batch: list[Event]
                try:
                    batch = [*_decode(body)]
                except _UNREADABLE as error:
                    raise TraceError(f"{self.path} has an unreadable tail: {error}") from None
                yield self._whole(batch)

    def _new_frames(self) -> Iterator[list[Event]]:
        with open(self.path, "rb") as file:
            file.seek(self.num_bytes)
            while True:
                try:
                    kind, body = _read_frame(file, self.path)
                except EOFError:  # it is being written
                    return
                self.num_bytes = file.tell()
                if kind == b"F":
                    self._read_footer(body)
                    self.ended = True
                    return
                raw = _unzip(self._decompress, body, self.path, file)
                self.num_frames += 1
                # It begins with what stood in the tail when that was looked at.
                seen, self._taken = self._taken, 0
                yield from self._decode_frame(raw[seen:])

    def _new_in_tail(self) -> list[bytes]:
        """Batches that joined the tail, if it is the one behind the frames that were read."""
        found, taken = [], self._taken
        try:
            with open(self.path.with_name(self.path.name + TAIL_SUFFIX), "rb") as file:
                head = file.read(_TAIL.size)
                if len(head) < _TAIL.size or not head.startswith(MAGIC):
                    return []
                _, generation, dropped, _ = _TAIL.unpack(head)
                if generation != self.num_frames:
                    return []
                file.seek(_TAIL.size + taken)
                while True:
                    head = file.read(_SIZE.size)
                    size = _SIZE.unpack(head)[0] if len(head) == _SIZE.size else 0
                    body = file.read(size)
                    if not size or len(body) != size:
                        break
                    found.append(body)
                    taken += _SIZE.size + size
            # A writer puts the tail into a frame before it empties it. As long as there is no new
            # frame, what was read here was whole.
            if os.path.getsize(self.path) != self.num_bytes:
                return []
        except OSError:
            return []  # closed: the last frame is there now
        self._taken, self.dropped = taken, dropped
        return found


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
