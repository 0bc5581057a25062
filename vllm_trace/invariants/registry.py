"""The registry: what an invariant is, and how one is added.

A user's own is three lines::

    @invariant("few-blocks", "No request holds more than 100 blocks.", on="slots.allocated")
    def few_blocks(books, event):
        if books.num_blocks_of(event.request) > 100: yield "holds more than 100 blocks"

A rule is a function called after each event, or a class with a method for each kind of event that
it looks at: ``blocks_taken`` is called after ``books`` took ``blocks.taken`` in, and
``before_blocks_taken`` before that; ``end`` when the trace is over. One instance is made for each
engine. Each of them returns or yields what is wrong: a sentence, or ``books.violation(…)``.
What a rule wants to remember it keeps in its own object: ``books`` takes no further attributes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from vllm_trace.errors import UsageError, unknown
from vllm_trace.events import KINDS
from vllm_trace.extending import run_file

NEEDS = {
    "full": "events of level full",
    "known-groups": "KV-cache groups whose tables grow at the end (attention, sliding window)",
    "worker": "every worker's tables and slots",
    "attention": "the numbers that a kernel's variant was chosen from",
    "kv-events": "vLLM's own KV events",
    "caching": "prefix caching",
}
"""What a rule can ask of a trace; without it, it is not judged."""


@dataclass(frozen=True)
class Violation:
    """The first place where a trace breaks a rule."""

    invariant: str
    event_number: int
    message: str
    request: int | None = None
    block: int | None = None
    step: int | None = None
    requests: tuple[int, ...] = ()
    """More requests that the story is about, ``request`` not among them."""
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Invariant:
    """A registered rule. ``make()`` gives a fresh judge for one engine."""

    id: str
    sentence: str
    make: Callable[[], Any]
    handlers: tuple[tuple[str, bool, str], ...]
    """(kind of event, whether before ``books`` has it, name of the method; "" is a function)."""
    needs: tuple[str, ...] = ()
    releases: str = ""
    """As in ``>=0.11,<0.34``; empty: all."""
    doc: str = ""
    mutation: str = ""
    """What has to be done to an engine, or to its trace, to make this one fail."""
    built_in: bool = field(default=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        names = ("id", "sentence", "releases", "needs", "doc", "mutation")
        return {name: getattr(self, name) for name in names}

    def holds_for(self, release: str) -> bool:
        """Whether the rule is one of that release. Raises: ``ValueError`` for no version at all."""
        return satisfies(release, self.releases)


REGISTRY: dict[str, Invariant] = {}
"""All invariants by id, built-in ones in the order of the documentation."""

_ID = re.compile(r"[a-z0-9][a-z0-9._-]*")
_METHODS = {kind.replace(".", "_"): kind for kind in KINDS}


def invariant(
    id: str,
    sentence: str,
    *,
    on: str | Iterable[str] = (),
    needs: Iterable[str] = (),
    releases: str = "",
    doc: str = "",
    mutation: str = "",
    built_in: bool = False,
) -> Callable[[Any], Any]:
    """Register the function or class that follows.

    ``on`` says which kinds of events a function wants to see; without it, all of them.

    Raises: ``UsageError`` when it does not fit, with its signature.
    """

    def register(rule: Any) -> Any:
        made = describe(
            rule, id, sentence, on=on, needs=needs, releases=releases, doc=doc,
            mutation=mutation, built_in=built_in,
        )  # fmt: skip
        other = REGISTRY.get(made.id)
        if other is not None and (other.built_in or not _is_same(other.make, rule)):
            raise UsageError(
                f"there are two invariants {made.id!r}", hint="Give one of them another id"
            )
        REGISTRY[made.id] = made
        return rule

    return register


def describe(rule: Any, id: str, sentence: str, **more: Any) -> Invariant:
    """The rule as an ``Invariant``, checked, not registered."""
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise UsageError(f"{id!r} is not an id: small letters, digits and - are")
    if not isinstance(sentence, str) or not sentence.strip():
        raise UsageError(f"invariant {id!r} has no sentence", hint="Say what must hold")
    needs = _texts(more.pop("needs", ()))
    for need in needs:
        if need not in NEEDS:
            raise unknown("need", need, NEEDS)
    _range(more.get("releases", ""))
    on = _texts(more.pop("on", ()))
    if inspect.isclass(rule):
        if on:
            raise UsageError(
                f"invariant {id!r} is a class: its methods say which events it wants, not on=",
                hint=f"def {on[0].replace('.', '_')}(self, books, event)",
            )
        return Invariant(id, sentence.strip(), rule, _methods_of(id, rule), needs, **more)
    _check_signature(id, rule, 2, "(books, event)")
    for kind in on:
        if kind not in KINDS:
            raise unknown("kind of event", kind, KINDS)
    handlers = tuple((kind, False, "") for kind in on or KINDS)

    def make() -> Any:
        return rule

    make.rule = rule  # type: ignore[attr-defined]
    return Invariant(id, sentence.strip(), make, handlers, needs, **more)


def _is_same(made: Any, rule: Any) -> bool:
    """A file that is loaded twice registers the same rule again."""
    before = getattr(made, "rule", made)
    return (before.__module__, before.__qualname__) == (rule.__module__, rule.__qualname__)


def _methods_of(id: str, rule: type) -> tuple[tuple[str, bool, str], ...]:
    try:
        inspect.signature(rule).bind()
    except (TypeError, ValueError):
        raise UsageError(
            f"invariant {id!r}: {rule.__name__}{_signature(rule)} must be made without arguments"
        ) from None
    found = []
    for name, method in inspect.getmembers(rule, inspect.isfunction):
        if name.startswith("_"):
            continue
        if name == "end":
            _check_signature(id, method, 2, "(self, books)")
            found.append(("end", False, name))
            continue
        before = name.startswith("before_")
        kind = _METHODS.get(name.removeprefix("before_"))
        if kind is None:
            raise unknown(f"method of invariant {id!r}:", name, [*_METHODS, "end"])
        _check_signature(id, method, 3, "(self, books, event)")
        found.append((kind, before, name))
    if not found:
        raise UsageError(
            f"invariant {id!r}: {rule.__name__} looks at no event",
            hint="def blocks_taken(self, books, event), for one",
        )
    return tuple(found)


def _check_signature(id: str, function: Any, count: int, wanted: str) -> None:
    try:
        inspect.signature(function).bind(*range(count))
    except (TypeError, ValueError):
        name = getattr(function, "__name__", repr(function))
        raise UsageError(
            f"invariant {id!r}: {name}{_signature(function)} must take {wanted}",
            hint=f"def {name}{wanted}",
        ) from None


def _signature(function: Any) -> str:
    try:
        return str(inspect.signature(function))
    except (TypeError, ValueError):
        return ""


def _texts(given: str | Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


# Choosing -------------------------------------------------------------------------------


def built_ins() -> dict[str, Invariant]:
    """All registered invariants, the built-in ones loaded."""
    from vllm_trace.invariants import rules

    assert rules
    return REGISTRY


def choose(only: Iterable[str] = ()) -> list[Invariant]:
    """The invariants of those ids, or all. Raises: ``UsageError`` for an id that is none."""
    known = built_ins()
    wanted = [*only]
    for id in wanted:
        if id not in known:
            raise unknown("invariant", id, known)
    return [known[id] for id in dict.fromkeys(wanted)] if wanted else [*known.values()]


def load(path: Path) -> None:
    """Run a Python file that registers invariants.

    Raises: ``UsageError`` when it cannot be run, or registers none.
    """
    before = built_ins().copy()
    name = run_file(path, "invariant")
    if before == REGISTRY and not any(
        getattr(rule.make, "rule", rule.make).__module__ == name for rule in REGISTRY.values()
    ):
        raise UsageError(f"{path} registers no invariant", hint="Give a file with @invariant in it")


# Releases -------------------------------------------------------------------------------


def satisfies(release: str, specifier: str) -> bool:
    """Whether a release is in a range like ``>=0.11,<0.34``. Raises: ``ValueError`` for no release at all."""
    return Version(release).base_version in _range(specifier)


def _range(specifier: str) -> SpecifierSet:
    try:
        return SpecifierSet(specifier, prereleases=True)
    except InvalidSpecifier:
        raise UsageError(f"{specifier!r} is no range of releases", hint=">=0.11,<0.34") from None
