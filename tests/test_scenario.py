"""Scenario files: what is accepted, what is said of the rest, and the workloads they make."""

from statistics import median

import pytest

from vllm_trace import scenario
from vllm_trace.errors import UsageError

GOOD = """
title = "One"
shows = "that it loads"
seed = 4

[engine]
model = "tiny-llama"

[prefixes]
system = 32
words = "You are "

[[requests]]
name = "a"
count = 40
tokens = { median = 60, sigma = 0.7, min = 5, max = 200 }
max_tokens = { median = 10, sigma = 0.4, min = 2, max = 30 }
every = 2

[[requests]]
name = "b"
prefix = "system"
tokens = 4
after = "a-0"

[[requests]]
name = "c"
prefix = "words"
prompt = "kind."

[expect]
finished = 42
"""


def load(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return scenario.load(str(path))


def test_a_scenario_of_the_user(tmp_path):
    made = load(tmp_path, GOOD)
    assert ("mine", "One", 4) == (made.name, made.title, made.seed)
    arrivals = made.arrivals(vocab_size=512)
    assert 42 == len(arrivals)
    assert ["a-0", "a-1", "a-39", "b", "c"] == [arrivals[i].name for i in (0, 1, 39, 40, 41)]
    assert [0, 2, 78] == [arrivals[i].step for i in (0, 1, 39)]
    assert (36, "a-0") == (len(arrivals[40].token_ids), arrivals[40].after)
    assert ("You are kind.", ()) == (arrivals[41].text, arrivals[41].token_ids)


def test_the_same_seed_makes_the_same_workload(tmp_path):
    made = load(tmp_path, GOOD).arrivals(512)
    assert made == load(tmp_path, GOOD).arrivals(512)
    other = load(tmp_path, GOOD.replace("seed = 4", "seed = 5")).arrivals(512)
    assert made[0].token_ids != other[0].token_ids


def test_lengths_are_spread_within_their_bounds(tmp_path):
    arrivals = load(tmp_path, GOOD.replace("count = 40", "count = 2000")).arrivals(512)[:2000]
    lengths = [len(arrival.token_ids) for arrival in arrivals]
    assert (5, 200) == (min(lengths), max(lengths))
    assert 50 < median(lengths) < 70
    answers = [arrival.max_tokens for arrival in arrivals]
    assert 2 <= min(answers) < 5 and max(answers) == 30
    assert (
        {3, 511}
        <= {token for arrival in arrivals for token in arrival.token_ids}
        <= {*range(3, 512)}
    )


def test_requests_with_a_prefix_share_it_to_the_token():
    arrivals = scenario.load("prefix").arrivals(2048)
    assert 100 == len(arrivals)
    assert 1 == len({arrival.token_ids[:160] for arrival in arrivals})
    assert 100 == len({arrival.token_ids for arrival in arrivals})


@pytest.mark.parametrize("name", scenario.names())
def test_every_scenario_loads_and_states_something(name):
    made = scenario.load(name)
    assert made.title and made.shows and made.expect and made.arrivals(512)
    assert len(made.title) <= 60
    assert made.expect["blocks_in_use_at_end"] == 0


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (
            'title = "One"',
            "titel = 'x'",
            "unknown key of scenario mine 'titel'; did you mean 'title'?",
        ),
        ('title = "One"', "", "scenario mine has no title"),
        ('title = "One"', "title = ", "scenario mine: Invalid value (at line 2, column 9)"),
        ('model = "tiny-llama"', "", "scenario mine names no model"),
        ("every = 2", "evry = 2", "unknown key of a request 'evry'; did you mean 'every'?"),
        ("sigma = 0.7, ", "", "is neither a number nor a table with median and sigma"),
        (
            "sigma = 0.7, ",
            "sigma = 1, mn = 2, ",
            "unknown key of a distribution 'mn'; did you mean 'min'?",
        ),
        (
            'prefix = "system"',
            'prefix = "sistem"',
            "unknown prefix 'sistem'; did you mean 'system'?",
        ),
        ('after = "a-0"', 'after = "a"', "unknown request 'a'"),
        ("tokens = 4", 'prompt = "x"', "request b mixes text and random tokens in one prompt"),
        ('prompt = "kind."', "tokens = 4", "request c mixes text and random tokens in one prompt"),
        ("finished = 42", 'finished = ">> 1"', "finished = '>> 1' is no statement"),
    ],
)
def test_a_mistake_is_said_before_an_engine_starts(tmp_path, before, after, said):
    assert before in GOOD
    with pytest.raises(UsageError) as error:
        load(tmp_path, GOOD.replace(before, after, 1))
    assert said in str(error.value)


def test_facts_are_held_against_statements(tmp_path):
    expect = """
        [expect]
        a = 3
        b = ">= 2"
        c = "< 2"
        d = "!= 4"
        "r.reason" = "length"
    """
    made = load(tmp_path, GOOD.partition("[expect]")[0] + expect)
    facts = {"a": 3, "b": 2, "c": 1, "d": 5, "r.reason": "length"}
    assert [] == made.failures(facts)
    wrong = {"a": 4, "b": 1, "c": 2, "d": 4, "r.reason": "abort"}
    assert [
        "a is 4, expected 3",
        "b is 1, expected >= 2",
        "c is 2, expected < 2",
        "d is 4, expected != 4",
        "r.reason is abort, expected length",
    ] == made.failures(wrong)
    # A statement about a number is not borne out by a word.
    assert ["b is x, expected >= 2"] == made.failures(facts | {"b": "x"})
    with pytest.raises(UsageError, match="unknown fact 'a'"):
        made.failures({"aa": 1})
