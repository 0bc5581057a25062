"""A replay's result for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from vllm_trace import render
from vllm_trace.divergence import Divergence, PoolState
from vllm_trace.replay import Replayed

MAX_TABLES = 12
SILENT = "Silent calls took no block: the trace only counts them, and each was made again."


def verdict(results: Sequence[Replayed]) -> RenderableType:
    """One line a replay, then the first divergence with both sides."""
    table = render.table(
        "replay", "events", "consumed", "facts equal", "silent calls", "verdict", left=(0, 5)
    )
    for one in results:
        share = 100 * one.num_consumed / one.num_events if one.num_events else 0
        if one.passed:
            said = Text("identical", style="green")
        elif one.divergence:
            said = Text(
                f"diverges at event {one.divergence.event} ({one.divergence.kind})", style="red"
            )
        else:
            said = Text("not judged", style="yellow")
        counts = (str(one.num_compared), str(one.num_silent))
        table.add_row(one.mode, str(one.num_events), f"{share:.1f} %", *counts, said)
    parts: list[RenderableType] = [table]
    if any(one.num_silent for one in results):
        parts.append(Text(SILENT, style="dim"))
    for one in results:
        if one.divergence is not None:
            parts += [Text(), Text(f"First divergence ({one.mode} replay)", style="bold")]
            parts.append(Padding(divergence(one.divergence), (0, 0, 0, 2)))
            break
    reasons = dict.fromkeys(reason for one in results for reason in one.not_judged)
    if reasons:
        parts += [Text(), Text("Not judged", style="bold")]
        parts.append(Padding(Text("\n".join(reasons), style="yellow"), (0, 0, 0, 2)))
    return Group(*parts)


def divergence(found: Divergence) -> RenderableType:
    """Both sides of the difference and of the pool, the story, and the script."""
    facts = Table.grid(padding=(0, 2))
    facts.add_row("recorded", Text(found.recorded))
    facts.add_row("mini", Text(found.mini))
    return Group(
        Text(f"at event {found.event}, of class {found.kind!r}"),
        *([Text(found.note)] if found.note else []),
        facts,
        Text("\nAfter that call:"),
        sides(found.recorded_state, found.mini_state),
        Text("\nBefore it:"),
        Text("\n".join(found.story)),
        Text("\nTo see it again:"),
        Syntax(found.script, "python", background_color="default", word_wrap=True),
    )


def sides(recorded: PoolState, mini: PoolState) -> Table:
    """Free queue, tables and reference counts of both, those that differ first."""
    made = render.table("", "recorded", "mini", left=(0, 1, 2))

    def row(title: str, left: str, right: str) -> None:
        style = "" if left == right else "red"
        made.add_row(title, Text(left, style=style), Text(right, style=style))

    row("free", str(len(recorded.free_list)), str(len(mini.free_list)))
    queues = [render.ids(side.free_list, limit=24) or "–" for side in (recorded, mini)]
    row("next out", *queues)
    names = {**recorded.tables, **mini.tables}
    differing = [n for n in names if recorded.tables.get(n) != mini.tables.get(n)]
    shown = dict.fromkeys([*differing, *names])
    for name in [*shown][:MAX_TABLES]:
        tables = [render.mapping(side.tables.get(name, [])) for side in (recorded, mini)]
        row(f"table {name[-20:]}", *tables)
    if len(names) > MAX_TABLES:
        row("", f"and {len(names) - MAX_TABLES} more tables", "")
    row("counts > 1", *[_shared(side.ref_cnts) for side in (recorded, mini)])
    odd = {
        block
        for block in {**recorded.ref_cnts, **mini.ref_cnts}
        if recorded.ref_cnts.get(block, 0) != mini.ref_cnts.get(block, 0)
    }
    if odd:
        row("counts", *[_counts(side.ref_cnts, sorted(odd)) for side in (recorded, mini)])
    return made


def _shared(ref_cnts: dict[int, int]) -> str:
    return _counts(ref_cnts, [block for block, count in sorted(ref_cnts.items()) if count > 1])


def _counts(ref_cnts: dict[int, int], blocks: Sequence[int]) -> str:
    said = ", ".join(f"{block}: {ref_cnts.get(block, 0)}" for block in blocks[:12])
    return f"{said} …" if len(blocks) > 12 else said or "–"
