"""Finds what the plan tells to read, by name, in whatever vLLM source is there.

A *reference* is one thing that a seed document points at: where it said it was, under which other
addresses other releases have it, and what does its work where it is gone. Nothing is imported:
Python is parsed, CUDA is searched by name.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError
from vllm_trace.hooks.source import VllmSource

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Address = tuple[str, str]
"""(file in the repository, dotted name in it; empty is the whole file).

``text:…`` finds the first line that holds a text, ``text:^…`` the first that begins with it.
"""


@dataclass(frozen=True)
class Reference:
    """One thing that a seed document points at."""

    id: str
    steps: tuple[int, ...]
    seed: str
    """Which document: ``plan``, ``deep dive``, ``notes``, or ``ours`` where none did."""
    said: str
    """File and name as the document has them."""
    lines: str
    """Line numbers as the document has them, or empty."""
    release: str
    """The release that the document describes."""
    places: tuple[Address, ...]
    """The same thing, under the addresses of different releases, oldest first."""
    successors: tuple[Address, ...]
    """What does its work where it is gone."""
    fate: str
    """``same``, ``moved``, ``renamed``, ``split``, ``removed`` or ``never``."""
    became: str
    """What became of it, in a sentence."""
    about: str
    """What one sees there, in our own words."""
    inside: str = ""
    """The reference, a function, that this is a passage of."""

    @property
    def is_cuda(self) -> bool:
        return bool(self.places) and self.places[0][0].startswith("csrc/")


@dataclass(frozen=True)
class Passage:
    """Where a reference, or what came after it, stands in one source."""

    file: str
    name: str
    line: int
    end: int
    successor: bool = False

    def to_list(self) -> list[Any]:
        return [self.file, self.name, self.line, self.end, self.successor]


@dataclass(frozen=True)
class Tree:
    """A vLLM repository or what is installed of one: the folder that holds ``vllm/``."""

    root: Path
    version: str

    @classmethod
    def of(cls, source: VllmSource) -> Tree:
        return cls(source.folder.parent, source.version)

    @classmethod
    def at(cls, folder: Path) -> Tree:
        """An unpacked wheel or source distribution of any release, those before V1 too.

        Raises: ``UsageError`` when there is no vLLM.
        """
        try:
            return cls.of(VllmSource.at(folder))
        except UsageError:
            stated = folder / "PKG-INFO"
            if not (folder / "vllm" / "__init__.py").is_file() or not stated.is_file():
                raise
            return cls(folder, re.findall(r"^Version: (.*)$", stated.read_text("utf-8"), re.M)[0])

    @classmethod
    def installed(cls) -> Tree | None:
        source = VllmSource.installed()
        return None if source is None else cls.of(source)

    @property
    def release(self) -> str:
        """The release without local parts: ``0.32.0`` of ``0.32.0+cpu``."""
        return self.version.partition("+")[0]

    @property
    def has_cuda(self) -> bool:
        return (self.root / "csrc").is_dir()

    def find(self, reference: Reference) -> Passage | None:
        """The thing itself under its newest address that is there, else what does its work."""
        for is_successor, places in ((False, reference.places), (True, reference.successors)):
            for file, name in reversed(places):
                span = self.locate(file, name)
                if span:
                    return Passage(file, name, *span, is_successor)
        return None

    def locate(self, file: str, name: str) -> tuple[int, int] | None:
        """First and last line of a name in a file of this source."""
        path = self.root / file
        if path.is_dir() and not name:
            return (0, 0)
        if not path.is_file():
            return None
        if not name:
            return (1, len(_lines(path)))
        if name.startswith("text:"):
            wanted = name.removeprefix("text:")
            begins = wanted.startswith("^")
            found = 0
            for number, line in enumerate(_lines(path), 1):
                if line.startswith(wanted[1:]) if begins else wanted in line:
                    found = number
                    break
            return (found, found) if found else None
        return _in_python(path, name) if path.suffix == ".py" else _in_cuda(path, name)

    def text(self, passage: Passage) -> list[str]:
        """Its lines. A folder has none."""
        path = self.root / passage.file
        return _lines(path)[passage.line - 1 : passage.end] if path.is_file() else []


@cache
def references() -> tuple[Reference, ...]:
    """All references, in the order of the steps."""
    text = (resources.files("vllm_trace.learn") / "references.toml").read_text(encoding="utf-8")
    made: list[Reference] = []
    for given in tomllib.loads(text)["reference"]:
        places = [(file, name) for file, name in given.get("places", ())]
        if inside := given.get("inside", ""):
            (outer,) = [one for one in made if one.id == inside]
            places = [(file, f"text:{given['at']}") for file, _ in outer.places]
        made.append(
            Reference(
                id=given["id"],
                steps=tuple(given["steps"]),
                seed=given.get("seed", "plan"),
                said=given.get("said", ""),
                lines=given.get("lines", ""),
                release=given.get("release", "0.11.2"),
                places=tuple(places),
                successors=tuple((f, n) for f, n in given.get("successors", ())),
                fate=given["fate"],
                became=" ".join(given["became"].split()),
                about=" ".join(given.get("about", "").split()),
                inside=inside,
            )
        )
    return tuple(made)


@cache
def known() -> dict[str, dict[str, list[Any]]]:
    """Release → reference → where it stands there, as ``learn sources --save`` found it."""
    text = (resources.files("vllm_trace.learn") / "places.json").read_text(encoding="utf-8")
    return json.loads(text)


def known_as(version: str) -> str:
    """The release of the table that this one is, by its first two numbers; empty when unknown."""
    minor = version.split(".")[:2]
    return next((release for release in known() if release.split(".")[:2] == minor), "")


def of_step(number: int) -> list[Reference]:
    """References of a step; those that it shares with an earlier one come last."""
    mine = [one for one in references() if number in one.steps]
    return sorted(mine, key=lambda one: one.steps[0] != number)


def begins_as_said(reference: Reference, passage: Passage, tree: Tree) -> bool:
    """Whether a passage stands where its document said it begins.

    Documents count from the definition or from a decorator above it, and may be off by a line.
    """
    first = int(re.match(r"\d+", reference.lines)[0])  # type: ignore[index]
    if passage.line in (first, first - 1):
        return True
    between = _lines(tree.root / passage.file)[first - 1 : passage.line - 1]
    return bool(between) and between[0].lstrip().startswith(("@", "template"))


# Finding -----------------------------------------------------------------------------------


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


@cache
def _parsed(path: Path) -> Iterable[ast.AST]:
    """The statements of a file; none when it is no Python."""
    try:
        return ast.parse("\n".join(_lines(path))).body
    except SyntaxError:
        return ()


def _in_python(path: Path, name: str) -> tuple[int, int] | None:
    """``Class.method``, ``function``, ``Class.field``, or ``function.variable`` set inside it."""
    body = _parsed(path)
    found: ast.AST | None = None
    for part in name.split("."):
        # The last definition counts: those before it are @overload or stand in a branch.
        found = next((node for node in reversed(list(_named(body, part)))), None)
        if found is None:
            return None
        body = getattr(found, "body", ())
    return (found.lineno, found.end_lineno or found.lineno)  # type: ignore[union-attr]


def _named(body: Iterable[ast.AST], name: str) -> Iterator[ast.AST]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name == name:
                yield node
            continue
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if name in (getattr(target, "id", ""), getattr(target, "attr", "")):
                    yield node
        for part in ("body", "orelse", "finalbody"):
            yield from _named(getattr(node, part, ()), name)


def _in_cuda(path: Path, name: str) -> tuple[int, int] | None:
    """A function, struct or macro: not a call of it, and not a mention in a comment."""
    lines = _lines(path)
    word = re.escape(name)
    kinds = r"(?:template.*)?(?:inline |static |__\w+__ )*(?:struct|void|float|class)"
    defines = re.compile(rf"^\s*#define {word}\b|^{kinds}\s+{word}\b(?!.*;)")
    for number, line in enumerate(lines, 1):
        if defines.match(line):
            return (number, _end_of(lines, number))
    return None


def _end_of(lines: list[str], first: int) -> int:
    """The line on which a C++ definition's braces close, or a macro's continuation ends."""
    if lines[first - 1].lstrip().startswith("#define"):
        number = first
        while number < len(lines) and lines[number - 1].rstrip().endswith("\\"):
            number += 1
        return number
    depth, opened = 0, False
    for number, line in enumerate(lines[first - 1 :], first):
        code = line.partition("//")[0]
        depth += code.count("{") - code.count("}")
        opened = opened or "{" in code
        if opened and depth <= 0:
            return number
    return first
