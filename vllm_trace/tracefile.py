"""The file of one process: written while an engine runs, read without one.

Layout of ``<role>-<pid>.vtrace``::

    magic  8 bytes  b"VTRACE\\r\\n"
    frame*          kind 1 byte, raw size u32, stored size u32, crc32 of the stored bytes u32,
                    then the stored bytes
      H  header     JSON, not compressed, always first
      E  events     zstd of batches: size u32, then a MessagePack list of events
      F  footer     JSON, not compressed, always last; missing when the process was killed

Batches that do not fill a frame yet live in ``<name>.tail``, a small memory map: one step costs
a memcpy and no system call, and the operating system keeps the bytes when the process dies.
Layout of the tail::

    magic 8 | generation u64 | dropped u64 | reason 104 bytes    the first 128 bytes
    batch*: size u32, bytes; a size of 0 ends them

``generation`` is the number of event frames that were in the file when the tail was begun. A
process killed between writing a frame and emptying the tail leaves an old generation, and the
reader knows that it has those batches already. The tail goes away when the file is closed.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import zstandard

from vllm_trace.errors import TraceError
from vllm_trace.events import SCHEMA_VERSION, AnyEvent, Event, StepScheduled

MAGIC = b"VTRACE\r\n"
SUFFIX = ".vtrace"
TAIL_SUFFIX = ".tail"

_FRAME = struct.Struct("<cIII")
_TAIL = struct.Struct("<8sQQ104s")
_SIZE = struct.Struct("<I")
_NO_SIZE = bytes(_SIZE.size)

TAIL_SIZE = 512 * 1024
"""Bytes of batches before they are compressed into a frame."""

MAX_RAW = 64 * 1024 * 1024
"""A frame that claims more than this is damage, not data: it bounds a reader's memory."""

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[AnyEvent]).decode


class TraceWriter:
    """Writes the file of one process.

    Never raises after it was opened: what could not be written is counted in ``dropped``, and
    ``failure`` says why.

    Raises: ``OSError`` when the file cannot be made.
    """

    def __init__(self, path: Path, header: dict[str, Any], tail_size: int = TAIL_SIZE) -> None:
        self.path = path
        self.num_events = 0
        self.dropped = 0
        self.failure = ""
        self._compress = zstandard.ZstdCompressor(level=1).compress
        self._num_frames = 0
        self._file: BinaryIO = open(path, "xb", buffering=0)  # noqa: SIM115
        self._tail_path = path.with_name(path.name + TAIL_SUFFIX)
        try:
            self._file.write(MAGIC)
            self._write_frame(b"H", msgspec.json.encode(header), compress=False)
            self._tail = self._open_tail(tail_size)
        except OSError:
            self._file.close()
            path.unlink(missing_ok=True)
            self._tail_path.unlink(missing_ok=True)
            raise
        self._tail_end = len(self._tail)
        self._used = _TAIL.size
        self._begin_tail()

    def _open_tail(self, size: int) -> mmap.mmap:
        with open(self._tail_path, "x+b") as file:
            # Without real blocks behind it, a full disk would turn a store into a SIGBUS.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)

    def _begin_tail(self) -> None:
        self._tail[_TAIL.size : _TAIL.size + _SIZE.size] = _NO_SIZE
        self._tail[: _TAIL.size] = _TAIL.pack(
            MAGIC, self._num_frames, self.dropped, self.failure.encode()[:104]
        )
        self._used = _TAIL.size

    def write(self, events: list[Event]) -> None:
        """Add one batch. It is safe from ``kill -9`` when this returns."""
        data = _encode(events) + _NO_SIZE
        begin = self._used
        end = begin + len(data)
        if end + 4 > self._tail_end or self.failure:
            self._write_around_tail(events, data)
            return
        tail = self._tail
        tail[begin + 4 : end + 4] = data
        # The size goes in last: until then the batch does not exist for a reader.
        _SIZE.pack_into(tail, begin, len(data) - 4)
        self._used = end
        self.num_events += len(events)

    def _write_around_tail(self, events: list[Event], data: bytes) -> None:
        """The tail is full: empty it, and put this batch into it or, if larger, into a frame."""
        self._flush_tail()
        if self.failure:
            self._drop(len(events))
        elif _TAIL.size + len(data) + 4 > self._tail_end:
            if self._write_events(_SIZE.pack(len(data) - 4) + data[:-4]):
                self.num_events += len(events)
            else:
                self._drop(len(events))
        else:
            self.write(events)

    def _flush_tail(self) -> None:
        """Compress the tail's batches into a frame and begin a new one."""
        if self._used == _TAIL.size or self.failure:
            return
        self._write_events(self._tail[_TAIL.size : self._used])

    def _write_events(self, raw: bytes | bytearray) -> bool:
        try:
            self._write_frame(b"E", raw, compress=True)
        except OSError as error:
            self.failure = f"{error.strerror or error}"
            self._drop(0)
            return False
        self._num_frames += 1
        self._begin_tail()
        return True

    def _write_frame(self, kind: bytes, raw: bytes | bytearray, *, compress: bool) -> None:
        stored = self._compress(raw) if compress else bytes(raw)
        frame = _FRAME.pack(kind, len(raw), len(stored), zlib.crc32(stored)) + stored
        begin = self._file.tell()
        view = memoryview(frame)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(begin)
                self._file.seek(begin)
            raise

    def _drop(self, num_events: int) -> None:
        """Count what is lost where it can still be written: in the tail's own header."""
        self.dropped += num_events
        self._tail[: _TAIL.size] = _TAIL.pack(
            MAGIC, self._num_frames, self.dropped, self.failure.encode()[:104]
        )

    def close(self, footer: dict[str, Any]) -> None:
        """Write what is left and the footer. Safe to call twice."""
        if self._file.closed:
            return
        self._flush_tail()
        complete = not self.failure
        if complete:
            body = {"num_events": self.num_events, "num_frames": self._num_frames} | footer
            try:
                self._write_frame(b"F", msgspec.json.encode(body), compress=False)
            except OSError as error:
                self.failure = f"{error.strerror or error}"
                self._drop(0)
                complete = False
        self._tail.close()
        self._file.close()
        if complete:
            self._tail_path.unlink(missing_ok=True)


class TraceFile:
    """One process's file, open for reading.

    ``header`` is there at once; ``footer``, ``dropped`` and ``truncated`` are right when
    ``batches`` has been read to its end (``finish`` reads on to it).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.footer: dict[str, Any] = {}
        self.dropped = 0
        self.truncated = ""
        """Why the end is missing; empty for a whole file."""
        self.num_events = 0
        with open(path, "rb") as file:
            self.header = self._read_header(file)
            self._begin = file.tell()

    def _read_header(self, file: BinaryIO) -> dict[str, Any]:
        magic = file.read(len(MAGIC))
        if not magic:
            raise TraceError(f"{self.path} is empty", hint="Was the process killed as it started?")
        if magic != MAGIC:
            raise TraceError(f"{self.path} is not a vllm_trace file")
        kind, body = _read_frame(file, self.path)
        if kind != b"H":
            raise TraceError(f"{self.path} has no header: it was damaged")
        try:
            header = msgspec.json.decode(body)
            schema = int(header["schema"])
        except (msgspec.DecodeError, KeyError, TypeError, ValueError):
            raise TraceError(f"{self.path} has an unreadable header: it was damaged") from None
        if schema > SCHEMA_VERSION:
            raise TraceError(
                f"{self.path} has schema {schema}; this vllm_trace reads up to {SCHEMA_VERSION}",
                hint="pip install --upgrade vllm-trace",
            )
        return header

    def batches(self) -> Iterator[list[Event]]:
        """Yield the events of one flush after the other, holding one frame at a time.

        Raises: ``TraceError`` for damage in the middle; a missing end is no error but sets
        ``truncated``.
        """
        self.num_events, num_frames, ended = 0, 0, False
        self._requests: list[int] = []
        self._num_tokens: list[int] = []
        decompress = zstandard.ZstdDecompressor().decompress
        with open(self.path, "rb") as file:
            file.seek(self._begin)
            while not ended:
                try:
                    frame = _read_frame(file, self.path)
                except EOFError as error:
                    self.truncated = str(error)
                    break
                kind, body = frame
                if kind == b"F":
                    self.footer = msgspec.json.decode(body)
                    self.dropped = int(self.footer.get("dropped", 0))
                    ended = True
                elif kind == b"E":
                    num_frames += 1
                    raw = _unzip(decompress, body, self.path, file)
                    yield from self._decode_frame(raw)
                else:
                    raise TraceError(f"{self.path} has a frame of unknown kind {kind!r}")
        if not ended:
            self.truncated = self.truncated or "no footer: the process was killed or still runs"
            yield from self._read_tail(num_frames)

    def _decode_frame(self, raw: bytes) -> Iterator[list[Event]]:
        view, position = memoryview(raw), 0
        while position < len(raw):
            try:
                (size,) = _SIZE.unpack_from(view, position)
                batch = _decode(view[position + 4 : position + 4 + size])
            except (struct.error, msgspec.DecodeError, msgspec.ValidationError) as error:
                raise TraceError(
                    f"{self.path} is damaged after event {self.num_events}: {error}"
                ) from None
            position += 4 + size
            yield self._whole(batch)

    def _whole(self, batch: list[Event]) -> list[Event]:
        """Count the batch and put back what a step has in common with the one before."""
        self.num_events += len(batch)
        for event in batch:
            if type(event) is StepScheduled:
                if event.requests is None:
                    event.requests = self._requests
                if event.num_tokens is None:
                    event.num_tokens = self._num_tokens
                self._requests, self._num_tokens = event.requests, event.num_tokens
        return batch

    def _read_tail(self, num_frames: int) -> Iterator[list[Event]]:
        tail_path = self.path.with_name(self.path.name + TAIL_SUFFIX)
        try:
            data = tail_path.read_bytes()
        except OSError:
            return
        if len(data) < _TAIL.size or not data.startswith(MAGIC):
            return
        _, generation, dropped, reason = _TAIL.unpack_from(data)
        if dropped or reason.rstrip(b"\0"):
            self.dropped = dropped
            why = reason.rstrip(b"\0").decode(errors="replace")
            self.truncated = f"could not be written on: {why}"
        if generation != num_frames:
            return
        position = _TAIL.size
        while position + _SIZE.size <= len(data):
            (size,) = _SIZE.unpack_from(data, position)
            body = data[position + _SIZE.size : position + _SIZE.size + size]
            if not size or len(body) != size:
                return
            try:
                batch = _decode(body)
            except (msgspec.DecodeError, msgspec.ValidationError):
                return
            position += _SIZE.size + size
            yield self._whole(batch)

    def events(self) -> Iterator[Event]:
        """Yield every event in the order of the process."""
        for batch in self.batches():
            yield from batch

    def finish(self) -> TraceFile:
        """Read to the end so that ``footer``, ``dropped`` and ``truncated`` are known."""
        for _ in self.batches():
            pass
        return self


def _read_frame(file: BinaryIO, path: Path) -> tuple[bytes, bytes]:
    """Return kind and stored bytes. Raises: ``EOFError`` at a torn or missing end."""
    at = file.tell()
    head = file.read(_FRAME.size)
    if len(head) < _FRAME.size:
        raise EOFError("" if not head else f"torn frame at byte {at}")
    kind, raw_size, stored_size, crc = _FRAME.unpack(head)
    if raw_size > MAX_RAW or stored_size > MAX_RAW:
        raise TraceError(f"{path} is damaged at byte {at}: a frame claims {raw_size} bytes")
    body = file.read(stored_size)
    if len(body) < stored_size:
        raise EOFError(f"torn frame at byte {at}")
    if zlib.crc32(body) != crc:
        raise TraceError(f"{path} is damaged at byte {at}: the checksum of a frame is wrong")
    return kind, body


def _unzip(decompress: Any, body: bytes, path: Path, file: BinaryIO) -> bytes:
    try:
        size = zstandard.frame_content_size(body)
        if not 0 <= size <= MAX_RAW:
            raise zstandard.ZstdError(f"a frame claims {size} bytes")
        return decompress(body, max_output_size=MAX_RAW)
    except zstandard.ZstdError as error:
        raise TraceError(f"{path} is damaged near byte {file.tell()}: {error}") from None
