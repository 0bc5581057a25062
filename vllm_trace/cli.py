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
from pathlib import Path
from typing import Any

from vllm_trace import __version__
from vllm_trace.errors import EngineError, TraceError, UsageError, VllmTraceError, unknown
from vllm_trace.options import LEVELS, Options


class _Help(argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=80)


class _Parser(argparse.ArgumentParser):
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


def _parser() -> _Parser:
    parser = _Parser(
        prog="vllm-trace",
        description="See every KV-cache decision of an unmodified vLLM.",
        epilog="Begin with: vllm-trace run hello",
    )
    parser.add_argument("--version", action="version", version=f"vllm-trace {__version__}")
    verbs = parser.add_subparsers(
        title="verbs", metavar="VERB", required=True, parser_class=_Parser
    )

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

    show = verb("show", _show, "Show a trace in the terminal", "show reports/preempt/latest blocks")
    from vllm_trace.show import VIEWS

    show.add_argument("trace", type=Path, help="the folder of a run, or one .vtrace file")
    show.add_argument("view", nargs="?", default="summary", help=", ".join(VIEWS))
    show.add_argument("--request", default="", help="only what concerns this request")
    show.add_argument("--step", default="", help="only step N, or N-M")
    show.add_argument("--kind", default="", help="events: only these (slots,block.evicted …)")
    show.add_argument("--all", action="store_true", help="every row of a table")
    show.add_argument("--follow", action="store_true", help="keep showing a running engine")
    show.add_argument("--seconds", type=float, default=0, help="--follow: stop after so many")

    again = verb(
        "replay", _replay, "Replay a trace through the from-scratch engine and compare",
        "replay reports/preempt/latest",
    )  # fmt: skip
    again.add_argument("trace", type=Path, help="the folder of a run, or one .vtrace file")
    again.add_argument("--mode", default="", help="manager or engine (default: both)")

    story = verb(
        "explain", _explain, "Tell the life of one request in words, with event numbers",
        "explain reports/preempt/latest r-2",
    )  # fmt: skip
    story.add_argument("trace", type=Path, help="the folder of a run, or one .vtrace file")
    story.add_argument("request", help="its name, a part that only one has, or #NUMBER")

    two = verb(
        "diff", _diff, "Compare two traces: first divergence, then classes of difference",
        "diff reports/preempt/first reports/preempt/latest",
    )  # fmt: skip
    two.add_argument("a", type=Path, metavar="A", help="the folder of a run, or one .vtrace file")
    two.add_argument("b", type=Path, metavar="B", help="the same of another run")

    check = verb(
        "check", _check, "Judge traces by all invariants: the first event that breaks each",
        "check reports/preempt/latest",
    )  # fmt: skip
    check.add_argument(
        "traces", type=Path, nargs="*", metavar="TRACE", help="folders of runs, or files"
    )
    check.add_argument("--only", default="", metavar="ID,ID", help="only these invariants")
    check.add_argument("--list", action="store_true", help="list the invariants, judge nothing")
    check.add_argument(
        "--load", type=Path, action="append", default=[], metavar="FILE", help="your own invariants"
    )

    doctor = verb(
        "doctor", _doctor, "What is installed, and which hooks resolve", "doctor --source vllm-src"
    )
    doctor.add_argument(
        "--source", type=Path, help="an unpacked vLLM to look at, not the installed"
    )
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


def _console() -> Any:
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 80)


def _print(what: Any) -> None:
    """On a terminal in colour and as wide as it is, else as plain text of 80 columns."""
    from vllm_trace import render

    if sys.stdout.isatty():
        _console().print(what)
    else:
        sys.stdout.write(render.plain(what))


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
    try:
        outcome = _drive(chosen, run.folder, arguments.model, engine_args)
    except BaseException as error:
        run.discard(keep_log=isinstance(error, EngineError))
        raise
    finally:
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
    replays = _replays(run.trace) if arguments.replay else []
    if replays:
        document["replays"] = [one.to_dict() for one in replays]
    text = reports.save(run, document, summary, chosen, outcome)
    if arguments.json:
        _json(document)
    else:
        _print(text)
        if replays:
            from vllm_trace.replay_view import verdict

            _print(verdict(replays))
        print(f"Trace and summary: {run.folder}")
    for failure in failures:
        print(f"vllm-trace: {chosen.name} did not show it: {failure}", file=sys.stderr)
    return max(1 if failures else 0, _code_of(replays))


def _drive(chosen: Any, folder: Path, model: str, engine_args: dict[str, Any]) -> Any:
    """Start the engine, run the workload, close the trace; vLLM's own words go to a file."""
    from vllm_trace import hooks, runner

    log = folder / "engine.log"
    progress = _Progress(f"starting vLLM for {chosen.name!r}")
    began = time.monotonic_ns()
    try:
        with runner.output_to(log) as last_words, progress:
            try:
                llm, notes = runner.start_engine(chosen, model=model, engine_args=engine_args)
            except EngineError as error:
                raise EngineError(f"{error}\n{last_words()}".strip(), hint=error.hint) from None
            started = time.monotonic_ns()
            progress.say(f"running {chosen.name!r}")
            outcome = runner.run_workload(llm, chosen)
            runner.stop_engine(llm)
    finally:
        hooks.detach()
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
        # Taken now: inside, stderr belongs to the engine's log.
        self._terminal = os.fdopen(os.dup(2), "w") if sys.stderr.isatty() else None

    def __enter__(self) -> _Progress:
        if self._terminal is not None:
            from rich.console import Console

            self._stack.enter_context(self._terminal)
            console = Console(file=self._terminal, force_terminal=True)
            self._status = self._stack.enter_context(console.status(self.text))
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
    try:
        code = record(command, run.trace, options)
    except UsageError:
        run.discard()
        raise
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
    _print(table)
    return 0


def _show(arguments: argparse.Namespace) -> int:
    from vllm_trace import show
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
        _print(show.view(trace, arguments.view, wanted, 1 << 30 if arguments.all else 24))
    # The whole summary has them in its own text.
    for problem in trace.problems if (arguments.view, wanted) != ("summary", show.Filter()) else ():
        print(f"vllm-trace: {problem}", file=sys.stderr)
    return 0


def _replay(arguments: argparse.Namespace) -> int:
    results = _replays(arguments.trace, arguments.mode)
    if arguments.json:
        _json({"schema": 1, "replays": [result.to_dict() for result in results]})
    else:
        from vllm_trace.replay_view import verdict

        _print(verdict(results))
    return _code_of(results)


def _replays(path: Path, mode: str = "") -> list[Any]:
    from vllm_trace.replay import MODES, replay
    from vllm_trace.trace import read_trace

    if mode and mode not in MODES:
        raise unknown("mode", mode, MODES)
    return [replay(read_trace(path), one) for one in ([mode] if mode else MODES)]


def _code_of(replays: Sequence[Any]) -> int:
    """0 identical, 1 a divergence, 2 something could not be judged."""
    if all(result.passed for result in replays):
        return 0
    return 1 if any(result.divergence for result in replays) else 2


def _explain(arguments: argparse.Namespace) -> int:
    from vllm_trace.explain import explain, render
    from vllm_trace.trace import read_trace

    story = explain(read_trace(arguments.trace), arguments.request)
    if arguments.json:
        _json(story.to_dict())
    else:
        print(render(story))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from vllm_trace.diff import diff
    from vllm_trace.diff.words import render
    from vllm_trace.trace import read_trace

    found = diff(read_trace(arguments.a), read_trace(arguments.b))
    if arguments.json:
        _json(found.to_dict())
    else:
        print(render(found))
    return 1 if found.incomplete or not found.is_same else 0


def _check(arguments: argparse.Namespace) -> int:
    from vllm_trace.invariants import checking, registry

    for path in arguments.load:
        registry.load(path)
    only = [one.strip() for one in arguments.only.split(",") if one.strip()]
    chosen = registry.choose(only)
    if arguments.list:
        listed = [one.to_dict() for one in chosen]
        if arguments.json:
            _json({"schema": 1, "invariants": listed})
        else:
            print(checking.catalogue(chosen))
        return 0
    if not arguments.traces:
        raise UsageError("check needs a trace", hint="vllm-trace check reports/preempt/latest")
    reports = checking.check_all(arguments.traces, only)
    if arguments.json:
        _json({"schema": 1, "traces": [report.to_dict() for report in reports]})
    else:
        print("\n\n".join(report.text() for report in reports))
    return checking.exit_code(reports)


def _doctor(arguments: argparse.Namespace) -> int:
    from vllm_trace import render
    from vllm_trace.doctor import diagnose

    found = diagnose(arguments.source)
    if arguments.json:
        _json(found.to_dict())
        return 0 if found.healthy else 1
    _print(render.diagnosis(found))
    return 0 if found.healthy else 1
