"""``show``: a trace as tables in the terminal, whole, filtered, or growing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from vllm_trace import render
from vllm_trace.errors import UsageError, unknown
from vllm_trace.events import KINDS, StepScheduled, StepUpdated, to_dict
from vllm_trace.state import KVState
from vllm_trace.summary import RequestLife, Summary
from vllm_trace.trace import Record, Trace, read_trace

VIEWS = ("summary", "steps", "blocks", "requests", "kernels", "events")


@dataclass(frozen=True)
class Filter:
    """What to keep."""

    request: str = ""
    """A request's name, or a part of it that only one has."""
    first_step: int = 0
    last_step: int = 1 << 62
    kinds: tuple[str, ...] = ()
    """Kinds of events, or their beginnings: ``blocks`` is all of ``blocks.*``."""

    @classmethod
    def parse(cls, request: str, step: str, kind: str) -> Filter:
        """From the flags ``--request``, ``--step 5`` or ``5-9``, ``--kind a,b``.

        Raises: ``UsageError`` for a step that is no number, or a kind that does not exist.
        """
        first, last = 0, 1 << 62
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
                raise unknown("kind of event", name, KINDS)
        return cls(request, first, last, kinds)

    def covers(self, step: int) -> bool:
        return self.first_step <= step <= self.last_step

    @property
    def is_open(self) -> bool:
        return self == Filter()


def find_request(trace: Trace, name: str, lives: list[RequestLife]) -> RequestLife:
    """The request of that name, or the only one that has it as a part.

    Raises: ``UsageError`` when there is none, or several.
    """
    exact = [life for life in lives if life.name == name]
    found = exact or [life for life in lives if name in life.name]
    if not found:
        raise unknown("request", name, [life.name for life in lives])
    if len(found) > 1:
        some = ", ".join(life.name for life in found[:5])
        raise UsageError(f"{len(found)} requests are called {name!r}: {some} …")
    return found[0]


def view(trace: Trace, what: str, wanted: Filter, limit: int) -> RenderableType:
    """One view of a trace as something that rich prints."""
    if what == "blocks":
        return pool_map(trace, wanted)
    summary = Summary.of(trace)
    lives = summary.requests
    if wanted.request:
        lives = [find_request(trace, wanted.request, lives)]
    shown = [step for step in summary.steps if wanted.covers(step.step)]
    if wanted.request:
        shown = [s for s in shown if lives[0].first_step <= s.step <= lives[0].last_step]
    if what == "steps":
        return render.steps(shown, limit)
    if what == "requests":
        return render.requests(lives, limit)
    if what == "kernels":
        return render.kernels(summary.kernels)
    summary.steps, summary.requests = shown, lives
    return render.report(summary)


def data(trace: Trace, what: str, wanted: Filter) -> Any:
    """The same as plain values, for ``--json``."""
    if what == "blocks":
        return {"schema": 1, "columns": [column.to_dict() for column in pool_columns(trace, wanted)]}
    told = Summary.of(trace).to_dict()
    if what == "summary":
        return told
    rows = told[what]
    if what == "steps":
        rows = [row for row in rows if wanted.covers(row["step"])]
    if what == "requests" and wanted.request:
        rows = [row for row in rows if wanted.request in row["name"]]
    return {"schema": 1, what: rows, "problems": told["problems"]}


# Raw events -----------------------------------------------------------------------------


def select(trace: Trace, wanted: Filter) -> Iterator[Record]:
    """Records that pass the filter. A record belongs to the step that it leads up to."""
    held: list[Record] = []
    for record in trace.records():
        event = record.event
        if wanted.kinds and not event.kind.startswith(wanted.kinds):
            if not isinstance(event, StepScheduled | StepUpdated):
                continue
        elif _speaks_of(trace, event, wanted.request):
            held.append(record)
        step = getattr(event, "step", None)
        if step is None and len(held) < 4096:
            continue
        if step is None or wanted.covers(step):
            yield from held
        held = []
    if wanted.last_step >= 1 << 62:
        yield from held


def _speaks_of(trace: Trace, event: Any, name: str) -> bool:
    if not name:
        return True
    numbers = {n for n, known in trace.names.items() if name in known}
    own = getattr(event, "request", None)
    return own in numbers or bool(numbers & set(getattr(event, "requests", None) or ()))


def describe(trace: Trace, record: Record) -> str:
    """One event on one line, with names for requests."""
    fields = to_dict(record.event)
    kind = fields.pop("kind")
    if "request" in fields:
        fields["request"] = trace.names.get(fields["request"], f"#{fields['request']}")
    parts = [f"{key}={_brief(value)}" for key, value in fields.items() if value not in (None, [], {})]
    return f"{record.number:>7} {kind:<18} {' '.join(parts)}"


def _brief(value: Any) -> str:
    if isinstance(value, list) and len(value) > 12:
        return "[" + ", ".join(map(str, value[:10])) + f", … {len(value)}]"
    return str(value)


# The pool over time ---------------------------------------------------------------------


@dataclass
class Column:
    """The pool after a step: for each block its owner's number, -1 cached, -2 free."""

    step: int
    owners: list[int] = field(default_factory=list)
    shared: set[int] = field(default_factory=set)

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "owners": self.owners, "shared": sorted(self.shared)}


FREE, CACHED = -2, -1
_STYLES = ("red", "green", "yellow", "blue", "magenta", "cyan", "bright_red", "bright_green",
           "bright_yellow", "bright_blue", "bright_magenta", "bright_cyan")  # fmt: skip
_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def column_of(state: KVState, step: int) -> Column:
    """The pool as it is now."""
    size = state.config.num_blocks if state.config else 0
    made = Column(step, [FREE] * size)
    for block in state.hashes:
        if block < size:
            made.owners[block] = CACHED
    seen: set[int] = set()
    for request, table in state.tables.items():
        for block in {b for row in table for b in row if 0 < b < size}:
            if block in seen:
                made.shared.add(block)
            seen.add(block)
            made.owners[block] = request
    return made


def pool_columns(trace: Trace, wanted: Filter) -> Iterator[Column]:
    """The pool after each step's schedule."""
    state = KVState()
    for record in trace.records():
        state.apply(record.event)
        if type(record.event) is StepScheduled and wanted.covers(record.event.step):
            yield column_of(state, record.event.step)


def pool_map(trace: Trace, wanted: Filter, width: int = 64) -> RenderableType:
    """Blocks down, steps across: a letter for each owner, ``#`` shared, ``·`` cached."""
    columns = list(pool_columns(trace, wanted))
    if not columns:
        return Text("no step in this trace")
    stride = max(1, -(-len(columns) // width))
    shown = columns[::stride]
    size = len(shown[0].owners)
    rows_per_line = max(1, -(-(size - 1) // 48))
    lines = [Text(f"steps {shown[0].step}–{columns[-1].step}, a column is {stride} step(s); ")]
    lines[0].append("letters are requests, # shared, · cached and free, blank free", style="dim")
    for first in range(1, size, rows_per_line):
        last = min(size - 1, first + rows_per_line - 1)
        label = f"{first}" if first == last else f"{first}–{last}"
        line = Text(f"{label:>9} ")
        for column in shown:
            line.append(*_cell(column, first, last))
        lines.append(line)
    legend = Text("\n")
    owners = {o for column in shown for o in column.owners if o >= 0}
    for owner in sorted(owners)[:20]:
        legend.append(_LETTERS[owner % len(_LETTERS)], style=_STYLES[owner % len(_STYLES)])
        legend.append(f" {trace.names.get(owner, owner)}  ", style="dim")
    if len(owners) > 20:
        legend.append(f"and {len(owners) - 20} more", style="dim")
    return Group(*lines, legend)


def _cell(column: Column, first: int, last: int) -> tuple[str, str]:
    owners = column.owners[first : last + 1]
    owner, _ = Counter(owners).most_common(1)[0]
    if owner == FREE:
        return " ", ""
    if owner == CACHED:
        return "·", "dim"
    style = _STYLES[owner % len(_STYLES)]
    if any(block in column.shared for block in range(first, last + 1)):
        return "#", style
    return _LETTERS[owner % len(_LETTERS)], style


# Following ------------------------------------------------------------------------------


def follow(path: Path, console: Console, *, seconds: float = 0, every: float = 0.5) -> None:
    """Show the end of a growing trace until Ctrl-C, or for so many seconds."""
    began = time.monotonic()
    with Live(console=console, refresh_per_second=4, transient=False) as live:
        try:
            while not seconds or time.monotonic() - began < seconds:
                live.update(_now(path))
                time.sleep(every)
        except KeyboardInterrupt:
            pass
        live.update(_now(path))


def _now(path: Path) -> RenderableType:
    from vllm_trace.errors import TraceError

    try:
        trace = read_trace(path)
        summary = Summary.of(trace)
    except TraceError as error:
        return Text(f"waiting: {error}")
    recent = summary.steps[-10:]
    span = (recent[-1].started_ns - recent[0].started_ns) / 1e9 if len(recent) > 1 else 0
    rate = f"{(len(recent) - 1) / span:.1f} steps/s" if span else ""
    running = [life for life in summary.requests if not life.reason and life.num_steps]
    total = max(1, summary.engine.get("num_blocks", 1) - 1)
    free = recent[-1].num_free_blocks if recent else total
    bar = "█" * round(40 * (total - free) / total)
    return Group(
        Text(f"step {recent[-1].step if recent else 0}  {rate}  blocks [{bar:<40}] {free} free"),
        render.steps(recent),
        render.requests(running[-10:]),
    )


def printer(trace: Trace, wanted: Filter, out: Callable[[str], None], as_json: bool) -> None:
    """Print raw events, one a line."""
    import msgspec

    for record in select(trace, wanted):
        if as_json:
            line = {"event": record.number, "process": record.process} | to_dict(record.event)
            out(msgspec.json.encode(line).decode())
        else:
            out(describe(trace, record))
