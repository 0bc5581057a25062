"""What the attention functions take, and errors that name the offending index.

Follows: the combinations that vLLM 0.11.0's csrc/attention/ is built for, and some more.
Raises: ValueError everywhere: `mini` knows no sibling, so callers wrap it in an error of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("flash", "heads", "planes", "split")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ONE_BYTE = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
HEAD_SIZES = range(8, 257, 8)
BLOCK_SIZES = range(1, 257)


def unsupported(
    *,
    head_size: int,
    num_heads: int,
    num_kv_heads: int,
    block_size: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype | None = None,
    layout: str = "flash",
) -> list[str]:
    """Sentences that say what stands in the way, each with what is supported; none if nothing does.

    >>> unsupported(head_size=64, num_heads=8, num_kv_heads=3, block_size=16, dtype=torch.float16)
    ['8 query heads over 3 KV heads: the first must be a multiple of the second']
    """
    wrong = []
    if head_size not in HEAD_SIZES:
        wrong.append(f"head size {head_size}: multiples of 8 from 8 to 256 are supported")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        wrong.append(
            f"{num_heads} query heads over {num_kv_heads} KV heads: the first must be a multiple of the second"
        )
    if block_size not in BLOCK_SIZES:
        wrong.append(f"block size {block_size}: 1 to 256 are supported")
    if dtype not in DTYPES:
        wrong.append(f"dtype {name_of(dtype)}: {_names(DTYPES)} are supported")
    if cache_dtype is not None and cache_dtype not in (*DTYPES, *ONE_BYTE):
        supported = _names((*DTYPES, *ONE_BYTE))
        wrong.append(
            f"cache dtype {name_of(cache_dtype)}: {supported} are supported (a uint8 cache of vLLM's is a view "
            f"of float8_e4m3fn)"
        )
    if layout not in LAYOUTS:
        wrong.append(f"layout {layout!r}: {', '.join(LAYOUTS)} are supported")
    elif layout == "split" and head_size % (16 // (cache_dtype or dtype).itemsize):
        wrong.append(
            f"head size {head_size} in layout split: it must be a multiple of 16 bytes' worth of elements"
        )
    return wrong


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(map(name_of, dtypes))


def check_shapes(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    layout: str,
    out: Tensor | None = None,
    num_seqs: int | None = None,
) -> None:
    """Raises: ValueError when shapes do not fit together. `num_seqs`: when it is not the number of queries."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: {', '.join(LAYOUTS)} are supported")
    num_seqs = len(query) if num_seqs is None else num_seqs
    dims = 5 if layout == "split" else 4
    facts = [
        (query.dim() == 3, f"query has shape {list(query.shape)}, not [tokens, heads, head size]"),
        (
            key_cache.dim() == dims and value_cache.dim() == 4,
            f"caches of shapes {list(key_cache.shape)} and {list(value_cache.shape)} are not in layout {layout}",
        ),
        (
            key_cache.dtype == value_cache.dtype,
            f"key cache is {name_of(key_cache.dtype)}, value cache {name_of(value_cache.dtype)}",
        ),
        (
            block_tables.dim() == 2 and len(block_tables) >= num_seqs and len(seq_lens) >= num_seqs,
            f"{num_seqs} sequences, but block tables {list(block_tables.shape)} and {len(seq_lens)} lengths",
        ),
        (
            out is None or out.shape == query.shape,
            f"out has another shape than query, {list(query.shape)}",
        ),
    ]
    for fits, sentence in facts:
        if not fits:
            raise ValueError(sentence)


def check_tables(block_tables: Tensor, seq_lens: Tensor, block_size: int, num_blocks: int) -> None:
    """Raises: ValueError that names the first negative length or table entry outside the cache.

    Entries behind a sequence's last block are nobody's business and may hold anything.
    """
    if not len(seq_lens):
        return
    if int(seq_lens.min()) < 0:
        seq = int((seq_lens < 0).nonzero()[0])
        raise ValueError(f"seq_lens[{seq}] is {int(seq_lens[seq])}: a length cannot be negative")
    needed = (seq_lens + block_size - 1) // block_size
    width = block_tables.shape[1]
    if int(needed.max()) > width:
        seq = int((needed > width).nonzero()[0])
        raise ValueError(
            f"seq_lens[{seq}] is {int(seq_lens[seq])}: that takes {int(needed[seq])} blocks of {block_size}, "
            f"and the table has {width}"
        )
    rows = block_tables[: len(seq_lens)]
    outside = (rows < 0) | (rows >= num_blocks)
    if not bool(outside.any()):
        return
    outside &= torch.arange(width, device=rows.device) < needed[:, None]
    if bool(outside.any()):
        seq, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"block_tables[{seq}, {column}] is {int(rows[seq, column])}: the cache has blocks 0 to {num_blocks - 1}"
        )


def check_slots(slot_mapping: Tensor, num_slots: int) -> None:
    """Raises: ValueError that names the first slot beyond the cache. -1 is padding, and nothing else below 0 is."""
    wrong = (slot_mapping < -1) | (slot_mapping >= num_slots)
    if bool(wrong.any()):
        token = int(wrong.nonzero()[0])
        raise ValueError(
            f"slot_mapping[{token}] is {int(slot_mapping[token])}: the cache has slots 0 to {num_slots - 1}, "
            f"and -1 is padding"
        )


def check_pairs(block_mapping: Tensor, num_from: int, num_to: int) -> None:
    """Raises: ValueError that names the first pair with a block outside its cache."""
    limits = block_mapping.new_tensor([num_from, num_to])
    wrong = (block_mapping < 0) | (block_mapping >= limits)
    if bool(wrong.any()):
        pair, side = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"block_mapping[{pair}, {side}] is {int(block_mapping[pair, side])}: "
            f"that cache has blocks 0 to {int(limits[side]) - 1}"
        )
