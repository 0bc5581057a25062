"""Registering: what fits, and what a wrong rule is told."""

import pytest

from vllm_trace.errors import UsageError
from vllm_trace.events import KINDS
from vllm_trace.invariants import registry
from vllm_trace.invariants.registry import choose, describe, invariant, satisfies


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "REGISTRY", registry.built_ins().copy())


def test_a_users_own_is_three_lines():
    @invariant("few-blocks", "No request holds more than 100 blocks.", on="slots.allocated")
    def few_blocks(books, event):
        if books.num_blocks_of(event.request) > 100:
            yield "holds more than 100 blocks"

    (made,) = choose(["few-blocks"])
    assert (("slots.allocated", False, ""),) == made.handlers
    assert few_blocks is made.make()


def test_a_function_without_on_sees_every_kind():
    made = describe(lambda books, event: None, "all", "Sees all.")
    assert set(KINDS) == {kind for kind, _, _ in made.handlers}


class Misspelled:
    def blocks_takken(self, books, event): ...


class Short:
    def blocks_taken(self, event): ...


class Needy:
    def __init__(self, limit): ...

    def blocks_taken(self, books, event): ...


class Blind:
    limit = 3


@pytest.mark.parametrize(
    "rule, more, said",
    [
        (lambda event: None, {}, "(event) must take (books, event)"),
        (lambda books, event, limit: None, {}, "(books, event, limit) must take (books, event)"),
        (lambda books, event: None, {"on": "block.taken"}, "did you mean 'blocks.taken'"),
        (lambda books, event: None, {"needs": ["wroker"]}, "did you mean 'worker'"),
        (lambda books, event: None, {"releases": "0.32"}, "'0.32' is no range of releases"),
        (Misspelled, {}, "did you mean 'blocks_taken'"),
        (Short, {}, "blocks_taken(self, event) must take (self, books, event)"),
        (Needy, {}, "Needy(limit) must be made without arguments"),
        (Blind, {}, "Blind looks at no event"),
        (Short, {"on": "blocks.taken"}, "is a class: its methods say which events it wants"),
        ("text", {}, "text"),
    ],
)
def test_a_rule_that_does_not_fit_is_told_so_with_its_signature(rule, more, said):
    with pytest.raises(UsageError) as error:
        describe(rule, "mine", "Something holds.", **more)
    assert said in str(error.value)


@pytest.mark.parametrize("id, sentence", [("Big", "Holds."), ("", "Holds."), ("mine", " ")])
def test_an_id_and_a_sentence_are_needed(id, sentence):
    with pytest.raises(UsageError):
        describe(lambda books, event: None, id, sentence)


def test_an_id_stands_for_one_rule():
    with pytest.raises(UsageError, match="two invariants 'null-block'"):
        invariant("null-block", "Mine.")(lambda books, event: None)
    # A file that is loaded again registers the same function again.
    for _ in range(2):
        invariant("mine", "Mine.")(sample)
    with pytest.raises(UsageError, match="two invariants 'mine'"):
        invariant("mine", "Another.")(lambda books, event: None)


def sample(books, event):
    """A rule."""


def test_an_unknown_id_names_the_nearest():
    with pytest.raises(UsageError, match="did you mean 'null-block'"):
        choose(["nul-block"])


@pytest.mark.parametrize(
    "release, range_, holds",
    [
        ("0.32.0", ">=0.11,<0.34", True),
        ("0.32.0+cpu", ">=0.32", True),
        ("0.34.0", ">=0.11,<0.34", False),
        ("0.11.0", ">=0.11.2", False),
        ("0.11.2", ">=0.11.2", True),
        ("0.9.2", ">=0.11", False),
        ("1.0", "!=1.0.0", False),
        ("0.33.0rc1", "<=0.33", True),
        ("0.5", "", True),
    ],
)
def test_ranges_of_releases(release, range_, holds):
    assert holds is satisfies(release, range_)


def test_every_built_in_says_what_it_is_for_and_how_it_fails():
    for one in choose():
        assert one.doc and one.mutation and one.sentence.endswith("."), one.id
        assert one.releases.startswith(">=0.11"), one.id


def test_a_file_of_ones_own_is_loaded_and_a_broken_one_is_told_why(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from vllm_trace.invariants import invariant\n"
        "@invariant('mine-too', 'Holds.', on='blocks.taken')\n"
        "def mine(books, event): return None\n"
    )
    registry.load(path)
    registry.load(path)
    assert ["mine-too"] == [one.id for one in choose(["mine-too"])]
    path.write_text("1 / 0")
    with pytest.raises(UsageError, match="ZeroDivisionError"):
        registry.load(path)
    (tmp_path / "none.py").write_text("x = 1")
    with pytest.raises(UsageError, match="registers no invariant"):
        registry.load(tmp_path / "none.py")
    with pytest.raises(UsageError, match="is no Python file"):
        registry.load(tmp_path / "absent.py")


def test_the_examples_of_the_document_are_rules():
    """Every Python block with ``@invariant`` registers what it shows, and judges a trace."""
    from pathlib import Path

    from vllm_trace.invariants import check
    from vllm_trace.trace import read_trace

    root = Path(__file__).parent.parent.parent
    text = (root / "docs" / "invariants.md").read_text()
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    source = "\n".join(block for block in blocks if "@invariant" in block)
    assert 2 == source.count("@invariant(")
    exec(compile(source, "docs/invariants.md", "exec"), {})
    report = check(read_trace(root / "tests/gold/evict.vtrace"), ["few-blocks", "no-reuse"])
    assert [] == report.of("raised")
    assert ["few-blocks"] == [each.invariant.id for each in report.of("holds")]
    assert ["no-reuse"] == [violation.invariant for violation in report.violations]
