"""Answers the questions of docs/sql.md anew: ``.venv/bin/python docs/make_sql.py``.

Each block ```` ```sql TRACE ```` is run on the tables of the golden trace of that name, and its
result stands below it. A test compares them.
"""

import re
import tempfile
from functools import cache
from pathlib import Path

from vllm_trace.export import export
from vllm_trace.export.derived import connect
from vllm_trace.export.tenancies import COLUMNS
from vllm_trace.trace import read_trace

ROOT = Path(__file__).parent.parent
DOC = ROOT / "docs" / "sql.md"
GOLD = ROOT / "tests" / "gold"

QUESTION = re.compile(r"```sql (\w+)\n(.*?)```\n(\n\|.*?\n(?=\n|\Z))?", re.S)
"""A query, and the table below it if there is one."""


@cache
def tables(name: str):
    """DuckDB with the tables of a golden trace."""
    with tempfile.TemporaryDirectory() as folder:
        export(read_trace(GOLD / f"{name}.vtrace"), "parquet", f"{folder}/tables")
        database = connect(f"{folder}/tables")
        # Into memory, so that the folder can go.
        for (view,) in database.execute(
            "SELECT view_name FROM duckdb_views() WHERE NOT internal"
        ).fetchall():
            database.execute(f"CREATE TABLE kept_{view} AS FROM {view}; DROP VIEW {view}")
            database.execute(f"ALTER TABLE kept_{view} RENAME TO {view}")
        return database


def answer(name: str, query: str) -> str:
    """The result as a Markdown table."""
    found = tables(name).execute(query)
    rows = [[column[0] for column in found.description]]
    values = found.fetchall()
    numbers = [all(type(v) in (int, float) for v in column) for column in zip(*values)]
    rows.append(["--:" if number else "---" for number in numbers or [False] * len(rows[0])])
    rows += [["" if value is None else str(value) for value in row] for row in values]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def columns_of_blocks() -> str:
    lines = ["| column | |", "|---|---|", "| `process` | which pool |"]
    return "\n".join(lines + [f"| `{name}` | {text} |" for name, text in COLUMNS])


def fill(text: str) -> str:
    """The document with every answer made anew."""
    begin, end = "<!-- blocks -->", "<!-- /blocks -->"
    head, _, rest = text.partition(begin)
    text = f"{head}{begin}\n{columns_of_blocks()}\n{end}{rest.partition(end)[2]}"

    def answered(found: re.Match) -> str:
        name, query = found[1], found[2]
        return f"```sql {name}\n{query}```\n\n{answer(name, query)}\n"

    return QUESTION.sub(answered, text)


if __name__ == "__main__":
    DOC.write_text(fill(DOC.read_text(encoding="utf-8")), encoding="utf-8")
