"""Writing and copying in Triton beside the torch forms. Runs under `test_interpreted.py`, or on a GPU."""

import pytest
import torch

from vllm_trace.mini import attention, kernels

DEVICE = "cpu" if kernels.interpreted() else "cuda"
STORED = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8]  # fmt: skip

ROUNDED_OTHERWISE = (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def check(expected, cache):
    if kernels.interpreted() and cache.dtype in ROUNDED_OTHERWISE:
        # Triton 3.9's interpreter cuts bfloat16 off and loses a carry where float8's mantissa rounds up.
        close = torch.isclose(cache.float(), expected.float(), rtol=2**-7, atol=2**-8)
        assert bool(close.all()) if cache.dtype == torch.bfloat16 else close.float().mean() > 0.98
    else:
        assert torch.equal(bits(expected), bits(cache))


def caches(layout, dtype, num_blocks=7, block_size=8, heads=2, head_size=48):
    cache = torch.zeros(num_blocks, block_size, heads, head_size, device=DEVICE).to(dtype)
    if layout == "split":
        return list(attention.to_kernel_layout(cache, cache.clone()))
    order = {"flash": (0, 1, 2, 3), "heads": (0, 2, 1, 3), "planes": (2, 0, 1, 3)}[layout]
    return [cache.permute(order).contiguous() for _ in range(2)]


@pytest.mark.parametrize("layout", attention.LAYOUTS)
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_reshape_and_cache(stored, layout):
    """Bit for bit what the torch form writes: rounding, cutting off at the largest, padding."""
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    key, value = (torch.randn(6, 2, 48, device=DEVICE, generator=generator) for _ in range(2))
    key[0, 0, :4] = torch.tensor([1e4, -1e4, 0.5, 1.5])  # beyond the largest; ties
    slots = torch.tensor([5, -1, 55, 8, 16, 17], device=DEVICE)
    scales = [(1.0, 1.0), (0.25, 2.0)]
    scales.append((torch.tensor([0.25, 0.5], device=DEVICE), torch.tensor(2.0, device=DEVICE)))
    for scale in scales:
        ours, theirs = caches(layout, stored), caches(layout, stored)
        kernels.reshape_and_cache(key, value, *ours, slots, *scale, layout=layout)
        attention.reshape_and_cache(key, value, *theirs, slots, *scale, layout=layout)
        for cache, expected in zip(ours, theirs):
            check(expected, cache)


def test_from_strided_keys():
    """K and V as slices of one projection, as models make them."""
    qkv = torch.randn(3, 4 * 48, device=DEVICE)
    key, value = qkv[:, :96].view(3, 2, 48), qkv[:, 96:].view(3, 2, 48)
    ours, theirs = caches("flash", torch.float32), caches("flash", torch.float32)
    slots = torch.tensor([9, 0, 30], device=DEVICE)
    kernels.reshape_and_cache(key, value, *ours, slots)
    attention.reshape_and_cache(key, value, *theirs, slots)
    assert torch.equal(theirs[0], ours[0]) and torch.equal(theirs[1], ours[1])


@pytest.mark.parametrize("layout", attention.LAYOUTS)
@pytest.mark.parametrize("stored", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_copy_blocks(stored, layout):
    pairs = torch.tensor([[1, 4], [1, 5], [0, 2]], device=DEVICE)
    made = [caches(layout, torch.float32) for _ in range(2)]
    made = [[torch.randn_like(cache).to(stored) for cache in pair] for pair in made]
    copies = [[cache.clone() for cache in pair] for pair in made]
    for module, layers in ((kernels, made), (attention, copies)):
        module.copy_blocks(*map(list, zip(*layers)), pairs, layout=layout)
    for ours, theirs in zip(made, copies):
        assert all(torch.equal(bits(b), bits(a)) for a, b in zip(ours, theirs))


def test_swap_blocks():
    source, target = (
        torch.randn(5, 8, 2, 48, device=DEVICE),
        torch.zeros(3, 8, 2, 48, device=DEVICE),
    )
    kernels.swap_blocks(source, target, torch.tensor([[4, 0], [1, 2]], device=DEVICE))
    assert torch.equal(torch.stack([source[4], torch.zeros_like(source[0]), source[1]]), target)


def test_swap_views_of_one_tensor():
    """Caches that lie head by head beside each other, as vLLM 0.32's do on CPUs."""
    both = torch.randn(4, 2, 2, 8, 48, device=DEVICE)
    key = both[:, :, 0].transpose(1, 2)
    expected = key[3].clone()
    kernels.swap_blocks(key, key, torch.tensor([[3, 0]], device=DEVICE))
    assert torch.equal(expected, key[0]) and torch.equal(expected, both[0, :, 0].transpose(0, 1))


def test_swap_refuses_other_shapes():
    with pytest.raises(ValueError, match="do not fit into blocks of shape"):
        kernels.swap_blocks(
            torch.zeros(2, 8, 2, 48, device=DEVICE), torch.zeros(2, 8, 2, 32, device=DEVICE),
            torch.zeros(1, 2, device=DEVICE),
        )  # fmt: skip
