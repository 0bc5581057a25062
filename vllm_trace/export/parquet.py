"""Parquet: a table for each kind of event, and ``blocks``, ``requests``, ``steps``, ``trace``.

A folder with a file for each table, all of them always there, so that a query never lacks one. What
the columns are stands in ``tables``; how blocks, requests and steps are made of events in
``tenancies``, ``lives`` and ``steps``. Memory is bounded by the row groups that are open.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vllm_trace import __version__
from vllm_trace.events import EVENT_TYPES, SCHEMA_VERSION, Event
from vllm_trace.export import (
    Exported,
    ExportOptions,
    columns,
    exporter,
    holding,
    lives,
    steps,
    tenancies,
)
from vllm_trace.export.tables import SCHEMAS, TRACE, table_name
from vllm_trace.trace import Trace

ROWS = 65_536
"""Most rows of a row group."""

BYTES = 4 * 1024 * 1024
"""Bytes of columns after which a row group is written, however few rows it has."""

OWN = ("request_id", "name", "traceparent", "settings")
"""Texts of which no two are the same: a dictionary of them is no use."""

ALIKE = ("num_tokens", "num_output_tokens")
"""Lists of numbers that are nearly all 1: zstd alone makes as little of them, and sooner."""

BY_RANGE = ("number", "step", "at_ns", "request", "block", "from_event", "to_event", "arrived_ns")
"""Columns with the least and the largest value of each row group, by which a query leaves groups out."""

FAST_FROM = 700_000
"""Bytes of a trace file from which on it pays to load the compiled reader (about 40,000 events)."""


class TableFile:
    """One table: holds batches until they make a row group."""

    def __init__(self, path: Path, schema: pa.Schema, about: dict[str, str]) -> None:
        self.num_rows = 0
        self._schema = schema.with_metadata(about)
        self._writer = pq.ParquetWriter(path, self._schema, **_encodings(schema))
        self._held: list[pa.RecordBatch] = []
        self._rows = self._bytes = 0

    def add(self, batch: pa.RecordBatch) -> None:
        self._held.append(batch)
        self._rows += batch.num_rows
        self._bytes += batch.get_total_buffer_size()
        if self._rows >= ROWS or self._bytes >= BYTES:
            self._write()

    def _write(self) -> None:
        table = pa.Table.from_batches(self._held)
        self._writer.write_table(table.replace_schema_metadata(self._schema.metadata), ROWS)
        self.num_rows += self._rows
        self._held, self._rows, self._bytes = [], 0, 0

    def abandon(self) -> None:
        """Close the file as it is; whoever opened the folder removes it."""
        self._writer.close()

    def close(self, about: dict[str, str]) -> None:
        if self._held:
            self._write()
        self._writer.add_key_value_metadata(about)
        self._writer.close()


def _encodings(schema: pa.Schema) -> dict[str, Any]:
    """zstd; numbers as differences of neighbours, texts by dictionary, hashes as they are."""
    texts, encodings = [], {}
    for path, kind in _leaves(schema):
        name = path.partition(".")[0]
        if pa.types.is_string(kind) and name not in OWN:
            texts.append(path)
        elif pa.types.is_int64(kind) and (name not in ALIKE or path == name):
            encodings[path] = "DELTA_BINARY_PACKED"
        elif not pa.types.is_boolean(kind):
            encodings[path] = "PLAIN"
    return {
        "compression": "zstd",
        "compression_level": 1,
        "use_dictionary": texts or False,
        "write_statistics": [name for name in schema.names if name in BY_RANGE],
        "column_encoding": encodings or None,
        "write_batch_size": 8192,
    }


def _leaves(schema: pa.Schema) -> Iterator[tuple[str, pa.DataType]]:
    def below(path: str, kind: pa.DataType) -> Iterator[tuple[str, pa.DataType]]:
        if pa.types.is_map(kind):
            yield from below(f"{path}.key_value.key", kind.key_type)
            yield from below(f"{path}.key_value.value", kind.item_type)
        elif pa.types.is_list(kind):
            yield from below(f"{path}.list.element", kind.value_type)
        elif pa.types.is_struct(kind):
            for field in kind:
                yield from below(f"{path}.{field.name}", field.type)
        else:
            yield path, kind

    for field in schema:
        yield from below(field.name, field.type)


@exporter("parquet", "Tables for SQL: one for each kind of event", to="folder", suffix=".parquet")
def export(trace: Trace, out: Path, options: ExportOptions) -> Exported:
    """Write all tables into the folder."""
    about = {
        "vllm_trace.version": __version__,
        "vllm_trace.schema": str(SCHEMA_VERSION),
        "vllm": str(trace.header.get("vllm", "")),
        "level": trace.level,
    }
    files = {cls: _table(out, table_name(cls.kind), SCHEMAS[cls], about) for cls in EVENT_TYPES}
    made = {
        name: _table(out, name, schema, about)
        for name, schema in (
            ("blocks", tenancies.SCHEMA), ("steps", steps.SCHEMA), ("requests", lives.SCHEMA),
        )
    }  # fmt: skip
    try:
        with _one_heap():
            _fill(trace, options.tokens, files, made)
    except BaseException:
        for table in (*files.values(), *made.values()):
            table.abandon()
        raise
    problems = trace.problems
    ended = {
        "vllm_trace.complete": "no" if problems else "yes",
        "vllm_trace.problems": json.dumps(problems),
    }
    for table in (*files.values(), *made.values()):
        table.close(ended)
    _processes(trace, _table(out, "trace", TRACE, about), ended)
    counts = {"events": sum(table.num_rows for table in files.values())}
    return Exported(
        counts | {"tenancies of blocks": made["blocks"].num_rows},
        notes=["the tables are marked: vllm_trace.complete is no"] if problems else [],
    )


@contextlib.contextmanager
def _one_heap() -> Iterator[None]:
    """Arrow's memory from the C library's heap, as NumPy's: freed pages of its own pool stay with that pool,
    and a long trace leaves more and more of them."""
    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def _table(out: Path, name: str, schema: pa.Schema, about: dict[str, str]) -> TableFile:
    return TableFile(out / f"{name}.parquet", schema, about | {"table": name})


def _fill(
    trace: Trace, tokens: bool, files: dict[type[Event], TableFile], made: dict[str, TableFile]
) -> None:
    chunks, makers = _reader(trace, tokens)
    for chunk in chunks:
        for cls, batch in chunk.items():
            files[cls].add(batch)
        for name, maker in makers.items():
            for batch in maker.take(chunk):
                made[name].add(batch)
    for name, maker in makers.items():
        for batch in maker.end():
            made[name].add(batch)


def _reader(trace: Trace, tokens: bool) -> tuple[Iterator[columns.Chunk], dict[str, Any]]:
    """Chunks and what makes tables of them: compiled where that pays and can be had."""
    size = sum(file.path.stat().st_size for file in trace.files)
    if size >= FAST_FROM:
        # RuntimeError: numba finds no folder that it may keep what it compiles in.
        with contextlib.suppress(ImportError, RuntimeError):
            from vllm_trace.export import compiled

            found = compiled if len(trace.files) == 1 else columns
            return found.chunks(trace, tokens), _makers(trace, compiled)
    return columns.chunks(trace, tokens), _makers(trace)


def _makers(trace: Trace, compiled: Any = None) -> dict[str, Any]:
    # No file of level light has outputs.
    answers = any(file.header.get("level") != "light" for file in trace.files)
    return {
        "blocks": tenancies.Tenancies(compiled.fold if compiled else holding.fold),
        "steps": steps.Steps(compiled.count_tokens if compiled else steps.count_tokens),
        "requests": lives.Lives(compiled.live if compiled else lives.fold, answers),
    }


def _processes(trace: Trace, table: TableFile, about: dict[str, str]) -> None:
    """The table ``trace``: what each file's header and footer say."""
    rows = []
    for number, file in enumerate(trace.files):
        header, clock = file.header, file.header.get("clock", {})
        rows.append(
            {
                "process": number,
                "file": file.path.name,
                "num_events": file.num_events,
                "dropped": file.dropped,
                "truncated": file.truncated or None,
                "problems": trace.problems_of(file),
            }
            | {key: header.get(key) for key in TRACE.names if key in header}
            | {key: clock.get(key) for key in ("monotonic_ns", "unix_ns")}
        )
    table.add(pa.RecordBatch.from_pylist(rows, schema=TRACE))
    table.close(about)
