"""MessagePack of a recorder to columns, compiled: what makes millions of events a second possible.

``unpack`` goes over the bytes once and puts each value where its column has its next place; what a
kind looks like is told by the tables of ``shapes``. Numba compiles it the first time it is used
(some seconds, kept on disk); without numba ``columns`` does the work.
"""

from __future__ import annotations

import numpy as np
from numba import njit

NUMBER, NEGATIVE, NIL, BOOL, TEXT, LIST, MAP, FLOAT, BAD = range(9)
"""Sorts of tokens. A token is a number, a text, or the head of a list or map."""

(
    PLACE, NOTHING, RARE, OF_INT, OF_BOOL, OF_FLOAT, OF_TEXT, OF_JSON, OF_INTS, OF_HASHES,
    OF_LISTS, OF_LISTS_OF_HASHES, OF_INT_MAP, OF_TEXT_MAP,
) = range(14)  # fmt: skip
"""What a field is, in ``shapes.FIELDS``."""

AS_STEP, AS_TIME = 1, 2
"""What a field's number says of its event."""

FITS, SHORT, UNUSUAL = range(3)
"""How ``unpack`` ended."""

DEEPEST = 32
"""Lists within lists; events have at most six."""


@njit(cache=True, forceinline=True)
def token(raw, at, end):
    """The token at a byte: sort, value (a number; bytes of a text; how many a list or map has), byte after it."""
    if at >= end:
        return BAD, np.int64(0), at
    head = np.int64(raw[at])
    at += 1
    if head < 0x80:
        return NUMBER, head, at
    if head < 0xC0:
        if head >= 0xA0:
            sort, value = TEXT, head & 31
        elif head >= 0x90:
            sort, value = LIST, head & 15
        else:
            sort, value = MAP, head & 15
        if sort == TEXT and end - at < value:
            return BAD, value, at
        return sort, value, at
    if head >= 0xE0:
        return NEGATIVE, head - 256, at
    if head == 0xC0:
        return NIL, np.int64(0), at
    if head == 0xC2 or head == 0xC3:
        return BOOL, head & 1, at
    if head == 0xCB:
        sort, width = FLOAT, 8
    elif 0xCC <= head <= 0xCF:
        sort, width = NUMBER, 1 << (head - 0xCC)
    elif 0xD0 <= head <= 0xD3:
        sort, width = NEGATIVE, 1 << (head - 0xD0)
    elif 0xD9 <= head <= 0xDB:
        sort, width = TEXT, 1 << (head - 0xD9)
    elif head == 0xDC or head == 0xDD:
        sort, width = LIST, 2 << (head - 0xDC)
    elif head == 0xDE or head == 0xDF:
        sort, width = MAP, 2 << (head - 0xDE)
    else:
        return BAD, head, at
    if end - at < width:
        return BAD, head, at
    value = np.int64(0)
    for i in range(width):
        value = (value << 8) | np.int64(raw[at + i])
    at += width
    if sort == NEGATIVE:
        if width < 8 and value >> (8 * width - 1):
            value -= np.int64(1) << (8 * width)
        if value >= 0:
            sort = NUMBER
    elif sort == TEXT and end - at < value:
        return BAD, value, at
    return sort, value, at


@njit(cache=True, forceinline=True)
def number(raw, at, end, unsigned):
    """A number of a column: whether it is one that fits, it, byte after it. One of 64 bits unsigned is negative."""
    # What nearly all numbers are, without a loop.
    if end - at > 4:
        head = np.int64(raw[at])
        if head < 0x80:
            return True, head, at + 1
        if head == 0xCC:
            return True, np.int64(raw[at + 1]), at + 2
        if head == 0xCD:
            return True, np.int64(raw[at + 1]) << 8 | np.int64(raw[at + 2]), at + 3
        if head == 0xCE:
            value = (
                np.int64(raw[at + 1]) << 24 | np.int64(raw[at + 2]) << 16
                | np.int64(raw[at + 3]) << 8 | np.int64(raw[at + 4])
            )  # fmt: skip
            return True, value, at + 5
        if head == 0xCF and end - at > 8:
            value = np.int64(0)
            for i in range(1, 9):
                value = value << 8 | np.int64(raw[at + i])
            return unsigned or value >= 0, value, at + 9
    sort, value, at = token(raw, at, end)
    good = (sort == NUMBER and (unsigned or value >= 0)) or (sort == NEGATIVE and not unsigned)
    return good, value, at


@njit(cache=True)
def skip(raw, at, end):
    """The byte after the value at ``at``; -1 where it is none."""
    left = np.empty(DEEPEST, np.int64)
    depth = 0
    while True:
        sort, value, at = token(raw, at, end)
        if sort == BAD:
            return np.int64(-1)
        if sort == TEXT:
            at += value
        children = value if sort == LIST else (2 * value if sort == MAP else 0)
        if children:
            if depth == DEEPEST:
                return np.int64(-1)
            left[depth] = children
            depth += 1
            continue
        while depth:
            left[depth - 1] -= 1
            if left[depth - 1]:
                break
            depth -= 1
        if depth == 0:
            return at


@njit(cache=True, forceinline=True)
def take_numbers(raw, at, end, length, unsigned, slot, cells, begins, rooms, used):
    """Numbers of a list into a slot: whether they are ones, whether there was room, the first, byte after them."""
    place, first = used[slot], np.int64(0)
    used[slot] += length
    fits = used[slot] <= rooms[slot]
    into = begins[slot] + place
    for i in range(length):
        good, value, at = number(raw, at, end, unsigned)
        if not good:
            return False, fits, first, at
        if fits:
            cells[into + i] = value
        if i == 0:
            first = value
    return True, fits, first, at


@njit(cache=True, forceinline=True)
def take_lists(raw, at, end, length, unsigned, slot, cells, begins, rooms, used):
    """Lists of numbers: their lengths into a slot, the numbers into the next: as ``take_numbers``."""
    place = used[slot]
    used[slot] += length
    room, fits = used[slot] <= rooms[slot], True
    for i in range(length):
        sort, inner, at = token(raw, at, end)
        if sort != LIST or inner > end - at:
            return False, False, at
        if room:
            cells[begins[slot] + place + i] = inner
        good, fit, _, at = take_numbers(
            raw, at, end, inner, unsigned, slot + 1, cells, begins, rooms, used
        )
        if not good:
            return False, False, at
        fits &= fit
    return True, room and fits, at


@njit(cache=True, forceinline=True)
def take_map(raw, at, end, length, named, slot, cells, begins, rooms, used):
    """A map to numbers: keys (``named``: places and sizes of texts) and values into slots that all grow alike."""
    last = slot + (2 if named else 1)
    place = used[last]
    for part in range(slot, last + 1):
        used[part] = place + length
    fits = used[last] <= rooms[last]
    for i in range(length):
        if named:
            sort, key, at = token(raw, at, end)
            if sort != TEXT:
                return False, fits, at
            if fits:
                cells[begins[slot] + place + i] = at
                cells[begins[slot + 1] + place + i] = key
            at += key
        else:
            good, key, at = number(raw, at, end, False)
            if not good:
                return False, fits, at
            if fits:
                cells[begins[slot] + place + i] = key
        good, value, at = number(raw, at, end, False)
        if not good:
            return False, fits, at
        if fits:
            cells[begins[last] + place + i] = value
    return True, fits, at


@njit(cache=True, forceinline=True)
def take_other(raw, at, end, what, slot, empty, may_lack, row, cells, begins):
    """A text, truth, fraction or JSON: whether it is one, whether a ``RARE`` field has more, byte after it."""
    before = at
    if what == OF_TEXT:
        sort, value, at = token(raw, at, end)
        if sort == NIL and may_lack:
            cells[begins[slot] + row] = 0
            cells[begins[slot + 1] + row] = -1
        elif sort == TEXT:
            cells[begins[slot] + row] = at
            cells[begins[slot + 1] + row] = value
            at += value
        else:
            return False, False, at
        return True, False, at
    if what in (OF_BOOL, OF_FLOAT):
        sort, value, at = token(raw, at, end)
        cells[begins[slot] + row] = value
        return sort == (BOOL if what == OF_BOOL else FLOAT), False, at
    at = skip(raw, at, end)
    if at < 0:
        return False, False, before
    if what == OF_JSON:
        if not (0x80 <= raw[before] < 0x90 or 0xDE <= raw[before] <= 0xDF):
            return False, False, before
        cells[begins[slot] + row] = before
        cells[begins[slot + 1] + row] = at
    more = what == RARE and not (at - before == 1 and raw[before] == empty)
    return True, more, at


@njit(cache=True, forceinline=True)
def take_many(raw, at, end, what, slot, may_lack, row, cells, begins, rooms, used):
    """A list or map: whether it is one, whether there was room, whether it has a first number, that, byte after."""
    sort, length, at = token(raw, at, end)
    if sort == NIL and may_lack:
        cells[begins[slot] + row] = -1
        return True, True, False, np.int64(0), at
    if sort != (LIST if what <= OF_LISTS_OF_HASHES else MAP) or length > end - at:
        return False, False, False, np.int64(0), at
    cells[begins[slot] + row] = length
    first = np.int64(0)
    if what <= OF_HASHES:
        good, fits, first, at = take_numbers(
            raw, at, end, length, what == OF_HASHES, slot + 1, cells, begins, rooms, used
        )
    elif what <= OF_LISTS_OF_HASHES:
        good, fits, at = take_lists(
            raw, at, end, length, what == OF_LISTS_OF_HASHES, slot + 1, cells, begins, rooms, used
        )
    else:
        good, fits, at = take_map(
            raw, at, end, length, what == OF_TEXT_MAP, slot + 1, cells, begins, rooms, used
        )
    return good, fits, length > 0 and what <= OF_HASHES, first, at


@njit(cache=True, forceinline=True)
def put_absent(what, slot, value, row, cells, begins):
    """What stands for a field that is not in the file."""
    if slot < 0:
        return
    if what == OF_TEXT:
        cells[begins[slot] + row] = value >> 32
        cells[begins[slot + 1] + row] = np.int64(np.int32(value))
    else:
        cells[begins[slot] + row] = value


@njit(cache=True, forceinline=True)
def batch_at(raw, at):
    """The head of a batch (``size u32``, list): whether there is one, its end, how many events, byte of the first."""
    total = len(raw)
    if total - at < 4:
        return False, at, np.int64(0), at
    size = np.int64(0)
    for i in range(4):
        size |= np.int64(raw[at + i]) << (8 * i)
    at += 4
    end = at + size
    if end > total:
        return False, end, np.int64(0), at
    sort, num_events, at = token(raw, at, end)
    return sort == LIST, end, num_events, at


@njit(cache=True, forceinline=True)
def event_at(raw, at, end, kinds):
    """The head of an event: whether it is one, how many fields it has here, its tag, byte of the first field."""
    sort, length, at = token(raw, at, end)
    if sort != LIST or length == 0:
        return False, length, np.int64(0), at
    sort, tag, at = token(raw, at, end)
    if sort != NUMBER or tag < 0 or tag >= len(kinds) or kinds[tag, 0] < 0:
        return False, length, np.int64(0), at
    return length - 1 >= kinds[tag, 2], length - 1, tag, at


@njit(cache=True)
def unpack(
    raw, at, kinds, fields, cells, begins, rooms, used, counts, rare,
    tags, heads, ends, steps, has_step, times, has_time,
):  # fmt: skip
    """Read batches (``size u32, MessagePack list of events``) that fill ``raw`` from ``at`` on exactly.

    ``kinds`` has for each tag: its first field, how many fields, how many of them must be there,
    its first slot. ``fields`` has for each: what it is, its first slot, what it is when it is not
    there, whether it may be nil, what it says of the event. A *slot* is a stretch of ``cells`` from
    ``begins`` on with room for ``rooms``, of which ``used`` are filled; the first slot of a kind
    gets which events are of it, ``counts`` how many. ``rare`` marks kinds that had a field of sort
    ``RARE`` that is not empty. For each event: its tag, first byte and the one after it, step and time.

    Returns how it ended and how many events, or the byte where it is not what a recorder writes.
    When there was no room, ``used`` and ``counts`` say how much is needed.
    """
    event, short = 0, False
    used[:], counts[:], rare[:] = 0, 0, 0
    while at < len(raw):
        good, end, num_events, at = batch_at(raw, at)
        if not good:
            return UNUSUAL, at
        for _ in range(num_events):
            heads[event] = at
            good, there, tag, at = event_at(raw, at, end, kinds)
            if not good:
                return UNUSUAL, at
            first, num_fields, own = kinds[tag, 0], kinds[tag, 1], kinds[tag, 3]
            row = counts[tag]
            counts[tag] += 1
            if row >= rooms[own]:
                short, row = True, 0  # anywhere: it is all read again
            cells[begins[own] + row] = event
            tags[event], has_step[event], has_time[event] = tag, False, False
            for place in range(num_fields):
                field = first + place
                what, slot, absent = fields[field, 0], fields[field, 1], fields[field, 2]
                may_lack, says = fields[field, 3], fields[field, 4]
                if place >= there:
                    put_absent(what, slot, absent, row, cells, begins)
                elif what in (OF_INT, PLACE):
                    good, value, at = number(raw, at, end, False)
                    if what == OF_INT:
                        cells[begins[slot] + row] = value
                    if says == AS_STEP:
                        steps[event], has_step[event] = value, True
                    elif says == AS_TIME:
                        times[event], has_time[event] = value, True
                elif what >= OF_INTS:
                    good, fits, some, value, at = take_many(
                        raw, at, end, what, slot, may_lack, row, cells, begins, rooms, used
                    )
                    short |= not fits
                    if some and says == AS_TIME:
                        times[event], has_time[event] = value, True
                else:
                    good, more, at = take_other(
                        raw, at, end, what, slot, absent, may_lack, row, cells, begins
                    )
                    if more:
                        rare[tag] = 1
                if not good:
                    return UNUSUAL, at
            for _ in range(num_fields, there):
                at = skip(raw, at, end)
                if at < 0:
                    return UNUSUAL, heads[event]
            ends[event] = at
            event += 1
        if at != end:
            return UNUSUAL, at
    return (SHORT if short else FITS), event


@njit(cache=True)
def spread(is_mark, tags, steps, has_step, times, has_time):
    """Steps and times go back to the events before them; a step only from a mark.

    Returns the first step of a mark and the first time, each with whether there is one.
    """
    step, some_step, time, some_time = np.int64(0), False, np.int64(0), False
    for event in range(len(tags) - 1, -1, -1):
        if is_mark[tags[event]]:
            step, some_step = steps[event], True
        elif not has_step[event] and some_step:
            steps[event], has_step[event] = step, True
        if has_time[event]:
            time, some_time = times[event], True
        elif some_time:
            times[event], has_time[event] = time, True
    return step, some_step, time, some_time


@njit(cache=True)
def offsets_of(lengths, offsets):
    """Where each list or text begins; -1 is the length of a null. Returns how many are null."""
    num_null = 0
    total = np.int64(0)
    offsets[0] = 0
    for i in range(len(lengths)):
        if lengths[i] < 0:
            num_null += 1
        else:
            total += lengths[i]
        offsets[i + 1] = total
    return num_null


@njit(cache=True)
def gather_texts(places, sizes, raw, made):
    """The bytes of texts, one after the other."""
    count = 0
    for i in range(len(places)):
        place = places[i]
        for byte in range(sizes[i]):
            made[count] = raw[place + byte]
            count += 1


@njit(cache=True)
def sum_bytes(raw, begins, ends, made):
    """A checksum (FNV-1a) of each stretch of bytes."""
    for i in range(len(begins)):
        value = np.uint64(0xCBF29CE484222325)
        for at in range(begins[i], ends[i]):
            value = (value ^ np.uint64(raw[at])) * np.uint64(0x100000001B3)
        made[i] = value


@njit(cache=True)
def same_bytes(raw, begins, ends, others):
    """Whether each stretch of bytes is the same as another one."""
    for i in range(len(begins)):
        begin, other = begins[i], begins[others[i]]
        size = ends[i] - begin
        if size != ends[others[i]] - other:
            return False
        for at in range(size):
            if raw[begin + at] != raw[other + at]:
                return False
    return True
