"""The shadow: every attention call of the engine a second time by our kernels, on the same cache and tables.

Not for speed: the batch is copied to the host, which on a GPU waits for the stream. The first call whose error is
beyond the tolerance, or that reads a NaN or an infinity, is kept with its table and slots and saved;
``replay --attention`` computes it again without vLLM.

Leaves out: encoder layers and cross attention (no paged cache), backends whose cache layout is not known, attention
sinks. Such a call counts as a failed probe and is not counted as compared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_trace.backend.case import AttentionCase, RowError, of_rows
from vllm_trace.backend.engine_cache import block_size_of, blocks_of


@dataclass
class Found:
    """What the shadow says of one call."""

    tolerance: float
    rows: list[RowError]
    beyond: dict[str, Any] = field(default_factory=dict)
    """The first call of this process that is beyond, told once."""


class Shadow:
    """Called by the attention probes of one process."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / f"attention-{os.getpid()}.safetensors"
        self.told = False

    def __call__(
        self, impl: Any, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any, output: Tensor
    ) -> Found:
        """Compute the call again. Raises: NotImplementedError for what the docstring above leaves out."""
        case = case_of(impl, layer, query, kv_cache, metadata, output)
        ours = type(impl).__module__.startswith("vllm_trace.")
        rows = case.errors(case.reference(dense=ours))
        found = Found(case.tolerance, rows)
        if not self.told:
            self._judge(case, found)
        return found

    def _judge(self, case: AttentionCase, found: Found) -> None:
        bad = case.first_not_finite()
        worst = max(found.rows, key=lambda row: row.relative, default=None)
        if worst is None or (bad is None and worst.relative <= found.tolerance):
            return
        self.told = True
        row = bad.row if bad is not None else worst.row
        error = found.rows[row]
        begin, end = case.query_start_loc[row], case.query_start_loc[row + 1]
        found.beyond = {
            "row": row,
            "position": bad.position if bad is not None else error.position,
            "absolute": error.absolute,
            "relative": error.relative,
            "tolerance": found.tolerance,
            "table": case.table_of(row),
            "slots": case.slots[begin:end].tolist(),
            "seq_len": case.seq_lens[row],
            "not_finite": bad._asdict() if bad is not None else {},
            "file": self.path.name,
        }
        case.about |= {"beyond": found.beyond}
        of_rows(case, [row]).save(self.path)


def case_of(
    impl: Any, layer: Any, query: Tensor, kv_cache: Tensor, metadata: Any, output: Tensor
) -> AttentionCase:
    """The call as a case on the host, with the blocks that its tables name."""
    if getattr(impl, "sinks", None) is not None or not bool(getattr(metadata, "causal", True)):
        raise NotImplementedError("the shadow knows no attention sinks and only causal attention")
    num_tokens = metadata.num_actual_tokens
    starts = metadata.query_start_loc.cpu().tolist()
    num_rows = next((i for i, start in enumerate(starts) if start >= num_tokens), len(starts) - 1)
    lens = metadata.seq_lens[:num_rows].cpu().tolist()
    size = block_size_of(impl, kv_cache)
    width = max((-(-n // size) for n in lens), default=0)
    engine_table = metadata.block_table[:num_rows, :width].cpu().long()
    held = torch.arange(width)[None, :] < torch.tensor([-(-n // size) for n in lens])[:, None]
    ids = engine_table[held].unique()
    places = torch.searchsorted(ids, engine_table.contiguous()).clamp(max=max(len(ids) - 1, 0))
    keys, values = blocks_of(impl, layer, kv_cache, ids)
    slots = getattr(metadata, "slot_mapping", None)
    alibi = getattr(impl, "alibi_slopes", None)
    shape = getattr(impl, "shape", None)
    return AttentionCase(
        query=query[:num_tokens].detach().cpu(),
        output=output[:num_tokens].detach().cpu().view(query[:num_tokens].shape),
        key_blocks=keys,
        value_blocks=values,
        block_ids=ids,
        table=places.masked_fill(~held, -1),
        seq_lens=lens,
        query_start_loc=starts[: num_rows + 1],
        slots=slots[:num_tokens].cpu().long() if slots is not None else torch.empty(0).long(),
        scale=float(impl.scale),
        sliding_window=shape.sliding_window if shape else _window(impl),
        softcap=float((shape.softcap if shape else impl.logits_soft_cap) or 0),
        alibi_slopes=shape.alibi_slopes if shape else (alibi.cpu() if alibi is not None else None),
        k_scale=float(getattr(layer, "_k_scale_float", 1.0)),
        v_scale=float(getattr(layer, "_v_scale_float", 1.0)),
        about={"kernel": type(impl).__name__, "layer": getattr(layer, "layer_name", "")},
    )


def _window(impl: Any) -> int:
    """Tokens that one sees; 0 for all. The CPU keeps this number or -1, the others (tokens before, tokens after)."""
    window = impl.sliding_window
    if isinstance(window, tuple | list):
        return window[0] + 1 if window[0] >= 0 else 0
    return max(int(window or 0), 0)
