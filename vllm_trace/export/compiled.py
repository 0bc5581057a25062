"""What needs numba, in one place: importing this fails where there is none."""

from __future__ import annotations

from collections.abc import Iterator

from numba import njit

from vllm_trace.export import columns, fast, holding, lives, steps
from vllm_trace.export.columns import Chunk
from vllm_trace.trace import Trace

fold = njit(cache=True)(holding.fold)
live = njit(cache=True)(lives.fold)
count_tokens = njit(cache=True)(steps.count_tokens)


def chunks(trace: Trace, tokens: bool = False) -> Iterator[Chunk]:
    """The chunks of a trace of one process.

    Bytes that a recorder does not write are read again from there on by ``columns``, which says
    what is wrong with them.
    """
    number = 0
    try:
        for chunk in fast.chunks(trace.files[0], tokens):
            number += sum(batch.num_rows for batch in chunk.values())
            yield chunk
        return
    except fast.Unusual:
        pass
    yield from columns.chunks(trace, tokens, after=number)
