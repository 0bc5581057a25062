"""DuckDB over exported tables."""

from __future__ import annotations

from pathlib import Path

import duckdb


def connect(folder: Path | str, memory: str = "") -> duckdb.DuckDBPyConnection:
    """DuckDB with a view for each table of an exported trace."""
    database = duckdb.connect()
    database.execute("SET threads = 1")
    database.execute("SET enable_progress_bar = false")  # it would go to stdout
    if memory:
        database.execute(f"SET memory_limit = '{memory}'")
    for file in sorted(Path(folder).glob("*.parquet")):
        database.execute(f"CREATE VIEW {file.stem} AS FROM read_parquet('{quoted(file)}')")
    return database


def quoted(path: Path | str) -> str:
    """For a place between single quotes."""
    return str(path).replace("'", "''")
