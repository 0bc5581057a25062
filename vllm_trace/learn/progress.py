"""What the reader has done: one small JSON file in the user's data folder.

``VTRACE_LEARN_DIR`` moves it; else ``$XDG_DATA_HOME/vllm-trace/learn``, else
``~/.local/share/vllm-trace/learn``. The traces that steps were run for lie beside it. A file that
cannot be read is kept aside and a new one begun. A reader may have several terminals open: what is
saved is what changed, put into the file as it is then.
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import json
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError
from vllm_trace.writing import whole_file

SCHEMA = 1
FILE = "progress.json"


def folder() -> Path:
    """Where the reader's things are kept."""
    asked = os.environ.get("VTRACE_LEARN_DIR")
    if asked:
        return Path(asked).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    base = Path(data) if data and Path(data).is_absolute() else Path.home() / ".local" / "share"
    return base / "vllm-trace" / "learn"


@dataclass
class Progress:
    """Steps and exercises that were opened and passed, and the traces they were run for."""

    path: Path
    seed: int = 0
    """The reader's own: makes the prompts of runs and picks questions."""
    opened: dict[str, str] = field(default_factory=dict)
    passed: dict[str, str] = field(default_factory=dict)
    """Step or exercise → date."""
    attempts: dict[str, int] = field(default_factory=dict)
    """Times that a step was answered; each asks other questions."""
    runs: dict[str, str] = field(default_factory=dict)
    """Scenario → folder of its trace."""
    exercises: dict[str, str] = field(default_factory=dict)
    """Exercise → the reader's file."""
    set_aside: str = ""
    """Name under which a damaged file was kept, when it was now."""
    _before: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """The file's fields when they were read or saved last."""

    @classmethod
    def load(cls) -> Progress:
        path = folder() / FILE
        try:
            kept = _read(path)
        except _DAMAGE as error:
            made = cls._new(path)
            made._keep_aside(error)
            return made
        if kept is None:
            return cls._new(path)
        return cls(path, **kept, _before=copy.deepcopy(kept))

    @classmethod
    def _new(cls, path: Path) -> Progress:
        return cls(path, seed=random.SystemRandom().randrange(1, 10_000))

    def _keep_aside(self, error: Exception) -> None:
        path = self.path
        aside, again = path.with_name(f"{FILE}.damaged"), 1
        while aside.exists():
            again += 1
            aside = path.with_name(f"{FILE}.damaged-{again}")
        try:
            path.rename(aside)
        except OSError:
            raise UsageError(
                f"{path} cannot be read: {error}", hint="Set VTRACE_LEARN_DIR to another folder"
            ) from None
        self.set_aside = str(aside)

    def save(self) -> None:
        """Write the file whole or not at all, with what others wrote since it was read.

        Raises: ``UsageError`` when the folder cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _alone(self.path.parent):
                kept = self._merged()
                text = json.dumps({"schema": SCHEMA} | kept, indent=1)
                with whole_file(self.path) as file:
                    file.write(text.encode())
            for name, value in kept.items():
                setattr(self, name, value)
            self._before = copy.deepcopy(kept)
        except OSError as error:
            raise UsageError(
                f"cannot write to {self.path.parent}: {error.strerror}",
                hint="Set VTRACE_LEARN_DIR to a folder that can be written",
            ) from None

    def _merged(self) -> dict[str, Any]:
        """The file's fields as they are now, with our changes."""
        try:
            kept = _read(self.path)
        except _DAMAGE as error:
            self._keep_aside(error)
            kept = None
        if kept is None:
            return {name: getattr(self, name) for name in _FIELDS}
        for name in _FIELDS:
            mine, was = getattr(self, name), self._before.get(name)
            if name == "seed":
                kept[name] = kept[name] if was in (None, mine) else mine
                continue
            was = was or {}
            for key in was.keys() - mine.keys():
                kept[name].pop(key, None)
            kept[name] |= {key: value for key, value in mine.items() if was.get(key) != value}
        return kept

    def note_opened(self, name: str) -> None:
        self.opened.setdefault(name, _now())
        self.save()

    def note_passed(self, name: str) -> None:
        self.passed.setdefault(name, _now())
        self.save()

    def note_attempt(self, name: str) -> None:
        self.attempts[name] = self.attempts.get(name, 0) + 1
        self.save()

    def seed_of(self, name: str) -> str:
        """What the questions of a step are picked by; another one after each attempt that passed."""
        return f"{self.seed}:{name}:{self.attempts.get(name, 0)}"


_FIELDS = ("seed", "opened", "passed", "attempts", "runs", "exercises")


_DAMAGE = (OSError, ValueError, TypeError, RecursionError)
"""What reading a file that is no progress file may raise; a text that is no UTF-8 is a ``ValueError``."""


def _read(path: Path) -> dict[str, Any] | None:
    """The fields of the file; None when there is none. Raises: ``_DAMAGE``."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return _checked(json.loads(text))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While nobody else saves."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _checked(document: Any) -> dict[str, Any]:
    """The fields of a progress file. Raises: ValueError when it is none."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError("not a progress file of this version")
    made: dict[str, Any] = {}
    for name in _FIELDS:
        value = document.get(name)
        wanted = int if name == "seed" else dict
        inside = int if name == "attempts" else str
        if type(value) is not wanted:
            raise ValueError(f"{name} is {value!r}")
        if isinstance(value, dict) and not all(type(v) is inside for v in value.values()):
            raise ValueError(f"{name} holds something else")
        made[name] = value
    return made


def _now() -> str:
    return datetime.now().isoformat(timespec="seconds")
