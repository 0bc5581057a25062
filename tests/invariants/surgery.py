"""What a fault of a real engine is, and how one is put into vLLM's classes and taken out again."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Fault:
    """One thing that is done to the engine, and the invariant that must notice it."""

    id: str
    does: str
    invariant: str
    scenario: str
    kind: str
    """Of the first event that breaks the invariant."""
    inject: Callable
    engine_args: dict = field(default_factory=dict)
    steps_late: int = 0
    """Steps until it shows."""


def into(faults):
    """The decorator that adds what a function does to vLLM to the list ``faults``, under the function's name."""

    def fault(does, *, invariant, kind, scenario="preempt", steps_late=0, **engine_args):
        def register(inject):
            name = inject.__name__.replace("_", "-")
            faults.append(
                Fault(name, does, invariant, scenario, kind, inject, engine_args, steps_late)
            )
            return inject

        return register

    return fault


class Surgeon:
    """Replaces methods of classes, remembers when a fault first struck, and puts all back."""

    def __init__(self):
        self.struck_ns = 0
        self._undo = []

    def replace(self, owner, name, make):
        """``make(original)`` gives the faulty method."""
        original = vars(owner)[name]
        setattr(owner, name, make(original))
        self._undo.append((owner, name, original))

    def strike(self):
        """True each time; the first time is kept."""
        self.struck_ns = self.struck_ns or time.monotonic_ns()
        return True

    def once(self):
        """True the first time only."""
        return not self.struck_ns and self.strike()

    def close(self):
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)
