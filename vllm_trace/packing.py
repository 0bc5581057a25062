"""The events of a steady step straight as the bytes that a trace holds.

A request that decodes takes one block, fills one block; a step is like the one before. For these an event
object would be made only to be encoded a moment later, and both are slow in code that runs once in half a
millisecond. ``struct`` makes the same MessagePack in one call, with numbers of fixed width. What is read
back is the event: ``tests/test_packing.py`` compares the two for all values.

Raises: ``struct.error`` from any of these for a number that does not fit (32 bits; 64 for times).
"""

from __future__ import annotations

from struct import Struct
from typing import Any

import msgspec

from vllm_trace.events import (
    BlocksCached,
    BlocksTaken,
    Event,
    SlotsAllocated,
    StepScheduled,
    StepUpdated,
    tag_of,
)

# MessagePack: 0x90 + n is a list of n, 0xce an unsigned number of 32 bits, 0xcf one of 64, 0xd1 a signed one
# of 16; below 0x80 a number stands for itself.
U32, U64, I16 = 0xCE, 0xCF, 0xD1
_LIST, _ONE = 0x90, 0x91


def _head(event: type[Event], fields: int, *rest: int) -> bytes:
    """A list of the event's tag and ``fields`` fields, up to where the first number's value begins."""
    return bytes([_LIST + 1 + fields, tag_of(event), *rest])


# Each ``pack_`` takes the constants between the values too, in the order of the format: a function that
# fills them in would cost what this saves.

#: ``blocks.taken``: TAKEN, block
TAKEN = _head(BlocksTaken, 1, _ONE, U32)
pack_taken = Struct(">4sI").pack

#: ``blocks.cached``: CACHED, request, group (below 128), U32, first, ONE_ID, block, ONE_HASH, hash (8 bytes)
CACHED = _head(BlocksCached, 5, U32)
ONE_ID = bytes([_ONE, U32])
ONE_HASH = bytes([_ONE, U64])
pack_cached = Struct(">3sIBBI2sI2s8s").pack

#: ``slots.allocated``: ALLOCATED, request, U32, num_new_tokens, NO_HIT, block, NO_HIT_BLOCKS, free, I16, kept
ALLOCATED = _head(SlotsAllocated, 7, U32)
NO_HIT = bytes([0, _ONE, _ONE, U32])
NO_HIT_BLOCKS = bytes([_LIST, U32])
pack_allocated = Struct(">3sIBI4sI2sIBh").pack

#: The two of a block that was taken for a request: what ``pack_taken`` and ``pack_allocated`` take, in turn
pack_taken_allocated = Struct(">4sI3sIBI4sI2sIBh").pack

#: ``step.scheduled`` without composition: SCHEDULED, step, U64, started, U64, dur, U32, running, U32, waiting,
#: U32, free, I16, kept
SCHEDULED = _head(StepScheduled, 7, U32)
pack_scheduled = Struct(">3sIBQBQBIBIBIBh").pack

#: ``step.updated`` without outcomes: UPDATED, step, U64, started, U64, dur
UPDATED = _head(StepUpdated, 3, U32)
pack_updated = Struct(">3sIBQBQ").pack

LIST_HEADS = [bytes([_LIST + n]) for n in range(16)]
"""What a list of so many begins with."""


def list_head(length: int) -> bytes:
    """What a MessagePack list begins with."""
    return LIST_HEADS[length] if length < 16 else b"\xdd" + length.to_bytes(4, "big")


_encode = msgspec.msgpack.Encoder().encode


def encoded(event: Any) -> bytes:
    """The MessagePack of an event; one that was made as bytes is it already, a block of vLLM's was taken."""
    if type(event) is bytes:
        return event
    if isinstance(event, Event):
        return _encode(event)
    return pack_taken(TAKEN, event.block_id)
