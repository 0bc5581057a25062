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
import symtable
import warnings
from collections.abc import Callable, Iterable, Iterator
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
    node, imported = _definition(original)
    signature = inspect.signature(original, follow_wrapped=False)
    names = pasting.names(probe, signature, recorder, failed, clock)
    parameters = set(signature.parameters)
    if taken := parameters & set(PROVIDED):
        raise CannotWeave(f"{original.__qualname__} has a parameter named {taken.pop()!r}")
    ours = _Ours(names, parameters)
    before = ours.renamed(pasting.statements_before(probe), keep=probe.as_list)
    ours.saved = _rebound(node) & parameters
    after = ours.renamed(pasting.statements_after(probe), keep=probe.as_list)
    save = "\n".join(f"{PREFIX}{name} = {name}" for name in sorted(ours.saved & ours.read))
    _Returns(after).visit_own(node)
    node.body[:0] = _located([*before, *ast.parse(save).body], node.body[0])
    made = _compiled(node, imported, original, ours.provided)
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


def _definition(original: FunctionType) -> tuple[ast.FunctionDef, tuple[str, ...]]:
    """The function's syntax tree, bare of decorators, defaults and annotations; the names its module imports."""
    code = original.__code__
    if code.co_freevars:
        raise CannotWeave(f"{original.__qualname__} is a closure")
    if inspect.isgeneratorfunction(original):
        raise CannotWeave(f"{original.__qualname__} is a generator")
    try:
        lines, _ = inspect.findsource(code)
        definitions, imported = _module("".join(lines))
        node = copy.deepcopy(definitions[code.co_firstlineno])
    except (OSError, SyntaxError, TypeError, ValueError, KeyError) as error:
        raise CannotWeave(f"no source of {original.__qualname__}: {error}") from None
    node.decorator_list, node.returns = [], None
    arguments = node.args
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        argument.annotation = None
    for rest in (arguments.vararg, arguments.kwarg):
        if rest is not None:
            rest.annotation = None
    # How many there are counts; the objects are the original's.
    arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
    arguments.kw_defaults = [default and ast.Constant(None) for default in arguments.kw_defaults]
    if any(
        isinstance(part, ast.Name | ast.arg)
        and (part.id if isinstance(part, ast.Name) else part.arg).startswith(PREFIX)
        for part in ast.walk(node)
    ):
        raise CannotWeave(f"{original.__qualname__} has names that begin with {PREFIX}")
    # The file may be another by now, and a decorator may have left a function that is not in it.
    if not _same(_compiled(node, imported, original, {}).__code__, code):
        raise CannotWeave(f"the source of {original.__qualname__} is not what runs")
    return node, imported


@functools.lru_cache(maxsize=4)
def _module(text: str) -> tuple[dict[int, ast.FunctionDef], tuple[str, ...]]:
    """The functions of a module by the line that they begin in, and the names that it imports."""
    tree = ast.parse(text)
    definitions = {
        min([node.lineno, *(one.lineno for one in node.decorator_list)]): node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    imports = (node for node in _own_nodes(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    names = {name.asname or name.name.partition(".")[0] for one in imports for name in one.names}
    return definitions, tuple(sorted(names - {"*"}))


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All that is in a module or a function, but for what is in the functions and classes inside it."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _own_nodes(child)


def _rebound(node: ast.FunctionDef) -> set[str]:
    """Names that the function gives another value, or lets an inner function give one."""
    bare = ast.Module([node], type_ignores=[])
    table = symtable.symtable(ast.unparse(bare), node.name, "exec")
    (function,) = table.get_children()
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


class _Returns(ast.NodeTransformer):
    """Puts statements in front of each return of one function, and at its end."""

    def __init__(self, statements: list[ast.stmt]) -> None:
        self._statements = statements

    def visit_own(self, node: ast.FunctionDef) -> None:
        last = node.body[-1]
        if not isinstance(last, ast.Return | ast.Raise):
            node.body.append(ast.copy_location(ast.Return(None), last))
        self.generic_visit(node)

    def _last_word(self, node: Any) -> ast.AST:
        """What runs after a return inside may raise, or return something else."""
        ends = isinstance(node, ast.With) or node.finalbody
        if ends and any(isinstance(inside, ast.Return) for inside in _own_nodes(node)):
            raise CannotWeave("a return is not the last that is done")
        return self.generic_visit(node)

    visit_With = visit_Try = visit_TryStar = _last_word

    def visit_Return(self, node: ast.Return) -> list[ast.stmt]:
        value = node.value or ast.copy_location(ast.Constant(None), node)
        keep = ast.Assign([ast.Name(f"{PREFIX}result", ast.Store())], ast.Constant(None))
        give = ast.Return(ast.Name(f"{PREFIX}result", ast.Load()))
        inside = _located([keep, *copy.deepcopy(self._statements), give], node)
        keep.value = value  # where it stands in vLLM's file
        return inside

    def _inner(self, node: ast.AST) -> ast.AST:
        """What a function inside returns is its own."""
        return node

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = visit_ClassDef = _inner


def _located(statements: list[ast.stmt], like: ast.AST) -> list[ast.stmt]:
    for statement in statements:
        for node in ast.walk(statement):
            ast.copy_location(node, like)
    return statements


def _compiled(
    node: ast.FunctionDef,
    imported: tuple[str, ...],
    original: FunctionType,
    provided: dict[_Placeholder, Any],
) -> FunctionType:
    """The function of a syntax tree, in the module of ``original`` and with its defaults."""
    module = ast.Module([node], type_ignores=[])
    if imported:
        # Never run. A method of what a module imports is called by other instructions than one of an object.
        module.body += ast.parse(f"if False: import {', '.join(imported)}").body
    theirs = original.__code__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # for one, that a constant is called
        compiled = compile(
            ast.fix_missing_locations(module),
            theirs.co_filename,
            "exec",
            theirs.co_flags & _FUTURES,
            dont_inherit=True,
        )
    code = next(one for one in compiled.co_consts if isinstance(one, CodeType))
    code = _filled(code, provided).replace(co_qualname=theirs.co_qualname)
    made = FunctionType(code, original.__globals__, original.__name__, original.__defaults__)
    made.__kwdefaults__ = original.__kwdefaults__
    return made


def _filled(code: CodeType, provided: dict[_Placeholder, Any]) -> CodeType:
    """The code with the objects that its placeholders stand for, in the functions inside it too."""
    filled = tuple(
        _filled(one, provided) if isinstance(one, CodeType) else provided.get(one, one)
        for one in code.co_consts
    )
    return code.replace(co_consts=filled)


_COMPARED = (
    "co_name", "co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars",
    "co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_exceptiontable",
)  # fmt: skip


def _same(ours: CodeType, theirs: CodeType) -> bool:
    """Whether two pieces of code do the same, wherever they were compiled."""
    if ours.co_flags != theirs.co_flags:
        return False
    if any(getattr(ours, name) != getattr(theirs, name) for name in _COMPARED):
        return False
    return len(ours.co_consts) == len(theirs.co_consts) and all(
        type(one) is type(other)
        and (_same(one, other) if isinstance(one, CodeType) else one == other)
        for one, other in zip(ours.co_consts, theirs.co_consts)
    )
