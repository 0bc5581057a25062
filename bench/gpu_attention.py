"""Scenarios on every attention backend of one machine: traced, checked, replayed, timed, with tracing on and off.

    python -m bench.gpu_attention -o FOLDER [--only FLASH_ATTN,paged] [--scenarios hello,long] [--rounds 5]

Made for a CUDA machine with vLLM 0.20.2, in one process (the first engine takes seconds, the others one or two). On a
machine without CUDA it runs the backends that are there. Writes ``attention.md``, ``attention.json`` and the traces.
``VLLM_USE_V2_MODEL_RUNNER=1`` in the environment: the same on the V2 model runner (``attention-v2.md`` and ``.json``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

BACKENDS = ("FLASH_ATTN", "TRITON_ATTN", "paged", "paged:vllm")
SCENARIOS = ("hello", "prefix", "long", "preempt")
GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
}
"""Whole decode steps as CUDA graphs, without compiling the model."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_attention", description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default=",".join(BACKENDS))
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--rounds", type=int, default=5, help="pairs with tracing on and off")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument(
        "--shadow", action="store_true", help="shadow runs of the first two scenarios"
    )
    parser.add_argument(
        "--seconds", type=float, default=400, help="begin nothing new after so many"
    )
    asked = parser.parse_args()
    asked.output.mkdir(parents=True, exist_ok=True)
    from vllm_trace.runner import quiet_environment

    os.environ |= quiet_environment()
    from vllm_trace.backend.copy_rate import measure

    asked.copy_rate = measure()
    found: dict[str, Any] = {
        "schema": 1,
        "about": about(asked),
        "runs": [],
        "cost": [],
        "waits": [],
        "failed": [],
    }
    deadline = time.monotonic() + asked.seconds
    for backend in asked.only.split(","):
        jobs: list[tuple[str, dict[str, Any], bool]] = [
            (name, {}, False) for name in asked.scenarios.split(",")
        ]
        if backend == "FLASH_ATTN":
            jobs.append(("prefix", GRAPHS, False))
        if asked.shadow:
            jobs += [(name, {}, True) for name in asked.scenarios.split(",")[:2]]
        for name, more, shadow in jobs:
            attempt(found, asked, deadline, backend, name, more, shadow)
        with trying(found, f"cost of tracing with {backend}"):
            in_time(deadline)
            found["cost"].append(cost(asked, backend))
        with trying(found, f"synchronisations with {backend}"):
            in_time(deadline)
            found["waits"].append(waits(asked, backend))
        write(found, asked.output)
    write(found, asked.output)
    print(markdown(found))
    return 1 if found["failed"] else 0


def attempt(
    found: dict[str, Any],
    asked: Any,
    deadline: float,
    backend: str,
    name: str,
    more: dict[str, Any],
    shadow: bool,
) -> None:
    graphs = ", CUDA graphs" if more else ""
    with trying(found, f"{name} with {backend}{graphs}{', shadow' if shadow else ''}"):
        in_time(deadline)
        run = one_run(asked, backend, name, more, shadow)
        found["runs"].append(run)
        told = {k: v for k, v in run.items() if k not in ("kernels", "request_digests")}
        print(json.dumps(told), flush=True)
    write(found, asked.output)


def in_time(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError("not begun: out of time")


@contextmanager
def trying(found: dict[str, Any], what: str) -> Iterator[None]:
    """One that fails is named in the results and does not stop the others."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        found["failed"].append({"what": what, "error": f"{type(error).__name__}: {error}"[:600]})


def engine_args(asked: Any, backend: str, more: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(attention, arguments of the engine)."""
    given: dict[str, Any] = {"dtype": asked.dtype} | more
    if on_cuda():
        given["gpu_memory_utilization"] = 0.3
    if backend.startswith("paged"):
        return backend, given
    if on_cuda():
        given["attention_backend"] = backend
    return "engine", given


def on_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


@contextmanager
def traced(
    folder: Path | None,
    attention: str,
    *,
    shadow: bool = False,
    copy_rate: int = 0,
    level: str = "full",
):
    """Variables for engines made inside; with a folder they are traced."""
    from vllm_trace import hooks
    from vllm_trace.backend import register_backend
    from vllm_trace.options import Options

    options = Options(
        dir=str(folder) if folder else "",
        attention=attention,
        shadow=shadow,
        copy_rate=copy_rate,
        level=level,
    )
    before = {name: value for name, value in os.environ.items() if name.startswith("VTRACE_")}
    os.environ |= options.to_environment()
    try:
        if folder is None:
            register_backend(attention)
        yield
    finally:
        hooks.detach()
        for name in [n for n in os.environ if n.startswith("VTRACE_") and n not in before]:
            del os.environ[name]


def one_run(
    asked: Any, backend: str, name: str, more: dict[str, Any], shadow: bool
) -> dict[str, Any]:
    """Run, read, judge by all invariants, replay."""
    from vllm_trace import runner, scenario
    from vllm_trace.cli.traces import replay_all
    from vllm_trace.invariants import checking, judgements
    from vllm_trace.record import close_files
    from vllm_trace.summary import Summary
    from vllm_trace.trace import read_trace

    label = f"{name}-{backend.replace(':', '-')}{'-graphs' if more else ''}{'-shadow' if shadow else ''}"
    folder = asked.output / "traces" / label
    chosen = scenario.load(name)
    attention, given = engine_args(asked, backend, more)
    began = time.monotonic()
    with traced(folder, attention, shadow=shadow, copy_rate=asked.copy_rate):
        llm, notes = runner.start_engine(chosen, engine_args=given, attention=attention)
        started = time.monotonic() - began
        outcome = runner.run_workload(llm, chosen)
        runner.stop_engine(llm)
    close_files(folder, "stopped")
    summary = Summary.of(read_trace(folder))
    report = checking.check_all([folder], [])[0]
    replays = replay_all(folder)
    facts = summary.facts()
    return {
        "label": label,
        "backend": backend,
        "scenario": name,
        "graphs": bool(more),
        "notes": notes,
        "engine_args": {k: str(v) for k, v in given.items()},
        "start_s": round(started, 2),
        "run_s": round(outcome.run_seconds, 3),
        "backends": sorted({f"{b['backend']}/{b['impl']}" for b in summary.backends}),
        "not_shown": chosen.failures(facts),
        "steps": facts["steps"],
        "modes": sorted({step.mode for step in summary.steps}),
        "v1_steps": facts["v1_steps"],
        "v2_steps": facts["v2_steps"],
        "counterfactual": summary.rule.counterfactual,
        "rule_changes": summary.rule.changes[:6],
        "shadow": vars(summary.shadow) if shadow else {},
        "kernels": [vars(kernel) for kernel in summary.kernels],
        "replayed_graphs": {
            m: [len(t), statistics.median(t)] for m, t in summary.replayed_ns.items()
        },
        "invariants": report.text().splitlines()[-1] if report.text() else "",
        "invariants_exit": judgements.exit_code([report]),
        "replay": [
            {"mode": r.mode, "passed": r.passed, "verdict": r.to_dict().get("verdict")}
            for r in replays
        ],
        "problems": summary.problems,
        **worker_facts(folder),
        "request_digests": {name: digest(made) for name, made in outcome.token_ids.items()},
    }


def same_tokens(runs: list[dict[str, Any]]) -> list[str]:
    """How many requests got the same greedy tokens in all runs of their scenario."""
    seen: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for request, told in run["request_digests"].items():
            seen.setdefault(run["scenario"], {}).setdefault(request, set()).add(told)
    counts = [
        f"{name} {sum(len(told) == 1 for told in requests.values())} of {len(requests)}"
        for name, requests in seen.items()
    ]
    return [
        "Requests with the same greedy tokens whatever the backend, with the shadow and with CUDA graphs:"
        f" {', '.join(counts)}. (In half precision kernels round differently, and a near tie goes either way.)"
        " Mode `none` is the last step of an asynchronous scheduler, where nothing is left to run."
    ]


def worker_facts(folder: Path) -> dict[str, Any]:
    """What the workers told: batches with tables and slots, and how long forwards took on the device."""
    from vllm_trace.events import SlotsMapped, StepExecuted
    from vllm_trace.trace import read_trace

    events = list(read_trace(folder).events())
    taken = [e.device_dur_ns for e in events if type(e) is StepExecuted and e.device_dur_ns]
    return {
        "batches_seen": sum(type(e) is SlotsMapped for e in events),
        "forwards_timed": len(taken),
        "forward_median_us": round(statistics.median(taken) / 1e3, 1) if taken else None,
    }


def v2_runner() -> bool:
    return os.environ.get("VLLM_USE_V2_MODEL_RUNNER", "0") != "0"


def digest(token_ids: list[tuple[int, ...]]) -> str:
    """The same for the same tokens, and no token."""
    return hashlib.sha256(repr(token_ids).encode()).hexdigest()[:8]


def cost(asked: Any, backend: str) -> dict[str, Any]:
    """One workload with tracing off, light and full by turns, on one engine each; medians and ratios of a round."""
    from vllm_trace import runner, scenario

    chosen = scenario.load("prefix")
    attention, given = engine_args(asked, backend, {"enable_prefix_caching": False})
    times: dict[str, list[float]] = {"off": [], "light": [], "full": []}
    for turn in range(asked.rounds + 1):
        order = list(times) if turn % 2 else list(times)[::-1]
        for arm in order:
            folder = (
                None
                if arm == "off"
                else asked.output / "cost" / f"{backend.replace(':', '-')}-{arm}-{turn}"
            )
            with traced(folder, attention, level="full" if arm == "off" else arm):
                llm, _ = runner.start_engine(chosen, engine_args=given, attention=attention)
                runner.run_workload(llm, chosen)  # the first one also compiles kernels
                taken = [runner.run_workload(llm, chosen).run_seconds for _ in range(3)]
                runner.stop_engine(llm)
            if turn:  # one round for nothing
                times[arm].append(statistics.median(taken))
    ratios = {arm: [a / b for a, b in zip(times[arm], times["off"])] for arm in ("light", "full")}
    return {
        "backend": backend,
        "workload": "prefix, 100 requests at once, prefix caching off",
        "seconds": {arm: statistics.median(values) for arm, values in times.items()},
        "ratio": {arm: statistics.median(values) for arm, values in ratios.items()},
        "ratio_range": {arm: [min(values), max(values)] for arm, values in ratios.items()},
        "rounds": asked.rounds,
    }


def waits(asked: Any, backend: str) -> dict[str, Any]:
    """How often the host waited for the device in one workload, by torch's own count, with tracing off and on."""
    import warnings

    import torch

    from vllm_trace import runner, scenario

    chosen = scenario.load("hello")
    attention, given = engine_args(asked, backend, {})
    counts = {}
    for arm in ("off", "full"):
        folder = None if arm == "off" else asked.output / "waits" / backend.replace(":", "-")
        with traced(folder, attention):
            llm, _ = runner.start_engine(chosen, engine_args=given, attention=attention)
            runner.run_workload(llm, chosen)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    runner.run_workload(llm, chosen)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            counts[arm] = sum("synchronizing" in str(one.message) for one in seen)
            runner.stop_engine(llm)
    return {"backend": backend, "workload": "hello, 20 tokens"} | counts


def about(asked: Any) -> dict[str, Any]:
    import torch
    import vllm

    device = torch.cuda.get_device_name() if on_cuda() else platform.processor() or "cpu"
    return {
        "command": shlex.join(["python", "-m", "bench.gpu_attention", *sys.argv[1:]]),
        "date": datetime.now().isoformat(timespec="seconds"),
        "device": device,
        "copy_rate": asked.copy_rate,
        "runner": "V2" if v2_runner() else "V1",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": sys.version.split()[0],
    }


def _version(name: str) -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def write(found: dict[str, Any], folder: Path) -> None:
    name = "attention-v2" if v2_runner() else "attention"
    (folder / f"{name}.json").write_text(json.dumps(found, indent=1, default=str) + "\n")
    (folder / f"{name}.md").write_text(markdown(found))


def markdown(found: dict[str, Any]) -> str:
    """The tables for ``reports/gpu/``."""
    about, runs = found["about"], found["runs"]
    lines = [
        "# Attention backends, traced",
        "",
        f"`{about['command']}`, {about['date']}: vLLM {about['vllm']}, torch {about['torch']},"
        f" Triton {about['triton']},"
        f" {about['device']}; a copy moves {about['copy_rate'] / 1e12:.2f} TB/s (reads and writes);"
        f" model runner {about['runner']}.",
        "",
        *_runs_table(runs),
        "",
        *same_tokens(runs),
        *_kernels_table(runs),
        *_shadows([run for run in runs if run["shadow"]]),
        *_cost_table(found["cost"]),
        *_waits_table(found["waits"]),
    ]
    for failed in found["failed"]:
        lines += ["", f"Not done: {failed['what']}: {failed['error']}"]
    return "\n".join(lines) + "\n"


def _runs_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "*Batches*: steps of which block tables and slots were recorded, and compared with the manager's by the"
        " invariants and the replay. *Forward*: median time between events on the stream.",
        "",
        "| scenario | backend | steps | CUDA graphs | batches | forward, µs | as stated | invariants | replay"
        " | V1 / V2 steps |",
        "|---" * 10 + "|",
    ]
    for run in runs:
        replay = ", ".join(
            f"{r['mode']} {'identical' if r['passed'] else 'NOT identical'}" for r in run["replay"]
        )
        would = " (counterfactual)" if run["counterfactual"] else ""
        judged = "hold" if run["invariants_exit"] == 0 else "BROKEN"
        title = run["scenario"] + (", shadow" if run["shadow"] else "")
        rule = f"{run['v1_steps']} / {run['v2_steps']}{would}"
        cells = [title, ", ".join(run["backends"]), str(run["steps"]), ", ".join(run["modes"])]
        cells += [str(run["batches_seen"]), f"{run['forward_median_us'] or 0:.0f}"]
        cells.append("no: " + "; ".join(run["not_shown"]) if run["not_shown"] else "yes")
        lines.append(f"| {' | '.join([*cells, judged, replay, rule])} |")
    return lines


def _kernels_table(runs: list[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "## Kernel times, between events on the stream",
        "",
        "Medians over the steps. The models are tiny, so the stream is idle between launches and a"
        " time holds the host's own launch; the first calls of Triton kernels also compile, which"
        " where there is one step only is all that is seen.",
        "",
        "| scenario | backend | kernel | variant | calls | a call, median µs | clock |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        for kernel in () if run["shadow"] else run["kernels"]:
            lines.append(
                f"| {run['scenario']}{', graphs' if run['graphs'] else ''} | {run['backend']} | {kernel['kernel']} |"
                f" {kernel['variant'] or '–'} | {kernel['num_calls']} | {kernel['median_ns'] / 1e3:.1f} |"
                f" {kernel['clock']} |"
            )
        for mode, (count, median) in run["replayed_graphs"].items():
            lines.append(
                f"| {run['scenario']}, graphs | {run['backend']} | whole forward in a graph | {mode} | {count} |"
                f" {median / 1e3:.1f} | cuda |"
            )
    return lines


def _shadows(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    lines = ["", "## Shadow", ""]
    for run in runs:
        check = run["shadow"]
        lines.append(
            f"- {run['scenario']}, {run['backend']}: {check['num_calls']} calls, {check['num_beyond']} beyond"
            f" {check['tolerance']:g}, worst {check['max_relative']:.2g} of the largest value read"
        )
    return lines


def _cost_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["", "## Added by tracing: the whole workload, host and device", ""]
    lines += ["| backend | off, s | light | full | rounds |", "|---|---|---|---|---|"]
    for row in rows:
        cells = [
            f"× {row['ratio'][arm]:.3f} ({row['ratio_range'][arm][0]:.3f} to {row['ratio_range'][arm][1]:.3f})"
            for arm in ("light", "full")
        ]
        lines.append(
            f"| {row['backend']} | {row['seconds']['off']:.3f} | {' | '.join(cells)} | {row['rounds']} |"
        )
    return lines


def _waits_table(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    return [
        "",
        "## Waits of the host for the device, as torch counts them, in one `hello`",
        "",
        "| backend | tracing off | full |",
        "|---|---|---|",
        *(f"| {row['backend']} | {row['off']} | {row['full']} |" for row in rows),
    ]


if __name__ == "__main__":
    sys.exit(main())
