"""The correctness grid: every kernel beside a dense fp32 reference, and beside vLLM's own ops where they are.

``python -m bench.kernels_grid [--quick] [-o FOLDER]`` on a machine with a GPU writes ``kernels-grid.md`` and ``.json``.
With TRITON_INTERPRET=1 on a CPU it runs small shapes (``--quick``). Exit code 1 when something is out of tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from bench.attention_cases import HEADS, TOLERANCE, Case, dense, errors, make
from bench.kernels_about import about

E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
STORED = (None, E4M3, INT8)
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 192, 256)
BLOCK_SIZES = (8, 16, 32, 64, 128, 256)
BENDS = (
    {},
    dict(alibi=True),
    dict(sliding_window=100),
    dict(softcap=20.0),
    dict(alibi=True, sliding_window=1000, softcap=5.0),
)


def lengths(block_size: int, quick: bool) -> tuple[int, ...]:
    """None, one, around a block's end, around a partition's end, around what V1 once could hold."""
    small = (0, 1, block_size - 1, block_size, block_size + 1)
    return small if quick else (*small, 511, 512, 513, 8192, 8193)


def cases(quick: bool) -> list[Case]:
    """Every dtype and cache with every other pair of head size and block size; heads and layouts take turns along them.

    Then every dtype and cache with every bend of the logits.
    """
    turns = itertools.cycle(
        itertools.product(HEADS.values(), ("flash", "split", "heads", "planes"))
    )
    made = []
    head_sizes, block_sizes = ((64, 80), (8, 32)) if quick else (HEAD_SIZES, BLOCK_SIZES)
    sizes = list(itertools.product(head_sizes, block_sizes))
    for at, (dtype, stored) in enumerate(itertools.product(DTYPES, STORED)):
        for head_size, block_size in sizes[at % 2 :: 2]:
            heads, layout = next(turns)
            made.append(
                Case(
                    dtype,
                    stored,
                    heads,
                    head_size,
                    block_size,
                    lengths(block_size, quick),
                    layout=layout,
                )
            )
    for dtype, stored, bend in itertools.product(DTYPES, STORED, BENDS):
        heads, layout = next(turns)
        made.append(Case(dtype, stored, heads, 64, 16, lengths(16, quick), layout=layout, **bend))
    for layout in ("flash", "split"):
        made.append(Case(torch.bfloat16, E5M2, (8, 2), 128, 16, lengths(16, quick), layout=layout))
        made.append(Case(torch.bfloat16, None, (32, 8), 128, 16, lengths(16, quick), layout=layout))
    return made


def run(case: Case, device: str) -> list[dict]:
    """One row for each kernel."""
    from vllm_trace.mini import attention, kernels

    inputs = make(case, device)
    reference = dense(inputs, case)
    longest = max(case.lengths)
    splits = kernels.Plan(16, chunk=13, warps=2)
    runs = {
        "V1": lambda: inputs.decode(kernels.paged_attention_v1),
        "V2 shares": lambda: inputs.decode(kernels.paged_attention_v2, max_seq_len=longest),
        "V2 splits": lambda: inputs.decode(
            kernels.paged_attention_v2, plan=splits, max_seq_len=longest
        ),
        "torch V1": lambda: inputs.decode(attention.paged_attention_v1),
    }
    found, rows = {}, []
    for name, call in runs.items():
        found[name] = _named(name, call)
        rows.append(row_of(case, name, found[name], reference))
    rows += vllm_rows(case, inputs, reference, found["V2 shares"])
    chunks = tuple(min(length, 40 + 3 * at) for at, length in enumerate(case.lengths))
    behind = replace(case, chunks=chunks)
    inputs = make(behind, device)
    out = _named(
        "prefill", lambda: inputs.prefill(kernels.context_attention_fwd, max_query_len=max(chunks))
    )
    return [*rows, row_of(case, "prefill", out, dense(inputs, behind))]


def _named(name: str, call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """The result, waited for, so that an error carries the kernel's name."""
    try:
        out = call()
        if out.is_cuda:
            torch.cuda.synchronize()
    except Exception as error:
        raise RuntimeError(f"{name}: {error}") from error
    return out


def row_of(case: Case, name: str, out: torch.Tensor, reference: torch.Tensor) -> dict:
    relative, largest = errors(out, reference)
    most_relative, most = TOLERANCE[case.dtype]
    if "vLLM" in name and case.stored == E4M3:
        most_relative, most = max(most_relative, 1e-3), max(most, 1e-2)  # it goes through fp16
    return dict(
        case=str(case), dtype=str(case.dtype).removeprefix("torch."), kernel=name,
        relative=relative, largest=largest, ok=relative <= most_relative and largest <= most,
    )  # fmt: skip


def vllm_rows(case: Case, inputs, reference, ours) -> list[dict]:
    """vLLM's own V1 and V2 on the same caches and tables, where they take the case."""
    takes = (
        case.layout == "split"
        and case.block_size in (8, 16, 32)
        and case.stored in (case.dtype, E4M3)
    )
    if not takes or case.softcap or case.sliding_window or inputs.query.device.type != "cuda":
        return []
    try:
        from vllm import _custom_ops as ops
    except ImportError:
        return []
    num_seqs, num_heads, head_size = inputs.query.shape
    longest = max(case.lengths)
    scales = [torch.tensor([scale], device="cuda") for scale in (inputs.k_scale, inputs.v_scale)]
    fp8 = case.stored == E4M3
    caches = [c.view(torch.uint8) if fp8 else c for c in (inputs.key_cache, inputs.value_cache)]
    common = (
        inputs.query, *caches, case.heads[1], inputs.scale, inputs.block_tables, inputs.seq_lens,
        case.block_size, longest, inputs.options.get("alibi_slopes"), "fp8" if fp8 else "auto", *scales,
    )  # fmt: skip
    parts = -(-longest // 512)
    sums = torch.empty(num_seqs, num_heads, parts, device="cuda")
    tmp = torch.empty(num_seqs, num_heads, parts, head_size, device="cuda", dtype=case.dtype)
    rows = []
    for name in ("V1", "V2"):
        out = torch.empty_like(inputs.query)
        if name == "V1":
            ops.paged_attention_v1(out, *common)
        else:
            ops.paged_attention_v2(out, sums, torch.empty_like(sums), tmp, *common)
        # An op of vLLM leaves what it likes for a sequence of no tokens.
        out[inputs.seq_lens == 0] = 0
        rows.append(row_of(case, f"vLLM {name}", out, reference))
        rows.append(row_of(case, f"V2 shares against vLLM {name}", ours, out.float()))
    return rows


def _run(job: tuple[Case, str]) -> list[dict]:
    case, device = job
    try:
        return run(case, device)
    except Exception as error:  # a case that cannot run is a failed one, with its reason
        text = f"{type(error).__name__}: {error}"[:300]
        return [
            dict(
                case=str(case), dtype="", kernel="", relative=0.0, largest=0.0, ok=False, error=text
            )
        ]


def summary(rows: list[dict]) -> list[tuple]:
    """(kernel, dtype, cases, worst relative, worst absolute, failed)."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["dtype"]), []).append(row)
    return [
        (kernel, dtype, len(group), max(row["relative"] for row in group),
         max(row["largest"] for row in group), sum(not row["ok"] for row in group))
        for (kernel, dtype), group in sorted(groups.items())
    ]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels_grid", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small shapes only, for the interpreter"
    )
    parser.add_argument("--processes", type=int, default=1, help="compile and run side by side")
    parser.add_argument("-o", "--output", type=Path, default=Path("reports/gpu"))
    asked = parser.parse_args()
    began = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = [(case, device) for case in cases(asked.quick)]
    spawn = multiprocessing.get_context("spawn")
    # A process that met an illegal access is of no use any more.
    with ProcessPoolExecutor(asked.processes, mp_context=spawn, max_tasks_per_child=1) as pool:
        rows = [row for found in pool.map(_run, jobs, chunksize=4) for row in found]
    facts = about(sys.argv, device) | {"seconds": round(time.monotonic() - began)}
    found = summary(rows)
    asked.output.mkdir(parents=True, exist_ok=True)
    report = markdown(facts, found, len(jobs), [row for row in rows if not row["ok"]])
    (asked.output / "kernels-grid.md").write_text(report)
    document = dict(schema=1, about=facts, cases=len(jobs), rows=rows)
    (asked.output / "kernels-grid.json").write_text(json.dumps(document) + "\n")
    print(report)
    return int(any(not row["ok"] for row in rows))


def markdown(facts: dict, found: list[tuple], num_cases: int, failed: list[dict]) -> str:
    tolerances = "; ".join(
        f"{str(dtype).removeprefix('torch.')} {relative:g} and {most:g}"
        for dtype, (relative, most) in TOLERANCE.items()
    )
    lines = [
        "# Attention kernels beside a dense fp32 reference",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        f"- Cases: {num_cases} batches, each with the lengths 0, 1, block - 1, block, block + 1, 511, 512, 513, 8192 "
        "and 8193 unless --quick; slots that nobody owns hold NaN",
        f"- Tolerances (relative norm and largest difference): {tolerances}",
        "",
        "| kernel | dtype | cases | worst relative | worst absolute | out of tolerance |",
        "|---|---|---|---|---|---|",
        *(f"| {k} | {d} | {n} | {r:.2e} | {a:.2e} | {bad} |" for k, d, n, r, a, bad in found),
        "",
    ]
    for row in failed[:40]:
        lines.append(
            f"- {row['kernel']}: {row['case']}: {row['relative']:.2e}, {row['largest']:.2e} {row.get('error', '')}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
