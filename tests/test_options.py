"""Options: one dataclass that is read from the variables and written to them."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace.errors import UsageError
from vllm_trace.options import ATTENTIONS, LEVELS, OTHER_VARIABLES, Options, cache_dir

options = st.builds(
    Options,
    dir=st.text(st.characters(exclude_characters="\0", exclude_categories=("Cs",))),
    level=st.sampled_from(LEVELS),
    tokens=st.booleans(),
    strict=st.booleans(),
    failures=st.integers(),
    attention=st.sampled_from(ATTENTIONS),
    shadow=st.booleans(),
    copy_rate=st.integers(),
).filter(lambda asked: not asked.shadow or asked.level == "full")


@given(options)
def test_a_child_process_gets_the_same_options(asked):
    assert asked == Options.from_environment(asked.to_environment())


def test_only_what_differs_from_the_default_is_put_into_the_environment():
    assert {} == Options().to_environment()
    assert {"VTRACE_DIR": "/tmp/t", "VTRACE_TOKENS": "1"} == Options(
        "/tmp/t", tokens=True
    ).to_environment()


def test_every_option_can_be_set_by_a_variable():
    asked = {"dir": "d", "level": "full", "tokens": "yes", "strict": "ON", "failures": "7"}
    asked |= {"attention": "paged", "shadow": "1", "copy_rate": "9"}
    asked["otlp"] = "http://h:4317"
    assert {field.name for field in fields(Options)} == set(asked)
    made = Options.from_environment(
        {f"VTRACE_{name.upper()}": text for name, text in asked.items()}
    )
    assert Options("d", "full", True, True, 7, "http://h:4317", "paged", True, 9) == made


def test_variables_of_others_are_left_alone():
    environ = {"VLLM_CACHE_ROOT": "x", "PATH": "y"} | dict.fromkeys(OTHER_VARIABLES, "z")
    assert Options() == Options.from_environment(environ)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("VTRACE_DIRR", "x", "unknown variable 'VTRACE_DIRR'; did you mean 'VTRACE_DIR'?"),
        ("VTRACE_LEVLE", "full", "unknown variable 'VTRACE_LEVLE'; did you mean 'VTRACE_LEVEL'?"),
        ("VTRACE_LEVEL", "ful", "unknown level 'ful'; did you mean 'full'?"),
        ("VTRACE_LEVEL", "", "unknown level ''"),
        ("VTRACE_TOKENS", "maybe", "VTRACE_TOKENS='maybe' is not a yes or a no"),
        ("VTRACE_FAILURES", "many", "VTRACE_FAILURES='many' is not a whole number"),
        ("VTRACE_FAILURES", "", "VTRACE_FAILURES='' is not a whole number"),
        ("VTRACE_ATTENTION", "pagde", "unknown attention 'pagde'; did you mean 'paged'?"),
    ],
)
def test_an_unknown_or_unreadable_setting_is_an_error_that_names_the_right_one(name, text, said):
    with pytest.raises(UsageError) as caught:
        Options.from_environment({name: text})
    assert said == str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("", False), ("No", False), ("0", False), ("TRUE", True)]
)
def test_words_for_yes_and_no(text, value):
    assert value == Options.from_environment({"VTRACE_STRICT": text}).strict


def test_the_cache_is_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("VTRACE_CACHE", str(tmp_path))
    assert tmp_path == cache_dir()
    monkeypatch.setenv("VTRACE_CACHE", "~/elsewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tmp_path / "elsewhere" == cache_dir()
    monkeypatch.delenv("VTRACE_CACHE")
    assert tmp_path / ".cache" / "vllm-trace" == cache_dir()


def test_a_shadow_needs_every_call():
    with pytest.raises(UsageError, match="shadow needs level full"):
        Options(level="light", shadow=True).checked()
