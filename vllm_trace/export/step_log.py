"""Events of the steps that decode, once for all requests in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from vllm_trace.export.span import SpanEvent


class StepLog:
    """Grows at its end and is forgotten from its beginning.

    A request's decode is a range of places in it. What lies before every open range is forgotten.
    """

    def __init__(self) -> None:
        self.events: list[SpanEvent] = []
        self.begin = 0
        self._bytes = bytearray()
        """The first events as an encoder makes them, one after the other."""
        self._starts = [0]
        """Where each of these begins, and where the last one ends; counted from the first there ever was."""

    @property
    def end(self) -> int:
        return self.begin + len(self.events)

    def append(self, event: SpanEvent) -> int:
        """Returns its place."""
        place = self.begin + len(self.events)
        self.events.append(event)
        return place

    def at(self, place: int) -> SpanEvent:
        """The event of a place that is not forgotten."""
        assert place >= self.begin
        return self.events[place - self.begin]

    def slice(self, begin: int, end: int) -> list[SpanEvent]:
        return self.events[begin - self.begin : end - self.begin]

    def joined(self, begin: int, end: int, encode: Callable[[SpanEvent], bytes]) -> bytearray:
        """A range as bytes, made once for all requests. Its events, and those before, change no more."""
        starts, first = self._starts, self.begin
        for event in self.events[len(starts) - 1 : end - first]:
            self._bytes += event.wire or encode(event)
            starts.append(starts[0] + len(self._bytes))
        return self._bytes[starts[begin - first] - starts[0] : starts[end - first] - starts[0]]

    def forget(self, before: int) -> None:
        count = min(before - self.begin, len(self.events))
        if count > 0:
            del self.events[:count]
            self.begin += count
            known = min(count, len(self._starts) - 1)
            del self._bytes[: self._starts[known] - self._starts[0]]
            del self._starts[:known]


Piece = tuple[int, int] | SpanEvent
"""A range of places in the log, or an event."""


class LogEvents(Sequence[SpanEvent]):
    """The events of one decode: ranges of the log, of which nothing changes any more, and events of its own.

    A reader may take them as a list; an encoder takes the ranges as bytes.
    """

    def __init__(self, log: StepLog, pieces: list[Piece]) -> None:
        self.log, self.pieces = log, pieces

    def __iter__(self) -> Iterator[SpanEvent]:
        for piece in self.pieces:
            if isinstance(piece, tuple):
                yield from self.log.slice(*piece)
            else:
                yield piece

    def __len__(self) -> int:
        return sum(
            [piece[1] - piece[0] if isinstance(piece, tuple) else 1 for piece in self.pieces]
        )

    def __getitem__(self, index: int) -> SpanEvent:  # type: ignore[override]
        """The first or the last."""
        assert index in (0, -1)
        piece = self.pieces[index]
        if not isinstance(piece, tuple):
            return piece
        return self.log.at(piece[0] if index == 0 else piece[1] - 1)

    def joined(self, encode: Callable[[SpanEvent], bytes]) -> list[bytes | bytearray]:
        """All of them, as an encoder makes them."""
        return [
            self.log.joined(*piece, encode) if isinstance(piece, tuple) else encode(piece)
            for piece in self.pieces
        ]
