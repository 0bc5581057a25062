"""docs/sql.md: every query runs, and prints what stands below it."""

import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install 'vllm-trace[export]'")
pytest.importorskip("duckdb", reason="duckdb is not installed: pip install 'vllm-trace[export]'")

ROOT = Path(__file__).resolve().parent.parent.parent
spec = importlib.util.spec_from_file_location("make_sql", ROOT / "docs" / "make_sql.py")
make_sql = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_sql)

TEXT = make_sql.DOC.read_text(encoding="utf-8")
FOUND = list(make_sql.QUESTION.finditer(TEXT))
AGAIN = "make it anew: .venv/bin/python docs/make_sql.py"


def test_there_are_at_least_ten_questions():
    assert 10 <= len(FOUND) == len(re.findall(r"^### \d+\. ", TEXT, re.M))


@pytest.mark.parametrize("found", FOUND, ids=[str(n) for n in range(1, len(FOUND) + 1)])
def test_a_question_has_the_answer_that_is_printed(found):
    assert found[3] is not None, AGAIN
    made = make_sql.answer(found[1], found[2])
    assert made == found[3].strip(), AGAIN
    assert len(made.splitlines()) > 2, "an answer without a row shows nothing"


def test_the_columns_of_blocks_are_current():
    assert make_sql.columns_of_blocks() in TEXT, AGAIN
