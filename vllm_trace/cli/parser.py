"""What every verb is parsed by: flags that are spelled out, and errors that name the nearest right word."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError, unknown
from vllm_trace.options import ATTENTIONS, LEVELS, Options

AddVerb = Callable[[str, Callable[[argparse.Namespace], int], str, str], argparse.ArgumentParser]
"""``verb(name, function, text, example)`` adds a verb and returns its parser."""


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=80)

    def add_argument(self, action: argparse.Action) -> None:
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # its verbs stand further in
            self._action_max_length += self._indent_increment


class Parser(argparse.ArgumentParser):
    """Names the nearest right word, and exits with 2."""

    def __init__(self, **options: Any) -> None:
        # --tok for --tokens would be one more thing that a script comes to depend on.
        super().__init__(allow_abbrev=False, formatter_class=_Help, **options)

    def error(self, message: str) -> Any:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and "invalid choice" in message:
                raise unknown("verb", message.split("'")[1], action.choices)
        raise UsageError(message, hint=f"Try: {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As ever, but each verb speaks for its own flags."""
        parsed, rest = super().parse_known_args(args, namespace)
        for word in rest:
            if not word.startswith("-"):
                raise UsageError(f"{word!r} is one word too many", hint=f"Try: {self.prog} --help")
            flags = [flag for action in self._actions for flag in action.option_strings]
            said = ", ".join(flag for flag in flags if flag.startswith("--"))
            raise unknown("flag", word.partition("=")[0], flags, f"{self.prog} has {said}")
        return parsed, rest


def trace_argument(parser: argparse.ArgumentParser, name: str = "trace") -> None:
    """The trace that a verb reads."""
    parser.add_argument(name, type=Path, help="the folder of a run, or one .vtrace file")


def recording_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the verbs that record."""
    parser.add_argument("--level", default="", help=f"{' or '.join(LEVELS)} (default: full)")
    parser.add_argument("--tokens", action="store_true", help="record token ids too")
    parser.add_argument("-o", "--output", type=Path, help="folder (default: reports/…)")
    parser.add_argument(
        "--otlp", default="", metavar="URL", help="send spans there while it runs (OTLP)"
    )
    parser.add_argument(
        "--attention",
        default="",
        help=f"{', '.join(ATTENTIONS)}: who computes it (default: engine)",
    )
    parser.add_argument(
        "--shadow", action="store_true", help="compute each attention call again, from scratch"
    )


def recording_options(arguments: argparse.Namespace) -> Options:
    """The variables, and the flags over them."""
    options = Options.from_environment()
    if arguments.level:
        options = replace(options, level=arguments.level)
    if arguments.tokens:
        options = replace(options, tokens=True)
    if arguments.otlp:
        options = replace(options, otlp=arguments.otlp)
    if arguments.attention:
        options = replace(options, attention=arguments.attention)
    if arguments.shadow:
        options = replace(options, shadow=True)
    return options.checked()
