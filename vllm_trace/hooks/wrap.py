"""Makes the wrapper of a hooked function, as source that is compiled once.

For a probe ``def get(append, result): append(BlocksTaken([b.block_id for b in result]))`` on
``BlockPool.get_new_blocks(self, num_blocks)`` the wrapper is::

    def get_new_blocks(self, num_blocks):
        result = original(self, num_blocks)
        try:
            append(BlocksTaken([b.block_id for b in result]))
        except Exception as error:
            failed(error)
        return result

The probe's body is pasted, not called, and the parameters are spelled out instead of
``*args, **kwargs``: together that is a third of a microsecond on a call that vLLM makes once
for each running request and step. What the original raises passes through untouched.

What the wrapper uses besides its parameters are constants of its code, so it needs no globals of its
own. So a hook that can *sleep* (``Probe.sleeps``) has a function with vLLM's globals and one of two
codes: the wrapper's, or the very code of the original, which costs nothing.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
import textwrap
import warnings
from collections.abc import Callable
from itertools import count
from types import CodeType, FunctionType
from typing import Any, cast

from vllm_trace.errors import HookError
from vllm_trace.hooks.table import PROVIDED, Probe
from vllm_trace.recorder import Recorder

_serial = count(1)


def make_wrapper(
    original: FunctionType,
    probe: Probe,
    *,
    recorder: Recorder,
    failed: Callable[[Exception], None],
    clock: Callable[[], int],
) -> FunctionType:
    """Return a function that calls ``original`` and then runs the probe's body.

    Raises: ``HookError`` when the signature has a name that the wrapper needs for itself.
    """
    signature = inspect.signature(original)
    taken = set(PROVIDED) & set(signature.parameters)
    if taken:
        raise HookError(f"{original.__qualname__} has a parameter named {taken.pop()!r}")
    namespace: dict[str, Any] = dict(probe.function.__globals__)
    namespace |= {n: v for n, v in probe.otherwise.items() if n not in signature.parameters}
    namespace |= {
        "_original": original,
        "recorder": recorder,
        "append": recorder.append,
        "defer": recorder.defer,
        "numbers": recorder.numbers,
        "next_step": recorder.next_step,
        "keep": recorder.keep,
        "_failed": failed,
        "_flush": recorder.flush,
        "_clock": clock,
    }
    parameters, call = _spell_out(signature)
    own_name = original.__name__ if original.__name__.isidentifier() else "wrapper"  # a <lambda>
    lines = [f"def {own_name}({parameters}):"]
    for name in probe.as_list:
        lines += [f"    if type({name}) is not list: {name} = list({name})"]
    if probe.before is not None:
        lines += ["    try:", *_before(probe.before, indent=8)]
        lines += ["    except Exception as error:", "        seen = None; _failed(error)"]
    if probe.timed:
        lines += ["    started = _clock()"]
    lines += [f"    result = _original({call})"]
    if "ended" in probe.parameters:
        lines += ["    ended = _clock()"]
    lines += ["    try:", *_body(probe.function, indent=8)]
    lines += ["    except Exception as error:", "        _failed(error)"]
    if probe.flush:
        lines += ["    _flush()"]
    lines += ["    return result"]
    code = _compile(own_name, "\n".join(lines) + "\n", namespace)
    # Of the signature, not of the original: a decorated function has none of its own.
    given = [p for p in signature.parameters.values() if p.default is not p.empty]
    defaults = tuple(p.default for p in given if p.kind is not p.KEYWORD_ONLY)
    wrapper = FunctionType(code, original.__globals__, own_name, defaults)
    wrapper.__kwdefaults__ = {p.name: p.default for p in given if p.kind is p.KEYWORD_ONLY}
    functools.update_wrapper(wrapper, original)
    if probe.sleeps and original.__closure__ is None:  # codes with and without cannot take turns
        recorder.sleepers[probe.name] = (wrapper, original.__code__, code)
    return wrapper


def _spell_out(signature: inspect.Signature) -> tuple[str, str]:
    """The parameter list and the argument list of a forwarding call, as source."""
    shown: list[str] = []
    call: list[str] = []
    last: Any = inspect.Parameter.POSITIONAL_ONLY
    for name, parameter in signature.parameters.items():
        if last is parameter.POSITIONAL_ONLY and parameter.kind is not last and shown:
            shown.append("/")
        if parameter.kind is parameter.KEYWORD_ONLY and last not in (
            parameter.KEYWORD_ONLY,
            parameter.VAR_POSITIONAL,
        ):
            shown.append("*")
        last = parameter.kind
        text = name
        if parameter.default is not parameter.empty:
            text = f"{name}=..."  # the original's own defaults are put in later
        if parameter.kind is parameter.VAR_POSITIONAL:
            text, argument = f"*{name}", f"*{name}"
        elif parameter.kind is parameter.VAR_KEYWORD:
            text, argument = f"**{name}", f"**{name}"
        elif parameter.kind is parameter.KEYWORD_ONLY:
            argument = f"{name}={name}"
        else:
            argument = name
        shown.append(text)
        call.append(argument)
    if last is inspect.Parameter.POSITIONAL_ONLY and shown:
        shown.append("/")
    return ", ".join(shown), ", ".join(call)


@functools.cache
def _tree(function: FunctionType) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    node = tree.body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def _body(function: Callable[..., None], indent: int) -> list[str]:
    statements = _tree(function).body
    if isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant):
        statements = statements[1:]
    for node in statements:
        if any(isinstance(part, ast.Return) for part in ast.walk(node)):
            raise HookError(f"the probe {function.__name__} must not return: its body is pasted")
    text = "\n".join(ast.unparse(node) for node in statements)
    return textwrap.indent(text, " " * indent).splitlines()


def _before(function: Callable[..., Any], indent: int) -> list[str]:
    """Its statements; what its last one returns is ``seen``."""
    *statements, last = _tree(function).body
    assert isinstance(last, ast.Return) and last.value is not None
    text = "\n".join([*map(ast.unparse, statements), f"seen = {ast.unparse(last.value)}"])
    return textwrap.indent(text, " " * indent).splitlines()


def _compile(name: str, source: str, namespace: dict[str, Any]) -> CodeType:
    """Compile with a file name of its own, so that a traceback shows the wrapper's lines."""
    filename = f"<vllm_trace wrapper {next(_serial)} of {name}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    binding = _Binding(vars(builtins) | namespace)
    tree = ast.fix_missing_locations(binding.visit(ast.parse(source)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant that is called, or compared by `is`
        module = compile(tree, filename, "exec")
    (code,) = [const for const in module.co_consts if isinstance(const, CodeType)]
    return binding.put_in(code)


class _Binding(ast.NodeTransformer):
    """Makes every name that is no local one a constant: a place holder that ``compile`` takes, then the thing."""

    def __init__(self, namespace: dict[str, Any]) -> None:
        self.namespace = namespace
        self.things: dict[frozenset[str], Any] = {}

    def visit_Module(self, node: ast.Module) -> ast.AST:
        bound = (part for part in ast.walk(node) if isinstance(part, ast.Name | ast.arg))
        self.local = {
            part.arg if isinstance(part, ast.arg) else part.id
            for part in bound
            if isinstance(part, ast.arg) or not isinstance(part.ctx, ast.Load)
        }
        self.local |= {
            part.name
            for part in ast.walk(node)
            if isinstance(part, ast.ExceptHandler) and part.name
        }
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.local or node.id not in self.namespace:
            return node
        thing = self.namespace[node.id]
        if thing is None or type(thing) in (bool, int, float, str, bytes):
            return ast.copy_location(ast.Constant(thing), node)
        place = frozenset({f"vllm_trace: {node.id}"})
        self.things[place] = thing
        return ast.copy_location(ast.Constant(cast(Any, place)), node)

    def put_in(self, code: CodeType) -> CodeType:
        return code.replace(co_consts=tuple(map(self._thing, code.co_consts)))

    def _thing(self, const: Any) -> Any:
        if isinstance(const, CodeType):
            return self.put_in(const)
        if isinstance(const, tuple):
            return tuple(map(self._thing, const))
        return self.things.get(const, const) if isinstance(const, frozenset) else const
