"""Writes the file of one process, while an engine runs. Its layout: ``tracefile``."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import zstandard

from vllm_trace.errors import TraceError
from vllm_trace.events import Event, StepScheduled, StepUpdated, tag_of
from vllm_trace.packing import encoded, list_head
from vllm_trace.steady import AREA_SIZE, WORDS, SteadyRun
from vllm_trace.tracefile import (
    BATCHES,
    FRAME,
    MAGIC,
    MAX_RAW,
    SIZE,
    TAIL,
    TAIL_MAGIC,
    TAIL_SUFFIX,
    TraceFile,
    is_running,
)

TAIL_SIZE = 512 * 1024
"""Bytes of batches before they are compressed into a frame."""

_put_size = SIZE.pack_into

# A steady step as MessagePack with numbers of fixed width (0xce: u32, 0xcf: u64): StepScheduled with its
# first seven fields and StepUpdated with its first three. The number of silent calls, a byte, is in the middle.
_STEADY = struct.Struct(">3sIBQBIBIBIBI4sIBQBI")
_STEADY_FRONT = struct.Struct("<IB")  # the size of the batch, and that it is a list of so many
_STEADY_HEAD = bytes([0x98, tag_of(StepScheduled), 0xCE])
_STEADY_MIDDLES = {
    kept: bytes([kept & 0xFF, 0x94, tag_of(StepUpdated), 0xCE]) for kept in range(-1, 128)
}


class TraceWriter:
    """Writes the file of one process.

    Never raises after it was opened: what could not be written is counted in ``dropped``, and
    ``failure`` says why. Ctrl-C may come anywhere: a batch is in the file and counted by then, or neither.

    Raises: ``OSError`` when the file cannot be made.
    """

    def __init__(self, path: Path, header: dict[str, Any], tail_size: int = TAIL_SIZE) -> None:
        self.path = path
        self._num_stored = 0
        self.dropped = 0
        self.failure = ""
        self._compress = zstandard.ZstdCompressor(level=1).compress
        self._num_frames = 0
        self._tail_path = path.with_name(path.name + TAIL_SUFFIX)
        self._file: BinaryIO = open(path, "xb", buffering=0)  # noqa: SIM115
        try:
            self._file.write(MAGIC)
            self._write_frame(b"H", msgspec.json.encode(header), bytes)
            self._tail = self._open_tail(tail_size)
            self.steady_run = SteadyRun(memoryview(self._tail)[TAIL.size : BATCHES])
            # Room for the size of 0 that ends the batches is always left.
            self._tail_end = self._used = len(self._tail) - SIZE.size
            self._begin_tail()
        except BaseException:
            self._file.close()
            path.unlink(missing_ok=True)
            self._tail_path.unlink(missing_ok=True)
            raise

    @property
    def num_events(self) -> int:
        """How many were written."""
        return self._num_stored + self.steady_run.num_events

    def _open_tail(self, size: int) -> mmap.mmap:
        with open(self._tail_path, "x+b") as file:
            # Without real blocks behind it, a full disk would turn a store into a SIGBUS.
            os.posix_fallocate(file.fileno(), 0, size + AREA_SIZE)
            return mmap.mmap(file.fileno(), size + AREA_SIZE)

    def _begin_tail(self) -> None:
        # Zeros all the way, so that a batch always has a size of 0 behind it. When the tail is new
        # this also touches each of its pages: no step pays for a page fault later.
        self._tail[BATCHES : self._used] = bytes(self._used - BATCHES)
        self.steady_run.clear()
        self._describe_tail()
        self._used = BATCHES

    def _describe_tail(self) -> None:
        self._tail[: TAIL.size] = TAIL.pack(
            TAIL_MAGIC, self._num_frames, self.dropped, self.failure.encode()[:104]
        )

    def write(self, events: list[Event]) -> None:
        """Add one batch. It is safe from ``kill -9`` when this returns."""
        self.write_encoded(list_head(len(events)) + b"".join(map(encoded, events)), len(events))

    def write_encoded(self, data: bytes, num_events: int) -> None:
        """The same for a batch that is MessagePack already, its list head included."""
        if self.steady_run.end:
            self._store_steady_run()
        begin = self._used
        end = begin + 4 + len(data)
        if end > self._tail_end:
            self._write_around_tail(data, num_events)
            return
        tail = self._tail
        try:
            tail[begin + 4 : end] = data
            # The size goes in last: until then the batch does not exist for a reader.
            _put_size(tail, begin, len(data))
            self._used, self._num_stored = end, self._num_stored + num_events
        except BaseException:
            self._wipe()
            raise

    def _wipe(self) -> None:
        """Of a batch that was cut short nothing may stay: the next one could be shorter."""
        self._tail[self._used :] = bytes(len(self._tail) - self._used)

    # Names that are constants are its defaults: what a step looks up in a module's dictionary is in no
    # cache by then.

    def write_steady_step(
        self,
        planned: tuple[int, ...],
        started_ns: int,
        dur_ns: int,
        before: list[bytes],
        put: Callable[..., None] = _STEADY.pack_into,
        size: int = _STEADY.size,
        head: bytes = _STEADY_HEAD,
        middles: dict[int, bytes] = _STEADY_MIDDLES,
        put_front: Callable[..., None] = _STEADY_FRONT.pack_into,
    ) -> bool:
        """Add a batch of events, a ``step.scheduled`` like the last one, and its ``step.updated``.

        ``planned``: step, started, duration, running, waiting, free, silent calls. The same bytes as
        ``write`` would store but for the width of the numbers, made in place. False when it
        does not fit, or ``before`` is not all bytes; the caller takes the long way then.
        """
        step, at, dur, running, waiting, free, kept = planned
        number = len(before) + 2
        tail, begin = self._tail, self._used + 5
        try:
            data = b"".join(before)
            place = begin + len(data)
            end = place + size
            if end > self._tail_end or number > 15:
                return False
            put(
                tail, place, head, step, 0xCF, at, 0xCE, dur, 0xCE, running, 0xCE, waiting,
                0xCE, free, middles[kept], step, 0xCF, started_ns, 0xCE, dur_ns,
            )  # fmt: skip
            tail[begin:place] = data
            # The size goes in last: until then the batch does not exist for a reader.
            put_front(tail, begin - 5, end - begin + 1, 0x90 + number)
            self._used, self._num_stored = end, self._num_stored + number
        except (TypeError, KeyError):
            return False
        except struct.error:  # some of it may be there already
            self._wipe()
            return False
        except BaseException:
            self._wipe()
            raise
        return True

    def begin_steady_run(self) -> None:
        """Let ``steady_run`` take the steps that follow, until anything else is written."""
        if not self.failure:
            self._store_steady_run()
            self.steady_run.begin(self._used, self._tail_end - self._used)

    def _store_steady_run(self) -> None:
        """Make batches of the steps in ``steady_run`` and end it. There is room for them, see ``begin``."""
        run = self.steady_run
        run.end = 0
        if run.at == WORDS:
            return
        data, num_events = run.stored(), run.num_events
        begin, end = self._used, self._used + len(data)
        try:
            self._tail[begin + SIZE.size : end] = data[SIZE.size :]
            # The first size goes in last: until then none of the batches exist for a reader.
            self._tail[begin : begin + SIZE.size] = data[: SIZE.size]
            self._used, self._num_stored, run.dirty, run.at = (
                end, self._num_stored + num_events, run.at, WORDS
            )  # fmt: skip
        except BaseException:
            self._wipe()
            raise

    def _write_around_tail(self, data: bytes, num_events: int) -> None:
        """The tail is full: empty it, and put this batch into it or, if larger, into a frame."""
        self.flush_tail()
        if self.failure or SIZE.size + len(data) > MAX_RAW:  # no reader would take that frame
            self.drop(num_events)
        elif BATCHES + SIZE.size + len(data) > self._tail_end:
            if not self._write_events(SIZE.pack(len(data)) + data, num_events):
                self.drop(num_events)
        else:
            self.write_encoded(data, num_events)

    def flush_tail(self) -> None:
        """Compress the tail's batches into a frame and begin a new one."""
        self._store_steady_run()
        if self._used == BATCHES or self.failure:
            return
        self._write_events(self._tail[BATCHES : self._used])

    def _write_events(self, raw: bytes | bytearray, num_new: int = 0) -> bool:
        """``num_new``: events in it that were not in the tail, and are not counted yet."""
        before = self._num_frames
        try:
            self._write_frame(b"E", raw, self._compress, num_new)
            self._begin_tail()
        except OSError as error:
            self.failure = f"{error.strerror or error}"
            self._tail_end = 0  # so that ``write`` need not ask for a failure
            self.drop(0)
            return False
        except BaseException:
            if self._num_frames != before:
                self._begin_tail()  # it was cut short
            raise
        return True

    def _write_frame(
        self, kind: bytes, raw: bytes | bytearray, store: Callable[[Any], bytes], num_new: int = 0
    ) -> None:
        frame = _frame(kind, raw, store)
        begin = self._file.tell()
        view = memoryview(frame)
        try:
            while view:
                num_written = self._file.write(view)
                view = view[num_written:]
            self._num_frames, self._num_stored = (
                self._num_frames + (kind == b"E"), self._num_stored + num_new
            )  # fmt: skip
        except BaseException:
            with contextlib.suppress(OSError):
                self._file.truncate(begin)
                self._file.seek(begin)
            raise

    def drop(self, num_events: int) -> None:
        """Count what is lost where it can still be written: in the tail's own header."""
        self.dropped += num_events
        self._describe_tail()

    def close(self, footer: dict[str, Any]) -> None:
        """Write what is left and the footer. Safe to call twice."""
        if self._file.closed:
            return
        self.flush_tail()
        complete = not self.failure
        if complete:
            body = {"num_events": self.num_events, "num_frames": self._num_frames} | footer
            try:
                self._write_frame(b"F", msgspec.json.encode(body), bytes)
            except OSError as error:
                self.failure = f"{error.strerror or error}"
                self.drop(0)
                complete = False
        self.steady_run.words.release()
        self._tail.close()
        self._file.close()
        if complete:
            self._tail_path.unlink(missing_ok=True)


def _frame(kind: bytes, raw: bytes | bytearray, store: Callable[[Any], bytes]) -> bytes:
    stored = store(raw)
    return FRAME.pack(kind, len(raw), len(stored), zlib.crc32(stored)) + stored


def seal(path: Path, ended: str) -> bool:
    """Close the file of a process that is gone: its tail becomes a frame, and a footer follows.

    ``ended`` is ``stopped`` when somebody asked the process to stop, ``killed`` otherwise; a
    killed process's file stays marked as truncated. Returns whether there was anything to do;
    a file whose process still runs, or that cannot be read, is left as it is.
    """
    try:
        file = TraceFile(path).finish()
    except TraceError:
        return False
    if file.footer or is_running(file.header.get("pid", 0)):
        return False
    raw = b"".join(SIZE.pack(len(body)) + body for body in file.tail())
    footer = {"num_events": file.num_events, "dropped": file.dropped, "ended": ended}
    try:
        with open(path, "r+b") as out:
            out.truncate(file.num_bytes)
            out.seek(file.num_bytes)
            if raw:
                out.write(_frame(b"E", raw, zstandard.ZstdCompressor().compress))
            out.write(_frame(b"F", msgspec.json.encode(footer), bytes))
    except OSError:
        return False
    path.with_name(path.name + TAIL_SUFFIX).unlink(missing_ok=True)
    return True
