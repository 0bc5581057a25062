"""The command line: parse, call one function, print. Nobody imports it.

The answer goes to stdout; progress, warnings and errors to stderr. Exit codes as in ``diff``:
0 clean, 1 ran and found something, 2 could not run. A verb is a function and its flags in one of
the modules here; each has an ``add(verb)``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_trace import __version__
from vllm_trace.cli import (
    bench,
    doctor,
    export,
    learn,
    memory,
    pictures,
    record,
    report,
    run,
    traces,
)
from vllm_trace.cli.parser import Parser
from vllm_trace.cli.printing import say
from vllm_trace.errors import TraceError, VllmTraceError

MODULES = (run, record, traces, report, export, learn, memory, bench, pictures, doctor)
"""In the order of ``--help``."""


CONTRADICTIONS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError,
)  # fmt: skip
"""What readers raise when the events of a trace do not fit together: each is well formed by itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code."""
    _prepare_stdout()
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen = _parser().parse_args(arguments)
        with _traces_believed(chosen):
            code = int(chosen.function(chosen) or 0)
        sys.stdout.flush()
        return code
    except VllmTraceError as error:
        say(str(error), f"{error.hint}\n(README.md#{error.slug})".lstrip("\n"))
    except BrokenPipeError:
        _forget_stdout()
        return 0
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _forget_stdout()
        say(f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""))
    except KeyboardInterrupt:
        return 130
    return 2


def _prepare_stdout() -> None:
    """A name that the terminal's encoding lacks, or a stdout that was closed, is no reason to stop."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    elif isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _forget_stdout() -> None:
    """Nobody takes what is still in the buffer; Python would say so as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


@contextlib.contextmanager
def _traces_believed(chosen: argparse.Namespace) -> Iterator[None]:
    """Readers take a trace at its word; when it contradicts itself, that is an error of the trace."""
    try:
        yield
    except CONTRADICTIONS as error:
        given = [getattr(chosen, name, None) for name in ("trace", "traces", "a", "b")]
        paths = [path for one in given if one for path in (one if type(one) is list else [one])]
        if not paths or sys.flags.dev_mode:
            raise
        named = " or ".join(map(str, paths))
        raise TraceError(
            f"{named}: its events do not fit together ({type(error).__name__}: {error})",
            hint=f"The first that does not fit, as far as the books tell: vllm-trace check {paths[0]}\n"
            f"If nobody edited it, this is a bug: python -X dev -m vllm_trace {chosen.verb} … shows where",
        ) from error


def _parser() -> Parser:
    parser = Parser(
        prog="vllm-trace",
        description="See every KV-cache decision of an unmodified vLLM.",
        epilog="Begin with: vllm-trace run hello",
    )
    parser.add_argument("--version", action="version", version=f"vllm-trace {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True, parser_class=Parser)

    def verb(name: str, function: Any, text: str, example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name, help=text, description=text, epilog=f"Example: vllm-trace {example}"
        )
        made.set_defaults(function=function, verb=name)
        made.add_argument("--json", action="store_true", help="print one JSON document")
        return made

    for module in MODULES:
        module.add(verb)
    return parser
