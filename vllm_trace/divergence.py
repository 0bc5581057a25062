"""The first place where a trace and ``mini`` differ: what, of which class, and how to see it again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

CLASSES = ("order", "eviction", "hash", "off by one", "lost event", "configuration", "schedule")

OF_BLOCKS = ("blocks.taken", "slots.allocated", "blocks.freed", "blocks.touched")
"""Facts that are lists of block ids."""


@dataclass
class PoolState:
    """The pool and the tables as one side has them after the call in which they differ."""

    free_list: list[int] = field(default_factory=list)
    """The free queue, the next to be handed out first."""
    tables: dict[str, list[list[int]]] = field(default_factory=dict)
    """Block tables by request name."""
    ref_cnts: dict[int, int] = field(default_factory=dict)
    """Of blocks with a count above zero."""


@dataclass
class Divergence:
    """Both sides of the first difference."""

    event: int
    """Number of the recorded event."""
    kind: str
    """One of ``CLASSES``."""
    recorded: str
    mini: str
    note: str = ""
    """Under which other release's rules both sides agree."""
    recorded_state: PoolState = field(default_factory=PoolState)
    """What the events add up to."""
    mini_state: PoolState = field(default_factory=PoolState)
    story: list[str] = field(default_factory=list)
    """The recorded events before it, oldest first."""
    script: str = ""
    """A program over ``mini`` that ends with what ``mini`` does here."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def classify(recorded: Any, mini: Any) -> str:
    """Which kind of difference it is; see ``CLASSES``."""
    if recorded is None or mini is None:
        return "lost event"
    if recorded[0] != mini[0]:
        both = {recorded[0], mini[0]}
        return "eviction" if "block.evicted" in both else "lost event"
    kind = recorded[0]
    if kind in ("prefix.looked_up", "blocks.cached"):
        return "hash"
    if kind == "block.evicted":
        return "eviction"
    theirs, ours = _ids(recorded), _ids(mini)
    if kind in OF_BLOCKS and theirs != ours:
        if sorted(theirs) == sorted(ours) or len(theirs) == len(ours):
            return "order"
        return "off by one"
    if isinstance(recorded[-1], int) and isinstance(mini[-1], int):
        return "off by one" if abs(recorded[-1] - mini[-1]) == 1 else "schedule"
    return "schedule"


def _ids(fact: Any) -> list[int]:
    """Every block id in a fact, however deep its lists."""
    found: list[int] = []
    for value in fact[1:]:
        if isinstance(value, list):
            found += [i for v in value for i in (v if isinstance(v, list) else [v])]
    return found
