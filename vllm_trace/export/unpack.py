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
    total, event, short = len(raw), 0, False
    used[:] = 0
    counts[:] = 0
    rare[:] = 0
    while at < total:
        if total - at < 4:
            return UNUSUAL, at
        size = np.int64(0)
        for i in range(4):
            size |= np.int64(raw[at + i]) << (8 * i)
        at += 4
        end = at + size
        if end > total:
            return UNUSUAL, at
        sort, num_events, at = token(raw, at, end)
        if sort != LIST:
            return UNUSUAL, at
        for _ in range(num_events):
            begun = at
            sort, length, at = token(raw, at, end)
            if sort != LIST or length == 0:
                return UNUSUAL, begun
            sort, tag, at = token(raw, at, end)
            if sort != NUMBER or tag < 0 or tag >= len(kinds) or kinds[tag, 0] < 0:
                return UNUSUAL, begun
            first, num_fields = kinds[tag, 0], kinds[tag, 1]
            if length - 1 < kinds[tag, 2]:
                return UNUSUAL, begun
            row = counts[tag]
            counts[tag] += 1
            if row >= rooms[kinds[tag, 3]]:
                short, row = True, 0  # anywhere: it is all read again
            cells[begins[kinds[tag, 3]] + row] = event
            tags[event] = tag
            heads[event] = begun
            has_step[event] = False
            has_time[event] = False
            for field in range(first, first + num_fields):
                what, slot, says = fields[field, 0], fields[field, 1], fields[field, 4]
                if field - first >= length - 1:
                    if slot >= 0:
                        value = fields[field, 2]
                        if what == OF_TEXT:
                            cells[begins[slot] + row] = value >> 32
                            cells[begins[slot + 1] + row] = np.int64(np.int32(value))
                        else:
                            cells[begins[slot] + row] = value
                    continue
                if what in (OF_INT, PLACE):
                    good, value, at = number(raw, at, end, False)
                    if not good:
                        return UNUSUAL, at
                    if what == OF_INT:
                        cells[begins[slot] + row] = value
                    if says == AS_STEP:
                        steps[event], has_step[event] = value, True
                    elif says == AS_TIME:
                        times[event], has_time[event] = value, True
                elif what >= OF_INTS:
                    sort, length_of, at = token(raw, at, end)
                    if sort == NIL and fields[field, 3]:
                        cells[begins[slot] + row] = -1
                        continue
                    if (
                        sort != (LIST if what <= OF_LISTS_OF_HASHES else MAP)
                        or length_of > end - at
                    ):
                        return UNUSUAL, at
                    cells[begins[slot] + row] = length_of
                    if what <= OF_HASHES:
                        place = used[slot + 1]
                        used[slot + 1] += length_of
                        fits = used[slot + 1] <= rooms[slot + 1]
                        short |= not fits
                        into = begins[slot + 1] + place
                        for i in range(length_of):
                            good, value, at = number(raw, at, end, what == OF_HASHES)
                            if not good:
                                return UNUSUAL, at
                            if fits:
                                cells[into + i] = value
                            if i == 0 and says == AS_TIME:
                                times[event], has_time[event] = value, True
                    elif what <= OF_LISTS_OF_HASHES:
                        place = used[slot + 1]
                        used[slot + 1] += length_of
                        fits = used[slot + 1] <= rooms[slot + 1]
                        short |= not fits
                        for i in range(length_of):
                            sort, inner, at = token(raw, at, end)
                            if sort != LIST or inner > end - at:
                                return UNUSUAL, at
                            if fits:
                                cells[begins[slot + 1] + place + i] = inner
                            into = begins[slot + 2] + used[slot + 2]
                            used[slot + 2] += inner
                            fit = used[slot + 2] <= rooms[slot + 2]
                            short |= not fit
                            for j in range(inner):
                                good, value, at = number(raw, at, end, what == OF_LISTS_OF_HASHES)
                                if not good:
                                    return UNUSUAL, at
                                if fit:
                                    cells[into + j] = value
                    else:
                        last = slot + (2 if what == OF_INT_MAP else 3)
                        place = used[last]
                        for part in range(slot + 1, last + 1):  # all grow alike
                            used[part] = place + length_of
                        fits = used[last] <= rooms[last]
                        short |= not fits
                        for i in range(length_of):
                            if what == OF_INT_MAP:
                                good, key, at = number(raw, at, end, False)
                                if not good:
                                    return UNUSUAL, at
                                if fits:
                                    cells[begins[slot + 1] + place + i] = key
                            else:
                                sort, key, at = token(raw, at, end)
                                if sort != TEXT:
                                    return UNUSUAL, at
                                if fits:
                                    cells[begins[slot + 1] + place + i] = at
                                    cells[begins[slot + 2] + place + i] = key
                                at += key
                            good, value, at = number(raw, at, end, False)
                            if not good:
                                return UNUSUAL, at
                            if fits:
                                cells[begins[last] + place + i] = value
                elif what == OF_TEXT:
                    sort, value, at = token(raw, at, end)
                    if sort == TEXT:
                        cells[begins[slot] + row] = at
                        cells[begins[slot + 1] + row] = value
                        at += value
                    elif sort == NIL and fields[field, 3]:
                        cells[begins[slot] + row] = 0
                        cells[begins[slot + 1] + row] = -1
                    else:
                        return UNUSUAL, at
                elif what in (OF_BOOL, OF_FLOAT):
                    sort, value, at = token(raw, at, end)
                    if sort != (BOOL if what == OF_BOOL else FLOAT):
                        return UNUSUAL, at
                    cells[begins[slot] + row] = value
                else:
                    before = at
                    at = skip(raw, at, end)
                    if at < 0:
                        return UNUSUAL, before
                    if what == OF_JSON:
                        if not (0x80 <= raw[before] < 0x90 or 0xDE <= raw[before] <= 0xDF):
                            return UNUSUAL, before
                        cells[begins[slot] + row] = before
                        cells[begins[slot + 1] + row] = at
                    elif what == RARE and not (
                        at - before == 1 and raw[before] == fields[field, 2]
                    ):
                        rare[tag] = 1
            for _ in range(num_fields, length - 1):
                before = at
                at = skip(raw, at, end)
                if at < 0:
                    return UNUSUAL, before
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


@njit(cache=True)
def spell_out(lengths, items, last):
    """Lists of which -1 in ``lengths`` says "as the one before", the first as ``last``: offsets, items."""
    count, size = np.int64(0), np.int64(len(last))
    for i in range(len(lengths)):
        if lengths[i] >= 0:
            size = lengths[i]
        count += size
    offsets = np.empty(len(lengths) + 1, np.int32)
    made = np.empty(count, np.int64)
    offsets[0] = 0
    read, at, size = np.int64(0), np.int64(0), np.int64(len(last))
    before, of_last = np.int64(0), True
    for i in range(len(lengths)):
        if lengths[i] >= 0:
            size, before, of_last = lengths[i], read, False
            read += size
        for j in range(size):
            made[at + j] = last[j] if of_last else items[before + j]
        at += size
        offsets[i + 1] = at
    return offsets, made


@njit(cache=True)
def spell_out_outputs(lengths, items, events, steps, scheduled, of_steps, sizes, back):
    """Outputs of which -1 in ``lengths`` says "one each", where the step is one of the ``back`` before.

    ``events`` and ``steps`` are of the updates, ``scheduled`` (events), ``of_steps``, ``sizes`` of
    what was scheduled. Puts the lengths in and returns the items.
    """
    latest, count = 0, np.int64(0)
    told = np.empty(len(lengths), np.int64)
    for i in range(len(lengths)):
        while latest < len(scheduled) and scheduled[latest] < events[i]:
            latest += 1
        told[i] = lengths[i]
        if lengths[i] < 0:
            for place in range(latest - 1, max(latest - 1 - back, -1), -1):
                if of_steps[place] == steps[i]:
                    lengths[i] = sizes[place]
                    break
        if lengths[i] > 0:
            count += lengths[i]
    made = np.empty(count, np.int64)
    read, at = np.int64(0), np.int64(0)
    for i in range(len(lengths)):
        if told[i] >= 0:
            made[at : at + told[i]] = items[read : read + told[i]]
            read += told[i]
            at += told[i]
        else:
            for _ in range(lengths[i]):
                made[at] = 1
                at += 1
    return made
