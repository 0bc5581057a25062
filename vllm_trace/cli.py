"""The command line: parse, call one function, print. Nobody imports it.

The answer goes to stdout; progress, warnings and errors to stderr. Exit codes as in ``diff``:
0 clean, 1 ran and found something, 2 could not run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from vllm_trace import __version__
from vllm_trace.errors import EngineError, TraceError, UsageError, VllmTraceError
from vllm_trace.options import LEVELS, Options

README = "https://github.com/vllm-trace/vllm-trace#"


class _Parser(argparse.ArgumentParser):
    """Names the nearest right word, and exits with 2."""

    def error(self, message: str) -> Any:
        hint = f"Try: {self.prog} --help"
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and "invalid choice" in message:
                word = message.split("'")[1]
                near = get_close_matches(word, list(action.choices), n=1, cutoff=0.4)
                message = f"there is no verb {word!r}" + (
                    f"; did you mean {near[0]!r}?" if near else ""
                )
                hint = f"Verbs: {', '.join(action.choices)}"
        raise UsageError(message, hint=hint)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        chosen = _parser().parse_args(arguments)
        return int(chosen.function(chosen) or 0)
    except VllmTraceError as error:
        print(f"vllm-trace: {error}", file=sys.stderr)
        if error.hint:
            print(f"  {error.hint}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130


def _parser() -> _Parser:
    parser = _Parser(
        prog="vllm-trace",
        description="See every KV-cache decision of an unmodified vLLM.",
        epilog="Begin with: vllm-trace run hello",
    )
    parser.add_argument("--version", action="version", version=f"vllm-trace {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True, parser_class=_Parser)

    def verb(name: str, function: Any, text: str, example: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(
            name, help=text, description=text, epilog=f"Example: vllm-trace {example}"
        )
        made.set_defaults(function=function, verb=name)
        made.add_argument("--json", action="store_true", help="print one JSON document")
        return made

    run = verb("run", _run, "Run a scenario on a real engine and trace it", "run preempt")
    run.add_argument("scenario", help="a name (see: scenarios) or a TOML file")
    run.add_argument("--model", default="", help="a folder or hub name instead of the tiny model")
    run.add_argument(
        "--engine-arg", action="append", default=[], metavar="K=V", help="an argument of vllm.LLM"
    )
    run.add_argument("--replay", action="store_true", help="replay the trace through mini at once")
    _recording(run)

    verb("scenarios", _scenarios, "List what there is to run", "scenarios")

    record = verb(
        "record", _record, "Run any command with tracing on in every vLLM process",
        "record -- vllm serve MODEL --port 8000",
    )  # fmt: skip
    _recording(record)
    record.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")

    show = verb(
        "show", _show, "Show a trace in the terminal", "show reports/preempt/latest blocks"
    )
    from vllm_trace.show import VIEWS

    show.add_argument("trace", type=Path, help="the folder of a run, or one .vtrace file")
    show.add_argument("view", nargs="?", default="summary", help=", ".join(VIEWS))
    show.add_argument("--request", default="", help="only what concerns this request")
    show.add_argument("--step", default="", help="only step N, or N-M")
    show.add_argument("--kind", default="", help="events: only these kinds (blocks,request.fin…)")
    show.add_argument("--all", action="store_true", help="every row of a table")
    show.add_argument("--follow", action="store_true", help="keep showing a running engine")
    show.add_argument("--seconds", type=float, default=0, help="with --follow: stop after this")

    again = verb(
        "replay", _replay, "Replay a trace through the from-scratch engine and compare",
        "replay reports/preempt/latest",
    )  # fmt: skip
    again.add_argument("trace", type=Path, help="the folder of a run, or one .vtrace file")
    again.add_argument("--mode", default="", help="manager or engine (default: both)")

    doctor = verb(
        "doctor", _doctor, "What is installed, and which hooks resolve", "doctor --source vllm-src"
    )
    doctor.add_argument("--source", type=Path, help="an unpacked vLLM to look at, not the installed")
    return parser


def _recording(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--level", default="", help=f"{' or '.join(LEVELS)} (default: full)")
    parser.add_argument("--tokens", action="store_true", help="record token ids too")
    parser.add_argument("-o", "--output", type=Path, help="folder (default: reports/…)")


def _options(arguments: argparse.Namespace) -> Options:
    """The variables, and the flags over them."""
    options = Options.from_environment()
    if arguments.level:
        options = replace(options, level=arguments.level)
    if arguments.tokens:
        options = replace(options, tokens=True)
    return options.checked()


def _console(*, stderr: bool = False) -> Any:
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 80
    return Console(stderr=stderr, width=width, highlight=False)


def _json(document: Any) -> None:
    json.dump(document, sys.stdout, indent=1, default=str)
    print()


# run ------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    from vllm_trace import reports, scenario
    from vllm_trace.record import close_files

    chosen = scenario.load(arguments.scenario)
    options = _options(arguments)
    engine_args = _engine_args(arguments.engine_arg)
    run = reports.new_run(chosen.name, arguments.output)
    options = replace(options, dir=str(run.trace.absolute()))
    os.environ |= options.to_environment()
    outcome = _drive(chosen, run.folder, arguments.model, engine_args)
    close_files(run.trace, "stopped")
    from vllm_trace.summary import Summary
    from vllm_trace.trace import read_trace

    try:
        trace = read_trace(run.trace)
    except TraceError as error:
        raise EngineError(f"the engine ran, but left no trace: {error}") from None
    summary = Summary.of(trace)
    failures = chosen.failures(summary.facts()) if options.level == "full" else []
    document = summary.to_dict() | {
        "scenario": chosen.name,
        "command": shlex.join(["vllm-trace", *sys.argv[1:]]),
        "date": run.date,
        "notes": outcome.notes,
        "start_seconds": round(outcome.start_seconds, 3),
        "run_seconds": round(outcome.run_seconds, 3),
        "failures": failures,
        "facts": summary.facts(),
    }
    text = reports.save(run, document, summary, chosen, outcome)
    if arguments.json:
        _json(document)
    else:
        _console().print(text)
        print(f"Trace and summary: {run.folder}")
    for failure in failures:
        print(f"vllm-trace: {chosen.name} did not show it: {failure}", file=sys.stderr)
    code = 1 if failures else 0
    if arguments.replay:
        print(file=sys.stderr if arguments.json else sys.stdout)
        code = max(code, _replay_trace(run.trace) if not arguments.json else 0)
    return code


def _drive(chosen: Any, folder: Path, model: str, engine_args: dict[str, Any]) -> Any:
    """Start the engine, run the workload, close the trace; vLLM's own words go to a file."""
    from vllm_trace import hooks, runner

    log = folder / "engine.log"
    progress = _Progress(f"starting vLLM for {chosen.name!r}")
    began = time.monotonic_ns()
    try:
        with runner.stderr_to(log) as last_words, progress:
            try:
                llm, notes = runner.start_engine(chosen, model=model, engine_args=engine_args)
            except EngineError as error:
                raise EngineError(f"{error}\n{last_words()}".strip(), hint=error.hint) from None
            started = time.monotonic_ns()
            progress.say(f"running {chosen.name!r}")
            outcome = runner.run_workload(llm, chosen)
            runner.stop_engine(llm)
            hooks.detach()
    finally:
        for line in runner.warnings_of(log):
            print(line, file=sys.stderr)
    outcome.notes = notes
    outcome.start_seconds = (started - began) / 1e9
    return outcome


class _Progress:
    """A line on the terminal that says what is going on; nothing when there is no terminal."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._status: Any = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> _Progress:
        if sys.stdout.isatty():
            from rich.console import Console

            # stderr belongs to the engine's log now; the terminal is still stdout's.
            self._status = self._stack.enter_context(Console().status(self.text))
        return self

    def say(self, text: str) -> None:
        if self._status is not None:
            self._status.update(text)

    def __exit__(self, *error: object) -> None:
        self._stack.close()


def _engine_args(given: Sequence[str]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign:
            raise UsageError(f"--engine-arg {text!r} is not K=V", hint="--engine-arg block_size=32")
        try:
            made[name.replace("-", "_")] = json.loads(value)
        except json.JSONDecodeError:
            made[name.replace("-", "_")] = value
    return made


# record ---------------------------------------------------------------------------------


def _record(arguments: argparse.Namespace) -> int:
    from vllm_trace import reports
    from vllm_trace.record import record

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise UsageError("record needs a command", hint="vllm-trace record -- python script.py")
    options = _options(arguments)
    run = reports.new_run("record", arguments.output)
    code = record(command, run.trace, options)
    said = reports.describe_recording(run)
    print(f"vllm-trace: {said}", file=sys.stderr)
    if arguments.json:
        _json({"schema": 1, "code": code, "trace": str(run.trace), "said": said})
    return code


# scenarios, show, doctor ----------------------------------------------------------------


def _scenarios(arguments: argparse.Namespace) -> int:
    from vllm_trace import render, scenario

    loaded = [scenario.load(name) for name in scenario.names()]
    if arguments.json:
        _json(
            {
                "schema": 1,
                "scenarios": [
                    {k: getattr(s, k) for k in ("name", "title", "shows", "plan", "seconds")}
                    for s in loaded
                ],
            }
        )
        return 0
    table = render.table("scenario", "what it shows", "plan", "takes", left=(0, 1))
    for one in loaded:
        table.add_row(one.name, one.title, f"step {one.plan}", f"{one.seconds} s")
    _console().print(table)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from vllm_trace import show
    from vllm_trace.errors import unknown
    from vllm_trace.trace import read_trace

    if arguments.view not in show.VIEWS:
        raise unknown("view", arguments.view, show.VIEWS)
    wanted = show.Filter.parse(arguments.request, arguments.step, arguments.kind)
    if arguments.follow:
        show.follow(arguments.trace, _console(), seconds=arguments.seconds)
        return 0
    trace = read_trace(arguments.trace)
    if arguments.view == "events":
        show.printer(trace, wanted, print, arguments.json)
    elif arguments.json:
        _json(show.data(trace, arguments.view, wanted))
    else:
        _console().print(show.view(trace, arguments.view, wanted, 1 << 30 if arguments.all else 24))
    for problem in trace.problems if arguments.view == "events" else ():
        print(f"vllm-trace: {problem}", file=sys.stderr)
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    return _replay_trace(arguments.trace, arguments.mode, as_json=arguments.json)


def _replay_trace(path: Path, mode: str = "", *, as_json: bool = False) -> int:
    from vllm_trace.errors import unknown
    from vllm_trace.replay import MODES, replay
    from vllm_trace.trace import read_trace

    if mode and mode not in MODES:
        raise unknown("mode", mode, MODES)
    results = [replay(read_trace(path), one) for one in ([mode] if mode else MODES)]
    if as_json:
        _json({"schema": 1, "replays": [result.to_dict() for result in results]})
    else:
        from vllm_trace.replay_view import verdict

        _console().print(verdict(results))
    if all(result.passed for result in results):
        return 0
    return 1 if any(result.divergence for result in results) else 2


def _doctor(arguments: argparse.Namespace) -> int:
    from vllm_trace import render
    from vllm_trace.doctor import diagnose

    found = diagnose(arguments.source)
    if arguments.json:
        _json(found.to_dict())
        return 0 if found.healthy else 1
    console = _console()
    console.print(f"vllm_trace {__version__}, Python {sys.version.split()[0]}")
    console.print(f"vLLM {found.vllm or '–'}" + (f" in {found.where}" if found.where else ""))
    console.print(f"hook tables for vLLM {', '.join(found.tables)}")
    console.print(f"plugin {found.plugin}")
    for name, version in found.packages.items():
        console.print(f"{name} {version}")
    if found.problem:
        console.print(f"\n{found.problem}")
        if found.hint:
            console.print(f"  {found.hint}")
    if found.rows:
        console.print()
        console.print(render.hooks(found.rows))
    return 0 if found.healthy else 1
