"""A vLLM's source, read without importing it: the one that is installed, or an unpacked one."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from vllm_trace.errors import UsageError

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A function found in a source file."""

    path: Path
    line: int
    parameters: tuple[str, ...]
    fingerprint: str
    """Hash of the dedented source: the same for one release under any Python."""


@dataclass(frozen=True)
class VllmSource:
    """The ``vllm`` package folder of some release."""

    folder: Path
    version: str
    """As the package says; empty when it does not."""

    @classmethod
    def installed(cls) -> VllmSource | None:
        """The vLLM of this interpreter, or None. Imports nothing of it."""
        spec = importlib.util.find_spec("vllm")
        if spec is None or not spec.submodule_search_locations:
            return None
        return cls.at(Path(next(iter(spec.submodule_search_locations))))

    @classmethod
    def at(cls, folder: Path) -> VllmSource:
        """A vLLM unpacked at ``folder`` (the package itself or the folder that holds it).

        Raises: ``UsageError`` when there is none.
        """
        for candidate in (folder, folder / "vllm", folder / "src" / "vllm"):
            if (candidate / "v1").is_dir() and (candidate / "__init__.py").is_file():
                return cls(candidate, _version_of(candidate))
        raise UsageError(
            f"no vLLM source in {folder}",
            hint="Give the folder of an unpacked wheel or source distribution (it holds vllm/)",
        )

    def find(self, module: str, qualname: str) -> Definition | str:
        """The definition of ``module:qualname``, or a sentence that says why there is none."""
        path = self.path_of(module)
        if path is None:
            return f"no module {module}"
        quick = _quickly(path, qualname)
        if quick is not None:
            return quick
        tree = _parse(path)
        owner, _, name = qualname.rpartition(".")
        body: list[ast.stmt] = tree.body
        if owner:
            found = [n for n in body if isinstance(n, ast.ClassDef) and n.name == owner]
            if not found:
                return f"no class {owner} in {module}"
            body = found[0].body
        functions = [n for n in _flat(body) if isinstance(n, FunctionNode) and n.name == name]
        if not functions:
            if not owner:
                return f"no function {name} in {module}"
            bases = [ast.unparse(base) for base in found[0].bases]
            heir = self._inherited(module, bases, name)
            return f"inherited from {heir}" if heir else f"no {name} in {module}:{owner}"
        return _definition(path, functions[-1])

    @staticmethod
    def forget() -> None:
        """Let go of the syntax trees: half a million objects that every collection would visit."""
        _parse.cache_clear()
        _lines.cache_clear()

    def path_of(self, module: str) -> Path | None:
        parts = module.split(".")[1:]
        base = self.folder.joinpath(*parts)
        for candidate in (base.with_suffix(".py") if parts else base, base / "__init__.py"):
            if candidate.is_file():
                return candidate
        return None

    def _inherited(self, module: str, bases: list[str], name: str) -> str:
        """The base class, in the same file or imported by name, that defines ``name``."""
        path = self.path_of(module)
        assert path is not None
        tree = _parse(path)
        origin = {
            alias.asname or alias.name: node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        for base in bases:
            found = self.find(origin.get(base, module), f"{base}.{name}")
            if isinstance(found, Definition):
                return base
        return ""


def _flat(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements of a body with those under ``if`` and ``try``: definitions may stand there."""
    flat: list[ast.stmt] = []
    for node in body:
        flat.append(node)
        if isinstance(node, ast.If | ast.Try):
            for part in ("body", "orelse", "finalbody"):
                flat.extend(_flat(getattr(node, part, [])))
    return flat


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _quickly(path: Path, qualname: str) -> Definition | None:
    """The definition where it stands plainly in its class or file; None when only a parser can tell.

    Of a file with thousands of lines only the function is parsed: a second of the engine's start.
    """
    lines = _lines(path)
    owner, _, name = qualname.rpartition(".")
    begin, end, indent = 0, len(lines), ""
    if owner:
        classes = [n for n, line in enumerate(lines) if re.match(rf"class {owner}\b", line)]
        if len(classes) != 1:
            return None
        begin, indent = classes[0] + 1, "    "
        end = _next_statement(lines, begin, "")
    head = re.compile(rf"{indent}(async )?def {name}\(")
    heads = [n for n in range(begin, end) if head.match(lines[n])]
    elsewhere = re.compile(rf"\s*(async )?def {name}\(")
    if len(heads) != 1 or sum(bool(elsewhere.match(line)) for line in lines[begin:end]) != 1:
        return None
    last = min(end, _next_statement(lines, heads[0] + 1, indent))
    try:
        (node,) = ast.parse(textwrap.dedent("\n".join(lines[heads[0] : last]))).body
    except (SyntaxError, ValueError):  # the cut went through a string, or found two
        return None
    return _definition(path, node, heads[0]) if isinstance(node, FunctionNode) else None


def _next_statement(lines: list[str], begin: int, indent: str) -> int:
    """The line after ``begin`` where a statement begins that is not deeper than ``indent``."""
    start = re.compile(r"[A-Za-z_@]" if not indent else rf"({indent})?[A-Za-z_@]")
    return next((n for n in range(begin, len(lines)) if start.match(lines[n])), len(lines))


def _definition(path: Path, node: FunctionNode, above: int = 0) -> Definition:
    """``above``: lines of the file above what was parsed."""
    assert node.end_lineno is not None
    lines = _lines(path)[above + node.lineno - 1 : above + node.end_lineno]
    text = textwrap.dedent("\n".join(lines))
    spec = node.args
    names = [a.arg for a in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)]
    return Definition(
        path=path,
        line=above + node.lineno,
        parameters=tuple(names),
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
    )


def _version_of(folder: Path) -> str:
    """Version from ``_version.py``, else from the metadata that stands beside the package."""
    stated = folder / "_version.py"
    if stated.is_file():
        match = re.search(
            r"^__version__[^\n]*?=\s*['\"]([^'\"]+)['\"]", stated.read_text(encoding="utf-8"), re.M
        )
        if match:
            return match[1]
    for info in (*folder.parent.glob("vllm*.dist-info"), folder.parent):
        metadata = importlib.metadata.PathDistribution(info).metadata
        if metadata and (metadata["Name"] or "").startswith("vllm"):
            return str(metadata["Version"])
    return ""
