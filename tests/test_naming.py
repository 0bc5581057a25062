"""Which request is meant when a user names one."""

import pytest

from vllm_trace.errors import UsageError
from vllm_trace.naming import is_called, requests_called

NAMES = {
    0: "0-a4c7ca3e",
    1: "1-0000000a",
    2: "10-b5d8db4f",
    3: "0_chat-12345678",
    4: "1_chat-12345678",
    5: "twice",
    6: "twice",
    7: "twice-more",
    8: "cmpl-0123456789abcdef-0-deadbeef",
}


@pytest.mark.parametrize(
    "asked, found",
    [
        ("0", [0]),  # a part of nearly all, and the user's own name of one
        ("1", [1]),
        ("10", [2]),
        ("0-a4c7ca3e", [0]),
        ("a4c7", [0]),
        ("#2", [2]),
        ("twice", [5, 6]),  # also a part of another
        ("more", [7]),
        ("0_chat", [3]),
        ("cmpl-0123456789abcdef-0", [8]),
    ],
)
def test_the_best_that_there_is(asked, found):
    assert found == requests_called(NAMES, asked)


def test_only_eight_hex_digits_are_vllms_own():
    assert is_called(0, "a-0123456f", "a")
    assert not is_called(0, "a-0123456g", "a")
    assert not is_called(0, "a-0123456", "a")
    assert not is_called(0, "a-01234567-b", "a")
    assert not is_called(0, "b-a-01234567", "a")


def test_several_are_listed_with_their_numbers():
    with pytest.raises(UsageError) as raised:
        requests_called(NAMES, "chat")
    assert "'chat' may be any of 2 requests: 0_chat-12345678 (#3), 1_chat-12345678 (#4)" == str(
        raised.value
    )
    assert "Give the whole name, or the number: #3" == raised.value.hint
    # Two engines in one trace, each with a request that the user calls 0.
    with pytest.raises(UsageError, match=r"0-a4c7ca3e \(#0\), 0-ffffffff \(#9\)$"):
        requests_called(NAMES | {9: "0-ffffffff"}, "0")
    many = {number: f"r-{number}" for number in range(20)}
    with pytest.raises(UsageError, match=r"r-7 \(#7\) and 12 more$"):
        requests_called(many, "r-")


def test_none():
    with pytest.raises(UsageError, match="unknown request 'twoce'; did you mean 'twice'"):
        requests_called(NAMES, "twoce")
    with pytest.raises(UsageError, match="unknown request ''"):
        requests_called(NAMES, "")
    with pytest.raises(UsageError, match="unknown request 'a'"):
        requests_called({}, "a")
