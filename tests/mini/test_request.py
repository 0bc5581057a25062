"""Requests with tokens, requests with recorded hashes, and the chain of hashes."""

import pytest

from vllm_trace.mini.request import Request, get_request_block_hasher, sha256
from vllm_trace.mini.rules import rules_for


def test_hashes_are_chained():
    hasher = get_request_block_hasher(2, sha256, b"seed")
    one = Request("one", [1, 2, 3, 4], block_hasher=hasher)
    other = Request("other", [9, 2, 3, 4], block_hasher=hasher)
    assert one.block_hashes[0] == sha256((b"seed", (1, 2), None))
    assert one.block_hashes[1] == sha256((one.block_hashes[0], (3, 4), None))
    assert one.block_hashes[1] != other.block_hashes[1]


def test_only_full_blocks_and_only_new_ones():
    request = Request("a", [1, 2, 3], block_hasher=get_request_block_hasher(2))
    assert len(request.block_hashes) == 1
    first = request.block_hashes[0]
    request.append_output_token_ids([4, 5])
    assert len(request.block_hashes) == 2 and request.block_hashes[0] == first
    assert (request.num_tokens, request.num_output_tokens) == (5, 2)


def test_extra_keys_make_another_hash():
    hasher = get_request_block_hasher(2, lambda value: value[1:], none_hash="seed")
    salted = Request(
        "a",
        [1, 2, 3, 4],
        block_hasher=hasher,
        extra_keys=lambda start, end: None if start else ("salt",),
    )
    assert salted.block_hashes == [((1, 2), ("salt",)), ((3, 4), None)]


def test_counts_and_recorded_hashes_are_enough():
    request = Request("a", num_prompt_tokens=7, block_hashes=["h0"])
    request.append_output_tokens(2)
    request.block_hashes.append("h1")
    assert (request.num_tokens, request.num_output_tokens, request.block_hashes) == (
        9,
        2,
        ["h0", "h1"],
    )


@pytest.mark.parametrize("arguments", [{}, {"prompt_token_ids": [1], "num_prompt_tokens": 1}])
def test_tokens_or_their_number(arguments):
    with pytest.raises(ValueError, match="not both"):
        Request("a", **arguments)


def test_seed_of_the_installed_vllm(real):
    assert sha256(rules_for("0.32.0").none_hash_seed) == real.none_hash
