"""Who has which block: the loop of ``tenancies`` over what happened, event by event.

Written for numba (flat arrays, no objects); it runs without it too, more slowly.
"""

from __future__ import annotations

NAMES = (
    "block", "request", "group", "position", "how", "num_sharers", "from_event", "from_step",
    "from_ns", "cached_event", "to_event", "to_step", "to_ns", "ended", "evicted_event",
    "next_event", "next_request", "next_how",
)  # fmt: skip

(
    BLOCK, REQUEST, GROUP, POSITION, HOW_GOT, NUM_SHARERS, FROM_EVENT, FROM_STEP, FROM_NS, CACHED,
    TO_EVENT, TO_STEP, TO_NS, HOW_ENDED, EVICTED, NEXT_EVENT, NEXT_REQUEST, NEXT_HOW,
) = range(len(NAMES))  # fmt: skip

NOTHING, ALLOCATED, REFUSED, FREED, GAVE_BACK, PREEMPTED, FINISHED, GOT_HASH, LOST_HASH = range(9)
"""What an event was."""

STEP, NS, WHO, INDEX, BEGIN, END, HIT_BEGIN, HIT_END = range(8)
"""What is told of it: its step and time, request and the index of that, where its blocks begin and end in
``flat``. Of ``ALLOCATED``, where its groups begin and end in ``groups``, which says it for each group; of
``FINISHED``, how as ``BEGIN``."""

HELD, BY_FREE, _, _, BY_PREEMPTION, BY_WINDOW = range(6)
"""How a row ended, until its ``request.finished`` says more."""


def fold(
    what, number, told, at, groups, flat,
    rows, links, free, heads, cached, filled, given, closed, state, out,
):  # fmt: skip
    """Take what happened; write the rows that are complete to the columns of ``out``, return how many.

    ``what`` says it for each event from ``number`` on; ``at`` has for each kind which column of
    ``told`` is of its next event. ``rows`` are the open tenancies and those that wait for a next one,
    each in the chain of its block (``heads``, ``links``); ``free`` is a stack of unused ones.
    ``cached`` has per block who gave it a hash, and when; ``filled`` per request and group the
    length of the table; ``given`` what was freed and not explained yet; ``closed`` the rows that
    the last ``request.freed`` ended. ``state``: sizes of ``free``, ``given``, ``closed``; this call
    of ``allocate_slots`` and the last.
    """
    num_out = 0
    for place in range(len(what)):
        kind = what[place]
        if kind == NOTHING:
            continue
        event, one = number + place, at[kind]
        at[kind] += 1
        request, begin, end = told[WHO, one], told[BEGIN, one], told[END, one]
        if kind == FREED:
            for i in range(begin, end):
                if state[1] < len(given):
                    given[state[1], 0] = flat[i]
                    given[state[1], 1] = event
                    given[state[1], 2] = told[STEP, one]
                    given[state[1], 3] = told[NS, one]
                    state[1] += 1
        elif kind in (ALLOCATED, REFUSED, GAVE_BACK):
            state[2] = 0
            for i in range(state[1]):
                block = given[i, 0]
                if block <= 0 or block >= len(heads):
                    continue
                row = heads[block]
                while row >= 0:
                    if rows[row, TO_EVENT] < 0 and rows[row, REQUEST] == request:
                        rows[row, TO_EVENT] = given[i, 1]
                        rows[row, TO_STEP] = given[i, 2]
                        rows[row, TO_NS] = given[i, 3]
                        if kind == GAVE_BACK:
                            rows[row, HOW_ENDED] = BY_FREE
                            closed[state[2]] = row
                            state[2] += 1
                        else:
                            rows[row, HOW_ENDED] = BY_WINDOW
                        break
                    row = links[row]
            state[1] = 0
            index = told[INDEX, one]
            if kind == GAVE_BACK:
                filled[index, :] = 0
                continue
            state[4] = state[3]
            state[3] = event
            if kind == REFUSED:
                continue
            for how in (1, 0):  # hits stand before new ones in the table
                first = told[HIT_BEGIN, one] if how else begin
                last = told[HIT_END, one] if how else end
                for each in range(first, last):
                    group = each - first
                    for i in range(groups[0, each], groups[1, each]):
                        block = flat[i]
                        position = filled[index, group]
                        filled[index, group] += 1
                        if block <= 0 or block >= len(heads):
                            continue
                        sharers, before, row = 0, -1, heads[block]
                        while row >= 0:
                            after = links[row]
                            if rows[row, TO_EVENT] < 0:
                                sharers += 1
                                before = row
                            else:
                                rows[row, NEXT_EVENT] = event
                                rows[row, NEXT_REQUEST] = request
                                rows[row, NEXT_HOW] = how
                                for column in range(len(out)):
                                    out[column, num_out] = rows[row, column]
                                num_out += 1
                                if before < 0:
                                    heads[block] = after
                                else:
                                    links[before] = after
                                free[state[0]] = row
                                state[0] += 1
                            row = after
                        state[0] -= 1
                        row = free[state[0]]
                        rows[row, :] = -1
                        rows[row, BLOCK] = block
                        rows[row, REQUEST] = request
                        rows[row, GROUP] = group
                        rows[row, POSITION] = position
                        rows[row, HOW_GOT] = how
                        rows[row, NUM_SHARERS] = sharers
                        rows[row, FROM_EVENT] = event
                        rows[row, FROM_STEP] = told[STEP, one]
                        rows[row, FROM_NS] = told[NS, one]
                        rows[row, HOW_ENDED] = HELD
                        # Within the call, hashes come before the table is told.
                        if how == 0 and cached[block, 0] == request and cached[block, 1] > state[4]:
                            rows[row, CACHED] = cached[block, 1]
                        links[row] = heads[block]
                        heads[block] = row
        elif kind in (PREEMPTED, FINISHED):
            for i in range(state[2]):
                row = closed[i]
                if rows[row, REQUEST] == request and rows[row, HOW_ENDED] == BY_FREE:
                    rows[row, HOW_ENDED] = BY_PREEMPTION if kind == PREEMPTED else begin
            state[2] = 0
        elif kind == GOT_HASH:
            for i in range(begin, end):
                block = flat[i]
                if block <= 0 or block >= len(heads):
                    continue
                cached[block, 0] = request
                cached[block, 1] = event
                row = heads[block]
                while row >= 0:
                    if (
                        rows[row, REQUEST] == request
                        and rows[row, TO_EVENT] < 0
                        and rows[row, CACHED] < 0
                    ):
                        rows[row, CACHED] = event
                    row = links[row]
        elif kind == LOST_HASH:
            block = flat[begin]
            row = heads[block] if 0 < block < len(heads) else -1
            while row >= 0:
                if rows[row, TO_EVENT] >= 0 and rows[row, EVICTED] < 0:
                    rows[row, EVICTED] = event
                row = links[row]
    return num_out
