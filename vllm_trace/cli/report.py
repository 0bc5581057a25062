"""``report``: a trace as one HTML file."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from vllm_trace.cli.parser import AddVerb, trace_argument
from vllm_trace.cli.printing import print_json, say
from vllm_trace.errors import UsageError


def add(verb: AddVerb) -> None:
    report = verb(
        "report", _report, "Make one HTML file of a trace, to look at in any browser",
        "report reports/preempt/latest --open",
    )  # fmt: skip
    trace_argument(report)
    report.add_argument(
        "-o", "--output", default="", metavar="FILE", help="where to (default: beside the trace); - is stdout"
    )  # fmt: skip
    report.add_argument("--open", action="store_true", help="open it in the browser")
    report.add_argument("--step", default="", help="only steps N-M of a long trace")
    report.add_argument(
        "--tokens", action="store_true", help="show the token ids that the trace holds"
    )
    report.add_argument("--no-replay", action="store_true", help="without the replay")
    report.add_argument("--no-check", action="store_true", help="without the invariants")


def _report(arguments: argparse.Namespace) -> int:
    from vllm_trace import report
    from vllm_trace.show import Filter
    from vllm_trace.trace import read_trace

    to_stdout = arguments.output == "-"
    if to_stdout and (arguments.json or arguments.open):
        flag = "--json" if arguments.json else "--open"
        raise UsageError(f"-o - and {flag} do not go together", hint="Give a file with -o")
    steps = Filter.parse("", arguments.step, "")
    trace = read_trace(arguments.trace)
    made = report.build(
        trace,
        report.Asked(
            label=report.label_of(arguments.trace),
            command=shlex.join(["vllm-trace", "report", *_spelled(arguments)]),
            tokens=arguments.tokens,
            first_step=steps.first_step,
            last_step=steps.last_step,
            check=not arguments.no_check,
            replay=not arguments.no_replay,
        ),
    )
    for problem in made.problems:
        say(problem)
    if to_stdout:
        sys.stdout.buffer.write(made.html)
        sys.stdout.flush()
        return int(made.damaged)
    path = Path(arguments.output) if arguments.output else report.default_path(arguments.trace)
    report.save(made.html, path)
    if arguments.json:
        print_json(made.to_dict(path))
    else:
        print(f"{path} ({len(made.html) / 1e6:.1f} MB)")
    if arguments.open:
        import webbrowser

        if not webbrowser.open(path.resolve().as_uri()):
            say("no browser could be started")
    return int(made.damaged)


def _spelled(arguments: argparse.Namespace) -> list[str]:
    """The words that make this report again, for its foot."""
    words = [str(arguments.trace)]
    if arguments.step:
        words += ["--step", arguments.step]
    for flag in ("tokens", "no_replay", "no_check"):
        if getattr(arguments, flag):
            words.append(f"--{flag.replace('_', '-')}")
    return words
