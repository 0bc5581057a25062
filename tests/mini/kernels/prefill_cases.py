"""Prefill in Triton beside a dense reference. Runs under `test_interpreted.py`, or on a GPU."""

import pytest
import torch

from bench.attention_cases import HEADS, TOLERANCE, Case, dense, errors, make
from vllm_trace.mini import attention, kernels

DEVICE = "cpu" if kernels.interpreted() else "cuda"
BATCH = dict(lengths=(1, 33, 64, 65, 90), chunks=(1, 33, 32, 1, 50), head_size=32, heads=(4, 2))


def check(case, **more):
    inputs = make(case, DEVICE)
    relative, largest = errors(
        inputs.prefill(kernels.context_attention_fwd, **more), dense(inputs, case)
    )
    most_relative, most = TOLERANCE[case.dtype]
    assert relative <= most_relative and largest <= most, (case, relative, largest)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_chunks_behind_contexts(heads):
    check(Case(block_size=16, **BATCH | dict(heads=heads)))


@pytest.mark.parametrize("block_size", [8, 64])
def test_block_sizes_and_a_known_longest_query(block_size):
    check(Case(block_size=block_size, **BATCH))
    check(Case(block_size=block_size, **BATCH), max_query_len=50)


@pytest.mark.parametrize("layout", attention.LAYOUTS)
@pytest.mark.parametrize("stored", [None, torch.float8_e4m3fn, torch.int8], ids=str)
def test_caches(layout, stored):
    check(Case(cache_dtype=stored, layout=layout, **BATCH))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    check(Case(dtype, **BATCH))


@pytest.mark.parametrize("head_size", [80, 128, 256])
def test_head_sizes(head_size):
    check(Case(head_size=head_size, lengths=(20, 40), chunks=(20, 7), heads=(4, 2)))


@pytest.mark.parametrize(
    "options",
    [dict(alibi=True), dict(sliding_window=1), dict(sliding_window=24), dict(softcap=3.0),
     dict(alibi=True, sliding_window=24, softcap=3.0)],
    ids=str,
)  # fmt: skip
def test_bends(options):
    check(Case(**BATCH, **options))


def test_not_causal_equals_the_torch_form():
    inputs = make(Case(**BATCH), DEVICE)
    ours = inputs.prefill(kernels.context_attention_fwd, causal=False)
    theirs = inputs.prefill(attention.context_attention_fwd, causal=False)
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=1e-5)
