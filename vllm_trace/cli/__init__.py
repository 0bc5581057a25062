"""The command line: parse, call one function, print. Nobody imports it.

The answer goes to stdout; progress, warnings and errors to stderr. Exit codes as in ``diff``:
0 clean, 1 ran and found something, 2 could not run. A verb is a function and its flags in one of
the modules here; each has an ``add(verb)``.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
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
from vllm_trace.errors import VllmTraceError

MODULES = (run, record, traces, report, export, learn, memory, bench, pictures, doctor)
"""In the order of ``--help``."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen = _parser().parse_args(arguments)
        return int(chosen.function(chosen) or 0)
    except VllmTraceError as error:
        print(f"vllm-trace: {error}", file=sys.stderr)
        for line in error.hint.splitlines():
            print(f"  {line}", file=sys.stderr)
        print(f"  (README.md#{error.slug})", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130


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
