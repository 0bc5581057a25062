"""Where the elements of a cache lie, and collecting the tokens of one sequence from it.

Follows: vLLM 0.11.0, paged_attn.py `split_kv_cache` ("split"); the deep dive's exercise 3 (the other three).

    flash     key, value   [num_blocks, block_size, num_kv_heads, head_size]     a token's heads lie side by side
    heads     key, value   [num_blocks, num_kv_heads, block_size, head_size]     a head's tokens lie side by side
    planes    key, value   [num_kv_heads, num_blocks, block_size, head_size]     every head has a cache of its own
    split     key          [num_blocks, num_kv_heads, head_size / x, block_size, x]     x elements are 16 bytes
              value        [num_blocks, num_kv_heads, head_size, block_size]            vLLM's V1 and V2 kernels

Strides are free: a view of a larger tensor will do.
"""

from __future__ import annotations

from math import prod

from torch import Tensor, dtype, float32, index_select, uint8

#: layout → the order of its dimensions as [block, token, head, element]
ORDER = {"flash": (0, 1, 2, 3), "heads": (0, 2, 1, 3), "planes": (1, 2, 0, 3)}

Scale = float | Tensor


def size_of(key_cache: Tensor, layout: str) -> tuple[int, int]:
    """Number of blocks and block size."""
    if layout == "split":
        return key_cache.shape[0], key_cache.shape[3]
    num_blocks, block_size = key_cache.permute(ORDER[layout]).shape[:2]
    return num_blocks, block_size


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory for indexing: float8 as uint8 (torch does not index float8), everything else as it is."""
    return tensor.view(uint8) if tensor.dtype.itemsize == 1 else tensor


def by_block(cache: Tensor, layout: str) -> Tensor:
    """A view whose first dimension is the block."""
    return cache.transpose(0, 1) if layout == "planes" else cache


class Reader:
    """Collects tokens of sequences from the caches of one layer, always into the same memory.

    What `keys` or `values` returns holds until either is called again. Memory of its own for each piece would be
    handed back to the system and taken anew every time, which costs more than the copy.
    """

    def __init__(
        self, key_cache: Tensor, value_cache: Tensor, k_scale: Scale, v_scale: Scale, layout: str
    ) -> None:
        self._split_keys = key_cache if layout == "split" else None
        self._keys = key_cache if layout == "split" else key_cache.permute(ORDER[layout])
        order = (0, 3, 1, 2) if layout == "split" else ORDER[layout]
        self._values = value_cache.permute(order)
        self._scales = k_scale, v_scale
        self.num_kv_heads = self._values.shape[2]
        self._room: dict[dtype, Tensor] = {}

    def keys(self, table: Tensor, start: int, end: int) -> Tensor:
        """Tokens `start` to `end` of the sequence whose row of the block tables is `table`.

        Shapes: returns `[end - start, num_kv_heads, head_size]`, float32.
        """
        if self._split_keys is None:
            return self._collect(self._keys, table, start, end, self._scales[0])
        blocks, offset = _needed(table, start, end, self._split_keys.shape[3])
        tokens = as_bytes(self._split_keys)[blocks].permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)
        return self._real(
            tokens[offset : offset + end - start], self._split_keys.dtype, self._scales[0]
        )

    def values(self, table: Tensor, start: int, end: int) -> Tensor:
        """The same for V, which the split layout stores in another way."""
        return self._collect(self._values, table, start, end, self._scales[1])

    def _collect(self, cache: Tensor, table: Tensor, start: int, end: int, scale: Scale) -> Tensor:
        blocks, offset = _needed(table, start, end, cache.shape[1])
        stored = as_bytes(cache)
        room = self._take(stored.dtype, (len(blocks), *stored.shape[1:]), stored)
        tokens = index_select(stored, 0, blocks, out=room).flatten(0, 1)
        # What lies behind the last token of a block is left from an earlier owner and is cut off.
        return self._real(tokens[offset : offset + end - start], cache.dtype, scale)

    def _real(self, tokens: Tensor, stored: dtype, scale: Scale) -> Tensor:
        """What the stored numbers stand for."""
        tokens = tokens.view(stored)
        if stored != float32:
            tokens = self._take(float32, tuple(tokens.shape), tokens).copy_(tokens)
        if isinstance(scale, Tensor):
            return tokens.mul_(per_head(scale))
        return tokens if scale == 1.0 else tokens.mul_(scale)

    def _take(self, kind: dtype, shape: tuple[int, ...], beside: Tensor) -> Tensor:
        """Memory for so many elements, what it held before is void."""
        size = prod(shape)
        room = self._room.get(kind)
        if room is None or len(room) < size:
            room = self._room[kind] = beside.new_empty(size, dtype=kind)
        return room[:size].view(shape)


def _needed(table: Tensor, start: int, end: int, block_size: int) -> tuple[Tensor, int]:
    """The blocks that hold the tokens, and where in the first of them `start` is."""
    first = start // block_size
    return table[first : -(-end // block_size)], start - first * block_size


def per_head(scale: Tensor) -> Tensor:
    """A scale tensor, of one element or of one for each KV head, to stand beside `[..., num_kv_heads, head_size]`."""
    return scale.to(float32).reshape(-1, 1)


def to_kernel_layout(key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor]:
    """Caches of layout "flash" as `torch.ops._C.paged_attention_v1` reads them: 16 bytes of K at a time for a thread.

    Shapes: returns K `[num_blocks, num_kv_heads, head_size / x, block_size, x]`, where x elements are 16 bytes, and
    V `[num_blocks, num_kv_heads, head_size, block_size]`.
    """
    x = 16 // key_cache.element_size()
    keys = key_cache.permute(0, 2, 3, 1).unflatten(2, (-1, x)).transpose(3, 4)
    return keys.contiguous(), value_cache.permute(0, 2, 3, 1).contiguous()


def from_kernel_layout(key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor]:
    """The way back."""
    keys = key_cache.transpose(3, 4).flatten(2, 3).permute(0, 3, 1, 2)
    return keys.contiguous(), value_cache.permute(0, 3, 1, 2).contiguous()
