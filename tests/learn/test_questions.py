"""Answers are computed from a trace: right ones are taken, mistakes explained, nothing is fixed."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trace.errors import TraceError
from vllm_trace.events import BlocksTaken
from vllm_trace.learn import book, plan, questions, runs
from vllm_trace.learn.questions import Question, ask, normal
from vllm_trace.trace import read_trace

SCENARIOS = (
    "hello",
    "batch",
    "chunked",
    "prefix",
    "preempt",
    "parallel",
    "evict",
    "boundary",
    "long",
)
STEPS = plan.steps()
_books = {}


def book_of(name):
    if name not in _books:
        _books[name] = book.read(read_trace(runs.shipped(name)))
    return _books[name]


def asked(one, seed):
    return ask(book_of(one.scenario), one.questions, str(seed))


@pytest.mark.parametrize("one", STEPS, ids=lambda s: s.name)
def test_right_is_right_and_a_mistake_is_explained(one):
    for seed in range(25):
        for each in asked(one, seed):
            assert each.is_right(each.answer) and each.is_right(f"  {each.answer} ")
            assert each.hints and each.why and "?" in each.text
            assert not each.choices or each.answer in each.choices
            for mistake in (*each.wrong, "", "-5", "1000000", "what"):
                assert not each.is_right(mistake), each
                said = each.judge(mistake)
                assert said
            for mistake, text in each.wrong.items():
                assert text == each.judge(mistake)


@pytest.mark.parametrize("one", STEPS, ids=lambda s: s.name)
def test_there_is_no_fixed_key(one):
    many = [asked(one, seed) for seed in range(30)]
    assert len({tuple(each.answer for each in some) for some in many}) >= 5
    for place in range(len(one.questions)):
        assert len({some[place].text for some in many}) >= 2


@pytest.mark.parametrize("one", STEPS, ids=lambda s: s.name)
def test_the_same_seed_asks_the_same(one):
    assert asked(one, 3) == asked(one, 3)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_question_can_be_asked_of_any_trace(scenario):
    names = [name for one in STEPS for name in one.questions]
    for seed in range(5):
        for each in ask(book_of(scenario), names, str(seed)):
            assert each.is_right(each.answer)
            assert not each.answer.startswith("-"), each


def test_answers_follow_the_trace():
    one = plan.step("4")
    a = ask(book_of("prefix"), one.questions, "1")
    b = ask(book_of("parallel"), one.questions, "1")
    assert [q.text for q in a] != [q.text for q in b]


# Answers worked out again, from other events than the question used --------------------------


def numbers(text):
    return [int(word.strip(".,()?:")) for word in text.split() if word.strip(".,()?:").isdigit()]


@pytest.mark.parametrize("seed", range(12))
def test_a_slot_is_the_one_that_the_kernel_received(seed):
    made = book_of("chunked")
    received = {}
    for step in made.steps:
        for token in step.tokens():
            received[made.name(token.request), token.position] = token.slot
    (each,) = ask(made, ["slot_of"], str(seed))
    name = each.text.removeprefix("The table of ").partition(" is ")[0]
    assert received[name, numbers(each.text)[-1]] == int(each.answer)


@pytest.mark.parametrize("scenario", ["preempt", "evict", "batch", "prefix"])
def test_the_next_block_is_the_one_that_was_taken_next(scenario):
    """The queue of a book agrees with what the pool gave out, all the way."""
    made = book_of(scenario)
    records = list(read_trace(runs.shipped(scenario)).records())
    for freed in made.freed:
        after = next(
            (
                r.event
                for r in records
                if r.number > freed.event and isinstance(r.event, BlocksTaken)
            ),
            None,
        )
        frees = [f.event for f in made.freed if f.event > freed.event]
        number = next((r.number for r in records if r.event is after), 0)
        touched = [n for n, _ in made.touched if freed.event < n < number]
        if after is not None and not touched and not any(f < number for f in frees):
            assert freed.queue_after[: len(after.blocks)] == after.blocks


def test_free_blocks_are_those_of_the_engine():
    for scenario in SCENARIOS:
        made = book_of(scenario)
        for one in made.allocations:
            assert 0 <= one.free < made.config.num_blocks
        for step in made.steps:
            for request, table in step.tables.items():
                length = step.before[request] + step.counts[request]
                assert len(table) == book.cdiv(length, made.block_size)


# Judging -----------------------------------------------------------------------------------


def question(answer, **more):
    return Question("?", answer, "because", ("look",), **more)


@pytest.mark.parametrize(
    ("answer", "given", "said"),
    [
        ("12", "13", "too large by one"),
        ("12", "11", "too small by one"),
        ("12", "40", "too large"),
        ("12", "4", "too small"),
        ("12", "many", "'many' is no number: answer with one number"),
        ("12", "", "there is no answer"),
        ("1, 2, 3", "1 2", "too few: 2 numbers, and there are 3"),
        ("1, 2, 3", "1 2 3 4", "too many: 4 numbers, and there are 3"),
        ("1, 2, 3", "3,2,1", "the right numbers in another order"),
        ("1, 2, 3", "1,2,4", "number 3 of the list is another one"),
    ],
)
def test_a_wrong_answer_is_told_how(answer, given, said):
    one = question(answer)
    assert not one.is_right(given)
    assert said == one.judge(given)


def test_a_choice_is_one_of_those_that_are_there():
    one = question("V1", choices=("V1", "V2"))
    assert one.is_right("v1")
    assert "'V3' is none of V1, V2" == one.judge("V3")
    assert "it is another one" == one.judge("V2")


@given(st.integers(0, 10**9), st.sampled_from(["{}", " {} ", "{:,}", "{:_}"]))
def test_a_number_is_taken_however_it_is_written(number, form):
    text = form.format(number)
    if "," in text:  # 1,000 reads like a list of two
        return
    assert question(str(number)).is_right(text)


@given(st.text())
def test_nothing_typed_breaks_the_judge(text):
    assert isinstance(normal(text), str)
    one = question("12", wrong={"13": "off"})
    assert one.is_right(text) or one.judge(text)
    several = question("1, 2")
    assert several.is_right(text) or several.judge(text)


def test_a_mistake_that_happens_to_be_right_is_none():
    made = book_of("hello")
    for seed in range(60):
        for name in questions.MAKERS:
            (each,) = ask(made, [name], str(seed))
            assert normal(each.answer) not in {normal(key) for key in each.wrong}


def test_a_light_trace_cannot_be_asked(tmp_path):
    class Light:
        level = "light"

    with pytest.raises(TraceError, match="level full"):
        book.read(Light())


def test_random_is_not_the_machine_s():
    """The questions do not touch the global generator."""
    random.seed(1)
    before = random.getstate()
    asked(plan.step("3"), 1)
    assert before == random.getstate()
