"""The oracle's own speed and memory: ``mini`` against vLLM, ``replay``, ``check``: ``python -m bench --only oracle``.

Everything is a ratio of one run, or CPU time on one core; rounds take turns, and their spread is printed.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import starmap, zip_longest
from pathlib import Path
from time import process_time
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

WORKLOADS = {"roomy": 8192, "tight": 448}
"""Blocks of the pool. In the first nobody has to wait for blocks; in the second requests preempt each other."""

READER = """
import sys, time
from pathlib import Path
what, path = sys.argv[1], Path(sys.argv[2])
from vllm_trace.trace import read_trace
from vllm_trace.replay import replay
from vllm_trace.invariants.checking import check
began = time.process_time()
if what == "check":
    report = check(read_trace(path))
    assert not report.of("violated") and not report.of("raised"), report.text()
    count = report.num_events
else:
    done = replay(read_trace(path), what)
    assert done.passed, (done.divergence, done.not_judged)
    count = done.num_events
took = time.process_time() - began
(peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
print(count, took, peak)
"""
"""One reading in a fresh process: (events, CPU seconds, kB at the highest)."""


PLAIN = """
import json, sys
from pathlib import Path
from bench import mini_block_manager, oracle
from vllm_trace.compiled import is_compiled
assert not is_compiled()
operations, rounds, paths = int(sys.argv[1]), int(sys.argv[2]), [Path(path) for path in sys.argv[3:]]
made = {"block_manager": mini_block_manager.measure(operations, 0, rounds)}
made["speed"] = {path.name: oracle.speeds(path, rounds) for path in paths}
print(json.dumps(made))
"""
"""The same of the checkout, in a process of its own."""


def measure(quick: bool, tell: Callable[[str], object]) -> dict[str, Any]:
    """All figures, as plain values."""
    from bench import long_trace, mini_block_manager
    from vllm_trace.compiled import is_compiled

    figures: dict[str, Any] = {}
    tell("mini's block manager against vLLM's")
    operations, repeat = (20_000, 2) if quick else (100_000, 5)
    figures["block_manager"] = mini_block_manager.measure(operations, 0, repeat)
    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as name:
        folder = Path(name)
        figures["speed"] = {}
        for name, num_blocks in WORKLOADS.items():
            tell(f"recording a run to replay: {name}")
            record(folder / name, 1000 if quick else 8000, num_blocks)
            tell(f"replay and check: {name}")
            figures["speed"][name] = speeds(folder / name, 2 if quick else 5)
        if is_compiled():
            tell("the same as plain Python")
            figures["plain"] = as_plain(operations, 2, [folder / name for name in WORKLOADS])
        tell("the same rules in SQL")
        # A query has fixed costs: in a short trace they would favour ``check``.
        figures["sql"] = []
        for count in (100_000,) if quick else (500_000, 2_000_000):
            path = long_trace.write(folder / f"sql-{count}.vtrace", count)
            figures["sql"].append(against_sql(path, folder / f"tables-{count}", 2 if quick else 4))
        figures["memory"] = []
        for count in (100_000, 1_000_000 if quick else 10_000_000):
            tell(f"replay and check of {count:,} events")
            path = long_trace.write(folder / f"long-{count}.vtrace", count)
            for what in ("manager", "engine", "check"):
                figures["memory"].append({"what": what} | read(what, path))
            path.unlink()
    return figures


def as_plain(operations: int, rounds: int, traces: list[Path]) -> dict[str, Any]:
    """What is compiled here, as plain Python: fewer rounds, so its spread says less."""
    environ = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONSAFEPATH")
    }
    command = [sys.executable, "-c", PLAIN, str(operations), str(rounds), *map(str, traces)]
    done = subprocess.run(
        command, check=True, cwd=ROOT, env=environ, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def record(folder: Path, steps: int, num_blocks: int) -> None:
    """A run of the real scheduler with tracing on from the start, in a process of its own."""
    code = (
        "import sys\n"
        "from bench.engine import Engine\n"
        "from vllm_trace import hooks\n"
        "from vllm_trace.options import Options\n"
        "hooks.attach(Options(dir=sys.argv[1]))\n"
        "Engine(num_blocks=int(sys.argv[3])).serve(int(sys.argv[2]))\n"
        "hooks.detach()\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(steps), str(num_blocks)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)


def speeds(trace: Path, rounds: int) -> dict[str, Any]:
    """Events a second of each reader of one trace; in every round each once."""
    from vllm_trace.invariants.checking import check
    from vllm_trace.replay import replay
    from vllm_trace.trace import kinds, read_trace

    manager = replay(read_trace(trace), "manager")
    assert manager.passed, (manager.divergence, manager.not_judged)
    events = [*read_trace(trace).events()]
    gc.collect()
    gc.freeze()  # the collector is not to look through them while something else is timed
    readers: dict[str, Callable[[], object]] = {
        "read": lambda: sum(map(len, read_trace(trace).files[0].batches())),
        "lookup": lambda: look_up_each(trace),
        "alone": lambda: mini_alone(events),
        "manager": lambda: replay(read_trace(trace), "manager"),
        "engine": lambda: replay(read_trace(trace), "engine"),
        "check": lambda: check(read_trace(trace)),
    }
    took: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            began = process_time()
            reader()
            took[name].append(process_time() - began)
    count = manager.num_events
    return {
        "num_events": count,
        "silent_calls": manager.num_silent,
        "kinds": kinds(read_trace(trace).records()),
        "events_per_s": {
            name: [count / max(times), count / statistics.median(times), count / min(times)]
            for name, times in took.items()
        },
    }


def look_up_each(trace: Path) -> None:
    """The least that a reader in Python does: every event is decoded, and its type looked up."""
    from vllm_trace.events import EVENT_TYPES
    from vllm_trace.trace import read_trace

    found = dict.fromkeys(EVENT_TYPES, 0).get
    for batch in read_trace(trace).files[0].batches():
        for event in batch:
            found(type(event))


def mini_alone(events: list[Any]) -> None:
    """``mini``'s own work in the engine's replay: nothing is read, told or compared; its plans are not looked at."""
    from vllm_trace import events as ev
    from vllm_trace.mini.kv_cache_manager import FullAttentionSpec
    from vllm_trace.mini.request import Request
    from vllm_trace.mini.scheduler import SchedulerConfig
    from vllm_trace.replay.steady_manager import SteadyManager
    from vllm_trace.replay.steady_scheduler import SteadyScheduler

    stops: dict[int, str] = {}
    planned: dict[int, Any] = {}
    for event in events:
        kind = type(event)
        if kind is ev.EngineConfigured:
            limits = event.settings
            manager = SteadyManager(
                event.num_blocks, [FullAttentionSpec(event.block_size)], limits["max_model_len"]
            )
            config = SchedulerConfig(limits["max_num_scheduled_tokens"], limits["max_num_seqs"])
            scheduler = SteadyScheduler(manager, config, lambda fact: None)
        elif kind is ev.RequestArrived:
            made = Request(
                event.request,
                num_prompt_tokens=event.num_prompt_tokens,
                max_tokens=event.max_tokens,
                block_hashes=event.block_hashes,
            )
            scheduler.add_request(made)
        elif kind is ev.BlocksCached:
            hashes = scheduler.requests[event.request].block_hashes
            hashes += event.hashes[len(hashes) - event.first :]
        elif kind is ev.RequestFinished:
            if event.reason == "abort":
                scheduler.finish_requests([event.request])
            else:
                stops[event.request] = event.reason
        elif kind is ev.StepScheduled:
            planned[event.step] = scheduler.schedule()
        elif kind is ev.StepUpdated:
            scheduler.answer(planned.pop(event.step), event.num_output_tokens, stops)
            stops = {}


def against_sql(trace: Path, folder: Path, rounds: int) -> dict[str, Any]:
    """``check`` and the same rules in DuckDB SQL, from the same trace, on one core, in turns."""
    if importlib.util.find_spec("bench.sql_invariants") is None:
        return {"absent": "bench/sql_invariants.py is not in this checkout"}
    from bench import sql_invariants
    from vllm_trace.invariants.checking import check
    from vllm_trace.trace import read_trace

    command = [sys.executable, "-m", "vllm_trace", "export", str(trace), "--to", "parquet"]
    subprocess.run([*command, "-o", str(folder)], check=True, cwd=ROOT, capture_output=True)
    rules = [*sql_invariants.RULES]  # without those that SQL cannot say
    took: dict[str, list[float]] = {"check": [], "sql": []}
    for _ in range(rounds):
        began = process_time()
        report = check(read_trace(trace), rules)
        took["check"].append(process_time() - began)
        assert not report.of("violated")
        began = process_time()
        assert not any(sql_invariants.run(folder).values())
        took["sql"].append(process_time() - began)
    return {
        "rules": rules,
        "num_events": report.num_events,
        "check_s": statistics.median(took["check"]),
        "sql_s": statistics.median(took["sql"]),
        "ratios": [sql / own for sql, own in zip(took["sql"], took["check"])],
    }


def read(what: str, path: Path) -> dict[str, Any]:
    """One reading in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", READER, what, str(path)], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    count, took, peak = done.stdout.split()
    return {"num_events": int(count), "seconds": float(took), "peak_mb": int(peak) / 1024}


# Showing --------------------------------------------------------------------------------

SAID = {
    "read": "floor: every event decoded",
    "lookup": "floor: decoded, and one dict lookup for each",
    "alone": "floor: mini alone, nothing read or compared",
    "check": "check, 21 rules",
}
HEADS = ("what", "figure", "spread", "as plain Python", "target")
UNITS = (("decisions", "M decisions/s"), ("stored", "M stored events/s"))


def rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    """(what, figure, spread, figure as plain Python if it is another, target)."""
    made = _block_manager_rows(figures)
    for workload, speed in figures["speed"].items():
        plain = figures["plain"]["speed"][workload] if "plain" in figures else None
        made += _speed_rows(workload, speed, plain)
    for sql in figures["sql"]:
        if "absent" in sql:
            made.append(("check against DuckDB SQL", sql["absent"], "", "", "≥ 1.2×"))
            continue
        ratios = sql["ratios"]
        times = f"{sql['sql_s']:.2f} s / {sql['check_s']:.2f} s"
        figure = f"{sql['num_events']:,} events: {times} = {statistics.median(ratios):.2f}×"
        spread = f"{min(ratios):.2f} … {max(ratios):.2f}"
        made.append(("check against the same rules in DuckDB SQL", figure, spread, "", "≥ 1.2×"))
    for what in ("manager", "engine", "check"):
        small, large = (one for one in figures["memory"] if one["what"] == what)
        figure = ", ".join(
            f"{one['peak_mb']:.0f} MB at {one['num_events']:,} events" for one in (small, large)
        )
        said = what if what == "check" else f"replay, {what}"
        made.append((f"memory: {said}", figure, f"{large['seconds']:.0f} s", "", "the same"))
    return made


def _block_manager_rows(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    made = []
    plain = figures["plain"]["block_manager"]["kinds"] if "plain" in figures else []
    for kind, other in zip_longest(figures["block_manager"]["kinds"], plain):
        low, high = min(kind["ratios"]), max(kind["ratios"])
        times = f"{kind['vllm_us']:.2f} µs / {kind['mini_us']:.2f} µs = "
        target = f"≥ {kind['target']:g}×" if kind["target"] else ""
        ratio = f"{times}{statistics.median(kind['ratios']):.2f}×"
        slower = f"{statistics.median(other['ratios']):.2f}×" if other else ""
        spread = f"{low:.2f} … {high:.2f}"
        made.append((f"mini against vLLM: {kind['name']}", ratio, spread, slower, target))
    return made


def _speed_rows(
    workload: str, speed: dict[str, Any], plain: dict[str, Any] | None
) -> list[tuple[str, ...]]:
    """Each reader in decisions and in stored events, both beside the target."""
    made = []
    for name, figures in speed["events_per_s"].items():
        for unit, said in UNITS:
            per_event = 1.0
            if unit == "decisions":
                if name == "check":  # it judges what is stored
                    continue
                per_event += speed["silent_calls"] / speed["num_events"]
            low, median, high = (figure * per_event / 1e6 for figure in figures)
            slower = f"{plain['events_per_s'][name][1] * per_event / 1e6:.2f}" if plain else ""
            target = "≥ 1 M/s" if name in ("manager", "engine") else ""
            what = f"{workload}: {SAID.get(name, f'replay, {name}')}"
            made.append((what, f"{median:.2f} {said}", f"{low:.2f} … {high:.2f}", slower, target))
    return made


HOW = """\
*mini against vLLM*: `bench/mini_block_manager.py`; {operations} operations, every block id equal, block size 16; vLLM's
CPU time over mini's, less what reading the clock costs, median of {repeat} repetitions and their spread.

*replay*, *check*: recorded runs of the real scheduler (`bench/engine.py`, 32 requests at a time), CPU time of one core
from the file to the verdict, median of the rounds and their spread. A *stored event* is what lies in the file as one.
Most calls of `allocate_slots` take no block: the trace counts them and has no event of each; replay makes and compares
them all the same. A *decision* is a stored event or such a call. How many requests run is what decides how many
decisions there are for an event. Steps are answered before the next one is planned; where they overlap (async
scheduling, pipelines), or windows move, every request is followed in every step, half as fast.

{workloads}

*as plain Python*: the same checkout not compiled, in a process of its own in the same run, median of two rounds.

*floor*: what any replay in Python costs at least. To read is to decode (msgspec) and put back what a step has in
common with the one before; *mini alone* is the from-scratch scheduler and manager on the same arrivals and answers,
events in memory, nobody told and nothing compared. The engine's replay is both, one behind the other, and the telling
and comparing besides.

*memory*: highest resident memory of a fresh process that reads a trace of that many events in one engine's life
(`bench/long_trace.py`), and its CPU seconds.
"""


def _workload(name: str, speed: dict[str, Any]) -> str:
    """What a recorded run is made of."""
    count, silent, kinds = speed["num_events"], speed["silent_calls"], speed["kinds"]
    parts = [
        f"{kinds.get(kind, 0):,} {said}"
        for kind, said in (
            ("step.scheduled", "steps"),
            ("request.arrived", "requests"),
            ("blocks.touched", "prefix hits taken over"),
            ("block.evicted", "evictions"),
            ("request.preempted", "preemptions"),
            ("slots.refused", "refusals"),
        )
    ]
    return (
        f"- *{name}* (pool of {WORKLOADS[name]:,} blocks): {count:,} stored events and {silent:,} silent calls,"
        f"\n  {1 + silent / count:.2f} decisions a stored event; {', '.join(parts)}."
    )


def markdown(figures: dict[str, Any], head: list[str], table: Callable[..., list[str]]) -> str:
    how = HOW.format(
        operations=figures["block_manager"]["operations"],
        repeat=len(figures["block_manager"]["kinds"][0]["ratios"]),
        workloads="\n".join(starmap(_workload, figures["speed"].items())),
    )
    lines = ["# The oracle: speed and memory", "", *head, "", *table(HEADS, rows(figures))]
    return "\n".join([*lines, "", "## How", "", how])


def write(figures: dict[str, Any], folder: Path, head: list[str], table: Any) -> None:
    (folder / "oracle.json").write_text(json.dumps(figures, indent=1) + "\n")
    (folder / "oracle.md").write_text(markdown(figures, head, table))
