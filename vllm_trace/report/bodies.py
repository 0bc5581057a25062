"""The raw events for the report: an index of all, and their fields in pages that are read late."""

from __future__ import annotations

from typing import Any

import msgspec

from vllm_trace.events import KINDS, Event
from vllm_trace.trace import Record

PAGE = 2_000
"""Events in a page: a page is unpacked when one of its events is looked at."""

MAX_EVENTS = 200_000
"""Events in one report: further ones are left out, and the report says so."""

MAX_LIST = 600
"""Items of a list in an event; of a longer one, the first and a word on how many there are."""

_EXACT = 1 << 53
"""Beyond this, JavaScript's numbers are not exact."""

_TOKENS = "token_ids"
_HASHES = ("block_hashes", "new_hashes", "hashes", "events")


class Bodies:
    """Fold of a trace into the events view."""

    def __init__(self, *, tokens: bool, window: tuple[int, int]) -> None:
        self.tokens = tokens
        self.window = window
        self.kinds: dict[str, int] = {}
        self.index: dict[str, list[int]] = {
            name: [] for name in ("number", "kind", "step", "request", "process")
        }
        self.pages: list[bytes] = []
        self.num_left_out = 0
        self._page: list[bytes] = []
        self._waiting: list[Record] = []
        self._step = 0
        self._encode = msgspec.json.Encoder().encode

    def take(self, record: Record) -> None:
        """One record. It belongs to the step that it leads up to, as in ``show events --step``."""
        self._waiting.append(record)
        step = getattr(record.event, "step", None)
        if step is not None:
            self._flush(step)
            self._step = step
        elif len(self._waiting) >= 4096:
            self._flush(self._step)

    def close(self) -> None:
        self._flush(self._step)
        if self._page:
            self._end_page()

    def _flush(self, step: int) -> None:
        first, last = self.window
        for record in self._waiting:
            if not first <= step <= last or len(self.index["number"]) >= MAX_EVENTS:
                self.num_left_out += 1
                continue
            event, index = record.event, self.index
            index["number"].append(record.number)
            index["kind"].append(self.kinds.setdefault(event.kind, len(self.kinds)))
            index["step"].append(step)
            index["request"].append(getattr(event, "request", -1))
            index["process"].append(record.process)
            self._page.append(self._encode(self.fields_of(event)))
            if len(self._page) == PAGE:
                self._end_page()
        self._waiting.clear()

    def _end_page(self) -> None:
        self.pages.append(b"[" + b",".join(self._page) + b"]")
        self._page = []

    def fields_of(self, event: Event) -> list[Any]:
        """Values in the order of the fields, without tokens unless they were asked for."""
        made = []
        for name in event.__struct_fields__:
            value = getattr(event, name)
            if name == _TOKENS and not self.tokens:
                value = None
            elif name in _HASHES:
                value = exact(msgspec.to_builtins(value))
            if type(value) is list and len(value) > MAX_LIST:
                value = [*value[:MAX_LIST], f"… {len(value)} in all"]
            made.append(value)
        return made

    def to_dict(self) -> dict[str, Any]:
        numbers = self.index["number"]
        index = dict(self.index)
        # Usually all of them: a list that says nothing.
        if numbers and numbers[-1] - numbers[0] == len(numbers) - 1:
            index["number"] = numbers[:1]
        if not any(index["process"]):
            index["process"] = []
        kinds = [
            {"name": name, "fields": list(KINDS[name].__struct_fields__)} for name in self.kinds
        ]
        return index | {
            "count": len(numbers),
            "kinds": kinds,
            "page": PAGE,
            "pages": len(self.pages),
        }


def exact(value: Any) -> Any:
    """Integers that JavaScript would round, as text."""
    if type(value) is int:
        return str(value) if abs(value) > _EXACT else value
    if isinstance(value, list | tuple):
        return [exact(each) for each in value]
    if isinstance(value, dict):
        return {key: exact(each) for key, each in value.items()}
    return value
