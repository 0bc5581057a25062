"""The file of one process, and its reader; ``tracewriter`` writes it while an engine runs.

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
    steady steps that come after the batches, see ``steady``     64 KiB
    batch*: size u32, bytes; a size of 0 ends them

``generation`` is the number of event frames that were in the file when the tail was begun. A
process killed between writing a frame and emptying the tail leaves an old generation, and the
reader knows that it has those batches already. The tail goes away when the file is closed.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Union

import msgspec
import zstandard

from vllm_trace.errors import TraceError
from vllm_trace.events import (
    EVENT_TYPES,
    SCHEMA_VERSION,
    AnyEvent,
    Event,
    tag_of,
)
from vllm_trace.steady import AREA_SIZE, batches_in_area
from vllm_trace.whole import Completion

MAGIC = b"VTRACE\r\n"
SUFFIX = ".vtrace"
TAIL_SUFFIX = ".tail"

FRAME = struct.Struct("<cIII")
TAIL = struct.Struct("<8sQQ104s")
TAIL_MAGIC = b"VTAIL2\r\n"
BATCHES = TAIL.size + AREA_SIZE
"""Where the first batch of a tail begins."""

SIZE = struct.Struct("<I")

MAX_RAW = 64 * 1024 * 1024
"""A frame that claims more than this is damage, not data: it bounds a reader's memory."""

Decode = Callable[[Any], list[Any]]

decode_batch: Decode = msgspec.msgpack.Decoder(list[AnyEvent]).decode


@functools.cache
def decoder_without(*kinds: type[Event]) -> Decode:
    """Like ``decode_batch``, for a reader that passes these kinds by: of each such event only its place is left."""
    told = [one for one in EVENT_TYPES if one not in kinds]
    silent = [
        msgspec.defstruct(one.__name__, [], tag=tag_of(one), array_like=True, gc=False)
        for one in kinds
    ]
    return msgspec.msgpack.Decoder(list[Union[tuple(told + silent)]]).decode  # type: ignore[misc]  # noqa: UP007


#: What decoding hostile bytes can raise: text that is not UTF-8 and deep nesting have errors of their own.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def is_sealed(path: Path) -> bool:
    """Whether the file has its footer, or is none that could get one."""
    try:
        return bool(TraceFile(path).finish().footer)
    except TraceError:
        return True


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie; a file's writer is gone when it is not."""
    try:
        # The name before the bracket is any bytes, and cut off within a character.
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in b"ZX"


_Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class _Hook(msgspec.Struct):
    """What readers ask of a hook in the header."""

    target: str
    state: str
    without: str = ""


class _Header(msgspec.Struct):
    """What readers ask of a header, of which any may be missing; the rest is for people."""

    role: str = ""
    pid: _Count = 0
    parent: _Count = 0
    host: str = ""
    rank: _Count = 0
    level: str = ""
    vllm_trace: str = ""
    vllm: str = ""
    torch: str = ""
    python: str = ""
    platform: str = ""
    clock: dict[str, _Count] = {}
    hooks: list[_Hook] = []
    copy_rate: float = 0


class _Footer(msgspec.Struct):
    """The same of a footer."""

    num_events: _Count = 0
    dropped: _Count = 0
    failures: dict[str, _Count] = {}
    ended: str = ""


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
        self.num_frames = 0
        self.num_bytes = 0
        """Up to the end of the last whole frame that was read."""
        self._ended = False
        """The footer was read."""
        self._tail = self._steady = b""
        """The file beside this one, as it was when the last whole frame had been read, and the steady
        steps in it."""
        with open(path, "rb") as file:
            self.header = self._read_header(file)
            self._begin = file.tell()

    def _read_header(self, file: BinaryIO) -> dict[str, Any]:
        magic = file.read(len(MAGIC))
        if not magic:
            raise TraceError(f"{self.path} is empty", hint="Was the process killed as it started?")
        if magic != MAGIC:
            raise TraceError(f"{self.path} is not a vllm_trace file")
        try:
            kind, body = read_frame(file, self.path)
        except EOFError:
            raise TraceError(
                f"{self.path} ends within its header", hint="Was the process killed as it started?"
            ) from None
        if kind != b"H":
            raise TraceError(f"{self.path} has no header: it was damaged")
        try:
            header = msgspec.json.decode(body, type=dict[str, Any])
            schema = header["schema"] if type(header["schema"]) is int else None
            if schema is not None and schema <= SCHEMA_VERSION:
                msgspec.convert(header, _Header)
        except (*UNREADABLE, KeyError):
            schema = None
        if schema is None:
            raise TraceError(f"{self.path} has an unreadable header: it was damaged")
        if schema > SCHEMA_VERSION:
            raise TraceError(
                f"{self.path} has schema {schema}; this vllm_trace reads up to {SCHEMA_VERSION}",
                hint="pip install --upgrade vllm-trace",
            )
        return header

    def batches(self, decode: Decode = decode_batch) -> Iterator[list[Event]]:
        """Yield the events of one flush after the other, holding one frame at a time.

        ``decode`` may be one of ``decoder_without``.

        Raises: ``TraceError`` for damage in the middle; a missing end is no error but sets
        ``truncated``.
        """
        for raw in self.frames():
            yield from self._decode_frame(raw, decode)
        for body in self.tail():
            try:
                batch = decode(body)
            except UNREADABLE:
                return
            yield self._whole(batch)

    def frames(self) -> Iterator[bytes]:
        """Yield the batches of one frame after the other as they lie in the file: size, bytes.

        For readers that decode by themselves; ``tail`` has what comes after. The same bytes have
        the same errors and marks as in ``batches``.
        """
        self.begin_reading()
        decompress = zstandard.ZstdDecompressor().decompress
        with open(self.path, "rb") as file:
            file.seek(self._begin)
            tail_read_at = -1
            while not self._ended:
                self.num_bytes = file.tell()
                try:
                    kind, body = read_frame(file, self.path)
                except EOFError as error:
                    if tail_read_at != self.num_bytes:
                        # A writer empties its tail only when the frame is in the file: what is read
                        # of the tail is right if no frame has come by then.
                        tail_read_at = self.num_bytes
                        self._tail, self._steady = self._read_tail()
                        file.seek(self.num_bytes)
                        continue
                    self._mark_unfinished(str(error))
                    return
                if kind == b"F":
                    self._read_footer(body)
                    self._ended, self._tail = True, b""
                elif kind == b"E":
                    self.num_frames += 1
                    yield unzip(decompress, body, self.path, file)
                else:
                    raise TraceError(f"{self.path} has a frame of unknown kind {kind!r}")

    def begin_reading(self) -> None:
        """Forget what an earlier reading counted; its marks hold until a reading comes to the end."""
        self.num_events, self.num_frames, self._ended = 0, 0, False
        self._tail = self._steady = b""
        self._completion = Completion(self.path, str(self.header.get("level")))

    def _read_tail(self) -> tuple[bytes, bytes]:
        try:
            with open(self.path.with_name(self.path.name + TAIL_SUFFIX), "rb") as file:
                data = file.read(MAX_RAW)
                return data, same_run(file, data)
        except OSError:
            return b"", b""

    def _mark_unfinished(self, torn: str) -> None:
        """No footer: why, as far as the tail tells."""
        self.footer, self.dropped = {}, 0
        self.truncated = torn or "no footer: the process was killed or still runs"
        if len(self._tail) >= TAIL.size and self._tail.startswith(TAIL_MAGIC):
            _, _, dropped, reason = TAIL.unpack_from(self._tail)
            if dropped or reason.rstrip(b"\0"):
                self.dropped = dropped
                why = reason.rstrip(b"\0").decode(errors="replace")
                self.truncated = f"could not be written on: {why}"

    def _read_footer(self, body: bytes) -> None:
        try:
            footer = msgspec.json.decode(body, type=dict[str, Any])
            self.dropped = msgspec.convert(footer, _Footer).dropped
        except UNREADABLE:
            raise TraceError(f"{self.path} has an unreadable footer: it was damaged") from None
        self.footer = footer
        killed = self.footer.get("ended") == "killed"
        self.truncated = "the process was killed" if killed else ""

    def _decode_frame(self, raw: bytes, decode: Decode = decode_batch) -> Iterator[list[Event]]:
        view, position = memoryview(raw), 0
        while position < len(raw):
            try:
                (size,) = SIZE.unpack_from(view, position)
                if size > len(raw) - position - 4:
                    raise struct.error(f"a batch claims {size} bytes")
                batch = decode(view[position + 4 : position + 4 + size])
            except (struct.error, *UNREADABLE) as error:
                raise TraceError(
                    f"{self.path} is damaged after event {self.num_events}: {error}"
                ) from None
            position += 4 + size
            yield self._whole(batch)

    def _whole(self, batch: list[Any]) -> list[Event]:
        """Count the batch and put back what its steps have in common with the ones before."""
        self.num_events += len(batch)
        return self._completion.complete(batch)

    def tail(self) -> Iterator[bytes]:
        """Yield the batches that were in no frame yet, after ``frames``; none of a whole file."""
        return tail_batches(self._tail, self._steady, self.num_frames)

    def events(self) -> Iterator[Event]:
        """Yield every event in the order of the process."""
        for batch in self.batches():
            yield from batch

    def finish(self) -> TraceFile:
        """Read to the end so that ``footer``, ``dropped`` and ``truncated`` are known."""
        for _ in self.batches():
            pass
        return self


def tail_batches(data: bytes, steady: bytes, num_frames: int) -> Iterator[bytes]:
    """Batches of a tail that was begun after ``num_frames`` event frames; none of another."""
    if len(data) < BATCHES or not data.startswith(TAIL_MAGIC):
        return
    if TAIL.unpack_from(data)[1] == num_frames:
        yield from batches_in(data, BATCHES, 0, steady)


def same_run(file: BinaryIO, data: bytes) -> bytes:
    """The steady steps in a tail that was read up to them or further, or none if the run is another one by now.

    While they were read it may have ended, and the next one begun in its place.
    """
    file.seek(TAIL.size)
    position = file.read(8)
    return data[TAIL.size : BATCHES] if data[TAIL.size : TAIL.size + 8] == position else b""


def batches_in(data: bytes, position: int, begin: int, area: bytes) -> Iterator[bytes]:
    """Bodies of the batches that lie whole in ``data``, from ``position`` on, then the steady steps.

    ``begin``: where in the tail ``data`` begins.
    """
    while position + SIZE.size <= len(data):
        (size,) = SIZE.unpack_from(data, position)
        body = data[position + SIZE.size : position + SIZE.size + size]
        if not size or len(body) != size:
            break
        position += SIZE.size + size
        yield body
    yield from batches_in_area(area, begin + position)


def read_frame(file: BinaryIO, path: Path) -> tuple[bytes, bytes]:
    """Return kind and stored bytes. Raises: ``EOFError`` at a torn or missing end."""
    at = file.tell()
    head = file.read(FRAME.size)
    if len(head) < FRAME.size:
        raise EOFError("" if not head else f"torn frame at byte {at}")
    kind, raw_size, stored_size, crc = FRAME.unpack(head)
    if raw_size > MAX_RAW or stored_size > MAX_RAW:
        raise TraceError(f"{path} is damaged at byte {at}: a frame claims {raw_size} bytes")
    body = file.read(stored_size)
    if len(body) < stored_size:
        raise EOFError(f"torn frame at byte {at}")
    if zlib.crc32(body) != crc:
        raise TraceError(f"{path} is damaged at byte {at}: the checksum of a frame is wrong")
    return kind, body


def unzip(decompress: Any, body: bytes, path: Path, file: BinaryIO) -> bytes:
    """The batches of an event frame; no more bytes than ``MAX_RAW``, whatever it claims."""
    try:
        size = zstandard.frame_content_size(body)
        if not 0 <= size <= MAX_RAW:
            raise zstandard.ZstdError(f"a frame claims {size} bytes")
        return decompress(body, max_output_size=MAX_RAW)
    except zstandard.ZstdError as error:
        raise TraceError(f"{path} is damaged near byte {file.tell()}: {error}") from None
