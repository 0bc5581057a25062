"""``export``: a trace in a form that other programs read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_trace.cli.parser import AddVerb
from vllm_trace.cli.printing import print_json, say
from vllm_trace.counting import counted
from vllm_trace.errors import UsageError, unknown


def add(verb: AddVerb) -> None:
    from vllm_trace.export import BUILT_IN

    export = verb(
        "export", _export, "Write a trace as spans, timeline or tables",
        "export reports/preempt/latest --to jaeger-json",
    )  # fmt: skip
    export.add_argument(
        "trace", type=Path, nargs="?", help="the folder of a run, or one .vtrace file"
    )
    export.add_argument("--to", default="", metavar="FORMAT", help=", ".join(BUILT_IN))
    export.add_argument(
        "-o", "--output", default="", help="file or folder, - for stdout; otlp: also a URL"
    )
    export.add_argument("--detail", action="store_true", help="spans: one for each decode step")
    export.add_argument("--tokens", action="store_true", help="token ids too, if recorded")
    export.add_argument(
        "--follow", action="store_true", help="otlp: send while the trace grows, until it is whole"
    )
    export.add_argument("--while-stdin", action="store_true", help=argparse.SUPPRESS)
    export.add_argument("--list", action="store_true", help="list the formats, write nothing")
    export.add_argument(
        "--load", type=Path, action="append", default=[], metavar="FILE", help="your own exporters"
    )


def _export(arguments: argparse.Namespace) -> int:
    from vllm_trace import export
    from vllm_trace.export._write import STDOUT
    from vllm_trace.trace import read_trace

    for path in arguments.load:
        export.load(path)
    if arguments.list:
        return _list(arguments.json)
    if not arguments.to:
        raise UsageError("export needs a format", hint=f"--to {' | '.join(export.names())}")
    if arguments.to not in export.names():
        raise unknown("format", arguments.to, export.names())
    if arguments.trace is None:
        raise UsageError("export needs a trace", hint="vllm-trace export reports/preempt/latest …")
    if arguments.json and arguments.output == STDOUT:
        raise UsageError("--json and -o - both want stdout", hint="Give a file with -o")
    if arguments.follow:
        return _follow(arguments)
    chosen = export.format_of(arguments.to)
    trace = read_trace(arguments.trace)
    output = arguments.output or _beside(arguments.trace, chosen)
    options = export.ExportOptions(detail=arguments.detail, tokens=arguments.tokens)
    done = export.export(trace, chosen.name, output, options)
    told = ", ".join(counted(count, noun) for noun, count in done.counts.items())
    where = f" to {output}" if output and output != STDOUT else ""
    say(f"wrote {told or 'nothing'}{where}")
    for sentence in [*trace.problems, *done.notes, *done.problems]:
        say(sentence)
    if arguments.json:
        print_json(
            {
                "schema": 1,
                "format": chosen.name,
                "output": output,
                "counts": done.counts,
                "trace_problems": trace.problems,
                "notes": done.notes,
                "problems": done.problems,
            }
        )
    return 1 if done.problems else 0


def _follow(arguments: argparse.Namespace) -> int:
    from vllm_trace import export, sidecar
    from vllm_trace.export.endpoint import is_url

    if arguments.to != "otlp" or (arguments.output and not is_url(arguments.output)):
        raise UsageError("only spans are sent while a trace grows", hint="--to otlp -o URL")
    export.format_of("otlp")
    from vllm_trace.export.streaming import stream

    options = export.ExportOptions(detail=arguments.detail, tokens=arguments.tokens)
    sidecar.give_way()
    watch = sidecar.Watch()

    def over(followed: Any) -> bool:
        return not sidecar.stdin_is_open() if arguments.while_stdin else watch(followed)

    done = stream(arguments.trace, arguments.output, options, _until_interrupted(over))
    told = sidecar.Told(
        done.url, done.delivered.sent, done.delivered.dropped, done.delivered.reasons, done.requests
    )
    if arguments.json:
        print_json({"schema": 1, "format": "otlp", "streamed": done.to_dict()})
    if not arguments.while_stdin:
        say(told.text(arguments.trace))
        for problem in done.problems:
            say(problem)
    return 1 if told.failed else 0


def _until_interrupted(over: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Ctrl-C and SIGTERM end the following, not the program: what was read is still sent."""
    import signal

    asked = False

    def stop(number: int, frame: object) -> None:
        nonlocal asked
        asked = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return lambda followed: asked or over(followed)


def _beside(trace: Path, chosen: object) -> str:
    """Where it goes when nobody says: into the folder of the run, or beside the file."""
    if chosen.to == "any":  # type: ignore[attr-defined]
        return ""
    suffix = chosen.suffix  # type: ignore[attr-defined]
    name = chosen.name + (suffix if chosen.to == "file" else "")  # type: ignore[attr-defined]
    if trace.is_dir():
        return str(trace / name)
    return str(trace.with_name(f"{trace.stem}.{name}"))


def _list(as_json: bool) -> int:
    from vllm_trace import export

    found, missing = [], {}
    for name in export.names():
        try:
            found.append(export.format_of(name))
        except export.ExportError as error:
            missing[name] = str(error)
    if as_json:
        listed = [{"name": f.name, "text": f.text, "to": f.to, "suffix": f.suffix} for f in found]
        print_json({"schema": 1, "formats": listed, "missing": missing})
        return 0
    for known in found:
        print(f"{known.name:<14}{known.text}")
    for name, why in missing.items():
        print(f"{name:<14}not here: {why}")
    return 0
