"""Exercises: a skeleton in the reader's folder, run in a process of its own, the first failure explained.

``tasks/`` has skeletons and solutions, ``grader`` runs in the other process, ``checks_*`` are what
it runs, ``running`` starts it and bears what may come: endless loops, crashes, floods of output.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError, unknown
from vllm_trace.learn.lesson import wrap
from vllm_trace.learn.progress import Progress

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Exercise:
    """One exercise."""

    name: str
    title: str
    file: str
    """Name of the reader's file."""
    step: int
    task: str
    needs: tuple[str, ...] = ()

    def text(self, which: str) -> str:
        """The ``skeleton``, ``solution`` or ``harness``."""
        stem, _, suffix = self.file.partition(".")
        folder = resources.files("vllm_trace.learn.exercises") / "tasks"
        return (folder / f"{stem}_{which}.{suffix}").read_text(encoding="utf-8")

    def missing(self) -> str:
        """What it needs and is not here; empty when all is."""
        for what in self.needs:
            there = shutil.which(what) if what == "nvcc" else importlib.util.find_spec(what)
            if not there:
                return what
        return ""


@dataclass
class Result:
    """What became of the reader's file."""

    exercise: str
    checks: list[dict[str, Any]] = field(default_factory=list)
    """``title``, ``passed``, ``said`` (why not) and ``hint``, up to the first that failed."""
    notes: list[str] = field(default_factory=list)
    output: str = ""
    """What the reader's code printed, its beginning and its end."""
    left: int = 0
    """Checks that were not reached."""
    questions: list[str] = field(default_factory=list)
    """Asked when everything else was right, and not answered yet."""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and not self.questions and all(c["passed"] for c in self.checks)

    def fail(self, title: str, said: str, hint: str = "") -> Result:
        self.checks.append({"title": title, "passed": False, "said": said, "hint": hint})
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "exercise": self.exercise,
            "passed": self.passed,
            "checks": self.checks,
            "left": self.left,
            "questions": self.questions,
            "notes": self.notes,
            "output": self.output,
        }


@cache
def _table() -> dict[str, Exercise]:
    folder = resources.files("vllm_trace.learn.exercises")
    given = tomllib.loads((folder / "exercises.toml").read_text(encoding="utf-8"))
    made = {}
    for name, row in given.items():
        row["task"] = " ".join(row["task"].split())
        row["needs"] = tuple(row.get("needs", ()))
        made[name] = Exercise(name, **row)
    return made


def all_of_them() -> list[Exercise]:
    return list(_table().values())


def looks_like(name: str) -> bool:
    """Whether a word is meant as an exercise: ``ex3``, ``EX2-triton``, ``exercise1``, ``ex99``."""
    return bool(re.fullmatch(r"ex(ercise)?[-_ ]?\d+.*", name.lower())) or name in _table()


def exercise(name: str) -> Exercise:
    """Raises: ``UsageError`` naming the nearest."""
    key = re.sub(r"^exercise[-_ ]?", "ex", name.lower()).replace("_", "-")
    if key not in _table():
        raise unknown("exercise", name, _table(), f"Known: {', '.join(_table())}")
    return _table()[key]


def opening(one: Exercise, progress: Progress) -> list[str]:
    """What is to be done."""
    lines = [
        f"# {one.name}: {one.title}" + (" (passed)" if one.name in progress.passed else ""),
        f"belongs to step {one.step}",
        "",
        *wrap(one.task),
    ]
    if one.missing():
        lines += ["", f"It needs {one.missing()}, which is not here."]
    return [
        *lines,
        "",
        f"vllm-trace learn start {one.name}   puts {one.file} into your folder",
        f"vllm-trace learn check {one.name} --watch   runs it, and again when you save",
    ]


def start(one: Exercise, progress: Progress, folder: Path, again: bool = False) -> list[Path]:
    """Put the skeleton into the reader's folder. A file that is there stays, under another name at most.

    Raises: ``UsageError`` when the file is there already, or the folder cannot be written.
    """
    path = folder / one.file
    if path.exists() and not again:
        progress.exercises[one.name] = str(path.absolute())
        progress.save()
        raise UsageError(
            f"{path} is there already; it was left as it is",
            hint=f"Go on with it, or begin anew and keep the old one aside: "
            f"vllm-trace learn start {one.name} --again",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            number = 1
            while (aside := path.with_name(f"{path.name}.{number}")).exists():
                number += 1
            path.rename(aside)
        path.write_text(one.text("skeleton"), encoding="utf-8")
        made = [path]
        if one.name == "ex9":
            from vllm_trace.learn.exercises import faults

            made.append(faults.write(folder / "ex9.vtrace", progress.seed))
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from None
    progress.exercises[one.name] = str(path.absolute())
    progress.note_opened(one.name)
    return made


def file_of(one: Exercise, progress: Progress, folder: Path) -> Path:
    """The reader's file: in this folder, or where it was begun.

    Raises: ``UsageError`` when there is none.
    """
    here = folder / one.file
    if here.is_file():
        return here
    begun = progress.exercises.get(one.name)
    if begun and Path(begun).is_file():
        return Path(begun)
    raise UsageError(
        f"there is no {one.file} here", hint=f"Begin with: vllm-trace learn start {one.name}"
    )


def check(
    one: Exercise, path: Path, progress: Progress, answers: list[str] | None = None
) -> Result:
    """Run the reader's file, and remember it when it passed."""
    from vllm_trace.learn.exercises import running

    result = Result(one.name)
    if one.missing():
        result.fail("what it needs", f"{one.missing()} is not here")
    elif path.suffix == ".cu":
        running.run_cuda(one, path, result)
    else:
        running.run_python(one, path, result, progress)
        if one.name == "ex3" and result.passed:
            from vllm_trace.learn.exercises import layouts

            layouts.ask(path, progress, answers or [], result)
    if result.passed:
        progress.note_passed(one.name)
    return result


def told(one: Exercise, result: Result) -> list[str]:
    """A result as lines."""
    lines = [f"# {one.name}: {one.title}"]
    for each in result.checks:
        lines.append(f"{'ok  ' if each['passed'] else 'NO  '}{each['title']}"[:78])
        if not each["passed"]:
            lines += [
                row for part in each["said"].splitlines() for row in wrap(part, "    ") or [""]
            ]
            if each["hint"]:
                lines += wrap(each["hint"], "          ", "    hint: ")
    if result.left:
        lines.append(f"    {result.left} more after this")
    if result.output.strip():
        shown = result.output.strip().splitlines()
        lines += ["", "your code printed:", *[f"  | {row[:72]}" for row in shown[:6]]]
        if len(shown) > 6:
            lines.append(f"  | … {len(shown) - 6} lines more")
    for note in result.notes:
        lines += ["", *wrap(note)]
    for number, question in enumerate(result.questions, 1):
        lines += ["", *wrap(question, "   ", f"{number}. ")]
    if result.questions:
        lines += ["", f"vllm-trace learn check {one.name}" + " --answer …" * len(result.questions)]
    if result.passed:
        lines += ["", f"{one.name} is passed."]
    return lines
