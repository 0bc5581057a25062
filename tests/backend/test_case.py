"""A saved attention call: what is in the file comes back, and a file that is none is refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_trace.backend.again import compute_again
from vllm_trace.backend.case import AttentionCase, of_rows
from vllm_trace.errors import TraceError


def case_of(
    lens, query_lens, block_size=8, heads=4, kv_heads=2, dim=16, dtype=torch.float32, **more
):
    """Random contexts in shuffled blocks, with the output of the reference itself."""
    torch.manual_seed(sum(lens) + block_size)
    needed = [-(-n // block_size) for n in lens]
    total = sum(needed)
    order = torch.randperm(total)
    table = torch.full((len(lens), max(needed, default=0)), -1)
    cursor = 0
    for row, count in enumerate(needed):
        table[row, :count] = order[cursor : cursor + count]
        cursor += count
    starts = [0]
    for count in query_lens:
        starts.append(starts[-1] + count)
    shape = (starts[-1], heads, dim)
    made = AttentionCase(
        query=torch.randn(shape).to(dtype),
        output=torch.zeros(shape, dtype=dtype),
        key_blocks=torch.randn(total, block_size, kv_heads, dim).to(dtype),
        value_blocks=torch.randn(total, block_size, kv_heads, dim).to(dtype),
        block_ids=torch.arange(total) * 3 + 7,
        table=table,
        seq_lens=list(lens),
        query_start_loc=starts,
        slots=torch.zeros(starts[-1]).long(),
        scale=dim**-0.5,
        **more,
    )
    made.output = made.reference(dense=True).to(dtype)
    return made


batches = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 9)).map(lambda b: (max(b), min(b))),
    min_size=1,
    max_size=4,
)


@given(batches, st.sampled_from([8, 16]))
def test_v1_v2_and_the_dense_form_agree(batch, block_size):
    case = case_of(*zip(*batch, strict=True), block_size=block_size)
    assert max(row.relative for row in case.errors(case.reference())) < 1e-6


@given(batches, st.data())
def test_rows_taken_out_of_a_call_compute_to_the_same(batch, data):
    case = case_of(*zip(*batch, strict=True))
    rows = data.draw(st.lists(st.sampled_from(range(case.num_rows)), unique=True, min_size=1))
    some = of_rows(case, rows)
    assert max(row.relative for row in some.errors(some.reference(dense=True))) < 1e-6
    assert [case.table_of(row) for row in rows] == [some.table_of(i) for i in range(len(rows))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_call_comes_back_from_its_file(tmp_path, dtype):
    case = case_of((20, 9), (1, 4), dtype=dtype, softcap=30.0, about={"kernel": "some"})
    path = tmp_path / "call.safetensors"
    case.save(path)
    back = AttentionCase.load(path)
    for name, value in vars(case).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, getattr(back, name)), name
        else:
            assert value == getattr(back, name), name
    assert compute_again(path).passed


def test_the_error_is_where_it_was_put():
    case = case_of((20, 9), (1, 4))
    case.output[3, 2, 1] += 0.5  # the third of four new tokens of a context of 9
    rows = case.errors(case.reference(dense=True))
    assert rows[0].relative < 1e-6
    assert (1, 7) == (rows[1].row, rows[1].position)
    assert 0.5 == pytest.approx(rows[1].absolute, rel=1e-5)
    largest = case.value_blocks[case.table[1, :2]].flatten(0, 1)[:9].abs().max()
    assert 0.5 / float(largest) == pytest.approx(rows[1].relative, rel=1e-5)


def test_nan_in_the_output_counts_as_infinite():
    case = case_of((20,), (1,))
    case.output[0, 0, 0] = math.nan
    assert math.inf == case.errors(case.reference())[0].relative


@pytest.mark.parametrize(("what", "name"), [("K", "key_blocks"), ("V", "value_blocks")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_value_that_is_not_finite_is_named(what, name, value):
    case = case_of((20, 19), (1, 1))
    assert case.first_not_finite() is None
    place = int(case.table[1, 1])
    getattr(case, name)[place, 2, 0, 0] = value
    bad = case.first_not_finite()
    block = 3 * place + 7
    assert (what, 1, 10, block, block * 8 + 2, str(value)) == tuple(bad)


def test_what_lies_behind_a_context_is_not_judged():
    """A block is handed out as it was left: the slots behind the newest token hold anything."""
    case = case_of((9,), (1,))
    case.key_blocks[int(case.table[0, 1]), 1:] = math.nan
    case.value_blocks[int(case.table[0, 1]), 1:] = math.inf
    assert case.first_not_finite() is None
    assert case.errors(case.reference(dense=True))[0].relative < 1e-6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda p: p.write_bytes(b"not safetensors"), "cannot be read"),
        (lambda p: p.unlink(), "cannot be read"),
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "cannot be read"),
        (lambda p: save_file({"x": torch.zeros(1)}, p), "is no saved attention call"),
        (lambda p: save_file({"x": torch.zeros(1)}, p, {"vllm_trace_attention": "{"}), "whole attention call"),
        (
            lambda p: save_file({"x": torch.zeros(1)}, p, {"vllm_trace_attention": '{"version": 99}'}),
            "is of version 99; this reads up to 1",
        ),
        (
            lambda p: save_file({"x": torch.zeros(1)}, p, {"vllm_trace_attention": '{"version": 1}'}),
            "whole attention call",
        ),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_refused(tmp_path, change, said):
    path = tmp_path / "call.safetensors"
    case_of((5,), (1,)).save(path)
    change(path)
    with pytest.raises(TraceError, match=said):
        AttentionCase.load(path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seq_lens", [50]),
        ("seq_lens", [-1]),
        ("seq_lens", [9, 9]),
        ("query_start_loc", [0, 5]),
        ("table", torch.tensor([[0, 9]])),
        ("table", torch.tensor([[0, -1]])),
        ("query_start_loc", [1, 0, 1]),
        ("seq_lens", ["9"]),
        ("seq_lens", 9),
        ("scale", "small"),
        ("softcap", [1]),
        ("about", 3),
        ("block_ids", torch.zeros(1)),
        ("key_blocks", torch.zeros(2, 0, 2, 16)),
        ("key_blocks", torch.zeros(2, 8, 3, 16)),
        ("value_blocks", torch.zeros(2, 8, 2, 8)),
        ("value_blocks", torch.zeros(2)),
        ("query", torch.zeros(1, 64)),
    ],
    ids=str,
)
def test_what_does_not_belong_together_or_leads_outside_is_refused(tmp_path, field, value):
    case = case_of((9,), (1,))
    setattr(case, field, value)
    case.save(tmp_path / "call.safetensors")
    with pytest.raises(TraceError, match="whole attention call"):
        AttentionCase.load(tmp_path / "call.safetensors")
