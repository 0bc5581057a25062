"""The steps are whole, short, and readable on any terminal."""

from pathlib import Path

import pytest

from vllm_trace import cli, scenario
from vllm_trace.errors import UsageError
from vllm_trace.learn import book, exercises, lesson, passages, plan, questions, runs
from vllm_trace.learn.evidence import EVIDENCE
from vllm_trace.learn.progress import Progress
from vllm_trace.trace import read_trace

ROOT = Path(__file__).resolve().parents[2]
TWO_SCREENS = 2 * lesson.SCREEN
STEPS = plan.steps()


@pytest.fixture(params=["installed", "none"])
def tree(request):
    if request.param == "none":
        return None
    found = passages.Tree.installed()
    return found if found else pytest.skip("no vLLM is installed")


def reads(lines):
    """At most two screens of 80 columns, plain text."""
    assert len(lines) <= TWO_SCREENS
    for line in lines:
        assert len(line.removeprefix("# ")) <= 80, line
        assert line == line.rstrip(), line
        assert "\x1b" not in line


def book_of(one):
    return book.read(read_trace(runs.shipped(one.scenario)))


def test_thirteen_steps_of_the_plan_the_engine_step_and_part_3():
    assert list(range(1, 22)) == [one.number for one in STEPS]
    phases = [one.phase for one in STEPS]
    assert sorted(phases) == phases
    assert [13, 3, 5] == [
        len([p for p in phases if "2" <= p[0] <= "7"]),
        len([p for p in phases if p[0] == "8"]),
        len([p for p in phases if p[0] == "9"]),
    ]


@pytest.mark.parametrize("one", STEPS, ids=lambda s: s.name)
def test_a_step_has_all_of_its_parts(one):
    assert passages.of_step(one.number)
    assert one.scenario in scenario.names() and runs.shipped(one.scenario).is_file()
    assert scenario.load(one.scenario).seconds < 26
    assert one.see in EVIDENCE
    assert len(one.questions) == len(set(one.questions)) >= 3
    questions.ask(book_of(one), one.questions, "")
    for name in one.exercises:
        assert exercises.exercise(name)
    assert one is plan.step(one.name) is plan.step(plan.slug(one))


def test_every_evidence_and_question_is_used():
    assert set(EVIDENCE) == {one.see for one in STEPS}
    assert set(questions.MAKERS) == {name for one in STEPS for name in one.questions}


@pytest.mark.parametrize("one", STEPS, ids=lambda s: s.name)
def test_a_step_fits_two_screens(one, tree, progress):
    reads(lesson.opening(one, tree, progress))
    reads(lesson.reading(one, tree))
    for own in (True, False):
        reads(
            lesson.seeing(
                one, book_of(one), runs.Evidence(one.scenario, runs.shipped("hello"), own)
            )
        )
    for seed in range(5):
        asked = questions.ask(book_of(one), one.questions, str(seed))
        lines = [""] * 3
        for number, each in enumerate(asked, 1):
            lines += lesson.asking(number, len(asked), each)
        reads(lines)


@pytest.mark.parametrize(
    "scenario_name", ["batch", "mixed", "evict", "boundary", "abort", "prefix"]
)
def test_evidence_works_on_any_trace(scenario_name):
    """`--trace` takes a trace of anything."""
    made = book.read(read_trace(runs.shipped(scenario_name)))
    for name, view in EVIDENCE.items():
        lines = view(made)
        assert lines and all(len(line) <= 78 for line in lines), name
        assert len(lines) <= 30, name


def test_a_choice_that_was_recorded_is_shown_as_such():
    """With `run --attention paged` the engine itself chooses between V1 and V2."""
    made = book_of(plan.step("5"))
    assert "(it did not run)" in EVIDENCE["rule"](made)[0]
    for step in made.steps:
        if step.planned and book.Book.is_decode(made, step):
            variant = "V2" if step.number % 2 else "V1"
            step.planned.kernel, step.planned.variant = (
                f"mini.paged_attention_{variant.lower()}",
                variant,
            )
    lines = EVIDENCE["rule"](made)
    assert "the engine ran PagedAttention" in lines[0]
    decodes = [step for step in made.steps if made.is_decode(step)]
    assert ["V2" if step.number % 2 else "V1" for step in decodes] == [
        made.chosen(s) for s in decodes
    ]


@pytest.mark.parametrize("there", [True, False])
def test_the_own_backend_is_used_where_it_is(monkeypatch, there):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: object() if there else None)
    assert (["--attention", "paged"] if there else []) == runs.arguments_for("long")
    assert [] == runs.arguments_for("hello")


def test_the_map_fits(progress):
    listed = [(one.name, one.title) for one in exercises.all_of_them()]
    lines = lesson.overview(progress, listed)
    reads(lines)
    for one in STEPS:
        assert any(one.title in line for line in lines)
    assert "0 of 21 steps and 0 of 11 exercises passed" in lines[0]
    progress.passed |= {"5": "now", "ex1": "now"}
    lines = lesson.overview(progress, listed)
    assert "1 of 21 steps and 1 of 11 exercises passed" in lines[0]
    assert any(line.startswith("[x]  5") for line in lines)


# Names that do not exist -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("22", "there is no step 22; the nearest is 21"),
        ("0", "there is no step 0; the nearest is 1"),
        ("-3", "there is no step -3; the nearest is 1"),
        ("block-tabels", "unknown step 'block-tabels'; did you mean 'block-tables'?"),
    ],
)
def test_a_step_that_does_not_exist(name, said):
    with pytest.raises(UsageError) as caught:
        plan.step(name)
    assert said == str(caught.value)


def test_a_step_is_found_by_a_word_of_its_title():
    assert 15 == plan.step("continuous").number
    assert 17 == plan.step("MQA-and-GQA").number


def test_a_path_that_does_not_exist():
    with pytest.raises(UsageError, match="did you mean 'practical'"):
        plan.path("practcal")


# Paths -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("quick", 30, 30), ("practical", 60, 60), ("deep", 120, 180), ("production", 120, 120)],
)
def test_a_path_takes_as_long_as_the_tutorial_says(name, low, high, progress):
    way = plan.path(name)
    assert low <= way.minutes <= high
    reads(lesson.path_lines(way, progress))
    for stop in way.stops:
        words = stop.command.split()
        if words[:2] == ["vllm-trace", "learn"] and words[-1].isdigit():
            assert plan.step(words[-1]).minutes == stop.minutes


@pytest.mark.parametrize("way", plan.paths().values(), ids=lambda w: w.name)
def test_every_command_of_a_path_is_one_that_the_parser_takes(way):
    known = cli._parser()
    for stop in way.stops:
        if stop.is_page:
            assert (ROOT / stop.command).is_file()
            continue
        words = stop.command.split()
        assert "vllm-trace" == words[0]
        if words[1] in ("memory", "bench"):
            continue  # verbs of their own room, tested there
        assert words[1] == known.parse_args(words[1:]).verb


def test_a_path_shows_what_was_done(home):
    made = Progress.load()
    made.passed["3"] = "now"
    lines = lesson.path_lines(plan.path("quick"), made)
    assert any(line.startswith("[x]") and line.endswith("learn 3") for line in lines)
