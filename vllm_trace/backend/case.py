"""One attention call as a case that can be computed again: inputs, what came out, and the file that holds both.

The blocks that the tables name are cut out of the cache and renumbered, so a case is as large as its contexts; the
block ids as the engine had them are kept beside. Files are safetensors: no code is in them and none is run.

Leaves out: keys and values that the call did not read.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_trace.errors import TraceError
from vllm_trace.mini import attention

TOLERANCE = {"float32": 2e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
"""Largest error by the dtype of the computation, as a share of the largest value that was read.

An output is a weighted mean of values, so rounding moves it by a few units in the last place of the largest one: four
for the half types (their weights and the sum are rounded: 2**-11 and 2**-8 each), and for float32, whose kernels use
approximate exponentials and sum thousands of terms, 2e-5. The reference is float32 throughout, over the same stored
keys and values.
"""

FLOAT8_TOLERANCE = 0.12
"""Of kernels that, with an 8-bit cache, also round queries and weights to 8 bits (2**-4 each)."""

ROUND_QUERIES = ("FlashAttentionImpl",)
"""Which those are; the others compute in the model's own dtype."""

VERSION = 1


class RowError(NamedTuple):
    """How far one row's output is from the reference."""

    row: int
    absolute: float
    relative: float
    """To the largest value that the row reads."""
    position: int
    """Of the token where it is largest."""


class NotFinite(NamedTuple):
    """A key or value that is NaN or infinite."""

    what: str
    """``K`` or ``V``."""
    row: int
    position: int
    block: int
    slot: int
    value: str


@dataclass
class AttentionCase:
    """One call.

    Shapes: ``query, output [num_tokens, num_heads, head_size]`` · ``key_blocks, value_blocks [num_used, block_size,
    num_kv_heads, head_size]`` · ``block_ids [num_used]`` as the engine numbers them · ``table [num_rows, max]`` of
    places in ``block_ids``, -1 behind a row's end.
    """

    query: Tensor
    output: Tensor
    key_blocks: Tensor
    value_blocks: Tensor
    block_ids: Tensor
    table: Tensor
    seq_lens: list[int]
    query_start_loc: list[int]
    slots: Tensor
    scale: float
    sliding_window: int = 0
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    about: dict[str, Any] = field(default_factory=dict)
    """Kernel, layer, row, error, versions: what is printed of it."""

    @property
    def num_rows(self) -> int:
        return len(self.seq_lens)

    @property
    def block_size(self) -> int:
        return self.key_blocks.shape[1]

    @property
    def dtype(self) -> str:
        return str(self.output.dtype).removeprefix("torch.")

    @property
    def tolerance(self) -> float:
        if self.key_blocks.element_size() == 1 and self.about.get("kernel") in ROUND_QUERIES:
            return FLOAT8_TOLERANCE
        return TOLERANCE.get(self.dtype, TOLERANCE["bfloat16"])

    def table_of(self, row: int) -> list[int]:
        """The row's block ids as the engine numbers them."""
        places = self.table[row, : -(-self.seq_lens[row] // self.block_size)]
        return self.block_ids[places].tolist()

    # The computation -------------------------------------------------------------------------------------------

    def reference(self, *, dense: bool = False) -> Tensor:
        """The same call by our kernels in float32: V1 or V2 by the rule for rows of one token, prefill for the rest.

        ``dense``: all rows by the prefill form, which has no partitions and no rule; for judging those two.
        """
        made = torch.empty(self.output.shape, dtype=torch.float32)
        query, table = self.query.float(), self.table.clamp(min=0)
        lens, starts = torch.tensor(self.seq_lens), torch.tensor(self.query_start_loc)
        extras: dict[str, Any] = {"sliding_window": self.sliding_window, "softcap": self.softcap}
        extras |= {"alibi_slopes": self.alibi_slopes}
        extras = {name: value for name, value in extras.items() if value is not None and value != 0}
        common = (self.scale, self.k_scale, self.v_scale)
        single = (starts[1:] - starts[:-1] == 1) & (not dense)
        decode = single.nonzero()[:, 0]
        if len(decode):
            at = starts[:-1][decode]
            made[at] = attention.forward_decode(
                query[at], self.key_blocks, self.value_blocks, table[decode], lens[decode],
                *common, **extras,
            )  # fmt: skip
        for row in (~single).nonzero()[:, 0].tolist():
            begin, end = self.query_start_loc[row], self.query_start_loc[row + 1]
            made[begin:end] = attention.context_attention_fwd(
                query[begin:end], self.key_blocks, self.value_blocks, table[row : row + 1],
                torch.tensor([0, end - begin]), lens[row : row + 1], *common, **extras,
            )  # fmt: skip
        return made

    def errors(self, reference: Tensor) -> list[RowError]:
        """Each row's largest error; NaN counts as infinite."""
        apart = (self.output.float() - reference).abs().flatten(1).amax(dim=1)
        apart = apart.nan_to_num(nan=math.inf, posinf=math.inf)
        largest = self._largest_values()
        made = []
        for row, length in enumerate(self.seq_lens):
            begin, end = self.query_start_loc[row], self.query_start_loc[row + 1]
            if end == begin:
                made.append(RowError(row, 0.0, 0.0, -1))
                continue
            at = int(apart[begin:end].argmax())
            worst = float(apart[begin + at])
            position = length - (end - begin) + at
            made.append(RowError(row, worst, worst / max(largest[row], 1e-30), position))
        return made

    def _read(self) -> Tensor:
        """Places of the cut-out blocks that belong to some row's context: bool [num_used, block_size]."""
        size = self.block_size
        filled = torch.zeros(len(self.block_ids), dtype=torch.long)
        for row, length in enumerate(self.seq_lens):
            full, rest = divmod(length, size)
            filled[self.table[row, :full]] = size
            if rest:
                last = self.table[row, full]
                filled[last] = max(int(filled[last]), rest)
        return torch.arange(size)[None, :] < filled[:, None]

    def _largest_values(self) -> list[float]:
        """For each row the largest value that it reads, as the kernel sees it."""
        values = self.value_blocks.float().abs().flatten(2).amax(dim=2) * self.v_scale
        largest = values.masked_fill(~self._read(), 0).nan_to_num(posinf=0).amax(dim=1)
        rows = []
        for row, length in enumerate(self.seq_lens):
            places = self.table[row, : -(-length // self.block_size)]
            rows.append(float(largest[places].max()) if len(places) else 0.0)
        return rows

    def first_not_finite(self) -> NotFinite | None:
        """The first key or value of a context that is NaN or infinite, in the order of rows and positions."""
        read = self._read()
        for what, blocks in (("K", self.key_blocks), ("V", self.value_blocks)):
            bad = ~torch.isfinite(blocks.float()).flatten(2).all(dim=2) & read
            if not bool(bad.any()):
                continue
            for row, length in enumerate(self.seq_lens):
                places = self.table[row, : -(-length // self.block_size)]
                found = bad[places].flatten()[:length].nonzero()
                if len(found):
                    position = int(found[0])
                    place, offset = divmod(position, self.block_size)
                    block = int(self.block_ids[places[place]])
                    held = blocks[places[place], offset].float().flatten()
                    value = held[~torch.isfinite(held)][0].item()
                    slot = block * self.block_size + offset
                    return NotFinite(what, row, position, block, slot, str(value))
        return None

    # The file --------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write it. float8 is stored as bytes under its own name."""
        from safetensors.torch import save_file

        tensors = {
            name: getattr(self, name).contiguous()
            for name in (
                "query",
                "output",
                "key_blocks",
                "value_blocks",
                "block_ids",
                "table",
                "slots",
            )
        }
        if self.alibi_slopes is not None:
            tensors["alibi_slopes"] = self.alibi_slopes.contiguous()
        facts = {
            name: getattr(self, name)
            for name in (
                "seq_lens", "query_start_loc", "scale", "sliding_window", "softcap", "k_scale", "v_scale", "about",
            )
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION} | facts, default=str)
        save_file(tensors, path, metadata={"vllm_trace_attention": text})

    @classmethod
    def load(cls, path: Path) -> AttentionCase:
        """Read it back.

        Raises: ``TraceError`` when it is no such file, or of a newer version.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get("vllm_trace_attention")
                tensors = {name: file.get_tensor(name) for name in list(file.keys())}
        except (OSError, SafetensorError) as error:
            raise TraceError(f"{path} cannot be read: {error}") from None
        if text is None:
            raise TraceError(
                f"{path} is no saved attention call",
                hint="run SCENARIO --shadow saves the first bad one",
            )
        try:
            facts = json.loads(text)
            version = facts.pop("version")
            if version > VERSION:
                raise TraceError(f"{path} is of version {version}; this reads up to {VERSION}")
            return cls(**tensors, **facts)._checked()
        except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            raise TraceError(f"{path} does not hold a whole attention call: {error}") from None

    def _checked(self) -> AttentionCase:
        """Shapes are of one call; every place of the table and every length is inside. Raises: ValueError."""
        _, num_heads, head_size = self.query.shape
        shape = num_used, block_size, num_kv_heads, _ = self.key_blocks.shape
        if block_size < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"{num_heads} heads cannot read blocks of shape {[*shape]}")
        if self.value_blocks.shape != shape or shape[3] != head_size:
            raise ValueError("queries, keys and values are not of one model")
        if len(self.block_ids) != num_used:
            raise ValueError("the ids are not those of the blocks")
        for name in ("scale", "sliding_window", "softcap", "k_scale", "v_scale"):
            if not isinstance(getattr(self, name), int | float):
                raise ValueError(f"{name} is no number")
        if not isinstance(self.about, dict) or sorted(self.query_start_loc) != self.query_start_loc:
            raise ValueError("what is said of it is not in order")
        if len(self.query_start_loc) != self.num_rows + 1 or len(self.table) != self.num_rows:
            raise ValueError("lengths, starts and table are not of one batch")
        if self.query_start_loc[-1] != len(self.query) or self.query.shape != self.output.shape:
            raise ValueError("queries and outputs are not of one batch")
        for row, length in enumerate(self.seq_lens):
            places = self.table[row, : -(-length // self.block_size)]
            if length < 0 or len(places) * self.block_size < length:
                raise ValueError(f"row {row} has {length} tokens and a shorter table")
            if len(places) and not 0 <= int(places.min()) <= int(places.max()) < len(
                self.block_ids
            ):
                raise ValueError(f"row {row} names a block that is not there")
        return self


def of_rows(case: AttentionCase, rows: list[int]) -> AttentionCase:
    """The case with some of its rows only; blocks that no other row reads are left out."""
    starts, tokens = [0], list[int]()
    for row in rows:
        begin, end = case.query_start_loc[row], case.query_start_loc[row + 1]
        tokens += range(begin, end)
        starts.append(len(tokens))
    lens = [case.seq_lens[row] for row in rows]
    width = max((-(-n // case.block_size) for n in lens), default=0)
    table = torch.full((len(rows), width), -1)
    for i, row in enumerate(rows):
        needed = -(-lens[i] // case.block_size)
        table[i, :needed] = case.table[row, :needed]
    used = table[table >= 0].unique()
    places = torch.full((len(case.block_ids),), -1)
    places[used] = torch.arange(len(used))
    picked = torch.tensor(tokens, dtype=torch.long)
    return replace(
        case,
        query=case.query[picked],
        output=case.output[picked],
        slots=case.slots[picked] if len(case.slots) else case.slots,
        key_blocks=case.key_blocks[used],
        value_blocks=case.value_blocks[used],
        block_ids=case.block_ids[used],
        table=torch.where(table >= 0, places[table.clamp(min=0)], -1),
        seq_lens=lens,
        query_start_loc=starts,
    )
