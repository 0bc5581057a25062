"""Writing: K and V of new tokens to their slots, whole blocks within a cache and between two.

Follows: vLLM 0.11.0, csrc/cache_kernels.cu (the learning plan's step 9); Kwon et al. 2023, sections 4.2 to 4.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .layouts import ORDER, Scale, as_bytes, by_block, per_head, size_of
from .support import check_pairs, check_slots


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: Scale = 1.0,
    v_scale: Scale = 1.0,
    *,
    layout: str = "flash",
    validate: bool = True,
) -> None:
    """Write each token's K and V to its slot. Padding tokens (slot -1) are not written.

    Raises: ValueError that names the first slot beyond the cache, unless `validate` is off.
    """
    num_blocks, block_size = size_of(key_cache, layout)
    if validate:
        check_slots(slot_mapping, num_blocks * block_size)
    real = slot_mapping >= 0
    slots = slot_mapping[real].long()
    at = slots // block_size, slots % block_size
    key = to_stored(key[: len(real)][real], key_cache.dtype, k_scale)
    value = to_stored(value[: len(real)][real], value_cache.dtype, v_scale)
    if layout == "split":
        x = key_cache.shape[4]
        as_bytes(key_cache).permute(0, 3, 1, 2, 4)[at] = as_bytes(key.unflatten(2, (-1, x)))
        as_bytes(value_cache).permute(0, 3, 1, 2)[at] = as_bytes(value)
    else:
        as_bytes(key_cache).permute(ORDER[layout])[at] = as_bytes(key)
        as_bytes(value_cache).permute(ORDER[layout])[at] = as_bytes(value)


def to_stored(tensor: Tensor, dtype: torch.dtype, scale: Scale) -> Tensor:
    """Divided by the scale; rounded to the nearest that the cache can hold, and cut off at its largest."""
    if isinstance(scale, Tensor):
        tensor = tensor / per_head(scale)
    elif scale != 1.0:
        tensor = tensor / scale
    if dtype == torch.int8:
        return tensor.float().round().clamp(-127, 127).to(torch.int8)
    if dtype.itemsize == 1:
        largest = torch.finfo(dtype).max
        return tensor.float().clamp(-largest, largest).to(dtype)
    return tensor.to(dtype)


def copy_blocks(
    key_caches: Sequence[Tensor],
    value_caches: Sequence[Tensor],
    block_mapping: Tensor,
    *,
    layout: str = "flash",
) -> None:
    """Copy whole blocks inside the caches of every layer: what copy-on-write does when a shared block is written to.

    Shapes: `block_mapping [num_pairs, 2]`, (from, to). No block may be on both sides: the pairs have no order.
    """
    for cache in (*key_caches, *value_caches):
        swap_blocks(cache, cache, block_mapping, layout=layout)


def swap_blocks(
    source: Tensor, target: Tensor, block_mapping: Tensor, *, layout: str = "flash"
) -> None:
    """Copy whole blocks from one cache to another, as when a sequence is swapped to the CPU or back.

    Shapes: `block_mapping [num_pairs, 2]`, (block of `source`, block of `target`).
    Raises: ValueError that names the first pair with a block outside its cache.
    """
    source, target = by_block(source, layout), by_block(target, layout)
    check_pairs(block_mapping, len(source), len(target))
    from_blocks, to_blocks = block_mapping.long().unbind(1)
    moved = as_bytes(source)[from_blocks.to(source.device)]
    as_bytes(target)[to_blocks.to(target.device)] = moved.to(target.device)
