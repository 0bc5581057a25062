"""The verbs that read a trace: ``show``, ``replay``, ``explain``, ``diff``, ``check``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_trace.cli.parser import AddVerb, trace_argument
from vllm_trace.cli.printing import console, print_json, print_line, print_text, say
from vllm_trace.errors import UsageError, unknown
from vllm_trace.options import VIEWS


def add(verb: AddVerb) -> None:
    show = verb("show", _show, "Show a trace in the terminal", "show reports/preempt/latest blocks")
    trace_argument(show)
    show.add_argument("view", nargs="?", default="summary", help=", ".join(VIEWS))
    show.add_argument("--request", default="", help="only this one: a name, or #NUMBER")
    show.add_argument("--step", default="", help="only step N, or N-M")
    show.add_argument("--kind", default="", help="events: only these (slots,block.evicted …)")
    show.add_argument("--all", action="store_true", help="every row of a table")
    show.add_argument("--follow", action="store_true", help="keep showing a running engine")
    show.add_argument("--seconds", type=float, default=0, help="--follow: stop after so many")

    again = verb(
        "replay", _replay, "Replay a trace through the from-scratch engine and compare",
        "replay reports/preempt/latest",
    )  # fmt: skip
    again.add_argument(
        "trace", type=Path, nargs="?", help="the folder of a run, or one .vtrace file"
    )
    again.add_argument("--mode", default="", help="manager or engine (default: both)")
    again.add_argument(
        "--attention",
        type=Path,
        metavar="FILE",
        help="instead: an attention call that a shadow saved",
    )

    story = verb(
        "explain", _explain, "Tell the life of one request in words, with event numbers",
        "explain reports/preempt/latest r-2",
    )  # fmt: skip
    trace_argument(story)
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


def _show(arguments: argparse.Namespace) -> int:
    from vllm_trace import show
    from vllm_trace.trace import read_trace

    if arguments.view not in VIEWS:
        raise unknown("view", arguments.view, VIEWS)
    wanted = show.Filter.parse(arguments.request, arguments.step, arguments.kind)
    if arguments.follow:
        return _follow(arguments, wanted)
    trace = read_trace(arguments.trace)
    if arguments.view == "events":
        show.printer(trace, wanted, print if arguments.json else print_line, arguments.json)
    elif arguments.json:
        print_json(show.data(trace, arguments.view, wanted))
    else:
        limit = 1 << 30 if arguments.all else 24
        print_text(show.view(trace, arguments.view, wanted, limit, console().width))
    # The whole summary has them in its own text.
    for problem in trace.problems if (arguments.view, wanted) != ("summary", show.Filter()) else ():
        say(problem)
    return 0


def _follow(arguments: argparse.Namespace, wanted: Any) -> int:
    from vllm_trace import live, show

    if arguments.view not in ("summary", "blocks") or wanted != show.Filter():
        raise UsageError(
            "--follow shows the engine as it is now: the pool, the last steps, what runs",
            hint="Try: show TRACE --follow, show TRACE blocks --follow, or leave --follow out",
        )
    if arguments.json:
        live.follow_json(arguments.trace, _print_line, seconds=arguments.seconds)
    else:
        only_map = arguments.view == "blocks"
        live.follow(arguments.trace, console(), seconds=arguments.seconds, only_map=only_map)
    return 0


def _print_line(document: dict[str, Any]) -> None:
    print(json.dumps(document), flush=True)


def _replay(arguments: argparse.Namespace) -> int:
    if arguments.attention is not None:
        return _replay_attention(arguments)
    if arguments.trace is None:
        raise UsageError("replay needs a trace", hint="vllm-trace replay reports/preempt/latest")
    results = replay_all(arguments.trace, arguments.mode)
    if arguments.json:
        print_json({"schema": 2, "replays": [result.to_dict() for result in results]})
    else:
        from vllm_trace.replay_view import verdict

        print_text(verdict(results))
    return code_of(results)


def _replay_attention(arguments: argparse.Namespace) -> int:
    """A saved call again, by our kernels and without vLLM: 1 when it is beyond the tolerance."""
    if arguments.trace is not None or arguments.mode:
        raise UsageError(
            "--attention FILE is all that is replayed: no trace and no --mode beside it"
        )
    try:
        from vllm_trace.backend.again import compute_again
    except ImportError as error:
        raise UsageError(
            f"the kernels need torch and safetensors: {error}", hint="pip install torch safetensors"
        ) from None
    again = compute_again(arguments.attention)
    if arguments.json:
        print_json(again.to_dict())
    else:
        print_line(again.text())
    return 0 if again.passed else 1


def replay_all(path: Path, mode: str = "") -> list[Any]:
    """Both replays of a trace, or the one named."""
    from vllm_trace.replay import MODES, replay
    from vllm_trace.trace import read_trace

    if mode and mode not in MODES:
        raise unknown("mode", mode, MODES)
    return [replay(read_trace(path), one) for one in ([mode] if mode else MODES)]


def code_of(replays: Sequence[Any]) -> int:
    """0 identical, 1 a divergence, 2 something could not be judged."""
    if all(result.passed for result in replays):
        return 0
    return 1 if any(result.divergence for result in replays) else 2


def _explain(arguments: argparse.Namespace) -> int:
    from vllm_trace.explain import explain, render
    from vllm_trace.trace import read_trace

    story = explain(read_trace(arguments.trace), arguments.request)
    if arguments.json:
        print_json(story.to_dict())
    else:
        print_line(render(story))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from vllm_trace.diff import diff
    from vllm_trace.diff.words import render
    from vllm_trace.trace import read_trace

    found = diff(read_trace(arguments.a), read_trace(arguments.b))
    if arguments.json:
        print_json(found.to_dict())
    else:
        print_line(render(found))
    if not found.is_same:
        return 1
    return 2 if found.incomplete else 0


def _check(arguments: argparse.Namespace) -> int:
    from vllm_trace.invariants import checking, judgements, registry

    for path in arguments.load:
        registry.load(path)
    only = [one.strip() for one in arguments.only.split(",") if one.strip()]
    chosen = registry.choose(only)
    if arguments.list:
        listed = [one.to_dict() for one in chosen]
        if arguments.json:
            print_json({"schema": 1, "invariants": listed})
        else:
            print_line(judgements.catalogue(chosen))
        return 0
    if not arguments.traces:
        raise UsageError("check needs a trace", hint="vllm-trace check reports/preempt/latest")
    reports = checking.check_all(arguments.traces, only)
    if arguments.json:
        print_json({"schema": 1, "traces": [report.to_dict() for report in reports]})
    else:
        print_line("\n\n".join(report.text() for report in reports))
    return judgements.exit_code(reports)
