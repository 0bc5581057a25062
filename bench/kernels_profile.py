"""The deep dive's profiling checklist for our kernels: ``python -m bench kernels --profile``.

Where Nsight Compute is, its counters (in a process of their own, `python -m bench.kernels_profile KERNEL`, clocks left
alone). Where it is not, or where it fails: what can be derived from time, bytes, operations and the compiled kernel,
labelled so; bank conflicts and warp efficiency cannot.
"""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

BATCH = (128, 4096)  # sequences, context: the largest of the speed table
KERNELS = ("V1", "V2 whole", "V2 splits", "V2 shares")
#: what → (target, how Nsight Compute's counters give it)
CHECKLIST = {
    "memory throughput": "> 80 %",
    "compute throughput": "> 60 %",
    "occupancy": "> 50 %",
    "shared-memory conflicts": "< 5 %",
    "warp efficiency": "> 90 %",
}
COUNTERS = {
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory throughput",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute throughput",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "conflicts",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum": "wavefronts",
    "smsp__thread_inst_executed_per_inst_executed.ratio": "threads",
}


def runs() -> tuple[dict[str, Callable], Any]:
    """The kernels, each as one call on a batch that reads 2 GB of K and V."""
    from bench import kernels_gpu
    from vllm_trace.mini import kernels

    num_blocks = (
        kernels_gpu.POOL_BYTES // (kernels_gpu.BLOCK_SIZE * kernels_gpu.BYTES_PER_TOKEN) // 2
    )
    shape = (2, num_blocks, kernels_gpu.BLOCK_SIZE, kernels_gpu.NUM_KV_HEADS, kernels_gpu.HEAD_SIZE)
    caches = tuple(torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_())
    batch = kernels_gpu.make_batch(*BATCH, num_blocks)
    query, table = batch.sets[0]
    common = (query, *caches, table, batch.seq_lens, kernels_gpu.SCALE)
    plans = {
        "V2 whole": None,
        "V2 splits": kernels.Plan(64, chunk=16, warps=2),
        "V2 shares": kernels.v2_plan(
            BATCH[0], kernels_gpu.NUM_KV_HEADS, BATCH[1], kernels_gpu.HEAD_SIZE
        ),
    }
    found: dict[str, Callable] = {"V1": lambda: kernels.paged_attention_v1(*common)}
    for name, plan in plans.items():
        found[name] = lambda plan=plan: kernels.paged_attention_v2(
            *common, max_seq_len=BATCH[1], seq_lens_cpu=batch.lengths, plan=plan
        )
    return found, batch


def measure(tell: Callable[[str], None]) -> dict[str, Any]:
    """One row for each kernel and entry of the checklist; `skipped` says what could not be had."""
    if not torch.cuda.is_available():
        return dict(rows=[], skipped=["the profiling checklist: torch sees no CUDA device"])
    rows, skipped = [], []
    ncu = shutil.which("ncu")
    if not ncu:
        skipped.append("Nsight Compute (ncu) is not there: what can be derived stands below")
    derived = derive(tell)
    for name in KERNELS:
        counted: dict[str, float] = {}
        if ncu:
            tell(f"ncu {name}")
            counted, reason = counters(ncu, name)
            if reason:
                skipped.append(f"ncu, {name}: {reason}")
        for what, target in CHECKLIST.items():
            if what in counted:
                rows.append(
                    dict(kernel=name, what=what, percent=counted[what], source="ncu", target=target)
                )
            elif what in derived[name]:
                rows.append(dict(kernel=name, what=what, **derived[name][what], target=target))
            else:
                rows.append(
                    dict(kernel=name, what=what, percent=None, source="needs ncu", target=target)
                )
    return dict(rows=rows, skipped=skipped)


def derive(tell: Callable[[str], None]) -> dict[str, dict[str, dict]]:
    """Throughputs from times, occupancy from what a program takes of a multiprocessor."""
    from bench import kernels_gpu

    found, batch = runs()
    rate, matmul = kernels_gpu.copy_rate(), _matmul_rate()
    # Four query heads a KV head are padded to a dot of sixteen rows: that is what the tensor cores do.
    operations = 2 * 2 * 16 * kernels_gpu.NUM_KV_HEADS * kernels_gpu.HEAD_SIZE * sum(batch.lengths)
    derived = {}
    for name, run in found.items():
        tell(f"timing {name}")
        seconds = (
            kernels_gpu.time_us(lambda query, table, run=run: run(), batch.sets[:1], rounds=3)
            * 1e-6
        )
        derived[name] = {
            "memory throughput": dict(
                percent=100 * batch.num_bytes / seconds / rate,
                source="derived: K/V bytes, of the copy rate",
            ),
            "compute throughput": dict(
                percent=100 * operations / seconds / matmul,
                source="derived: dots, of a large matmul's rate",
            ),
        }
    return derived


def _matmul_rate() -> float:
    """Operations a second of a large bf16 product."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(8):
        begin.record()
        a @ a
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return 2 * 8192**3 / sorted(times)[4]


def counters(ncu: str, name: str) -> tuple[dict[str, float], str | None]:
    """The checklist's entries of one kernel in percent, or why there are none."""
    watched = [
        "--kernel-name",
        "regex:paged_attention",
        "--launch-skip",
        "2",
        "--launch-count",
        "1",
    ]
    counted = ["--clock-control", "none", "--csv", "--metrics", ",".join(COUNTERS)]
    command = [ncu, *counted, *watched, sys.executable, "-m", "bench.kernels_profile", name]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {}, "took more than two minutes"
    found = {}
    table = result.stdout[result.stdout.find('"ID"') :]
    for row in csv.DictReader(io.StringIO(table)):
        if row.get("Metric Name") in COUNTERS:
            found[COUNTERS[row["Metric Name"]]] = float(row["Metric Value"].replace(",", ""))
    if not found:
        return {}, (result.stdout + result.stderr).strip()[
            -200:
        ] or f"exit code {result.returncode}"
    if found.get("wavefronts"):
        found["shared-memory conflicts"] = 100 * found["conflicts"] / found["wavefronts"]
    if "threads" in found:
        found["warp efficiency"] = 100 * found["threads"] / 32
    return found, None


def markdown(facts: dict[str, str], figures: dict[str, Any]) -> str:
    lines = [
        "# The profiling checklist",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    lines += [f"- Skipped: {reason}" for reason in figures["skipped"]]
    if figures["rows"]:
        lines += [
            f"- Batch: {BATCH[0]} sequences of {BATCH[1]} tokens, bf16, 32/8 heads, head size 128, block size 16",
            "", "| kernel | what | figure | target | from |", "|---|---|---|---|---|",
        ]  # fmt: skip
    for row in figures["rows"]:
        figure = "–" if row["percent"] is None else f"{row['percent']:.1f} %"
        lines.append(
            f"| {row['kernel']} | {row['what']} | {figure} | {row['target']} | {row['source']} |"
        )
    if figures["rows"]:
        lines += [
            "",
            "Decode reads every byte of K and V for a few operations: memory is what it can fill, and a compute",
            "throughput of 60 % would mean that something is computed in vain.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":  # what ncu watches
    chosen = runs()[0][sys.argv[1]]
    for _ in range(4):
        chosen()
    torch.cuda.synchronize()
