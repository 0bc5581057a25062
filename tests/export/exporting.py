"""Traces as tables: of both readers, and in DuckDB."""

from collections import defaultdict
from pathlib import Path

from vllm_trace.events import EVENT_TYPES
from vllm_trace.export import ExportOptions, columns, export, fast
from vllm_trace.export.derived import connect
from vllm_trace.trace import read_trace

GOLD = Path(__file__).parent.parent / "gold"
NAMES = sorted(path.stem for path in GOLD.glob("*.vtrace"))


def exported(path, folder, **options):
    """DuckDB over the tables of a trace."""
    export(read_trace(path), "parquet", str(folder / "tables"), ExportOptions(**options))
    return connect(folder / "tables")


def rows(database, query):
    found = database.execute(query)
    names = [column[0] for column in found.description]
    return [dict(zip(names, row)) for row in found.fetchall()]


def whole(chunks):
    """All rows of each kind."""
    found = defaultdict(list)
    for chunk in chunks:
        for cls, batch in chunk.items():
            found[cls].extend(batch.to_pylist())
    return {cls: found[cls] for cls in EVENT_TYPES if cls in found}


def both(path, tokens=True):
    """The chunks of both readers, and what they found missing."""
    slow, quick = read_trace(path), read_trace(path)
    return (
        (whole(columns.chunks(slow, tokens)), slow.problems),
        (whole(fast.chunks(quick.files[0], tokens)), quick.problems),
    )
