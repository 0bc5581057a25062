"""The V1/V2 rule: its borders, its reasons, and that `mini` decides alike."""

import doctest

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace import decode_rule
from vllm_trace.decode_rule import choose


@pytest.mark.parametrize(
    ("max_seq_len", "num_seqs", "num_heads", "variant", "reason"),
    [
        (1, 1, 1, "V1", "the longest context, 1, is one partition of 512"),
        (512, 1, 4, "V1", "the longest context, 512, is one partition of 512"),
        (
            513, 1, 4, "V2",
            "the longest context, 513, is 2 partitions, and 1 sequence × 4 heads are at most 512",
        ),
        (
            513, 128, 4, "V2",
            "the longest context, 513, is 2 partitions, and 128 sequences × 4 heads are at most 512",
        ),
        (
            513, 513, 1, "V1",
            "513 sequences × 1 head are more than 512, and the longest context, 513, is at most 8192",
        ),
        (
            8192, 129, 4, "V1",
            "129 sequences × 4 heads are more than 512, and the longest context, 8192, is at most 8192",
        ),
        (8193, 129, 4, "V2", "the longest context, 8193, is more than 8192"),
    ],
)  # fmt: skip
def test_both_sides_of_every_border(max_seq_len, num_seqs, num_heads, variant, reason):
    made = choose(max_seq_len, num_seqs, num_heads)
    assert (variant, reason) == (made.variant, made.reason)


@given(st.integers(1, 20_000), st.integers(1, 600), st.integers(1, 64))
def test_mini_decides_alike(max_seq_len, num_seqs, num_heads):
    pytest.importorskip("torch", reason="torch is not installed: mini's attention cannot run")
    from vllm_trace.mini import attention

    made = choose(max_seq_len, num_seqs, num_heads)
    assert attention.use_v1(max_seq_len, num_seqs, num_heads) == (made.variant == "V1")
    assert attention.PARTITION_SIZE == made.numbers["partition_size"]
    assert attention.MAX_V1_SEQ_LEN == made.numbers["max_v1_seq_len"]


def test_the_examples_hold():
    assert 0 == doctest.testmod(decode_rule).failed
