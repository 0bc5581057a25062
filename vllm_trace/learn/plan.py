"""The steps, phases and paths, as ``steps/*.toml`` and ``paths.toml`` have them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from vllm_trace.errors import UsageError, unknown

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Step:
    """One step: what to read, what to run, what to see, what to answer."""

    number: int
    phase: str
    title: str
    goal: str
    minutes: int
    """To read, run, see and answer, at a reader's pace."""
    scenario: str
    idea: str
    """Paragraphs, separated by an empty line."""
    see: str
    """Name of the evidence."""
    notice: str
    """What to look at in the evidence."""
    questions: tuple[str, ...]
    exercises: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.number)


@dataclass(frozen=True)
class Stop:
    """One thing to do on a path."""

    command: str
    """A command, or a page of the repository."""
    minutes: int
    why: str

    @property
    def is_page(self) -> bool:
        return self.command.startswith("docs/")


@dataclass(frozen=True)
class LearningPath:
    """A way through for somebody in a hurry, or not."""

    name: str
    title: str
    goal: str
    stops: tuple[Stop, ...]

    @property
    def minutes(self) -> int:
        return sum(stop.minutes for stop in self.stops)


def _read(name: str) -> dict[str, Any]:
    text = (resources.files("vllm_trace.learn") / name).read_text(encoding="utf-8")
    return tomllib.loads(text)


@cache
def steps() -> tuple[Step, ...]:
    """All steps, by number."""
    folder = resources.files("vllm_trace.learn") / "steps"
    names = sorted(file.name for file in folder.iterdir() if file.name.endswith(".toml"))
    made = []
    for name in names:
        given = _read(f"steps/{name}")
        given["number"] = int(name.partition("-")[0])
        for key in ("questions", "exercises"):
            given[key] = tuple(given.get(key, ()))
        made.append(Step(**given))
    return tuple(made)


def step(name: str) -> Step:
    """The step of that number, or of a word of its title.

    Raises: ``UsageError`` naming the nearest.
    """
    text = name.strip().lower().removeprefix("step").strip()
    if text.lstrip("-").isdigit():
        number, last = int(text), steps()[-1].number
        for one in steps():
            if one.number == number:
                return one
        near = min(max(number, 1), last)
        raise UsageError(
            f"there is no step {name}; the nearest is {near}",
            hint=f"Steps go from 1 to {last}: vllm-trace learn",
        )
    slugs = {slug(one): one for one in steps()}
    if text in slugs:
        return slugs[text]
    inside = [one for key, one in slugs.items() if text and text in key]
    if len(inside) == 1:
        return inside[0]
    raise unknown("step", name, slugs, "All steps and exercises: vllm-trace learn")


def slug(one: Step) -> str:
    """``block-tables`` of "Block tables"."""
    letters = [letter if letter.isalnum() else " " for letter in one.title.lower()]
    return "-".join("".join(letters).split())


@cache
def paths() -> dict[str, LearningPath]:
    made = {}
    for name, given in _read("paths.toml").items():
        stops = tuple(Stop(*stop) for stop in given.pop("stops"))
        made[name] = LearningPath(name, stops=stops, **given)
    return made


def path(name: str) -> LearningPath:
    """Raises: ``UsageError`` naming the nearest."""
    if name not in paths():
        raise unknown("path", name, paths())
    return paths()[name]
