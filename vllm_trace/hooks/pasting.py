"""The parts of a probe that are pasted, not called: its body, what it reads before the call, its names."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any

from vllm_trace.errors import HookError
from vllm_trace.hooks.table import Probe
from vllm_trace.recorder import Recorder


@functools.cache
def _tree(function: FunctionType) -> ast.FunctionDef:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    node = tree.body[0]
    assert isinstance(node, ast.FunctionDef)
    return node


def body(function: Callable[..., None]) -> str:
    """The statements of a probe, without its docstring.

    Raises: ``HookError`` when one of them returns: that would end the hooked call.
    """
    statements = _tree(function).body
    if isinstance(statements[0], ast.Expr) and isinstance(statements[0].value, ast.Constant):
        statements = statements[1:]
    for node in statements:
        if any(isinstance(part, ast.Return) for part in ast.walk(node)):
            raise HookError(f"the probe {function.__name__} must not return: its body is pasted")
    return "\n".join(ast.unparse(node) for node in statements)


def expression(function: Callable[..., Any]) -> str:
    """What a function of one ``return`` returns."""
    node = _tree(function).body[-1]
    assert isinstance(node, ast.Return) and node.value is not None
    return ast.unparse(node.value)


def names(
    probe: Probe,
    signature: inspect.Signature,
    recorder: Recorder,
    failed: Callable[[Exception], None],
    clock: Callable[[], int],
) -> dict[str, Any]:
    """All that a probe's statements may name, but for the call's own parameters and times."""
    otherwise = {n: v for n, v in probe.otherwise.items() if n not in signature.parameters}
    return (
        dict(probe.function.__globals__)
        | otherwise
        | {
            "recorder": recorder,
            "append": recorder.append,
            "defer": recorder.defer,
            "numbers": recorder.numbers,
            "keep": recorder.keep,
            "_failed": failed,
            "_flush": recorder.flush,
            "_clock": clock,
        }
    )


def statements_before(probe: Probe) -> str:
    """What runs before the hooked function: it may read ``_clock`` and ``_failed``."""
    lines = [f"if type({name}) is not list: {name} = list({name})" for name in probe.as_list]
    if probe.before is not None:
        lines += ["try:", f"    seen = {expression(probe.before)}"]
        lines += ["except Exception as error:", "    seen = None; _failed(error)"]
    if probe.timed:
        lines += ["started = _clock()"]
    return "\n".join(lines)


def statements_after(probe: Probe) -> str:
    """What runs when it has its ``result``."""
    lines = ["ended = _clock()"] if "ended" in probe.parameters else []
    lines += ["try:", textwrap.indent(body(probe.function), "    ")]
    lines += ["except Exception as error:", "    _failed(error)"]
    if probe.flush:
        lines += ["_flush()"]
    return "\n".join(lines)
