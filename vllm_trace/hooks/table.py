"""The declarative part: a hook is a row, a table is the rows for one range of releases."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

#: Parameters of a probe that the wrapper provides; all others are read from the hooked call.
PROVIDED = (
    "append",
    "defer",
    "numbers",
    "keep",
    "recorder",
    "result",
    "started",
    "ended",
    "seen",
)


@dataclass(frozen=True)
class Probe:
    """Reads one call after it returned.

    ``function`` is a plain function whose body is pasted into the wrapper of the hooked
    function, so that it costs no call of its own. Its parameters name what it reads:
    ``recorder`` and its ``append``, ``defer``, ``numbers``, … (see ``PROVIDED``); ``result``,
    ``started`` and ``ended`` (ns), ``seen`` (what ``before`` returned); and any parameter of
    the hooked function by its own name.
    """

    function: Callable[..., None]
    before: Callable[..., Any] | None = None
    """Returns a value that must be read before the call; the probe takes it as ``seen``."""
    as_list: tuple[str, ...] = ()
    """Parameters that may be iterators: made lists before the call, so both can read them."""
    otherwise: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Parameters that some releases do not have, and what they stand for there."""
    flush: bool = False
    """The call ends a step: the recorder writes what is pending."""

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.function).parameters)

    @property
    def reads(self) -> tuple[str, ...]:
        """Parameters of the hooked function that must be there."""
        before = tuple(inspect.signature(self.before).parameters) if self.before else ()
        names = (*self.parameters, *before, *self.as_list)
        return tuple(
            dict.fromkeys(n for n in names if n not in PROVIDED and n not in self.otherwise)
        )

    @property
    def timed(self) -> bool:
        return "started" in self.parameters


def probe(**options: Any) -> Callable[[Callable[..., None]], Probe]:
    """Decorate a function to make it a probe: ``@probe()`` or ``@probe(flush=True)``."""
    return lambda function: Probe(function, **options)


@dataclass(frozen=True)
class Hook:
    """One row: where, what is read, what it gives, and what its absence costs."""

    target: str
    """``package.module:Class.method`` or ``package.module:function``."""
    probe: Probe
    emits: str
    """Kinds of events that come of it, separated by spaces."""
    without: str
    """What is lost when it is absent."""
    required: bool = False
    light: Probe | None = None
    """The probe for level ``light``; None: this row is for level ``full`` only."""
    platform: str = ""
    """``cpu`` or ``cuda``: applies to that platform only. Empty: to all."""
    needs: str = ""
    """A package without which the hooked code cannot run: where it is absent, nothing is missed."""
    each_step: bool = False
    """It is called in every step, maybe for each request: woven into a copy, see ``hooks.weave``."""
    fingerprints: tuple[str, ...] = ()
    """Hashes of the sources that were reviewed (a release's builds may differ)."""

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def qualname(self) -> str:
        return self.target.partition(":")[2]

    @property
    def can_run(self) -> bool:
        """Whether what it hooks can run in this environment at all."""
        return not self.needs or importlib.util.find_spec(self.needs) is not None

    def at_level(self, level: str) -> Hook | None:
        """This row as it is at a level; None when it is not part of it."""
        if level == "full":
            return self
        return replace(self, probe=self.light) if self.light else None


@dataclass(frozen=True)
class HookTable:
    """All rows for the vLLM releases that ``vllm`` covers."""

    vllm: str
    """A version specifier: ``>=0.32,<0.33``."""
    hooks: tuple[Hook, ...]

    def covers(self, version: str) -> bool:
        """Whether a release is in the range; a build that does not say which it is, is in none."""
        try:
            return Version(version).base_version in SpecifierSet(self.vllm, prereleases=True)
        except InvalidVersion:
            return False
