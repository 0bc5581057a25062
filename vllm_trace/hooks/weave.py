"""Puts a probe into a copy of the hooked function, for functions that every step calls for every request.

The copy is compiled from the function's own source, with the probe's statements in front of each ``return``.
For ``def get(append, result): append(BlocksTaken([b.block_id for b in result]))`` on ::

    def get_new_blocks(self, num_blocks):
        if not num_blocks:
            return []
        return self.free_block_queue.popleft_n(num_blocks)

it is (here without the other return, and without the prefix that keeps our names apart from vLLM's)::

    def get_new_blocks(self, num_blocks):
        …
        result = self.free_block_queue.popleft_n(num_blocks)
        try:
            append(BlocksTaken([b.block_id for b in result]))
        except Exception as error:
            failed(error)
        return result

A wrapper hands thirteen arguments on to ``allocate_slots`` in a frame of its own, which costs more than the
probe. The copy has the module, the defaults and the line numbers of the original: a traceback through it reads
as it does without us. What cannot be copied for certain is not: see ``CannotWeave``.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import copy
import functools
import inspect
import linecache
import math
import symtable
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from vllm_trace.errors import HookError
from vllm_trace.hooks import pasting
from vllm_trace.hooks.table import PROVIDED, Probe
from vllm_trace.recorder import Recorder

PREFIX = "_vtrace_"

_Placeholder = tuple[str, str]
"""A constant that stands for an object of ours until the copy is compiled. A constant costs less than a global
or a variable of a closure: it lies in no dictionary and in no cell that a call would have to fetch."""

_FUTURES = functools.reduce(
    int.__or__, (getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)
)


class CannotWeave(HookError):
    """The function has to be wrapped: a closure, another source than what runs, a return inside ``with``, …"""


def weave(
    original: FunctionType,
    probe: Probe,
    *,
    recorder: Recorder,
    failed: Callable[[Exception], None],
    clock: Callable[[], int],
) -> FunctionType:
    """Return a copy of ``original`` that runs the probe's body before it returns.

    Raises: ``CannotWeave`` when no copy can be made that is sure to do the same.
    """
    definition = _definition(original)
    node = definition.node
    signature = inspect.signature(original, follow_wrapped=False)
    names = pasting.names(probe, signature, recorder, failed, clock)
    parameters = set(signature.parameters)
    if taken := parameters & set(PROVIDED):
        raise CannotWeave(f"{original.__qualname__} has a parameter named {taken.pop()!r}")
    ours = _Ours(names, parameters)
    before = ours.renamed(pasting.statements_before(probe), keep=probe.as_list)
    ours.saved = definition.rebound & parameters
    after = ours.renamed(pasting.statements_after(probe), keep=probe.as_list)
    save = "\n".join(f"{PREFIX}{name} = {name}" for name in sorted(ours.saved & ours.read))
    first, last = node.body[0], node.body[-1]
    if not isinstance(last, ast.Return):
        node.body.append(ast.copy_location(ast.Return(None), last))
    node.body = _located([*before, *ast.parse(save).body], first) + _woven(node.body, after)
    code = _filled(_compiled(node, definition.imported, original.__code__), ours.provided)
    if sys.version_info >= (3, 11):
        code = code.replace(co_qualname=original.__code__.co_qualname)
    made = FunctionType(code, original.__globals__, original.__name__, original.__defaults__)
    made.__kwdefaults__ = original.__kwdefaults__
    functools.update_wrapper(made, original)
    return made


def is_woven(function: Any) -> bool:
    """Whether ``weave`` made it: code of vLLM's file, and not the function that it was made of."""
    if isinstance(function, classmethod | staticmethod):
        function = function.__func__
    original = getattr(function, "__wrapped__", None)
    if not isinstance(function, FunctionType) or not isinstance(original, FunctionType):
        return False
    ours, theirs = function.__code__, original.__code__
    return ours is not theirs and ours.co_filename == theirs.co_filename


def unweave(function: Any) -> None:
    """Give a woven function that was taken off the code of the original, for those who still hold it.

    It also lets our objects go: the garbage collector does not look into the constants of code.
    """
    if isinstance(function, classmethod | staticmethod):
        function = function.__func__
    if is_woven(function):
        function.__code__ = function.__wrapped__.__code__


def _definition(original: FunctionType) -> _Definition:
    """What is compiled to what runs. Raises: ``CannotWeave``."""
    code = original.__code__
    if code.co_freevars:
        raise CannotWeave(f"{original.__qualname__} is a closure")
    if inspect.isgeneratorfunction(original):
        raise CannotWeave(f"{original.__qualname__} is a generator")
    try:
        # Not through ``inspect``, which looks at every module of the process to find a file's.
        linecache.checkcache(code.co_filename)
        lines = linecache.getlines(code.co_filename, original.__globals__)
        text, node = _parsed(lines, code)
        rebound = _rebound(text, node.name)
    except (SyntaxError, ValueError, IndexError, StopIteration) as error:
        raise CannotWeave(f"no source of {original.__qualname__}: {error}") from None
    if PREFIX in text:
        raise CannotWeave(f"{original.__qualname__} has names that begin with {PREFIX}")
    # The file may be another by now, and a decorator may have left a function that is not in it.
    imported = _imported_as_it_seems(original)
    if _compiled(node, imported, code) != code:
        imported = _imported_as_it_says("".join(lines))
        if _compiled(node, imported, code) != code:
            raise CannotWeave(f"the source of {original.__qualname__} is not what runs")
    return _Definition(node, imported, rebound)


@dataclass(frozen=True)
class _Definition:
    node: ast.FunctionDef
    """With the line numbers of its file."""
    imported: tuple[str, ...]
    """Names that its module imports: a method of one is called by other instructions than one of an object."""
    rebound: set[str]
    """Names that the function gives another value, or lets an inner function give one."""


def _parsed(lines: list[str], code: CodeType) -> tuple[str, ast.FunctionDef]:
    """The text of a function and its tree: from where it begins to the last line that has an instruction, on to what
    never runs below that and to where the last brackets close."""
    first = code.co_firstlineno
    last = max(_lines_of(code))
    while last < len(lines) and _indent(lines[last]) > _indent(lines[first - 1]):
        last += 1
    while True:
        # Not dedented: the lines of a string are part of it.
        text = "if True:\n" * lines[first - 1][0].isspace() + "".join(lines[first - 1 : last])
        try:
            (node,) = ast.parse(text).body
            break
        except SyntaxError:
            if last == len(lines) or last - first > 5000:
                raise
            last += 1
    before = 1
    if isinstance(node, ast.If):
        (node,) = node.body
        before = 2
    if not isinstance(node, ast.FunctionDef):
        raise ValueError("it is not a function")
    ast.increment_lineno(node, first - before)
    return text, node


def _indent(line: str) -> float:
    return len(line) - len(line.lstrip()) if line.strip() else math.inf


def _lines_of(code: CodeType) -> Iterator[int]:
    yield from (line for _, _, line in code.co_lines() if line)
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _lines_of(one)


def _imported_as_it_seems(original: FunctionType) -> tuple[str, ...]:
    """Quick, and right but for imported objects."""
    space = original.__globals__
    return tuple(
        name
        for name in sorted(_names_in(original.__code__))
        if inspect.ismodule(value := space.get(name))
        or (callable(value) and getattr(value, "__module__", None) != original.__module__)
    )


def _names_in(code: CodeType) -> set[str]:
    inner = (one for one in code.co_consts if isinstance(one, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _imported_as_it_says(text: str) -> tuple[str, ...]:
    """Exact, and the whole module has to be parsed."""
    found = (
        node
        for node in _own_nodes(ast.parse(text))
        if isinstance(node, ast.Import | ast.ImportFrom)
    )
    names = {name.asname or name.name.partition(".")[0] for one in found for name in one.names}
    return tuple(sorted(names - {"*"}))


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All that is in a module, but for what is in its functions and classes."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _own_nodes(child)


def _rebound(text: str, name: str) -> set[str]:
    top = symtable.symtable(text, name, "exec").get_children()
    function = next(one for one in top if (one.get_name(), one.get_type()) == (name, "function"))
    inner = set()
    for child in _below(function):
        inner |= {symbol.get_name() for symbol in child.get_symbols() if symbol.is_nonlocal()}
    own = {symbol.get_name() for symbol in function.get_symbols() if symbol.is_assigned()}
    return own | inner


def _below(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    for child in table.get_children():
        yield child
        yield from _below(child)


class _Box:
    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _Ours(ast.NodeTransformer):
    """Renames what a probe's statements name, so that none of it meets a name of the hooked function."""

    def __init__(self, names: dict[str, Any], parameters: set[str]) -> None:
        self.provided: dict[_Placeholder, Any] = {}
        self.read: set[str] = set()
        """Parameters of the hooked function that are read."""
        self.saved: set[str] = set()
        """Those of them that are read from a copy."""
        self._names = vars(builtins) | names
        self._parameters = parameters
        self._own: set[str] = set()
        self._plain: set[ast.expr] = set()
        """Where a constant is only loaded: nothing is computed of it when the copy is compiled."""

    def renamed(self, text: str, keep: Iterable[str]) -> list[ast.stmt]:
        """The statements; what they give a value is theirs, but for the parameters in ``keep``."""
        tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self._own.add(node.id)
            elif isinstance(node, ast.arg):
                self._own.add(node.arg)
            elif isinstance(node, ast.ExceptHandler) and node.name:
                self._own.add(node.name)
            elif isinstance(node, ast.Call):
                self._plain.update((node.func, *node.args))
            elif isinstance(node, ast.Attribute):
                self._plain.add(node.value)
        self._own.add("result")
        self._own -= set(keep)
        return [self.visit(statement) for statement in tree.body]

    def visit_Name(self, node: ast.Name) -> ast.expr:
        name = node.id
        if name in self._own:
            node.id = PREFIX + name
        elif name in self._parameters:
            self.read.add(name)
            if name in self.saved:
                node.id = PREFIX + name
        else:
            return self._constant(name, plain=node in self._plain)
        return node

    def _constant(self, name: str, plain: bool) -> ast.expr:
        value = self._names[name]
        if plain and type(value).__hash__ is not None:
            self.provided[PREFIX, name] = value
            return ast.Constant((PREFIX, name))  # type: ignore[arg-type]
        # The compiler would take it for the tuple that stands for it (``if name:`` is always true then), or
        # nobody could hash the code, as debuggers do.
        self.provided[PREFIX, f"{name} in a box"] = _Box(value)
        return ast.Attribute(ast.Constant((PREFIX, f"{name} in a box")), "value", ast.Load())  # type: ignore[arg-type]

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.arg = PREFIX + node.arg
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> ast.AST:
        node.name = node.name and PREFIX + node.name
        return self.generic_visit(node)


def _woven(
    statements: list[ast.stmt], after: list[ast.stmt], *, last_word: bool = True
) -> list[ast.stmt]:
    """The statements of a function with ``after`` in front of each of its returns.

    Not ``last_word``: they stand where something else runs after a return, and may raise or return another value.
    """
    out: list[ast.stmt] = []
    for statement in statements:
        if isinstance(statement, ast.Return):
            if not last_word:
                raise CannotWeave("a return is not the last that is done")
            out += _before_return(statement, after)
            continue
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            inside = last_word and not (
                isinstance(statement, ast.With) or getattr(statement, "finalbody", None)
            )
            parts = [*getattr(statement, "handlers", ()), *getattr(statement, "cases", ())]
            for part in (statement, *parts):
                for name in ("body", "orelse", "finalbody"):
                    if inner := getattr(part, name, None):
                        setattr(part, name, _woven(inner, after, last_word=inside))
        out.append(statement)
    return out


def _before_return(node: ast.Return, after: list[ast.stmt]) -> list[ast.stmt]:
    keep = ast.Assign([ast.Name(f"{PREFIX}result", ast.Store())], ast.Constant(None))
    give = ast.Return(ast.Name(f"{PREFIX}result", ast.Load()))
    inside = _located([keep, *copy.deepcopy(after), give], node)
    if node.value is not None:
        keep.value = node.value  # where it stands in vLLM's file
    return inside


def _located(statements: list[ast.stmt], like: ast.AST) -> list[ast.stmt]:
    for statement in statements:
        for node in ast.walk(statement):
            ast.copy_location(node, like)
    return statements


def _compiled(node: ast.FunctionDef, imported: tuple[str, ...], like: CodeType) -> CodeType:
    """The code of a function that stands where ``like`` does. Nothing around it is run: no decorator, no default."""
    module = ast.Module([node], type_ignores=[])
    if imported:
        # The compiler looks at the names.
        module.body += ast.parse(f"import {', '.join(imported)}").body
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # for one, that a constant is called
        compiled = compile(
            module, like.co_filename, "exec", like.co_flags & _FUTURES, dont_inherit=True
        )
    return next(
        one
        for one in compiled.co_consts
        if isinstance(one, CodeType)
        and (one.co_name, one.co_firstlineno) == (like.co_name, like.co_firstlineno)
    )


def _filled(code: CodeType, provided: dict[_Placeholder, Any]) -> CodeType:
    """The code with the objects that its placeholders stand for, in the functions inside it too."""
    filled = tuple(
        _filled(one, provided) if isinstance(one, CodeType) else provided.get(one, one)
        for one in code.co_consts
    )
    return code.replace(co_consts=filled)
