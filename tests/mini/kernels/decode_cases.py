"""Decode in Triton beside a dense reference. Runs under `test_interpreted.py`, or on a GPU."""

import itertools

import pytest
import torch

from bench.attention_cases import HEADS, TOLERANCE, Case, dense, errors, make
from vllm_trace.mini import attention, kernels
from vllm_trace.mini.kernels import Plan

DEVICE = "cpu" if kernels.interpreted() else "cuda"
FULL, HALF, BRAIN = torch.float32, torch.float16, torch.bfloat16
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
PLANS = {
    "V1": None,
    "V2": None,
    "one share": Plan(16, shares=1),
    "more sequences than shares": Plan(16, shares=3),
    "more shares than sequences": Plan(16, shares=11, pieces=2),
    "more shares than tiles": Plan(32, shares=20),
    "a program for each tile": Plan(16, chunk=1, stages=0),
    "splits of several tiles": Plan(16, chunk=3, pieces=2),
    "whole": Plan(32),
}


def check(case, name="V2", **more):
    inputs = make(case, DEVICE)
    reference = dense(inputs, case)
    if name == "V1":
        out = inputs.decode(kernels.paged_attention_v1, **more)
    else:
        out = inputs.decode(kernels.paged_attention_v2, plan=PLANS[name], **more)
    relative, largest = errors(out, reference)
    most_relative, most = TOLERANCE[case.dtype]
    assert relative <= most_relative and largest <= most, (case, relative, largest)
    return inputs, out


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("window", [0, 20])
def test_every_cut(name, window):
    """Lengths that are alike, and lengths of which no two are; what no share or split holds is not waited for."""
    batches = [(40, 40, 40), (0, 1, 15, 16, 17, 33, 50)]
    for lengths in batches if window else [*batches, (0, 0), (100,)]:
        check(Case(lengths=lengths, sliding_window=window, head_size=32, heads=(2, 2)), name)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("name", ["V1", "V2"])
def test_heads(heads, name):
    check(Case(heads=heads, head_size=32, lengths=(0, 1, 17, 40)), name)


@pytest.mark.parametrize("head_size", [32, 40, 64, 80, 96, 128, 192, 256])
def test_head_sizes(head_size):
    for name in ("V1", "more sequences than shares"):
        check(Case(head_size=head_size, lengths=(1, 40), heads=(4, 2)), name)


@pytest.mark.parametrize("block_size", [8, 16, 24, 32, 64, 128, 256])
def test_block_sizes(block_size):
    borders = (block_size - 1, block_size, block_size + 1)
    for name in ("V1", "V2", "splits of several tiles"):
        check(Case(block_size=block_size, lengths=borders, heads=(2, 1), head_size=32), name)


@pytest.mark.parametrize("stored", [None, E4M3, E5M2, INT8], ids=str)
@pytest.mark.parametrize("dtype", [FULL, HALF, BRAIN], ids=str)
def test_dtypes(dtype, stored):
    for layout, name in (("flash", "V1"), ("split", "V2")):
        check(Case(dtype, stored, layout=layout, lengths=(0, 1, 50), head_size=32), name)


def test_scales_of_every_head():
    for dtype, stored in ((FULL, E4M3), (HALF, INT8), (FULL, FULL)):
        check(
            Case(dtype, stored, per_head_scales=True, head_size=32, heads=(4, 2), lengths=(1, 40))
        )


@pytest.mark.parametrize("layout", attention.LAYOUTS)
def test_layouts(layout):
    check(Case(layout=layout, head_size=32, heads=(4, 2), lengths=(40, 3)))


@pytest.mark.parametrize(
    "options",
    [
        dict(zip(("alibi", "sliding_window", "softcap"), chosen))
        for chosen in itertools.product((False, True), (0, 1, 24), (0.0, 3.0))
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_bends(options):
    for name in ("V1", "more shares than sequences"):
        check(Case(lengths=(1, 17, 50), head_size=32, heads=(4, 2), **options), name)


def test_lengths_at_the_rule_s_borders():
    """512 and 513 tokens, and beyond what V1's shared memory held in CUDA; one head, since the interpreter is slow."""
    check(Case(lengths=(511, 512, 513), head_size=32, heads=(1, 1), block_size=32))
    check(Case(lengths=(8193,), head_size=32, heads=(1, 1), block_size=256), "V2")


def test_equals_the_torch_form():
    case = Case(lengths=(5, 520, 33), head_size=32, heads=(4, 1))
    inputs = make(case, DEVICE)
    for name in ("paged_attention_v1", "paged_attention_v2", "forward_decode"):
        ours = inputs.decode(getattr(kernels, name))
        torch.testing.assert_close(
            ours, inputs.decode(getattr(attention, name)), atol=2e-6, rtol=1e-5
        )


def test_arrivals_are_left_at_zero():
    """The second call on the same scratch is as right as the first, also after a larger batch."""
    for lengths in ((70, 70), (150, 20, 0, 8), (70, 70), (64,)):
        case = Case(lengths=lengths, head_size=32, heads=(2, 1))
        check(case, "more shares than sequences")
        check(case, "splits of several tiles")


def test_out_and_strides():
    """Query and out as slices of larger tensors, caches as views; what lies between is not touched."""
    case = Case(lengths=(40, 3), head_size=32, heads=(4, 2))
    inputs = make(case, DEVICE)
    wide = torch.zeros(2, 4, 96, device=DEVICE)
    wide[..., 32:64] = inputs.query
    inputs.query = wide[..., 32:64]
    key, value = inputs.key_cache, inputs.value_cache
    both = torch.stack((key.transpose(1, 2), value.transpose(1, 2)), 2)  # vLLM 0.32's order on CPUs
    inputs.key_cache, inputs.value_cache = (
        both[:, :, 0].transpose(1, 2),
        both[:, :, 1].transpose(1, 2),
    )
    target = torch.full((2, 4, 64), 7.0, device=DEVICE)
    returned = inputs.decode(kernels.paged_attention_v2, out=target[..., :32])
    assert returned.data_ptr() == target.data_ptr()
    assert errors(target[..., :32], dense(inputs, case))[0] < 1e-5
    assert bool((target[..., 32:] == 7.0).all())


def test_nan_of_a_token_stays_visible():
    """In what the sequence owns; its neighbours in the batch are as they were."""
    case = Case(lengths=(40, 30), head_size=32, heads=(4, 2))
    inputs = make(case, DEVICE)
    block = int(inputs.block_tables[0, 1])
    inputs.value_cache[block, 3, 1, 5] = torch.nan
    out = inputs.decode(kernels.paged_attention_v2)
    assert bool(out[0, 2:, 5].isnan().all()) and not bool(out[0, :2].isnan().any())
    assert not bool(out[1].isnan().any())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=torch.zeros(2, 5, 32)), "5 query heads over 2 KV heads"),
        (dict(block_tables=torch.zeros(1, 4, dtype=torch.int32)), "2 sequences, but block tables"),
        (dict(options=dict(layout="rows")), "layout 'rows'"),
        (dict(query=torch.zeros(2, 4, 32, dtype=HALF)), "float32 cache with float16 queries"),
    ],
)
def test_bad_shapes_are_refused_before_the_launch(change, message):
    inputs = make(Case(lengths=(40, 3), head_size=32, heads=(4, 2)), DEVICE)
    for name, value in change.items():
        setattr(inputs, name, value.to(DEVICE) if isinstance(value, torch.Tensor) else value)
    with pytest.raises(ValueError, match=message):
        inputs.decode(kernels.paged_attention_v2)
