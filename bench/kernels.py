"""How fast the attention kernels are: ``python -m bench kernels [--profile] [--quick] [--json] [-o FOLDER]``.

With a GPU: decode beside vLLM's V1 and V2, FlashAttention 3 and Triton, all in one run. With vLLM's CPU build: the
torch form beside its kernel. Prints tables and writes ``kernels.md`` and ``.json``; what it cannot run it names.
``--profile`` prints the profiling checklist instead (throughputs, occupancy, bank conflicts, warp efficiency).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kernels_about import about

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "vLLM V1", "vLLM V2", "Triton 2D", "Triton 3D", "FA3", "FA3 planned",
    "ours V1", "ours V2 blind", "ours V2",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench kernels", description=__doc__)
    parser.add_argument("--profile", action="store_true", help="the profiling checklist")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "reports" / "bench")
    asked = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    facts = about(
        ["kernels.py", *(sys.argv[1:] if argv is None else argv)], "cuda" if gpu else "cpu"
    )
    facts["Command"] = facts["Command"].replace("bench.kernels", "bench kernels")

    def tell(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    if asked.profile:
        from bench import kernels_profile

        name, figures = "kernels-profile", kernels_profile.measure(tell)
        report = kernels_profile.markdown(facts, figures)
    else:
        name, figures = "kernels", measure(gpu, asked.quick, tell)
        report = markdown(facts, figures)
    name += "" if gpu else "-cpu"
    asked.output.mkdir(parents=True, exist_ok=True)
    document = dict(schema=1, about=facts, **figures)
    (asked.output / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (asked.output / f"{name}.md").write_text(report)
    print(json.dumps(document) if asked.json else report)
    tell(f"Written: {asked.output}/{name}.md and {name}.json")
    return 0


def measure(gpu: bool, quick: bool, tell: Any) -> dict[str, Any]:
    figures: dict[str, Any] = {"skipped": []}
    if gpu:
        from bench import kernels_gpu

        figures["gpu"] = kernels_gpu.measure(quick, tell)
        figures["skipped"] += figures["gpu"].pop("skipped")
        figures["summary"] = summary(figures["gpu"])
    else:
        figures["skipped"].append("the GPU's part: torch sees no CUDA device")
    from bench import kernels_cpu

    tell("CPU")
    figures["cpu"] = kernels_cpu.measure(5 if quick else 15)
    if reason := figures["cpu"].pop("skipped"):
        figures["skipped"].append(reason)
    return figures


def mean(ratios: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def summary(gpu: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(what, figure, target). A ratio above 1: ours is faster."""
    rows = gpu["rows"]

    def ratios(*others: str, name: str = "ours V2") -> list[float]:
        return [
            min(row["us"][other] for other in others) / row["us"][name]
            for row in rows
            if all(other in row["us"] for other in others)
        ]

    found = []
    for name in ("ours V2", "ours V2 blind"):
        for others, target in (
            (("vLLM V2",), "mean ≥ 2, aim 3.3"),
            (("FA3",), "mean ≥ 0.9, worst ≥ 0.8; aim 1.05, 1.0"),
            (("FA3 planned",), "none: its plan is made outside of what is timed"),
            (("Triton 2D", "Triton 3D"), "each ≥ 1.1, aim 1.3"),
        ):
            if values := ratios(*others, name=name):
                found.append(
                    (
                        f"{name} against {' or '.join(others)}",
                        f"mean {mean(values):.2f}×, worst {min(values):.2f}×",
                        target,
                    )
                )
    large = [row for row in rows if row["kv_bytes"] >= 512e6]
    shares = [
        row["kv_bytes"] / row["us"]["ours V2"] * 1e6 / gpu["copy_bytes_per_s"] for row in large
    ]
    text = f"{100 * min(shares):.0f} to {100 * max(shares):.0f} %, mean {100 * mean(shares):.0f} %"
    found.append(("share of the copy rate, K/V ≥ 512 MB", text, "≥ 85 %, aim 95 %"))
    if "FA3" in rows[0]["us"]:
        small = [
            row["us"]["FA3"] / row["us"]["ours V2"]
            for row in rows
            if row["num_seqs"] == 1 and row["context"] <= 1024
        ]
        found.append(
            (
                "one launch, batch 1, context 512 and 1024, against FA3",
                f"worst {min(small):.2f}×",
                "≥ 1, aim 1.5",
            )
        )
    return found


def markdown(facts: dict[str, str], figures: dict[str, Any]) -> str:
    lines = [
        "# How fast the attention kernels are",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    lines += [f"- Skipped: {reason}" for reason in figures["skipped"]]
    if "gpu" in figures:
        lines += _gpu_lines(figures)
    if rows := figures["cpu"]["rows"]:
        lines += ["", "## CPU, one thread, decode of 4 sequences, block size 32", ""]
        lines += [
            "| dtype | K/V | vLLM ms | floor ms | V1 ms | V2 ms | floor | V1 | V2 | target | difference |",
            "|---" * 11 + "|",
        ]
        for row in rows:
            ms, ratio = row["ms"], row["ratio"]
            target = "≥ 0.5×, aim 0.8×" if row["dtype"] == "float32" else "≥ 0.25×, aim 0.35×"
            lines.append(
                f"| {row['dtype']} | {row['kv_bytes'] / 1e6:.0f} MB "
                f"| {ms['vLLM']:.1f} | {ms['floor']:.1f} | {ms['V1']:.1f} | {ms['V2']:.1f} "
                f"| {ratio['floor']:.2f}× | {ratio['V1']:.2f}× | {ratio['V2']:.2f}× | {target} "
                f"| {row['differs']['V1']:.1e} |"
            )
        lines += [
            "",
            f"vLLM: `cpu_attention_with_kv_cache`, {rows[0]['isa']}. *Difference*: relative norm, V1 from vLLM's.",
            "*Floor*: the blocks of K and V copied side by side (and made float32) and the two products, nothing else.",
        ]
    return "\n".join(lines) + "\n"


def _gpu_lines(figures: dict[str, Any]) -> list[str]:
    gpu = figures["gpu"]
    rate = gpu["copy_bytes_per_s"]
    columns = [name for name in COLUMNS if name in gpu["rows"][0]["us"]]
    lines = [
        f"- Device-to-device copy: {rate / 1e12:.2f} TB/s, reading and writing counted",
        "",
        "## Decode, µs a call",
        "",
        "bf16, 32 query heads, 8 KV heads, head size 128, block size 16. CUDA-graph timing; every call has tables",
        "of its own, from all over 8 GiB, so that 600 MB or more are read before a block is read again.",
        "`of copy`: bytes of K and V, over the time of ours V2 and the copy rate. Ragged: log-normal, median 1200,",
        "sigma 1, at most 16384.",
        "",
        "| batch × context | " + " | ".join(columns) + " | cut | K/V MB | of copy |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for row in gpu["rows"]:
        times = " | ".join(f"{row['us'][name]:.1f}" for name in columns)
        share = row["kv_bytes"] / row["us"]["ours V2"] * 1e6 / rate
        lines.append(
            f"| {row['batch']} | {times} | {row['cut']} | {row['kv_bytes'] / 1e6:.0f} | {share:.2f} |"
        )
    lines += ["", "| what | figure | target |", "|---|---|---|"]
    lines += [f"| {what} | {figure} | {target} |" for what, figure, target in figures["summary"]]
    worst = max(max(row["differs"].values()) for row in gpu["rows"])
    lines += [
        "",
        "*ours V2* is told the lengths on the host, as vLLM's metadata has them (`seq_lens_cpu`), and cuts alike",
        "sequences alike; *ours V2 blind* knows the longest only. *FA3* plans in the call, as *ours* does;",
        "*FA3 planned* was given its scheduler metadata. A share of the copy rate above 1: reading alone is faster",
        "than reading and writing.",
        f"Worst relative difference of any from ours V1, vLLM's ops left out (see kernels-grid.md): {worst:.1e}.",
    ]
    return lines


if __name__ == "__main__":
    sys.exit(main())
