"""``pictures``: the tutorial's six pictures from traces, calculator and figures."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_trace.cli.parser import AddVerb
from vllm_trace.cli.printing import print_json


def add(verb: AddVerb) -> None:
    pictures = verb(
        "pictures", _pictures, "Draw the tutorial's six pictures from real traces",
        "pictures block_structure -o pictures",
    )  # fmt: skip
    pictures.add_argument("names", nargs="*", metavar="NAME", help="which (default: all six)")
    pictures.add_argument("-o", "--output", type=Path, default=Path("reports/pictures"))
    pictures.add_argument("--theme", default="both", help="light, dark or both")
    pictures.add_argument("--format", default="png", help="png or svg")
    pictures.add_argument("--traces", type=Path, help="folder of traces (default: the golden ones)")
    pictures.add_argument("--results", type=Path, help="figures of bench (docs/results.json)")


def _pictures(arguments: argparse.Namespace) -> int:
    from vllm_trace import pictures
    from vllm_trace.errors import unknown
    from vllm_trace.plotting import THEMES

    if arguments.theme not in (*THEMES, "both"):
        raise unknown("theme", arguments.theme, (*THEMES, "both"))
    themes = list(THEMES) if arguments.theme == "both" else [arguments.theme]
    sources = pictures.Sources(
        arguments.traces or pictures.GOLD, arguments.results or pictures.RESULTS
    )
    made = pictures.draw(
        arguments.output, arguments.names, themes, arguments.format.lower(), sources
    )
    if arguments.json:
        print_json({"schema": 1, "files": [str(path) for path in made]})
    else:
        print("\n".join(map(str, made)))
    return 0
