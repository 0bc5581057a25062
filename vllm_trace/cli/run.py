"""``run``: a scenario on a real engine, recorded; and ``scenarios``, the list of them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_trace.cli.parser import AddVerb, recording_flags, recording_options
from vllm_trace.cli.printing import print_json, print_line, print_text, say
from vllm_trace.cli.progress import Progress
from vllm_trace.cli.traces import code_of, replay_all
from vllm_trace.errors import EngineError, TraceError, UsageError
from vllm_trace.options import Options


def add(verb: AddVerb) -> None:
    run = verb("run", _run, "Run a scenario on a real engine and trace it", "run preempt")
    run.add_argument("scenario", help="a name (see: scenarios) or a TOML file")
    run.add_argument("--model", default="", help="a folder or hub name instead of the tiny model")
    run.add_argument(
        "--engine-arg", action="append", default=[], metavar="K=V", help="an argument of vllm.LLM"
    )
    run.add_argument("--replay", action="store_true", help="replay the trace through mini at once")
    recording_flags(run)
    verb("scenarios", _scenarios, "List what there is to run", "scenarios")


def _run(arguments: argparse.Namespace) -> int:
    from vllm_trace import reports, scenario, sidecar
    from vllm_trace.record import close_files

    chosen = scenario.load(arguments.scenario)
    options = recording_options(arguments)
    engine_args = parse_engine_args(arguments.engine_arg)
    url = options.otlp
    if url:
        sidecar.check(url)
    run = reports.new_run(chosen.name, arguments.output)
    options = replace(options, dir=str(run.trace.absolute()), otlp="")
    os.environ.pop("VTRACE_OTLP", None)  # the engine's processes need not start one of their own
    os.environ |= options.to_environment()
    beside = sidecar.start(run.trace.absolute(), url) if url else None
    try:
        outcome = _drive(chosen, run.folder, arguments.model, engine_args, options)
    except BaseException as error:
        if beside is not None:
            beside.abandon()
        run.discard(keep_log=isinstance(error, EngineError))
        raise
    finally:
        close_files(run.trace, "stopped")
    summary = _summary_of(run.trace)
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
    sent = beside.finish() if beside is not None else None
    if sent is not None:
        document["otlp"] = sent.to_dict()
    replays = replay_all(run.trace) if arguments.replay else []
    if replays:
        document["replays"] = [one.to_dict() for one in replays]
    text = reports.save(run, document, summary, chosen, outcome)
    if arguments.json:
        print_json(document)
    else:
        print_text(text)
        if replays:
            from vllm_trace.replay_view import verdict

            print_line("")
            print_text(verdict(replays))
        print(f"Trace and summary: {run.folder}")
    if sent is not None:
        say(sent.text(run.folder))
    complaints = [f"{chosen.name} did not show it: {failure}" for failure in failures]
    if options.shadow and not summary.shadow.num_calls:
        complaints.append("the shadow compared no attention call")
    for complaint in complaints:
        say(complaint)
    lost = sent is not None and sent.failed
    found = bool(complaints or lost or summary.shadow.num_beyond)
    return max(int(found), code_of(replays))


def _summary_of(folder: Path) -> Any:
    from vllm_trace.summary import Summary
    from vllm_trace.trace import read_trace

    try:
        return Summary.of(read_trace(folder))
    except TraceError as error:
        raise EngineError(f"the engine ran, but left no trace: {error}") from None


def _drive(
    chosen: Any, folder: Path, model: str, engine_args: dict[str, Any], options: Options
) -> Any:
    """Start the engine, run the workload, close the trace; vLLM's own words go to a file."""
    from vllm_trace import hooks, runner

    log = folder / "engine.log"
    progress = Progress(f"starting vLLM for {chosen.name!r}")
    began = time.monotonic_ns()
    try:
        with runner.output_to(log) as last_words, progress:
            try:
                # Nor in between: what was imported by then would be gone through again and again.
                with runner.no_gc():
                    if not options.copy_rate and options.level == "full":
                        measured = replace(options, copy_rate=_copy_rate(engine_args))
                        os.environ |= measured.to_environment()
                    llm, notes = runner.start_engine(
                        chosen, model=model, engine_args=engine_args, attention=options.attention
                    )
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


def _copy_rate(engine_args: dict[str, Any]) -> int:
    """What a copy moves on this device, for the share that kernels reach of it; 0: not known."""
    from vllm_trace.backend.copy_rate import measure, measure_apart
    from vllm_trace.runner import interrupts_wait, no_gc

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # An engine in other processes must not find CUDA in use here: it may be forked.
    apart = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0") != "0"
    try:
        if apart or int(engine_args.get("tensor_parallel_size", 1)) > 1:
            return measure_apart()
        with no_gc(), interrupts_wait():
            import torch  # noqa: F401
        return measure()
    except (ImportError, ValueError):
        return 0  # no torch, or no number: the engine will say it better


def parse_engine_args(given: Sequence[str]) -> dict[str, Any]:
    """Arguments of ``vllm.LLM`` from K=V words; values are JSON where they can be."""
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


def _scenarios(arguments: argparse.Namespace) -> int:
    from vllm_trace import render, scenario

    loaded = [scenario.load(name) for name in scenario.names()]
    if arguments.json:
        print_json(
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
    print_text(table)
    return 0
