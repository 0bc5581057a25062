"""A real engine with a fault in it: the invariant named for the fault notices, at the first event."""

import pytest

from invariants import faults, make_doc
from vllm_trace.invariants.registry import choose

IDS = [one.id for one in faults.FAULTS]


@pytest.mark.parametrize("id", IDS)
def test_each_fault_is_caught_by_its_invariant_at_the_first_event(caught, id):
    seen = caught[id]
    assert seen.violation is not None, seen.report.text()
    assert (seen.fault.kind, seen.fault.steps_late) == (seen.kind, seen.steps_late)
    assert "violated" == seen.report.verdict and 1 == seen.report.exit_code


@pytest.mark.parametrize("id", IDS)
def test_the_story_leads_to_the_event(caught, id):
    seen = caught[id]
    judgement = next(
        each for each in seen.report.judgements if each.invariant.id == seen.fault.invariant
    )
    numbers = [int(line.split()[1]) for line in judgement.story]
    assert sorted(set(numbers)) == numbers
    assert seen.violation.event_number == numbers[-1]
    assert 2 <= len(numbers) <= 10


def test_every_invariant_has_a_fault_that_makes_it_fail():
    assert {one.id for one in choose() if one.built_in} == {one.invariant for one in faults.FAULTS}


def test_the_leak_report_names_holder_and_age(caught):
    message = caught["block-leaked"].violation.message
    assert message.startswith("r-2 was freed and still holds block 6")
    assert message.endswith("5 steps ago")


def test_the_failed_equation_is_in_the_message(caught):
    message = caught["lost-in-the-queue"].violation.message
    assert "free 1 + used 6 + null 1 != total 9 at step 6, after request.freed r-2" == message


@pytest.mark.parametrize("mark", ["rules", "faults"])
def test_the_tables_of_the_document_are_current(caught, mark):
    made = make_doc.rules_table() if mark == "rules" else make_doc.table(caught.values())
    held = make_doc.DOC.read_text()
    assert make_doc.fill(held, **{mark: made}) == held, make_doc.AGAIN
