"""What a verb that takes a while says meanwhile."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


class Progress:
    """A line on the terminal that says what is going on; nothing when there is no terminal."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._status: Any = None
        self._stack = contextlib.ExitStack()
        # Taken now: inside, stderr belongs to the engine's log.
        self._terminal = os.fdopen(os.dup(2), "w") if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._terminal is not None:
            from rich.console import Console

            self._stack.enter_context(self._terminal)
            console = Console(file=self._terminal, force_terminal=True)
            self._status = self._stack.enter_context(console.status(self.text))
        return self

    def say(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)

    def __exit__(self, *error: object) -> None:
        self._stack.close()
