"""A replay's result for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from vllm_trace import render
from vllm_trace.divergence import Divergence
from vllm_trace.replay import Replayed


def verdict(results: Sequence[Replayed]) -> RenderableType:
    """One line a replay, then the first divergence with both sides."""
    table = render.table("replay", "events", "consumed", "compared", "verdict", left=(0, 4))
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
        row = (one.mode, str(one.num_events), f"{share:.1f} %", str(one.num_compared), said)
        table.add_row(*row)
    parts: list[RenderableType] = [table]
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
    """Both sides, ``mini``'s state, the story, and the script."""
    sides = Table.grid(padding=(0, 2))
    sides.add_row("recorded", Text(found.recorded))
    sides.add_row("mini", Text(found.mini))
    sides.add_row("free list", render.ids(found.free_list, limit=24))
    for name, groups in list(found.tables.items())[:12]:
        sides.add_row(f"table {name[-20:]}", render.mapping(groups))
    shared = {block: count for block, count in found.ref_cnts.items() if count > 1}
    if shared:
        text = ", ".join(f"{block}: {count}" for block, count in list(shared.items())[:12])
        sides.add_row("shared", f"{text} (reference counts above 1)")
    return Group(
        Text(f"at event {found.event}, of class {found.kind!r}"),
        sides,
        Text("\nBefore it:"),
        Text("\n".join(found.story)),
        Text("\nTo see it again:"),
        Syntax(found.script, "python", background_color="default", word_wrap=True),
    )
