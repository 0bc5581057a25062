"""What ``doctor`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vllm_trace.doctor import Diagnosis
from vllm_trace.hooks.resolve import Resolution

COMPILED = {True: "compiled", False: "plain Python (slower, the same otherwise)"}


def diagnosis(found: Diagnosis) -> RenderableType:
    """What ``doctor`` prints."""
    lines = Table.grid(padding=(0, 2))
    for what, said in (
        ("vllm_trace", f"{found.vllm_trace}, {COMPILED[found.compiled]}, Python {found.python}"),
        ("vLLM", f"{found.vllm or 'of no known release'} in {found.where}" if found.where else "–"),
        ("hook tables", "vLLM " + "; ".join(found.tables)),
        ("plugin", found.plugin),
        *found.packages.items(),
    ):
        lines.add_row(Text(what, style="dim"), Text(said, overflow="fold"))
    parts: list[RenderableType] = [lines]
    if found.problem:
        parts += [
            "",
            Text(found.problem, style="red"),
            Text(f"  {found.hint}" if found.hint else ""),
        ]
    if found.rows:
        parts += ["", hooks(found.rows)]
    return Group(*parts)


def hooks(rows: Sequence[Resolution]) -> RenderableType:
    """Every hook by class with its state, and what its absence costs."""
    styles = {"ok": "green", "changed": "yellow", "incompatible": "red", "missing": "red"}
    parts: list[RenderableType] = []
    for owner, group in groupby(rows, key=_owner):
        body = Table.grid(padding=(0, 2))
        for width in (29, 4, 12):
            body.add_column(width=width, overflow="fold")
        for row in group:
            gives = row.hook.emits.replace(" ", ", ")
            if not row.usable:
                gives = f"{row.detail}: {row.hook.without}"
            elif row.detail:
                gives += f" ({row.detail})"
            name = row.hook.qualname.rpartition(".")[2] + ("*" if row.hook.required else "")
            state = Text(row.state, style=styles[row.state])
            body.add_row(f"  {name}", row.hook.platform or "all", state, gives)
        parts += [Text(owner, style="bold"), body]
    return Group(*parts, "", Text("* required: without it nothing is hooked at all", style="dim"))


def _owner(row: Resolution) -> str:
    module = row.hook.module.removeprefix("vllm.")
    return f"{module} {row.hook.qualname.rpartition('.')[0]}"
