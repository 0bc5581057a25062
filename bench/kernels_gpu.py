"""Decode attention on a GPU: ours beside vLLM's V1 and V2, FlashAttention 3 and Triton's unified attention.

All in one run, on the same K and V: bf16, 32 query heads, 8 KV heads, head size 128, block size 16, block tables drawn
from all over a pool of 8 GiB. A CUDA graph holds one call after the other, each with tables and queries of its own,
until 600 MB of K and V are read, ten times the L2; a figure is the median of the replays, divided by the calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_trace.mini import kernels

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE = 32, 8, 128, 16
SCALE = HEAD_SIZE**-0.5
BYTES_PER_TOKEN = 2 * NUM_KV_HEADS * HEAD_SIZE * 2
SHAPES = [
    (1, 512), (1, 1024), (1, 4096), (1, 32768), (8, 2048), (32, 1024), (32, 4096), (128, 1024),
    (128, 4096), (256, 2048),
]  # fmt: skip
RAGGED = (64, 256)
POOL_BYTES = 8 << 30
READ_BYTES = 600 << 20

Run = Callable[[Tensor, Tensor], Any]


@dataclass
class Batch:
    """Lengths, and as many sets of queries and tables as it takes to leave the L2."""

    name: str
    lengths: list[int]
    seq_lens: Tensor
    sets: list[tuple[Tensor, Tensor]]

    @property
    def num_bytes(self) -> int:
        return sum(self.lengths) * BYTES_PER_TOKEN


def lengths_of(num_seqs: int, context: int | None) -> list[int]:
    """All alike, or log-normal around 1200 tokens with sigma 1, 16384 at most."""
    if context is not None:
        return [context] * num_seqs
    generator = torch.Generator().manual_seed(num_seqs)
    drawn = torch.exp(torch.randn(num_seqs, generator=generator) + math.log(1200))
    return drawn.long().clamp(1, 16384).tolist()


def make_batch(num_seqs: int, context: int | None, num_blocks: int) -> Batch:
    lengths = lengths_of(num_seqs, context)
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    num_sets = min(
        -(-READ_BYTES // (sum(lengths) * BYTES_PER_TOKEN)), num_blocks // sum(blocks), 400
    )
    ids = torch.randperm(num_blocks, dtype=torch.int32)
    sets = []
    for at in range(num_sets):
        own = ids[at * sum(blocks) : (at + 1) * sum(blocks)].split(blocks)
        table = torch.zeros(num_seqs, max(blocks), dtype=torch.int32)
        for row, row_ids in zip(table, own):
            row[: len(row_ids)] = row_ids
        query = torch.randn(num_seqs, NUM_HEADS, HEAD_SIZE, device="cuda", dtype=torch.bfloat16)
        sets.append((query, table.cuda()))
    name = f"{num_seqs} × {context}" if context else f"{num_seqs} ragged"
    return Batch(name, lengths, torch.tensor(lengths, dtype=torch.int32, device="cuda"), sets)


def time_us(run: Run, sets: list[tuple[Tensor, Tensor]], rounds: int = 7, ms: float = 10) -> float:
    """Median time of a call, from replays of a graph that holds one for each set, as `do_bench_cudagraph` does."""
    stream = torch.cuda.Stream()
    repeats = max(1, 8 // len(sets))
    with torch.cuda.stream(stream):
        for inputs in sets[:2]:
            run(*inputs)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(repeats):
                for inputs in sets:
                    run(*inputs)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        times, replays = [], 1
        for _ in range(rounds + 2):  # two to warm up and to learn how long one is
            begin.record()
            for _ in range(replays):
                graph.replay()
            end.record()
            stream.synchronize()
            times.append(begin.elapsed_time(end) / replays)
            replays = max(1, int(ms / times[-1]))
    return sorted(times[2:])[rounds // 2] * 1e3 / repeats / len(sets)


def copy_rate() -> float:
    """Bytes a second of a device-to-device copy of 4 GiB, reading and writing both counted."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(10):
        begin.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * source.nbytes / (sorted(times)[5] * 1e-3)


class Comparators:
    """What the installed vLLM has to compare with; what is missing stands in `skipped` with its reason."""

    def __init__(self) -> None:
        self.skipped: list[str] = []
        self.ops = self.flash = self.unified = None
        try:
            from vllm import _custom_ops

            torch.ops._C.paged_attention_v2  # noqa: B018 (raises when the op is not there)
            self.ops = _custom_ops
        except (ImportError, AttributeError) as error:
            self.skipped.append(f"vLLM V1 and V2: {error}")
        try:
            from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

            self.flash, self.schedule = flash_attn_varlen_func, get_scheduler_metadata
        except ImportError as error:
            self.skipped.append(f"FlashAttention 3: {error}")
        try:
            from vllm.v1.attention.ops.triton_unified_attention import unified_attention

            self.unified = unified_attention
        except ImportError as error:
            self.skipped.append(f"Triton unified attention: {error}")

    def of(self, batch: Batch, caches: tuple, split: tuple, out: Tensor) -> dict[str, Run]:
        found: dict[str, Run] = {}
        if self.ops:
            found |= self._vllm(batch, split, out)
        if self.flash:
            found |= self._flash(batch, caches, out)
        if self.unified:
            found |= self._triton(batch, caches, out)
        return found

    def _vllm(self, batch: Batch, split: tuple, out: Tensor) -> dict[str, Run]:
        num_seqs, longest = len(batch.lengths), max(batch.lengths)
        one = torch.ones(1, device="cuda")
        sums = torch.empty(num_seqs, NUM_HEADS, -(-longest // 512), device="cuda")
        maxima, tmp = (
            torch.empty_like(sums),
            torch.empty(*sums.shape, HEAD_SIZE, device="cuda", dtype=out.dtype),
        )

        def rest(table: Tensor) -> tuple:
            return (
                NUM_KV_HEADS,
                SCALE,
                table,
                batch.seq_lens,
                BLOCK_SIZE,
                longest,
                None,
                "auto",
                one,
                one,
            )

        def v1(query: Tensor, table: Tensor) -> None:
            self.ops.paged_attention_v1(out, query, *split, *rest(table))

        def v2(query: Tensor, table: Tensor) -> None:
            self.ops.paged_attention_v2(out, sums, maxima, tmp, query, *split, *rest(table))

        return {"vLLM V1": v1, "vLLM V2": v2}

    def _flash(self, batch: Batch, caches: tuple, out: Tensor) -> dict[str, Run]:
        num_seqs, longest = len(batch.lengths), max(batch.lengths)
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda")
        planned = self.schedule(
            num_seqs, 1, longest, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, batch.seq_lens, out.dtype,
            cu_seqlens_q=starts, page_size=BLOCK_SIZE, causal=True,
        )  # fmt: skip

        def run(query: Tensor, table: Tensor, metadata: Tensor | None = None) -> None:
            self.flash(
                query, *caches, 1, starts, longest, seqused_k=batch.seq_lens, softmax_scale=SCALE,
                causal=True, block_table=table, out=out, fa_version=3, scheduler_metadata=metadata,
            )  # fmt: skip

        return {"FA3": run, "FA3 planned": lambda query, table: run(query, table, planned)}

    def _triton(self, batch: Batch, caches: tuple, out: Tensor) -> dict[str, Run]:
        num_seqs, longest = len(batch.lengths), max(batch.lengths)
        starts = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda")
        parts = torch.empty(num_seqs, NUM_HEADS, 16, HEAD_SIZE, device="cuda")
        maxima, sums = (torch.empty(num_seqs, NUM_HEADS, 16, device="cuda") for _ in range(2))

        def run(query: Tensor, table: Tensor, threshold: int) -> None:
            self.unified(
                query, *caches, out, starts, 1, batch.seq_lens, longest, SCALE, True, (-1, -1), table, 0.0,
                None, None, None, seq_threshold_3D=threshold, num_par_softmax_segments=16,
                softmax_segm_output=parts, softmax_segm_max=maxima, softmax_segm_expsum=sums,
            )  # fmt: skip

        return {
            "Triton 2D": lambda query, table: run(query, table, 0),
            "Triton 3D": lambda query, table: run(query, table, 1 << 20),
        }


def ours(batch: Batch, caches: tuple, out: Tensor) -> dict[str, Run]:
    """V1; V2 as an engine calls it that knows the lengths on the host; V2 without knowing them."""
    longest = max(batch.lengths)

    def run(kernel: Callable, **known: Any) -> Run:
        def call(query: Tensor, table: Tensor) -> None:
            kernel(
                query, *caches, table, batch.seq_lens, SCALE, max_seq_len=longest, out=out, **known
            )

        return call

    return {
        "ours V1": run(kernels.paged_attention_v1),
        "ours V2": run(kernels.paged_attention_v2, seq_lens_cpu=batch.lengths),
        "ours V2 blind": run(kernels.paged_attention_v2),
    }


def measure(quick: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """All figures, as plain values. Every kernel's output is compared with ours before it is timed."""
    comparators = Comparators()
    rate = copy_rate()
    num_blocks = POOL_BYTES // (BLOCK_SIZE * BYTES_PER_TOKEN)
    pool = torch.empty(
        2, num_blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE, dtype=torch.bfloat16, device="cuda"
    )
    caches = tuple(pool.normal_())
    # vLLM's layout of the same bytes: other numbers, so times compare and results do not (`kernels_grid` does that).
    split = (
        caches[0].view(num_blocks, NUM_KV_HEADS, HEAD_SIZE // 8, BLOCK_SIZE, 8),
        caches[1].view(num_blocks, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE),
    )
    rows = []
    for num_seqs, context in [*SHAPES, *((num_seqs, None) for num_seqs in RAGGED)]:
        batch = make_batch(num_seqs, context, num_blocks)
        tell(batch.name)
        out = torch.empty_like(batch.sets[0][0])
        runs = ours(batch, caches, out) | comparators.of(batch, caches, split, out)
        agrees = _agreement(runs, batch, out)
        times = {name: time_us(run, batch.sets, 3 if quick else 7) for name, run in runs.items()}
        plan = kernels.v2_plan(
            num_seqs, NUM_KV_HEADS, max(batch.lengths), HEAD_SIZE, 2, "cuda", batch.lengths
        )
        rows.append(
            dict(
                batch=batch.name, num_seqs=num_seqs, context=context, kv_bytes=batch.num_bytes,
                sets=len(batch.sets), us=times, cut=plan.cut, plan=str(plan), differs=agrees,
            )
        )  # fmt: skip
    return dict(copy_bytes_per_s=rate, rows=rows, skipped=comparators.skipped)


def _agreement(runs: dict[str, Run], batch: Batch, out: Tensor) -> dict[str, float]:
    """Relative norm of each kernel's difference from our V1, on the first set."""
    found, reference = {}, None
    for name, run in runs.items():
        if name.startswith("vLLM"):
            continue  # reads another layout
        out.fill_(float("nan"))
        run(*batch.sets[0])
        result = out.float()
        reference = result if reference is None else reference
        found[name] = float((result - reference).norm() / reference.norm())
    return found
