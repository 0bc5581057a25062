"""What ``unpack`` must know of each kind of event: arrays of numbers, made from ``events.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from vllm_trace.events import EVENT_TYPES, AttentionCalled, Event, StepScheduled
from vllm_trace.export import unpack as u
from vllm_trace.export.tables import HASHES, HINTS, PLACE, SCHEMAS, TUPLES, is_json, may_lack

BY_TAG: dict[int, type[Event]] = {cls.__struct_config__.tag: cls for cls in EVENT_TYPES}  # type: ignore[misc]

_FACTORY = StepScheduled.__struct_defaults__[-1]
"""A default that msgspec makes anew each time: an empty list or map."""

SHAPED = {
    cls: not any(n in ("candidates", "events", "groups", "settings") for n in cls.__struct_fields__)
    for cls in EVENT_TYPES
}
"""Kinds that ``unpack`` can take apart; the others are rare."""

SLOTS = {
    u.OF_INT: 1, u.OF_BOOL: 1, u.OF_FLOAT: 1, u.OF_TEXT: 2, u.OF_JSON: 2, u.OF_INTS: 2, u.OF_HASHES: 2,
    u.OF_LISTS: 3, u.OF_LISTS_OF_HASHES: 3, u.OF_INT_MAP: 3, u.OF_TEXT_MAP: 4,
}  # fmt: skip
"""How many slots a field has. One number for each row: all of the first three sorts, of texts and JSON,
and the lengths of lists and maps; as many as there are: what is in those."""

A_ROW = {u.OF_TEXT: 2, u.OF_JSON: 2}
"""How many of them have one number for each row, where it is not one."""


@dataclass(frozen=True)
class Column:
    """A field of a kind, as ``unpack`` leaves it."""

    name: str
    what: int
    slot: int
    type: pa.DataType


class Shapes:
    """All kinds; ``tokens`` says whether token ids are wanted."""

    def __init__(self, tokens: bool) -> None:
        self.kinds = np.full((1 + max(BY_TAG), 4), -1, np.int64)
        self.columns: dict[type[Event], list[Column]] = {}
        self.defaults = b""
        """Texts that stand for fields that are not in the file: they lie before the bytes that are read."""
        self.kind_of_slot: list[int] = []
        """The tag of the kind whose rows it counts; -1: it has a size of its own."""
        fields: list[tuple[int, int, int, bool, int]] = []
        for tag, cls in BY_TAG.items():
            names = cls.__struct_fields__ if SHAPED[cls] else ()
            required = len(cls.__struct_fields__) - len(cls.__struct_defaults__)
            self.kinds[tag] = len(fields), len(names), required, self._slots(tag, 1, 1)
            self.columns[cls] = []
            for place, name in enumerate(names):
                default = cls.__struct_defaults__[place - required] if place >= required else None
                if isinstance(default, type(_FACTORY)):
                    default = default.factory()
                fields.append(self._field(tag, cls, name, default, tokens))
        self.fields = np.array(fields, np.int64)

    def _slots(self, tag: int, count: int, a_row: int) -> int:
        first = len(self.kind_of_slot)
        self.kind_of_slot += [tag] * a_row + [-1] * (count - a_row)
        return first

    def _field(
        self, tag: int, cls: type[Event], name: str, default: Any, tokens: bool
    ) -> tuple[int, int, int, bool, int]:
        says = 0
        if name == "step":
            says = u.AS_STEP
        elif name == "at_ns" or name == "started_ns":
            says = u.AS_TIME
        if name in PLACE:
            return u.PLACE, -1, 0, False, says
        kind = SCHEMAS[cls].field(name).type
        what = self._sort(cls, name, kind, tokens)
        slot = self._slots(tag, SLOTS[what], A_ROW.get(what, 1)) if what in SLOTS else -1
        self.columns[cls].append(Column(name, what, slot, kind))
        return what, slot, self._absent(what, kind, default), may_lack(HINTS[cls][name]), says

    @staticmethod
    def _sort(cls: type[Event], name: str, kind: pa.DataType, tokens: bool) -> int:
        if name == "token_ids" and not tokens:
            return u.NOTHING
        if cls is AttentionCalled and (name in TUPLES or is_json(cls, name)):
            return u.RARE
        if is_json(cls, name):
            return u.OF_JSON
        if pa.types.is_list(kind):
            hashes = name in HASHES
            if pa.types.is_list(kind.value_type):
                return u.OF_LISTS_OF_HASHES if hashes else u.OF_LISTS
            return u.OF_HASHES if hashes else u.OF_INTS
        if pa.types.is_map(kind):
            return u.OF_TEXT_MAP if pa.types.is_string(kind.key_type) else u.OF_INT_MAP
        return {pa.int64(): u.OF_INT, pa.string(): u.OF_TEXT, pa.bool_(): u.OF_BOOL,
                pa.float64(): u.OF_FLOAT}[kind]  # fmt: skip

    def _absent(self, what: int, kind: pa.DataType, default: Any) -> int:
        """What stands for a field that is not in the file."""
        if what == u.OF_TEXT:
            if default is None:
                return 0xFFFFFFFF  # a size of -1
            place, text = len(self.defaults), default.encode()
            self.defaults += text
            return place << 32 | len(text)
        if what == u.RARE:  # the byte of an empty one
            return 0x90 if pa.types.is_list(kind) else 0x80
        if what >= u.OF_INTS:
            assert not default, default
            return -1 if default is None else 0
        if what == u.OF_FLOAT:
            return int(np.float64(default or 0).view(np.int64))
        return int(default or 0)
