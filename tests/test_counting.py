"""Numbers and their nouns."""

import doctest

from vllm_trace import counting
from vllm_trace.counting import counted, were


def test_examples():
    assert 0 == doctest.testmod(counting).failed


def test_one_and_many():
    assert ["0 spans", "1 span", "12 spans"] == [counted(number, "spans") for number in (0, 1, 12)]
    assert ["1 fact of workers", "1 counter value"] == [
        counted(1, noun) for noun in ("facts of workers", "counter values")
    ]
    assert ["were", "was", "were"] == [were(number) for number in (0, 1, 2)]
