"""FlashAttention 3's plan, on plans that an H200 made (vLLM 0.20.2): whether the combining kernel ran stands beside."""

import pytest

from vllm_trace.patches.kernel_variants import splits_of_plan

#: (rows, query length, head size, plan, splits; more than one where the combining kernel ran)
SEEN = [
    (1, 1, 32, [1, 1, 0, 0, 0], [1]),
    (1, 1, 32, [1, 1, 0, 0, 12, 0, 0, 0, 0], [12]),
    (1, 1, 32, [2, 1, 130, 131, 45, 133, 134, 135, 0], [45]),
    (3, 1, 32, [2, 2, 2, 3, 12, 5, 12, 7, 0], [12, 5, 12]),
    (5, 1, 32, [1, 1, 1, 1, 1, 5, 390, 391, 7, 3, 7, 7, 7, 397, 398, 399, 0], [7, 3, 7, 7, 7]),
    (1, 6, 32, [6, 1, 875347719, 986068243, 4, -1156111386, 716810659, -1215218938, 0], [1]),
    (1, 500, 32, [1000, 1, 2, 3, 2, 5, 6, 7, 0], [1]),
    (3, 64, 32, [128, 128, 128, 3, 14, 6, 14, 7, 2, 2, 2, 11, 0], [14, 6, 14]),
    (1, 1, 128, [4, 1, 2, 3, 8, 5, 6, 7, 0], [1]),
    (1, 1, 128, [4, 1, 2, 3, 13, 5, 6, 7, 8, 9, 10, 11, 0], [13]),
    (3, 1, 128, [4, 4, 4, 3, 6, 2, 6, 7, 8, 8, 8, 11, 0], [6, 2, 6]),
    (1, 500, 128, [2000, 1, 2, 3, 8, 5, 6, 7, 0], [1]),
]


@pytest.mark.parametrize(("rows", "query_len", "head_size", "plan", "splits"), SEEN)
def test_splits_are_read_as_the_device_had_them(rows, query_len, head_size, plan, splits):
    made = splits_of_plan(plan, [query_len] * rows, num_rows=rows, head_size=head_size, causal=True)
    assert splits == made


@pytest.mark.parametrize(
    ("plan", "query_lens"),
    [
        ([7, 1, 0, 0, 0], [2]),  # not the query length of these rows
        ([2, 3, 0, 0, 0], [1, 1]),  # not the same packing in both
        ([1, 1, 0, 0], [1]),  # no semaphore
        ([1, 1, 0, 0, 2, 0, 0, 0, 8, 0, 0, 0, 0], [1]),  # a vector too many
        ([1, 1, 0, 0, 999, 0, 0, 0, 0], [1]),  # no number of splits
    ],
)
def test_a_plan_of_another_shape_is_not_read(plan, query_lens):
    made = splits_of_plan(plan, query_lens, num_rows=len(query_lens), head_size=32, causal=True)
    assert made is None


def test_rows_that_only_pad_a_graph_are_left_out():
    plan = [1, 1, 0, 0, 3, 2, 0, 0, 0]
    assert [3, 2] == splits_of_plan(plan, [1, 1], num_rows=4, head_size=32, causal=True)
