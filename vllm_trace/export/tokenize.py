"""MessagePack to flat arrays of tokens, compiled: what makes millions of events a second possible.

A *token* is a number, a text, or the head of a list or map. Numba compiles the one function here
the first time it is used (a few seconds, kept on disk); without numba ``columns`` does the work.
"""

from __future__ import annotations

import numpy as np
from numba import njit

NUMBER, NEGATIVE, NIL, BOOL, TEXT, LIST, MAP, FLOAT = range(8)

DEEPEST = 32
"""Lists within lists; events have at most six."""


@njit(cache=True)
def tokenize(raw, sorts, values, nexts, places, starts, ends):
    """Read batches (``size u32, MessagePack list of events``) that fill ``raw`` exactly.

    Writes for each token its sort, its value (a number; ``place << 32 | size`` of a text; how many
    a list or map has), the index of the token after it and all within it, and its first byte. For
    each event, its token goes to ``starts`` and the byte after it to ``ends``.

    Returns (tokens, events), or (-1, byte) where it is not what a recorder writes.
    """
    position, total = 0, len(raw)
    num_tokens, num_events = 0, 0
    heads = np.empty(DEEPEST, np.int64)
    left = np.empty(DEEPEST, np.int64)
    while position < total:
        if total - position < 4:
            return -1, position
        size = np.int64(0)
        for i in range(4):
            size |= np.int64(raw[position + i]) << (8 * i)
        position += 4
        end = position + size
        if end > total:
            return -1, position
        depth = 0
        while True:
            if position >= end:
                return -1, position
            begun = position
            head = raw[position]
            position += 1
            width, sort, value = 0, NUMBER, np.int64(0)
            if head < 0x80:
                value = np.int64(head)
            elif head < 0x90:
                sort, value = MAP, np.int64(head & 15)
            elif head < 0xA0:
                sort, value = LIST, np.int64(head & 15)
            elif head < 0xC0:
                sort, value = TEXT, np.int64(head & 31)
            elif head >= 0xE0:
                sort, value = NEGATIVE, np.int64(head) - 256
            elif head == 0xC0:
                sort = NIL
            elif head == 0xC2 or head == 0xC3:
                sort, value = BOOL, np.int64(head & 1)
            elif head == 0xCB:
                sort, width = FLOAT, 8
            elif 0xCC <= head <= 0xCF:
                width = 1 << (head - 0xCC)
            elif 0xD0 <= head <= 0xD3:
                sort, width = NEGATIVE, 1 << (head - 0xD0)
            elif 0xD9 <= head <= 0xDB:
                sort, width = TEXT, 1 << (head - 0xD9)
            elif head == 0xDC or head == 0xDD:
                sort, width = LIST, 2 << (head - 0xDC)
            elif head == 0xDE or head == 0xDF:
                sort, width = MAP, 2 << (head - 0xDE)
            else:
                return -1, begun
            if end - position < width:
                return -1, begun
            if width:
                for i in range(width):
                    value = (value << 8) | np.int64(raw[position + i])
                position += width
                if sort == NEGATIVE:
                    if width < 8 and value >> (8 * width - 1):
                        value -= np.int64(1) << (8 * width)
                    if value >= 0:
                        sort = NUMBER
            if sort == TEXT:
                if end - position < value:
                    return -1, begun
                place = np.int64(position)
                position += int(value)
                value = (place << 32) | value
            token = num_tokens
            num_tokens += 1
            sorts[token] = sort
            values[token] = value
            places[token] = begun
            children = value if sort == LIST else (2 * value if sort == MAP else 0)
            if depth == 0 and sort != LIST:
                return -1, begun
            if depth == 1:
                if sort != LIST or value == 0:
                    return -1, begun
                starts[num_events] = token
                num_events += 1
            if children:
                if depth == DEEPEST:
                    return -1, begun
                heads[depth] = token
                left[depth] = children
                depth += 1
                continue
            nexts[token] = num_tokens
            while depth:
                left[depth - 1] -= 1
                if left[depth - 1]:
                    break
                depth -= 1
                nexts[heads[depth]] = num_tokens
                if depth == 1:
                    ends[num_events - 1] = position
            if depth == 0:
                break
        if position != end:
            return -1, position
    return num_tokens, num_events


@njit(cache=True)
def walk(heads, lengths, nexts, nothing, fields):
    """The token of each field of each event; ``nothing`` for one that is not there."""
    for event in range(len(heads)):
        token = heads[event] + 2
        for field in range(len(fields)):
            if lengths[event] > field + 1:
                fields[field, event] = token
                token = nexts[token]
            else:
                fields[field, event] = nothing


@njit(cache=True)
def pick(at, sorts, values, unsigned, made):
    """The numbers that tokens are; False when one is none, or does not fit."""
    for i in range(len(at)):
        token = at[i]
        value = values[token]
        if sorts[token] != NUMBER:
            if unsigned or sorts[token] != NEGATIVE:
                return False
        elif value < 0 and not unsigned:
            return False
        made[i] = value
    return True


@njit(cache=True)
def pick_lists(at, lengths, sorts, values, unsigned, made):
    """The numbers in lists of numbers, one list after the other; False as in ``pick``."""
    count = 0
    for i in range(len(at)):
        for token in range(at[i] + 1, at[i] + 1 + lengths[i]):
            value = values[token]
            if sorts[token] != NUMBER:
                if unsigned or sorts[token] != NEGATIVE:
                    return False
            elif value < 0 and not unsigned:
                return False
            made[count] = value
            count += 1
    return True


@njit(cache=True)
def pick_texts(at, sizes, raw, values, made):
    """The bytes of texts, one after the other."""
    count = 0
    for i in range(len(at)):
        place = values[at[i]] >> 32
        for byte in range(place, place + sizes[i]):
            made[count] = raw[byte]
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
