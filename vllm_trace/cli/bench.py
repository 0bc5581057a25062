"""``bench``: a real vLLM beside a contiguous cache. What tracing costs is ``python -m bench``."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vllm_trace.cli.parser import AddVerb
from vllm_trace.cli.printing import print_json, print_text, say
from vllm_trace.cli.progress import Progress
from vllm_trace.errors import EngineError, HookError, UsageError, unknown


def add(verb: AddVerb) -> None:
    bench = verb(
        "bench", _bench, "Measure vLLM beside a contiguous preallocated cache",
        "bench --test throughput --requests 32",
    )  # fmt: skip
    bench.add_argument("--test", default="all", help="throughput, scaling, memory or all")
    bench.add_argument("--model", default="tiny-llama", help="a tiny checkpoint, or a folder")
    bench.add_argument("--budget", type=int, default=4096, help="tokens of KV cache for each arm")
    bench.add_argument("--max-model-len", type=int, default=512, help="tokens of a request")
    bench.add_argument("--block-size", type=int, default=32, help="tokens")
    bench.add_argument("--requests", type=int, default=64)
    bench.add_argument("--repeats", type=int, default=7, help="rounds that count")
    bench.add_argument("--quick", action="store_true", help="two rounds, for a first look")
    bench.add_argument("--dtype", default="", help="default: float32 on CPU, float16 on CUDA")
    bench.add_argument("--seed", type=int, default=0)
    bench.add_argument("-o", "--output", type=Path, help="folder (default: reports/engines/…)")
    bench.add_argument("--page", type=Path, metavar="FILE.md", help="write the results page too")
    bench.add_argument(
        "--also", type=Path, action="append", default=[], metavar="FILE.json",
        help="page: figures of another machine beside these",
    )  # fmt: skip


def _bench(arguments: argparse.Namespace) -> int:
    from vllm_trace import reports, runner
    from vllm_trace.benchmark import measure, page, view
    from vllm_trace.benchmark.arms import Plan

    if arguments.test not in (*measure.TESTS, "all"):
        raise unknown("test", arguments.test, (*measure.TESTS, "all"))
    tests = measure.TESTS if arguments.test == "all" else (arguments.test,)
    if arguments.page and arguments.page.suffix != ".md":
        raise UsageError(f"--page {arguments.page} does not end in .md")
    also = [page.read(path) for path in arguments.also]
    plan = Plan(
        model=arguments.model,
        budget=arguments.budget,
        max_model_len=arguments.max_model_len,
        block_size=arguments.block_size,
        num_requests=arguments.requests,
        repeats=2 if arguments.quick else arguments.repeats,
        seed=arguments.seed,
        dtype=arguments.dtype,
    ).checked()
    os.environ |= runner.quiet_environment()
    run = reports.new_run("engines", arguments.output)
    try:
        figures = _measure(plan, tests, run) | ({"also": also} if also else {})
    except BaseException as error:
        run.discard(keep_log=isinstance(error, EngineError))
        raise
    written = _write(figures, run.folder, arguments.page)
    if arguments.json:
        print_json(figures)
    else:
        print_text(view.report(figures))
    print(f"Written: {', '.join(map(str, written))}", file=sys.stderr)
    return 0


def _measure(plan: Any, tests: tuple[str, ...], run: Any) -> dict[str, Any]:
    """Engines are started, measured and stopped; what they print goes to a file."""
    from dataclasses import replace

    from vllm_trace import runner
    from vllm_trace.benchmark import arms, measure

    began, notes = time.monotonic(), []
    progress = Progress("starting vLLM")
    with runner.output_to(run.folder / "engine.log"), progress:
        device = _device()
        plan = replace(plan, dtype=plan.dtype or ("float32" if device == "cpu" else "float16"))
        small, note = _small_arms(plan, device)
        notes += note
        figures: dict[str, Any] = {"schema": 1, "about": {}}
        if set(tests) & {"throughput", "scaling"}:
            llm, version, _ = arms.start_vllm(plan)
            both = [*small, arms.VllmArm(llm, plan, version)]
            words = llm.llm_engine.model_config.get_vocab_size()
            if "throughput" in tests:
                progress.say("throughput")
                figures["throughput"] = measure.throughput(both, plan, words)
            if "scaling" in tests:
                progress.say("scaling")
                figures["scaling"] = measure.scaling(both, plan, words, progress.say)
            runner.stop_engine(llm)
        if "memory" in tests:
            progress.say("memory, with tracing on")
            try:
                figures["memory"] = _memory(plan, small, run.trace)
            except HookError as error:
                # A release without hooks has no trace to read; its speed was measured all the same.
                if len(tests) == 1:
                    raise
                notes.append(f"no memory test: {error}")
    figures["about"] = _about(plan, device, notes) | {"seconds": round(time.monotonic() - began, 1)}
    figures["about"]["date"] = run.date
    return figures


def _memory(plan: Any, small: list[Any], folder: Path) -> dict[str, Any]:
    """The memory test on an engine of its own, which is traced."""
    from vllm_trace import hooks, runner
    from vllm_trace.benchmark import arms, measure

    with _tracing(folder):
        llm, version, _ = arms.start_vllm(plan)
        words = llm.llm_engine.model_config.get_vocab_size()

        def close() -> Path:
            runner.stop_engine(llm)
            hooks.detach()
            return folder

        traced = arms.VllmArm(llm, plan, version)
        return measure.memory(traced, small[0] if small else None, plan, words, close)


def _device() -> str:
    from vllm_trace.benchmark import arms

    try:
        return arms.device()
    except ImportError as error:
        raise EngineError(
            f"bench needs a vLLM: it cannot be imported ({error})",
            hint="Try: make demo, or vllm-trace doctor; `vllm-trace memory` calculates without one",
        ) from error


def _small_arms(plan: Any, device: str) -> tuple[list[Any], list[str]]:
    """The two caches of the small engine, or a note on why there are none."""
    from vllm_trace import runner
    from vllm_trace.benchmark.arms import SmallArm

    folder = runner.model_folder(plan.model)
    try:
        return [SmallArm(kind, plan, folder, device) for kind in ("contiguous", "paged")], []
    except (ValueError, OSError) as error:
        return [], [f"no contiguous cache beside vLLM: {error}"]


@contextlib.contextmanager
def _tracing(folder: Path) -> Iterator[None]:
    """Engines made inside are traced."""
    from vllm_trace import hooks
    from vllm_trace.options import Options

    hooks.attach(Options(dir=str(folder)))
    try:
        yield
    finally:
        hooks.detach()


def _about(plan: Any, device: str, notes: list[str]) -> dict[str, Any]:
    """Command, versions, machine."""
    from dataclasses import asdict

    import torch
    import vllm

    from vllm_trace import __version__

    machine = f"{_processor()}, {os.cpu_count()} cores"
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    return {
        "command": shlex.join(["vllm-trace", *sys.argv[1:]]),
        "machine": f"{machine}, {platform.system()}, {_threads(torch.get_num_threads())}",
        "device": device,
        "versions": {
            "vllm_trace": __version__,
            "vLLM": vllm.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        "notes": notes,
    } | asdict(plan)


def _threads(number: int) -> str:
    return f"{number} thread{'' if number == 1 else 's'}"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _write(figures: dict[str, Any], folder: Path, page: Path | None) -> list[Path]:
    """JSON, plots, and the page when it is asked for."""
    from vllm_trace.benchmark import page as pages
    from vllm_trace.benchmark.plot import plot

    written = [folder / "bench.json", folder / "bench.png"]
    written[0].write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    try:
        plot(figures, written[1])
    except UsageError as error:
        say(f"no plots: {error}")
        written.pop()
    if page:
        written += [page, pages.write(figures, page)]
    return written
