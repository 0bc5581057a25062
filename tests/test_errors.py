"""Errors are values that a command line can print."""

import doctest

import pytest

from vllm_trace import errors
from vllm_trace.errors import UsageError, VllmTraceError, unknown

CLASSES = [
    cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, Exception)
]


def test_the_examples_in_the_docstrings_hold():
    failed, tried = doctest.testmod(errors)
    assert (0, True) == (failed, tried > 0)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_error_carries_a_message_a_hint_and_a_slug(cls):
    error = cls("what was found", hint="what to do")
    assert isinstance(error, VllmTraceError)
    assert ("what was found", "what to do") == (str(error), error.hint)
    assert cls.slug == cls.slug.lower().replace(" ", "-")


def test_slugs_are_anchors_so_no_two_errors_share_one():
    slugs = [cls.slug for cls in CLASSES]
    assert sorted(set(slugs)) == sorted(slugs)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ful", "unknown level 'ful'; did you mean 'full'?"),
        ("lihgt", "unknown level 'lihgt'; did you mean 'light'?"),
        ("zzz", "unknown level 'zzz'"),
        ("", "unknown level ''"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_one(name, said):
    error = unknown("level", name, ("light", "full"))
    assert UsageError is type(error)
    assert (said, "Known: full, light") == (str(error), error.hint)


def test_a_long_list_of_names_is_counted_instead_of_shown():
    hint = unknown("model", "x", [f"m{i:02}" for i in range(99)]).hint
    assert hint.startswith("Known: m00, m01, ") and hint.endswith(", m23 and 75 more")


def test_the_caller_may_give_the_hint():
    assert (
        "Try: vllm-trace scenarios"
        == unknown("scenario", "x", [], "Try: vllm-trace scenarios").hint
    )
