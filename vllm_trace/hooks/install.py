"""Put resolved rows in place when their modules are there, and take them off again."""

from __future__ import annotations

import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from vllm_trace.errors import HookError
from vllm_trace.hooks.arrivals import Arrivals, is_imported
from vllm_trace.hooks.resolve import Resolution
from vllm_trace.hooks.table import Hook
from vllm_trace.hooks.weave import unweave, weave
from vllm_trace.hooks.wrap import make_wrapper
from vllm_trace.recorder import Recorder


@dataclass
class _Placed:
    """One attribute that we set: where, what was there, and what we put."""

    target: str
    owner: Any
    name: str
    before: Any
    ours: Any
    uses: tuple[str, ...] = ()
    """Global names that the probe's body uses, the decoders that it defers to among them."""
    off: bool = False

    def take_off(self) -> str:
        """Restore; returns a sentence when something was wrapped over us."""
        if self.off:
            return ""
        now = vars(self.owner).get(self.name)
        if now is not self.ours:
            return f"{self.target} was replaced by {_name_of(now)} after us and is left as it is"
        setattr(self.owner, self.name, self.before)
        unweave(self.ours)
        self.off = True
        return ""


class Installation:
    """What ``install`` changed, and what it will change: a module is hooked when vLLM itself imports it.

    The front end runs no model and a worker no scheduler; neither has to import the other's half of vLLM.
    """

    def __init__(self, rows: Iterable[Resolution], recorder: Recorder) -> None:
        self.placed: list[_Placed] = []
        self.skipped: dict[str, str] = {}
        """Rows that resolved but could not be put in place, with the reason."""
        self.on_skipped: Callable[[Resolution, str], None] = lambda row, reason: None
        self._recorder = recorder
        self._waiting: dict[str, list[Resolution]] = {}
        for row in rows:
            if row.usable:
                self._waiting.setdefault(row.hook.module, []).append(row)
        absent = [module for module in self._waiting if not is_imported(module)]
        self._arrivals = Arrivals(absent, self._arrived)

    def place_imported(self) -> None:
        """Put in place what is there already. Raises: ``HookError`` as ``install`` does."""
        for module in [module for module in self._waiting if is_imported(module)]:
            self._place_module(module)

    def _place_module(self, module: str) -> None:
        with _no_collection():
            for row in self._waiting.pop(module, ()):
                self._place(row)

    def _place(self, row: Resolution) -> None:
        try:
            self.placed.append(_place(row, self._recorder))
        except Exception as error:
            reason = self.skipped[row.hook.target] = f"{type(error).__name__}: {error}"
            self.on_skipped(row, reason)
            if row.hook.required:
                self.undo()
                raise HookError(
                    f"{row.hook.qualname} cannot be hooked ({error}; required: "
                    f"{row.hook.without}). Nothing was changed.",
                    hint="Try: vllm-trace doctor",
                ) from error

    def _arrived(self, module: str) -> None:
        """vLLM has imported it. An engine that is about to start does not stop for us, unless it was asked to."""
        try:
            self._place_module(module)
        except HookError as error:
            self._recorder.tell(f"not tracing: {error}")
            if self._recorder.options.strict:
                raise

    def undo(self) -> list[str]:
        """Take everything off, last first. Safe to call twice. Returns what could not be taken off, in words."""
        self._arrivals.stop()
        self._waiting.clear()
        said = [placed.take_off() for placed in reversed(self.placed)]
        return [text for text in said if text]

    def take_off(self, failing: str) -> None:
        """Take off the row whose target or whose decoder keeps failing."""
        for placed in self.placed:
            if failing == placed.target or failing in placed.uses:
                placed.take_off()


def install(rows: Iterable[Resolution], recorder: Recorder) -> Installation:
    """Wrap every usable row, now or when its module is imported: every one that can be, or none when a required
    one cannot.

    Raises: ``HookError`` naming the required row; whatever was set before it is restored. When the module comes
    later, the recorder tells it instead; with ``VTRACE_STRICT`` the import raises it.
    """
    done = Installation(rows, recorder)
    recorder.on_failures = done.take_off
    done.place_imported()
    return done


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Syntax trees are many objects that soon go: they need no look at all of vLLM's, a third of a second each."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _place(row: Resolution, recorder: Recorder) -> _Placed:
    hook = row.hook
    owner: Any = sys.modules[hook.module]
    *path, name = hook.qualname.split(".")
    for part in path:
        owner = getattr(owner, part)
    before = vars(owner)[name] if name in vars(owner) else getattr(owner, name)
    inner = before.__func__ if isinstance(before, classmethod | staticmethod) else before
    if not isinstance(inner, FunctionType):
        raise TypeError(f"{hook.target} is not a plain function but {_name_of(inner)}")
    target = hook.target
    ours: Any = _observed(
        inner, hook, recorder=recorder, failed=_failing(recorder, target), clock=time.monotonic_ns
    )
    if isinstance(before, classmethod | staticmethod):
        ours = type(before)(ours)
    setattr(owner, name, ours)
    return _Placed(target, owner, name, before, ours, hook.probe.function.__code__.co_names)


def _observed(original: FunctionType, hook: Hook, **given: Any) -> FunctionType:
    if hook.each_step:
        with contextlib.suppress(Exception):  # whatever the reason, a wrapper does the same
            return weave(original, hook.probe, **given)
    return make_wrapper(original, hook.probe, **given)


def _failing(recorder: Recorder, target: str) -> Callable[[Exception], None]:
    return lambda error: recorder.probe_failed(target, error)


def _name_of(thing: Any) -> str:
    where = getattr(thing, "__module__", "?")
    return f"{where}.{getattr(thing, '__qualname__', type(thing).__name__)}"
