"""What vLLM's own op wrote to a block is what we read back, in each layout of its CPU kernels."""

from types import SimpleNamespace

import pytest
import torch

from vllm_trace.backend.engine_cache import blocks_of
from vllm_trace.backend.paged import Shape, VllmEngine


class CPUAttentionBackendImpl:
    kv_cache_dtype = "auto"


@pytest.mark.parametrize(
    ("dtype", "isa"),
    [
        (torch.float32, "vec"),
        (torch.float32, "vec16"),
        (torch.float16, "vec"),
        (torch.bfloat16, "vec"),
        (torch.bfloat16, "amx"),
    ],
)
@pytest.mark.parametrize(("block_size", "head_size"), [(32, 64), (64, 32), (128, 96)])
def test_a_block_reads_back_as_it_was_written(dtype, isa, block_size, head_size):
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    cache = torch.zeros(4, 2, block_size, 2 * head_size, dtype=dtype)
    views = cache.view(4, 2, 2 * block_size, head_size).chunk(2, dim=2)
    torch.manual_seed(0)
    key, value = torch.randn(2, block_size + 5, 2, head_size).to(dtype).unbind(0)
    first, second = 2, 1  # one whole block, then five tokens of another
    slots = torch.cat([torch.arange(block_size) + first * block_size, torch.arange(5) + block_size])
    ops.cpu_attn_reshape_and_cache(
        key, value, *views, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )
    keys, values = blocks_of(
        CPUAttentionBackendImpl(), SimpleNamespace(isa=isa), cache, torch.tensor([first, second])
    )
    assert torch.equal(key[:block_size], keys[0])
    assert torch.equal(value[:block_size], values[0])
    assert torch.equal(key[block_size:], keys[1, :5])
    assert torch.equal(value[block_size:], values[1, :5])


def test_a_layout_that_nobody_looked_at_is_refused():
    class OtherImpl:
        kv_cache_dtype = "auto"

    with pytest.raises(NotImplementedError, match="the cache layout of OtherImpl is not known"):
        blocks_of(OtherImpl(), None, torch.zeros(1, 1, 1, 2), torch.tensor([0]))


@pytest.mark.parametrize(
    "name", ["FlashAttentionImpl", "TritonAttentionImpl", "PagedImpl", "PagedVllmImpl"]
)
def test_the_layouts_of_cuda_backends(name):
    """Values that say where they are: block, offset, head, element."""
    blocks, size, heads, dim = 3, 16, 2, 32
    shape = Shape(4, heads, dim, 1.0)
    flat = torch.arange(2 * blocks * size * heads * dim).float().view(2, blocks, size, heads, dim)
    cache = {
        "FlashAttentionImpl": flat,
        "TritonAttentionImpl": flat.transpose(0, 1).contiguous(),
        "PagedImpl": flat,
    }.get(name)
    if cache is None:
        from vllm_trace.mini.attention import to_kernel_layout

        cache = torch.zeros_like(flat)
        for view, made in zip(VllmEngine.split(cache, shape), to_kernel_layout(flat[0], flat[1])):
            view.copy_(made)
    impl = type(name, (), {"kv_cache_dtype": "auto", "shape": shape})()
    keys, values = blocks_of(impl, None, cache, torch.tensor([2, 0]))
    assert torch.equal(flat[0, [2, 0]], keys)
    assert torch.equal(flat[1, [2, 0]], values)
