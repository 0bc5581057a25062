"""Inputs for attention kernels and what they must give: random caches, shuffled tables, a dense fp32 reference.

The kernels' tests and `bench.kernels_grid` share it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_trace.mini.attention import to_kernel_layout
from vllm_trace.mini.attention.cache import to_stored

HEADS = {"MHA": (8, 8), "GQA": (8, 2), "GQA 6": (12, 2), "MQA": (8, 1)}


@dataclass(frozen=True)
class Case:
    """One batch. `lengths`: tokens of each sequence in the cache; `chunks`: how many of them are new, 1 if empty."""

    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    heads: tuple[int, int] = (8, 2)
    head_size: int = 64
    block_size: int = 16
    lengths: tuple[int, ...] = (0, 1, 15, 16, 17, 100)
    chunks: tuple[int, ...] = ()
    layout: str = "flash"
    alibi: bool = False
    sliding_window: int = 0
    softcap: float = 0.0
    per_head_scales: bool = False

    @property
    def stored(self) -> torch.dtype:
        return self.cache_dtype or self.dtype

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.dtype, self.stored)]
        extras = [name for name in ("alibi", "per_head_scales") if getattr(self, name)]
        extras += [f"window {self.sliding_window}"] * bool(self.sliding_window)
        extras += [f"softcap {self.softcap}"] * bool(self.softcap)
        parts = [*dict.fromkeys(names), f"{self.heads[0]}/{self.heads[1]} heads"]
        parts += [f"head {self.head_size}", f"block {self.block_size}", self.layout, *extras]
        return ", ".join(parts)


@dataclass
class Inputs:
    """What a kernel is called with, and the K and V that the caches stand for, `[tokens, kv heads, head size]`."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    scale: float
    k_scale: float | Tensor
    v_scale: float | Tensor
    query_start_loc: Tensor
    options: dict = field(default_factory=dict)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def decode(self, kernel, **more) -> Tensor:
        return kernel(
            self.query, self.key_cache, self.value_cache, self.block_tables, self.seq_lens,
            self.scale, self.k_scale, self.v_scale, **self.options, **more,
        )  # fmt: skip

    def prefill(self, kernel, **more) -> Tensor:
        return kernel(
            self.query, self.key_cache, self.value_cache, self.block_tables, self.query_start_loc,
            self.seq_lens, self.scale, self.k_scale, self.v_scale, **self.options, **more,
        )  # fmt: skip


def make(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Slots that no token owns hold NaN where the dtype has one: a wrong read spoils everything."""
    generator = torch.Generator(device=device).manual_seed(seed)
    num_heads, num_kv_heads = case.heads
    chunks = case.chunks or (1,) * len(case.lengths)
    num_blocks = [-(-length // case.block_size) for length in case.lengths]
    total = sum(num_blocks)
    ids = torch.randperm(2 * total + 2, device=device, generator=generator, dtype=torch.int64)
    tables = ids[-1].repeat(len(case.lengths), max(num_blocks, default=0) + 1)
    slots = []
    for row, (blocks, length) in enumerate(zip(ids[:total].split(num_blocks), case.lengths)):
        tables[row, : len(blocks)] = blocks
        position = torch.arange(length, device=device)
        slots.append(
            tables[row, position // case.block_size] * case.block_size + position % case.block_size
        )
    scales = (1.0, 1.0)
    if case.stored.itemsize == 1:
        # float8_e4m3fn ends at 448, float8_e5m2 at 57344, int8 at 127: use a good part of it.
        scales = (0.02, 0.04) if case.stored == torch.int8 else (0.01, 0.02)
    if case.per_head_scales:
        factors = torch.linspace(0.5, 1.5, num_kv_heads, device=device)
        scales = tuple(scale * factors for scale in scales)
    shape = (sum(case.lengths), num_kv_heads, case.head_size)
    new = [torch.randn(shape, device=device, generator=generator) for _ in range(2)]
    stored = [to_stored(tensor, case.stored, scale) for tensor, scale in zip(new, scales)]
    caches = []
    for tensor in stored:
        empty = torch.full((len(ids) * case.block_size, *shape[1:]), torch.nan, device=device)
        if case.stored == torch.int8:
            empty.fill_(101)
        cache = empty.to(case.stored)
        view = cache.view(torch.uint8) if case.stored.itemsize == 1 else cache
        view[torch.cat(slots)] = tensor.view(view.dtype)
        caches.append(cache.unflatten(0, (len(ids), case.block_size)))
    real = [
        tensor.float() * (scale.view(-1, 1) if isinstance(scale, Tensor) else scale)
        for tensor, scale in zip(stored, scales)
    ]
    order = {"heads": (0, 2, 1, 3), "planes": (2, 0, 1, 3)}.get(case.layout)
    if case.layout == "split":
        caches = to_kernel_layout(*caches)
    elif order:
        caches = [cache.permute(order).contiguous() for cache in caches]
    options = dict(layout=case.layout, sliding_window=case.sliding_window, softcap=case.softcap)
    if case.alibi:
        options["alibi_slopes"] = 2.0 ** -torch.linspace(1, 8, num_heads, device=device)
    query = torch.randn(
        (sum(chunks), num_heads, case.head_size), device=device, generator=generator
    )
    starts = torch.tensor([0, *chunks], device=device).cumsum(0)
    return Inputs(
        query.to(case.dtype), *caches, tables.int(), torch.tensor(case.lengths, device=device).int(),
        case.head_size**-0.5, *scales, starts.int(), options,
        *(list(tensor.split(case.lengths)) for tensor in real),
    )  # fmt: skip


def dense(inputs: Inputs, case: Case) -> Tensor:
    """Softmax attention over the K and V that the caches stand for, in fp32, written as it is in the books."""
    out = torch.zeros_like(inputs.query, dtype=torch.float32)
    starts = inputs.query_start_loc.tolist()
    for seq, length in enumerate(case.lengths):
        begin, end = starts[seq], starts[seq + 1]
        if not length:
            continue
        repeat = case.heads[0] // case.heads[1]
        key, value = (
            part[seq].repeat_interleave(repeat, 1) for part in (inputs.keys, inputs.values)
        )
        logits = torch.einsum("qhd,khd->hqk", inputs.query[begin:end].float(), key) * inputs.scale
        if case.softcap:
            logits = case.softcap * torch.tanh(logits / case.softcap)
        positions = torch.arange(length, device=key.device)
        distance = positions - positions[length - (end - begin) :, None]
        if case.alibi:
            logits = logits + inputs.options["alibi_slopes"][:, None, None] * distance
        hidden = distance > 0
        if case.sliding_window:
            hidden = hidden | (distance <= -case.sliding_window)
        weights = torch.softmax(logits.masked_fill(hidden, -torch.inf), -1)
        out[begin:end] = torch.einsum("hqk,khd->qhd", weights, value)
    return out


#: dtype of the arithmetic → how far the result may be from the reference: relative norm, largest difference.
TOLERANCE = {
    torch.float32: (2e-5, 1e-4),
    torch.float16: (2e-3, 1e-2),
    torch.bfloat16: (1e-2, 6e-2),
}


def errors(out: Tensor, reference: Tensor) -> tuple[float, float]:
    """Relative norm of the difference, and the largest one. Not-a-number stays what it is."""
    difference = out.float() - reference
    norm = reference.norm().clamp_min(1e-20)
    return float(difference.norm() / norm), float(difference.abs().max())
