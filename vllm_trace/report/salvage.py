"""A trace read as far as it goes: what is damaged in the middle ends it there, and is said."""

from __future__ import annotations

from collections.abc import Iterator

from vllm_trace.errors import TraceError
from vllm_trace.trace import Record, Trace


class Salvaged(Trace):
    """The same trace, whose records end where it cannot be read on.

    Every reader of it (summary, invariants, replay) sees the same beginning, and finds the damage
    among ``problems``.
    """

    def __init__(self, trace: Trace) -> None:
        super().__init__(trace.files)
        self.damage = ""

    @property
    def problems(self) -> list[str]:
        return [*([self.damage] if self.damage else []), *super().problems]

    def records(self) -> Iterator[Record]:
        self.damage = ""
        last = 0
        try:
            for record in super().records():
                last = record.number
                yield record
        except TraceError as error:
            self.damage = f"read up to event {last} only: {error}"
