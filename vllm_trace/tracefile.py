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
import functools
import mmap
import os
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
    EngineConfigured,
    Event,
    SlotsAllocated,
    SlotsRefused,
    StepScheduled,
    StepUpdated,
    tag_of,
)
from vllm_trace.packing import encoded, list_head

MAGIC = b"VTRACE\r\n"
SUFFIX = ".vtrace"
TAIL_SUFFIX = ".tail"

MAX_BLOCKS = 1 << 24
"""A pool that claims more is damage too: 16 times what the largest devices hold of the smallest models."""

_FRAME = struct.Struct("<cIII")
TAIL = struct.Struct("<8sQQ104s")
SIZE = struct.Struct("<I")
_put_size = SIZE.pack_into

TAIL_SIZE = 512 * 1024
"""Bytes of batches before they are compressed into a frame."""

MAX_RAW = 64 * 1024 * 1024
"""A frame that claims more than this is damage, not data: it bounds a reader's memory."""

# A steady step as MessagePack with numbers of fixed width (0xce: u32, 0xcf: u64): StepScheduled with its
# first seven fields and StepUpdated with its first three. The number of silent calls, a byte, is in the middle.
_STEADY = struct.Struct(">3sIBQBIBIBIBI4sIBQBI")
_STEADY_ALONE = struct.Struct(">4sIBQBIBIBIBI4sIBQBI")
_STEADY_FRONT = struct.Struct("<IB")  # the size of the batch, and that it is a list of so many
_STEADY_HEAD = bytes([0x98, tag_of(StepScheduled), 0xCE])
_STEADY_MIDDLES = {
    kept: bytes([kept & 0xFF, 0x94, tag_of(StepUpdated), 0xCE]) for kept in range(-1, 128)
}

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
        # Room for the size of 0 that ends the batches is always left.
        self._tail_end = len(self._tail) - SIZE.size
        self._used = self._tail_end
        self._begin_tail()

    def _open_tail(self, size: int) -> mmap.mmap:
        with open(self._tail_path, "x+b") as file:
            # Without real blocks behind it, a full disk would turn a store into a SIGBUS.
            os.posix_fallocate(file.fileno(), 0, size)
            return mmap.mmap(file.fileno(), size)

    def _begin_tail(self) -> None:
        # Zeros all the way, so that a batch always has a size of 0 behind it. When the tail is new
        # this also touches each of its pages: no step pays for a page fault later.
        self._tail[TAIL.size : self._used] = bytes(self._used - TAIL.size)
        self._tail[: TAIL.size] = TAIL.pack(
            MAGIC, self._num_frames, self.dropped, self.failure.encode()[:104]
        )
        self._used = TAIL.size

    def write(self, events: list[Event]) -> None:
        """Add one batch. It is safe from ``kill -9`` when this returns."""
        self.write_encoded(list_head(len(events)) + b"".join(map(encoded, events)), len(events))

    def write_encoded(self, data: bytes, num_events: int) -> None:
        """The same for a batch that is MessagePack already, its list head included."""
        begin = self._used
        end = begin + 4 + len(data)
        if end > self._tail_end:
            self._write_around_tail(data, num_events)
            return
        tail = self._tail
        tail[begin + 4 : end] = data
        # The size goes in last: until then the batch does not exist for a reader.
        _put_size(tail, begin, len(data))
        self._used = end
        self.num_events += num_events

    # Names that are constants of the next two are their defaults: what a step looks up in a module's
    # dictionary is in no cache by then.

    def write_steady_step(
        self,
        planned: tuple[int, ...],
        started_ns: int,
        dur_ns: int,
        before: list[bytes],
        *,
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
        except (TypeError, KeyError, struct.error):
            return False
        tail[begin:place] = data
        # The size goes in last: until then the batch does not exist for a reader.
        put_front(tail, begin - 5, end - begin + 1, 0x90 + number)
        self._used = end
        self.num_events += number
        return True

    def write_steady_step_alone(
        self,
        planned: tuple[int, ...],
        started_ns: int,
        dur_ns: int,
        *,
        put: Callable[..., None] = _STEADY_ALONE.pack_into,
        size: int = _STEADY_ALONE.size,
        head: bytes = b"\x92" + _STEADY_HEAD,
        middle: bytes = _STEADY_MIDDLES[0],
    ) -> bool:
        """The same with nothing before it, in a step without silent calls: all that level light writes."""
        step, at, dur, running, waiting, free = planned
        tail, begin = self._tail, self._used
        end = begin + 4 + size
        if end > self._tail_end:
            return False
        try:
            put(
                tail, begin + 4, head, step, 0xCF, at, 0xCE, dur, 0xCE, running, 0xCE, waiting,
                0xCE, free, middle, step, 0xCF, started_ns, 0xCE, dur_ns,
            )  # fmt: skip
        except struct.error:
            return False
        tail[begin] = size  # below 256, before zeros
        self._used = end
        self.num_events += 2
        return True

    def _write_around_tail(self, data: bytes, num_events: int) -> None:
        """The tail is full: empty it, and put this batch into it or, if larger, into a frame."""
        self.flush_tail()
        if self.failure or SIZE.size + len(data) > MAX_RAW:  # no reader would take that frame
            self._drop(num_events)
        elif TAIL.size + 4 + len(data) > self._tail_end:
            if self._write_events(SIZE.pack(len(data)) + data):
                self.num_events += num_events
            else:
                self._drop(num_events)
        else:
            self.write_encoded(data, num_events)

    def flush_tail(self) -> None:
        """Compress the tail's batches into a frame and begin a new one."""
        if self._used == TAIL.size or self.failure:
            return
        self._write_events(self._tail[TAIL.size : self._used])

    def _write_events(self, raw: bytes | bytearray) -> bool:
        try:
            self._write_frame(b"E", raw, compress=True)
        except OSError as error:
            self.failure = f"{error.strerror or error}"
            self._tail_end = 0  # so that ``write`` need not ask for a failure
            self._drop(0)
            return False
        self._num_frames += 1
        self._begin_tail()
        return True

    def _write_frame(self, kind: bytes, raw: bytes | bytearray, *, compress: bool) -> None:
        frame = _frame(kind, raw, self._compress if compress else bytes)
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
        self._tail[: TAIL.size] = TAIL.pack(
            MAGIC, self._num_frames, self.dropped, self.failure.encode()[:104]
        )

    def close(self, footer: dict[str, Any]) -> None:
        """Write what is left and the footer. Safe to call twice."""
        if self._file.closed:
            return
        self.flush_tail()
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


def _frame(kind: bytes, raw: bytes | bytearray, store: Callable[[Any], bytes]) -> bytes:
    stored = store(raw)
    return _FRAME.pack(kind, len(raw), len(stored), zlib.crc32(stored)) + stored


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


def is_sealed(path: Path) -> bool:
    """Whether the file has its footer, or is none that could get one."""
    try:
        return bool(TraceFile(path).finish().footer)
    except TraceError:
        return True


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie; a file's writer is gone when it is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"


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
        self._tail = b""
        """The file beside this one, as it was when the last whole frame had been read."""
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
                        tail_read_at, self._tail = self.num_bytes, self._read_tail()
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
        self._tail = b""
        self._requests: list[int] = []
        self._num_tokens: list[int] = []
        self._sizes: dict[int, int] = {}
        """Requests in each step whose results are not in yet."""
        self._calls: list[SlotsAllocated | SlotsRefused] = []
        """Of the step that is being scheduled, without a count of the silent calls before them."""
        self._full = self.header.get("level") != "light"

    def _read_tail(self) -> bytes:
        try:
            with open(self.path.with_name(self.path.name + TAIL_SUFFIX), "rb") as file:
                return file.read(MAX_RAW)
        except OSError:
            return b""

    def _mark_unfinished(self, torn: str) -> None:
        """No footer: why, as far as the tail tells."""
        self.footer, self.dropped = {}, 0
        self.truncated = torn or "no footer: the process was killed or still runs"
        if len(self._tail) >= TAIL.size and self._tail.startswith(MAGIC):
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
        """Count the batch and put back what a step has in common with the one before."""
        self.num_events += len(batch)
        for event in batch:
            kind = type(event)
            if kind is StepScheduled:
                if event.requests is None:
                    event.requests = self._requests
                if event.num_tokens is None:
                    event.num_tokens = self._num_tokens
                self._requests, self._num_tokens = event.requests, event.num_tokens
                self._sizes[event.step] = len(event.requests)
                if event.num_kept < 0:
                    _count_kept(event, self._calls)
                self._calls.clear()
            elif kind is SlotsAllocated or kind is SlotsRefused:
                if event.num_kept < 0:
                    self._calls.append(event)
            elif kind is EngineConfigured:
                self._check_sizes(event)
            elif kind is StepUpdated:
                size = self._sizes.pop(event.step, None)
                if event.num_output_tokens is None and size is not None and self._full:
                    event.num_output_tokens = [1] * size
        return batch

    def _check_sizes(self, event: EngineConfigured) -> None:
        """Everybody divides by a block's size and makes room for each block of the pool."""
        sizes = [event.block_size, event.hash_block_size, *(g.block_size for g in event.groups)]
        if min(sizes) < 1 or not 1 <= event.num_blocks <= MAX_BLOCKS:
            raise TraceError(
                f"{self.path} is damaged: an engine with {event.num_blocks} blocks of {min(sizes)} tokens"
            )

    def tail(self) -> Iterator[bytes]:
        """Yield the batches that were in no frame yet, after ``frames``; none of a whole file."""
        return tail_batches(self._tail, self.num_frames)

    def events(self) -> Iterator[Event]:
        """Yield every event in the order of the process."""
        for batch in self.batches():
            yield from batch

    def finish(self) -> TraceFile:
        """Read to the end so that ``footer``, ``dropped`` and ``truncated`` are known."""
        for _ in self.batches():
            pass
        return self


def _count_kept(step: StepScheduled, calls: list[SlotsAllocated | SlotsRefused]) -> None:
    """Put in how many silent calls stood before each of ``calls``: vLLM asks in the step's order.

    Who is refused in a step that preempts nobody is new, and asks after all that run.
    """
    requests = step.requests
    assert requests is not None
    told, placed, others = 0, set(), []
    for call in calls:
        try:
            call.num_kept = requests.index(call.request) - told
            placed.add(call.request)
            told += 1
        except ValueError:
            others.append(call)
    step.num_kept = len(requests) - len(placed)
    for call in others:
        call.num_kept = step.num_kept


def tail_batches(data: bytes, num_frames: int) -> Iterator[bytes]:
    """Batches of a tail that was begun after ``num_frames`` event frames; none of another."""
    if len(data) < TAIL.size or not data.startswith(MAGIC):
        return
    if TAIL.unpack_from(data)[1] == num_frames:
        yield from batches_in(data, TAIL.size)


def batches_in(data: bytes, position: int) -> Iterator[bytes]:
    """Bodies of the batches that lie whole in a part of a tail."""
    while position + SIZE.size <= len(data):
        (size,) = SIZE.unpack_from(data, position)
        body = data[position + SIZE.size : position + SIZE.size + size]
        if not size or len(body) != size:
            return
        position += SIZE.size + size
        yield body


def read_frame(file: BinaryIO, path: Path) -> tuple[bytes, bytes]:
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


def unzip(decompress: Any, body: bytes, path: Path, file: BinaryIO) -> bytes:
    try:
        size = zstandard.frame_content_size(body)
        if not 0 <= size <= MAX_RAW:
            raise zstandard.ZstdError(f"a frame claims {size} bytes")
        return decompress(body, max_output_size=MAX_RAW)
    except zstandard.ZstdError as error:
        raise TraceError(f"{path} is damaged near byte {file.tell()}: {error}") from None
