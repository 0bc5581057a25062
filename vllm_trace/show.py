"""``show``: a trace as tables in the terminal, whole or filtered; ``live`` shows a growing one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from vllm_trace import render
from vllm_trace.errors import UsageError, unknown
from vllm_trace.events import KINDS, EngineConfigured, StepScheduled, StepUpdated, to_dict
from vllm_trace.naming import requests_called
from vllm_trace.state import KVState
from vllm_trace.summary import Summary
from vllm_trace.trace import REQUEST_LISTS, Record, Trace

OPEN = 1 << 62
"""A last step that no trace reaches."""


@dataclass(frozen=True)
class Filter:
    """What to keep."""

    request: str = ""
    """As a user names it; ``naming.requests_called`` finds it."""
    first_step: int = 0
    last_step: int = OPEN
    kinds: tuple[str, ...] = ()
    """Kinds of events, or their beginnings: ``blocks`` is all of ``blocks.*``."""

    @classmethod
    def parse(cls, request: str, step: str, kind: str) -> Filter:
        """From the flags ``--request``, ``--step 5`` or ``5-9``, ``--kind a,b``.

        Raises: ``UsageError`` for a step that is no number, or a kind that does not exist.
        """
        first, last = 0, OPEN
        if step:
            head, _, tail = step.partition("-")
            try:
                first = int(head or 0)
                last = int(tail or (last if step.endswith("-") else first))
            except ValueError:
                raise UsageError(f"--step {step!r} is neither N nor N-M") from None
        kinds = tuple(k.strip() for k in kind.split(",") if k.strip())
        for name in kinds:
            if not any(known.startswith(name) for known in KINDS):
                raise unknown("kind of event", name, KINDS, f"Known: {', '.join(sorted(KINDS))}")
        return cls(request, first, last, kinds)

    def covers(self, step: int) -> bool:
        return self.first_step <= step <= self.last_step

    def check(self, what: str) -> None:
        """Raise ``UsageError`` when a view cannot be filtered like this."""
        if self.kinds and what != "events":
            raise UsageError(f"--kind is for events, not for {what}", hint="Try: show TRACE events")
        if what == "kernels" and self != Filter():
            raise UsageError(
                "kernels are added up over the whole trace",
                hint="Of one step: show TRACE events --kind attention --step N",
            )


def select(trace: Trace, wanted: Filter) -> Summary:
    """The summary of a trace with only the steps and requests that are wanted."""
    summary = Summary.of(trace)
    if wanted.request:
        known = {life.request: life.name for life in summary.requests}
        found = requests_called(known, wanted.request)
        summary.requests = [life for life in summary.requests if life.request in found]
        first = min(life.first_step for life in summary.requests)
        last = max(life.last_step for life in summary.requests)
        summary.steps = [step for step in summary.steps if first <= step.step <= last]
    summary.steps = [step for step in summary.steps if wanted.covers(step.step)]
    if wanted.last_step < OPEN or wanted.first_step:
        summary.requests = [
            life
            for life in summary.requests
            if life.first_step <= wanted.last_step and life.last_step >= wanted.first_step
        ]
    return summary


def view(trace: Trace, what: str, wanted: Filter, limit: int, width: int = 80) -> RenderableType:
    """One view of a trace as something that rich prints, in ``width`` columns.

    Of several engines (data parallel): one after the other, each with its own steps and its own pool.
    """
    wanted.check(what)
    if parts := _taken_apart(trace):
        shown = _of_each(parts, lambda part: view(part, what, wanted, limit, width))
        return Group(*(Group(Text(name, style="bold underline"), one, "") for name, one in shown))
    if what == "blocks":
        return pool_map(trace, wanted, max(8, width - 16))
    if what == "summary" and wanted == Filter():
        return render.report(Summary.of(trace))
    summary = select(trace, wanted)
    if what == "steps":
        return render.steps(summary.steps, limit)
    if what == "requests":
        return render.requests(summary.requests, limit)
    if what == "kernels":
        return render.kernels_view(summary, limit)
    # Totals of the whole trace beside rows of a part of it would read as belonging together.
    return render.excerpt(summary, limit=limit)


def data(trace: Trace, what: str, wanted: Filter) -> Any:
    """The same as plain values, for ``--json``; of several engines a list of such documents."""
    if parts := _taken_apart(trace):
        each = _of_each(parts, lambda part: data(part, what, wanted))
        return {"schema": 1, "engines": [{"name": name} | document for name, document in each]}
    wanted.check(what)
    if what == "blocks":
        columns = [column.to_dict() for column in pool_columns(trace, wanted)]
        return {"schema": 1, "columns": columns, "problems": trace.problems}
    told = select(trace, wanted).to_dict()
    if what == "summary":
        return told
    if what == "kernels":
        fields = ("kernels", "kernel_steps", "replayed_ns", "rule", "shadow", "problems")
        return {"schema": 1} | {name: told[name] for name in fields}
    return {"schema": 1, what: told[what], "problems": told["problems"]}


def _taken_apart(trace: Trace) -> list[Trace]:
    """The engines of a trace; nothing when there is only one."""
    engines = trace.engines()
    return engines if len(engines) > 1 else []


def _of_each(parts: list[Trace], told: Callable[[Trace], Any]) -> list[tuple[str, Any]]:
    """(engine, what is told of it); an engine that never had the request asked for is left out.

    Raises: ``UsageError`` when none of them had it.
    """
    made: list[tuple[str, Any]] = []
    refused: list[UsageError] = []
    for number, part in enumerate(parts, 1):
        try:
            of_it = told(part)
        except UsageError as error:
            refused.append(error)
        else:
            made.append((f"Engine {number} of {len(parts)}: {part.path_of(0).stem}", of_it))
    if not made:
        raise refused[0]
    return made


# Raw events -----------------------------------------------------------------------------


def select_events(trace: Trace, wanted: Filter) -> Iterator[Record]:
    """Records that pass the filter. A record belongs to the step that it leads up to."""
    held: list[Record] = []
    numbers = _numbers_wanted(trace, wanted)
    for record in trace.records():
        event = record.event
        if wanted.kinds and not event.kind.startswith(wanted.kinds):
            if not isinstance(event, StepScheduled | StepUpdated):
                continue
        elif not numbers or _speaks_of(event, numbers):
            held.append(record)
        step = getattr(event, "step", None)
        if step is None and len(held) < 4096:
            continue
        if step is None or wanted.covers(step):
            yield from held
        held = []
    if wanted.last_step >= OPEN:
        yield from held


def _numbers_wanted(trace: Trace, wanted: Filter) -> set[int]:
    if not wanted.request:
        return set()
    for _ in trace.records():  # a first time, to learn the names
        pass
    return {*requests_called(trace.names, wanted.request)}


def _speaks_of(event: Any, numbers: set[int]) -> bool:
    own = getattr(event, "request", None)
    return own in numbers or not numbers.isdisjoint(getattr(event, "requests", None) or ())


def describe(trace: Trace, record: Record) -> str:
    """One event on one line, with names for requests."""
    fields = to_dict(record.event)
    kind = fields.pop("kind")
    for key in ("request", *REQUEST_LISTS):
        if key in fields:
            fields[key] = _named(trace.names, fields[key])
    if fields.get("request") == fields.get("request_id"):
        fields.pop("request_id", None)
    parts = [
        f"{key}={_brief(value)}" for key, value in fields.items() if value not in (None, [], {})
    ]
    return f"{record.number:>7} {kind:<18} {' '.join(parts)}".replace("\n", "\u240a")


def _named(names: Mapping[int, str], given: Any) -> Any:
    if isinstance(given, list):
        return [_named(names, number) for number in given]
    return names.get(given, f"#{given}")


def _brief(value: Any) -> str:
    if isinstance(value, list):
        words = [_brief(each) for each in value]
        if len(words) > 12:
            words = [*words[:10], f"… {len(value)} in all"]
        return f"[{', '.join(words)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_brief(each)}" for key, each in value.items()) + "}"
    return str(value)


def printer(trace: Trace, wanted: Filter, out: Callable[[str], None], as_json: bool) -> None:
    """Print raw events, one a line."""
    import msgspec

    for record in select_events(trace, wanted):
        if as_json:
            line = {"event": record.number, "process": record.process} | to_dict(record.event)
            out(msgspec.json.encode(line).decode())
        else:
            out(describe(trace, record))


# The pool over time ---------------------------------------------------------------------


@dataclass
class Column:
    """The pool after a step: for each block its owner's number, -1 cached, -2 free."""

    step: int
    owners: list[int] = field(default_factory=list)
    shared: set[int] = field(default_factory=set)

    def last_used(self) -> int:
        """The highest block that is held or cached; 0 when none is."""
        owners = self.owners
        return next((b for b in range(len(owners) - 1, 0, -1) if owners[b] != FREE), 0)

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "owners": self.owners, "shared": sorted(self.shared)}


SHARED, FREE, CACHED = -3, -2, -1
_STYLES = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green",
           "bright_yellow", "bright_blue", "bright_magenta", "bright_cyan")  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def column_of(state: KVState, step: int, named: Container[int] = ()) -> Column:
    """The pool as it is now. A shared block goes to one of its owners, to a named one if it can."""
    size = state.config.num_blocks if state.config else 0
    made = Column(step, [FREE] * size)
    for block in state.hashes:
        if block < size:
            made.owners[block] = CACHED
    seen: set[int] = set()
    for request, table in sorted(state.tables.items(), key=lambda item: item[0] in named):
        for block in {b for row in table for b in row if 0 < b < size}:
            if block in seen:
                made.shared.add(block)
            seen.add(block)
            made.owners[block] = request
    return made


def pool_columns(trace: Trace, wanted: Filter) -> Iterator[Column]:
    """The pool after each step's schedule.

    Raises: ``UsageError`` when the trace does not tell whose the blocks are.
    """
    if trace.level == "light":
        raise UsageError(
            "a trace of level light holds no block tables", hint="Record with --level full"
        )
    state = KVState()
    named = _numbers_wanted(trace, wanted)
    scheduler: int | None = None
    for record in trace.records():
        if type(record.event) is EngineConfigured:
            if scheduler not in (None, record.process):
                raise UsageError(
                    "this trace has several engines (data parallel), each with blocks of its own",
                    hint=f"Show the file of one, such as {trace.path_of(record.process)}",
                )
            scheduler = record.process
        state.apply(record.event)
        if type(record.event) is StepScheduled and wanted.covers(record.event.step):
            yield column_of(state, record.event.step, named)


def pool_map(trace: Trace, wanted: Filter, width: int = 64) -> RenderableType:
    """Blocks down, steps across: a letter for each owner, ``#`` shared, ``·`` cached."""
    steps = sum(type(e) is StepScheduled and wanted.covers(e.step) for e in trace.events())
    stride = max(1, -(-steps // width))
    shown: list[Column] = []
    last = size = used = 0
    for place, column in enumerate(pool_columns(trace, wanted)):
        if place % stride == 0:  # a long trace of a large pool would not fit as a whole
            shown.append(column)
        last, size = column.step, max(size, len(column.owners))
        used = max(used, column.last_used())
    if not shown:
        return Text("no such step in this trace")
    named = {*requests_called(trace.names, wanted.request)} if wanted.request else set()
    rows_per_line = max(1, -(-used // 48))
    lines = [
        Text(f"steps {shown[0].step} to {last}, a column is {_many(stride, 'step')}"),
        Text(
            "letter: held by a request  "
            + ("-: by another" if named else "#: by several")
            + "  ·: free, but cached  blank: free",
            style="dim",
        ),
    ]
    if rows_per_line > 1:
        text = f"a line is {rows_per_line} blocks and shows what most of them are"
        lines.append(Text(text, style="dim"))
    for first in range(1, used + 1, rows_per_line):
        last = min(used, first + rows_per_line - 1)
        line = Text(f"{span_of(first, last):>9} ")
        for column in shown:
            line.append(*_cell(column, first, last, named))
        lines.append(line)
    if used < size - 1:
        lines.append(
            Text(f"{span_of(used + 1, size - 1):>9} free in all of these steps", style="dim")
        )
    owners = sorted({o for column in shown for o in column.owners if o >= 0})
    owners = [owner for owner in owners if not named or owner in named]
    return Group(*lines, Text(), legend(trace.names, owners))


def span_of(first: int, last: int) -> str:
    """``7`` or ``7–9``."""
    return f"{first}" if first == last else f"{first}–{last}"


def _many(number: int, what: str) -> str:
    return f"{number} {what}{'s' if number != 1 else ''}"


def legend(names: Mapping[int, str], owners: list[int], limit: int = 20) -> RenderableType:
    """Letters with names; a line is broken between two of them only."""
    lines = [Text()]
    for owner in owners[:limit]:
        name = render.short_name(names.get(owner, str(owner)))
        if len(lines[-1]) + len(name) + 4 > 80:
            lines.append(Text())
        lines[-1].append(_LETTERS[owner % len(_LETTERS)], style=_STYLES[owner % len(_STYLES)])
        lines[-1].append(f" {name}  ", style="dim")
    if len(owners) > limit:
        lines.append(Text(f"and {len(owners) - limit} more", style="dim"))
    return Group(*lines)


def _cell(column: Column, first: int, last: int, named: set[int]) -> tuple[str, str]:
    """Character and style of some blocks after a step; ``named``: the requests asked for, or none."""
    what = Counter(
        SHARED if first + place in column.shared and not named else owner
        for place, owner in enumerate(column.owners[first : last + 1])
    )
    owner, _ = what.most_common(1)[0] if what else (FREE, 0)
    if named and (mine := named.intersection(what)):
        owner = min(mine)
    if named and owner >= 0 and owner not in named:
        return "-", "dim"
    return style_of(owner)


def style_of(owner: int) -> tuple[str, str]:
    """Character and style of a block with that owner, or ``FREE``, ``CACHED``, ``SHARED``."""
    if owner == FREE:
        return " ", ""
    if owner == CACHED:
        return "·", "dim"
    if owner == SHARED:
        return "#", "bold"
    return _LETTERS[owner % len(_LETTERS)], _STYLES[owner % len(_STYLES)]
