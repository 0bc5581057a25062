"""Decode attention on a CPU: the torch form beside the installed vLLM's kernel, on one thread, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from vllm_trace.mini import attention
from vllm_trace.mini.attention.decode import WALK
from vllm_trace.mini.attention.layouts import Reader

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, BLOCK_SIZE, NUM_SEQS = 32, 8, 128, 32, 4
KV_BYTES = 64 << 20


def measure(rounds: int = 15) -> dict[str, Any]:
    """Figures for fp32 and bf16; `skipped` says why there are none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        import vllm._C  # noqa: F401
        from vllm import _custom_ops as ops
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        torch.ops._C.cpu_attention_with_kv_cache  # noqa: B018 (raises when the op is not there)
    except (ImportError, AttributeError) as error:
        return dict(rows=[], skipped=f"the CPU's part: this vLLM has no CPU attention op ({error})")
    finally:
        torch.set_num_threads(threads)
    torch.set_num_threads(1)
    rows = [_row(dtype, rounds, ops, _get_attn_isa) for dtype in (torch.float32, torch.bfloat16)]
    torch.set_num_threads(threads)
    return dict(rows=rows, skipped=None)


@torch.inference_mode()  # as vLLM's engine runs it
def _row(dtype: torch.dtype, rounds: int, ops: Any, isa_of: Callable) -> dict[str, Any]:
    per_token = 2 * NUM_KV_HEADS * HEAD_SIZE * dtype.itemsize
    length = KV_BYTES // per_token // NUM_SEQS
    blocks = length // BLOCK_SIZE
    # vLLM 0.32's storage on CPUs: a block's K rows of a head, then its V rows.
    storage = torch.randn(NUM_SEQS * blocks, NUM_KV_HEADS, 2, BLOCK_SIZE, HEAD_SIZE).to(dtype)
    joined = storage.flatten(2, 3)
    key_cache, value_cache = joined[:, :, :BLOCK_SIZE], joined[:, :, BLOCK_SIZE:]
    tables = torch.randperm(NUM_SEQS * blocks).view(NUM_SEQS, blocks).int()
    seq_lens = torch.full((NUM_SEQS,), length, dtype=torch.int32)
    starts = torch.arange(NUM_SEQS + 1, dtype=torch.int32)
    isa = isa_of(dtype, BLOCK_SIZE, HEAD_SIZE)
    # The op reads K as it packs it itself, so it also writes it: what it computes can be compared.
    keys, values = (
        torch.randn(NUM_SEQS * length, NUM_KV_HEADS, HEAD_SIZE).to(dtype) for _ in range(2)
    )
    positions = torch.arange(length)
    slots = (
        (tables[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).flatten().long()
    )
    ops.cpu_attn_reshape_and_cache(keys, values, key_cache, value_cache, slots, isa)
    own = [
        torch.empty(NUM_SEQS * blocks, BLOCK_SIZE, NUM_KV_HEADS, HEAD_SIZE, dtype=dtype)
        for _ in range(2)
    ]
    attention.reshape_and_cache(keys, values, *own, slots)
    query = torch.randn(NUM_SEQS, NUM_HEADS, HEAD_SIZE).to(dtype)
    out = torch.empty_like(query)
    scale = HEAD_SIZE**-0.5
    metadata = ops.cpu_attn_get_scheduler_metadata(
        NUM_SEQS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, seq_lens, dtype, starts, True, -1, isa, True
    )

    def theirs() -> torch.Tensor:
        ops.cpu_attention_with_kv_cache(
            query, key_cache, value_cache, out, starts, seq_lens, scale, True, None, -1, tables, 0.0, metadata, None
        )  # fmt: skip
        return out

    rows = query.float().view(NUM_SEQS, NUM_KV_HEADS, -1, HEAD_SIZE)
    weights = torch.rand(NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, WALK)

    def floor() -> torch.Tensor:
        """What a form in plain torch cannot do without: the pages side by side, and two products."""
        reader = Reader(*own, 1.0, 1.0, "flash")
        for seq in range(NUM_SEQS):
            for start in range(0, length, WALK):
                part = tables[seq], start, min(start + WALK, length)
                torch.bmm(rows[seq], reader.keys(*part).permute(1, 2, 0))
                torch.bmm(weights[..., : part[2] - start], reader.values(*part).transpose(0, 1))
        return query

    runs = {
        "vLLM": theirs,
        "floor": floor,
        "V1": lambda: attention.paged_attention_v1(query, *own, tables, seq_lens, scale),
        "V2": lambda: attention.paged_attention_v2(query, *own, tables, seq_lens, scale),
    }
    results = {name: run().float().clone() for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):  # side by side, so that a disturbance meets all
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin)
    median = {name: sorted(found)[rounds // 2] * 1e3 for name, found in times.items()}
    return dict(
        dtype=str(dtype).removeprefix("torch."), isa=isa, kv_bytes=storage.nbytes, tokens=length, ms=median,
        ratio={name: median["vLLM"] / median[name] for name in ("floor", "V1", "V2")},
        differs={
            name: float((results[name] - results["vLLM"]).norm() / results["vLLM"].norm())
            for name in ("V1", "V2")
        },
    )  # fmt: skip
