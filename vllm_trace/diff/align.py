"""Two lists of facts side by side: equal up to a renaming of blocks, equal, or different how."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

from vllm_trace.diff.facts import Fact, Part

CLASSES = (
    "configuration", "schedule", "output", "eviction", "hash", "order", "off by one",
    "lost event", "kernel",
)  # fmt: skip

MAX_ALIGNED = 3000
"""Facts of a part that are aligned; longer ones are compared place by place."""


class Pair(NamedTuple):
    """One difference: a fact of each side, or None where a side has nothing."""

    kind: str
    """One of ``CLASSES``."""
    a: Fact | None
    b: Fact | None
    place_a: int
    """Where it stands among the facts of its part; of the missing one, where it would."""
    place_b: int


class Renaming:
    """A one-to-one map between values of A and values of B, learnt as they meet."""

    def __init__(self, fixed: Sequence[int] = ()) -> None:
        self.to_b: dict[int, int] = {value: value for value in fixed}
        self.to_a: dict[int, int] = dict(self.to_b)

    def fits(self, a: Sequence[int], b: Sequence[int]) -> bool:
        """Whether the values can be names of the same things; if so they are from now on."""
        if len(a) != len(b):
            return False
        new: list[tuple[int, int]] = []
        for left, right in zip(a, b):
            known = self.to_b.get(left)
            if known is None and right not in self.to_a:
                self.to_b[left], self.to_a[right] = right, left
                new.append((left, right))
            elif known != right:
                for bound, other in new:
                    del self.to_b[bound], self.to_a[other]
                return False
        return True

    def in_a(self, value: int) -> int:
        """B's value in A's names. One that did not come yet keeps its name if that is free."""
        known = self.to_a.get(value)
        if known is not None:
            return known
        return value if value not in self.to_b else ~value


class Names:
    """The renamings of one lane."""

    def __init__(self) -> None:
        self.blocks = Renaming(fixed=(0,))
        self.hashes = Renaming()

    def same(self, a: Fact, b: Fact) -> bool:
        """Equal up to the names of blocks and hashes."""
        if a.kind != b.kind or a.plain != b.plain or len(a.blocks) != len(b.blocks):
            return False
        if any(len(x) != len(y) for x, y in zip(a.blocks, b.blocks)):
            return False
        flat_a = [block for row in a.blocks for block in row]
        flat_b = [block for row in b.blocks for block in row]
        return self.blocks.fits(flat_a, flat_b) and self.hashes.fits(a.hashes, b.hashes)

    def clash(self, pair: Pair) -> str:
        """The first value of two facts that stood for another one before, in words; empty when there is none."""
        if pair.a is None or pair.b is None:
            return ""
        flat_a = [block for row in pair.a.blocks for block in row]
        flat_b = [block for row in pair.b.blocks for block in row]
        both = (
            ("block", self.blocks, flat_a, flat_b),
            ("hash", self.hashes, pair.a.hashes, pair.b.hashes),
        )
        for what, renaming, a, b in both:
            for left, right in zip(a, b):
                in_b, in_a = renaming.to_b.get(left, right), renaming.to_a.get(right, left)
                if in_b != right:
                    return f"{what} {left} of A was {what} {in_b} of B so far, and is {right} here"
                if in_a != left:
                    return f"{what} {right} of B was {what} {in_a} of A so far, and is {left} here"
        return ""

    def key(self, fact: Fact, of_b: bool) -> tuple[Any, ...]:
        """What the fact says, in A's names."""
        if not of_b:
            return (fact.kind, fact.plain, fact.blocks, fact.hashes)
        blocks = tuple(tuple(map(self.blocks.in_a, row)) for row in fact.blocks)
        return (fact.kind, fact.plain, blocks, tuple(map(self.hashes.in_a, fact.hashes)))


def differences(a: Part | None, b: Part | None, names: Names) -> list[Pair]:
    """All differences of two parts, up to renaming."""
    left, right = (a.facts if a else []), (b.facts if b else [])
    if a is None or b is None:
        some = left or right
        last = some[-1] if some else None
        return [] if last is None else [_only_here(last, of_a=b is None)]
    if len(left) == len(right) and all(map(names.same, left, right)):
        return []
    return list(_aligned(left, right, names))


def renamings(a: Part, b: Part) -> Iterator[Pair]:
    """Where two parts that are equal up to renaming use other names: ``order`` or ``hash``."""
    for place, (x, y) in enumerate(zip(a.facts, b.facts)):
        if x.blocks != y.blocks:
            yield Pair("order", x, y, place, place)
        if x.hashes != y.hashes:
            yield Pair("hash", x, y, place, place)


def _only_here(fact: Fact, *, of_a: bool) -> Pair:
    """A step that the other side does not have at all."""
    return Pair("schedule", fact if of_a else None, None if of_a else fact, 0, 0)


def _aligned(left: list[Fact], right: list[Fact], names: Names) -> Iterator[Pair]:
    keys_a = [names.key(fact, False) for fact in left]
    keys_b = [names.key(fact, True) for fact in right]
    if len(left) == len(right) and sorted(map(repr, keys_a)) == sorted(map(repr, keys_b)):
        first = next(i for i, (x, y) in enumerate(zip(keys_a, keys_b)) if x != y)
        yield Pair("order", left[first], right[first], first, first)
        return
    if max(len(left), len(right)) > MAX_ALIGNED:
        opcodes: Any = [("replace", 0, len(left), 0, len(right))]
    else:
        opcodes = SequenceMatcher(None, keys_a, keys_b, autojunk=False).get_opcodes()
    for tag, a1, a2, b1, b2 in opcodes:
        if tag == "equal":
            for x, y in zip(left[a1:a2], right[b1:b2]):
                names.same(x, y)
            continue
        yield from _replaced(left[a1:a2], right[b1:b2], a1, b1, names)


def _replaced(
    left: list[Fact], right: list[Fact], at_a: int, at_b: int, names: Names
) -> Iterator[Pair]:
    """Pair facts of the same kind in their order; what is left over stands on one side only."""
    kinds = SequenceMatcher(None, [f.kind for f in left], [f.kind for f in right], autojunk=False)
    for tag, a1, a2, b1, b2 in kinds.get_opcodes():
        if tag == "equal":
            for offset, (x, y) in enumerate(zip(left[a1:a2], right[b1:b2])):
                if not names.same(x, y):
                    kind = classify(x, y, names)
                    yield Pair(kind, x, y, at_a + a1 + offset, at_b + b1 + offset)
            continue
        for index in range(max(a2 - a1, b2 - b1)):
            place_a, place_b = min(a1 + index, a2), min(b1 + index, b2)
            only_a = left[place_a] if place_a < a2 else None
            only_b = right[place_b] if place_b < b2 else None
            kind = _one_sided(only_a, only_b)
            yield Pair(kind, only_a, only_b, at_a + place_a, at_b + place_b)


_SCHEDULING = ("step.scheduled", "request.preempted", "slots.refused")


def _one_sided(a: Fact | None, b: Fact | None) -> str:
    kinds = {fact.kind for fact in (a, b) if fact is not None}
    if a is not None and b is not None:
        if "block.evicted" in kinds:
            return "eviction"
        return "schedule" if kinds & set(_SCHEDULING) else "order"
    return "lost event"


def classify(a: Fact, b: Fact, names: Names) -> str:
    """Of which class the difference of two facts of one kind is; see ``CLASSES``."""
    kind = a.kind
    if kind == "engine.configured":
        return "configuration"
    if kind == "attention.planned":
        return "kernel"
    if kind == "step.updated":
        return "output" if a.plain[:1] == b.plain[:1] else "schedule"
    if kind == "block.evicted":
        return "eviction" if a.blocks != b.blocks else "hash"
    if a.plain != b.plain:
        return _numbers(a, b)
    sizes_a, sizes_b = [len(row) for row in a.blocks], [len(row) for row in b.blocks]
    if sizes_a != sizes_b:
        return "off by one" if abs(sum(sizes_a) - sum(sizes_b)) == 1 else "schedule"
    if names.key(a, False)[2] == names.key(b, True)[2]:
        return "hash"
    return "order"


def _numbers(a: Fact, b: Fact) -> str:
    """Facts of one kind whose plain values differ."""
    if a.kind == "step.scheduled":
        requests_a, requests_b = a.plain[0], b.plain[0]
        if requests_a != requests_b:
            same = sorted(map(str, requests_a)) == sorted(map(str, requests_b))
            return "order" if same else "schedule"
    if a.kind == "prefix.looked_up" and a.plain[:2] == b.plain[:2]:
        return "hash"
    gaps = list(_gaps(a.plain, b.plain))
    return "off by one" if gaps and all(gap in (-1, 1) for gap in gaps) else "schedule"


def _gaps(a: Any, b: Any) -> Iterator[int | None]:
    """Differences of the numbers that differ; None for what is no number or has no partner."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        if len(a) != len(b):
            yield None
            return
        for x, y in zip(a, b):
            yield from _gaps(x, y)
    elif a != b:
        numbers = type(a) is int and type(b) is int
        yield b - a if numbers else None
