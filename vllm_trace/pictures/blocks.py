"""The pictures that are drawings: block tables, shared blocks, and the way of one query through them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from vllm_trace.pictures.facts import Moment, moment
from vllm_trace.plotting import INK, new_figure

CELL = 1.0
"""Width of a block in every drawing."""


def _canvas(width: float, height: float, scale: float = 0.62) -> tuple[Any, Any]:
    """Axes without axes, one unit a block."""
    made, axes = new_figure(1, 1, size=(width * scale, height * scale))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return made, axes


def _block(
    axes: Any, x: float, y: float, label: str, colour: str, fill: float, ink: INK, **more: Any
) -> None:
    """A block with its id, filled from the left by the share of its slots that hold tokens."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    axes.add_patch(Rectangle((x, y), CELL * fill, 0.8, color=colour, alpha=0.85, linewidth=0))
    axes.add_patch(
        Rectangle((x, y), CELL, 0.8, fill=False, edgecolor=ink.text, linewidth=more.get("line", 1))
    )
    # Half a block may be filled, right under the number: an outline keeps it legible on both halves.
    axes.text(
        x + CELL / 2, y + 0.4, label, ha="center", va="center", color=ink.text, fontweight="bold",
        path_effects=[withStroke(linewidth=3, foreground=ink.page)],
    )  # fmt: skip


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str) -> None:
    axes.annotate(
        "", end, start,
        arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 1.3, "shrinkA": 1, "shrinkB": 2,
                    "connectionstyle": "arc3,rad=0"},
    )  # fmt: skip


def _scattered(found: Moment) -> tuple[float, ...]:
    """Many blocks, in tables that jump, the last of each about two thirds full."""
    jumps = sum(b != a + 1 for table in found.tables.values() for a, b in pairwise(table))
    size = found.block_size
    fill = sum(abs((tokens - 1) % size + 1 - 0.65 * size) for tokens in found.held.values())
    return (jumps, sum(map(len, found.tables.values())), -fill)


def block_structure(sources: Any, ink: INK) -> Any:
    """Logical blocks of each request, and where they lie in the pool: half of the tables above it, half below."""
    found = moment(sources.trace("preempt"), _scattered)
    names = list(found.tables)
    above = names[: -(-len(names) // 2)]
    below = names[len(above) :]
    longest = max(map(len, found.tables.values()))
    width = 2.6 + max(longest * 1.5, found.num_blocks) + 0.2
    pool_y = 1.1 + len(above) * 1.3 + 1.1
    made, axes = _canvas(width, pool_y + 3.0 + len(below) * 1.3, 0.8)
    colours = dict(zip(names, ink.requests))
    axes.text(
        0, 0.4, f"Step {found.step} of `preempt`: the block tables of {len(names)} requests and the pool, blocks of "
        f"{found.block_size} tokens", fontsize=12,
    )  # fmt: skip
    rows = [(name, 1.1 + row * 1.3, 0.8) for row, name in enumerate(above)]
    rows += [(name, pool_y + 1.9 + row * 1.3, 0.0) for row, name in enumerate(below)]
    for name, y, edge in rows:
        axes.text(
            0, y + 0.4, f"{name}\n{found.held[name]} tokens", va="center", color=colours[name]
        )
        for index, block in enumerate(found.tables[name]):
            x = 2.6 + index * 1.5
            _block(axes, x, y, str(index), colours[name], found.fill(name, index), ink)
            start = (x + CELL / 2, y + edge)
            end = (2.6 + block + CELL / 2, pool_y if edge else pool_y + 0.8)
            _arrow(axes, start, end, colours[name])
    axes.text(0, pool_y + 0.4, "pool\n(block ids)", va="center")
    owners = found.owners
    for block in range(found.num_blocks):
        who = owners.get(block, [])
        share = found.fill(who[0], found.tables[who[0]].index(block)) if who else 0
        colour = colours[who[0]] if who else ink.faint
        _block(axes, 2.6 + block, pool_y, str(block), colour, share, ink)
    free = found.num_blocks - 1 - len(owners)
    axes.text(
        0, pool_y + 2.5 + len(below) * 1.3,
        f"numbers above and below: logical blocks; coloured as far as a block is filled; "
        f"block 0 is the null block; {free} free",
        fontsize=9.5,
    )  # fmt: skip
    return made


def block_sharing(sources: Any, ink: INK) -> Any:
    """The same blocks in many tables."""
    found = moment(
        sources.trace("prefix"),
        lambda one: (len(one.tables), max(one.ref_cnts.values(), default=0)),
    )
    owners = found.owners
    names = list(found.tables)
    shown = [*names[:4], names[-1]] if len(names) > 5 else names
    longest = max(len(found.tables[name]) for name in shown)
    shared = sorted(block for block, who in owners.items() if len(who) > 1)
    made, axes = _canvas(max(3.6 + longest * 1.25, 10.2), 3.4 + len(shown) * 1.15, 0.8)
    entries = sum(map(len, found.tables.values()))
    axes.text(
        0, 0.5, f"Step {found.step} of `prefix`: {len(names)} requests, {entries} entries in their tables, "
        f"{len(owners)} blocks", fontsize=12,
    )  # fmt: skip
    for row, name in enumerate(shown):
        y = 1.2 + row * 1.15 + (0.5 if row == 4 and len(names) > 5 else 0)
        if row == 4 and len(names) > 5:
            axes.text(3.4, y - 0.2, f"… {len(names) - 5} more …", va="center", fontsize=9.5)
        axes.text(0, y + 0.4, f"{name}, {found.held[name]} tokens", va="center")
        for index, block in enumerate(found.tables[name]):
            share = found.fill(name, index)
            colour = ink.shared if block in shared else ink.used
            _block(axes, 3.4 + index * 1.25, y, str(block), colour, share, ink)
    counts = sorted({found.ref_cnts.get(block, 0) for block in shared})
    said = " to ".join(map(str, {min(counts), max(counts)} if counts else ()))
    y = 2.1 + len(shown) * 1.15
    axes.text(
        0, y + 0.3, f"purple: in several tables; reference count of those: {said}. "
        "blue: the request's own.", fontsize=9.5,
    )  # fmt: skip
    once = entries - len(owners)
    axes.text(
        0, y + 0.8, f"Without sharing {once} more blocks would be needed: {once / (once + len(owners)):.0%} saved.",
        fontsize=9.5,
    )  # fmt: skip
    return made


def attention_flow(sources: Any, ink: INK) -> Any:
    """One decode: from the query's position over the block table to the keys and values, and out."""

    def decoding(one: Moment) -> tuple[float, ...]:
        if not all(count == 1 for count in one.num_tokens.values()):
            return (-1,)
        return _scattered(one)

    found = moment(sources.trace("preempt"), decoding)
    name = max(
        found.tables, key=lambda one: (len(found.tables[one]), -list(found.tables).index(one))
    )
    table, held, size = found.tables[name], found.held[name], found.block_size
    position = held - 1
    slot = found.slots[name][0]
    made, axes = _canvas(13.6, 10.0, 0.7)
    axes.text(0, 0.5, f"Step {found.step} of `preempt`: one new token of {name}", fontsize=12)
    lines = [
        ("1", f"query of position {position}", "its key and value are computed with it"),
        ("2", f"block_table[{position} // {size}] = {table[position // size]}",
         f"slot {table[position // size]} x {size} + {position} % {size} = {slot}: key and value are written there"),
        ("3", f"{len(table)} blocks are read in logical order", f"{held} keys; {len(table) * size - held} empty slots "
         "of the last block are masked by seq_len"),
    ]  # fmt: skip
    for row, (number, what, why) in enumerate(lines):
        y = 1.4 + row * 0.95
        axes.text(0, y, number, color=ink.used, fontweight="bold", fontsize=13, va="center")
        axes.text(0.6, y, what, va="center", fontfamily="monospace")
        axes.text(0.6, y + 0.42, why, va="center", fontsize=9.5, color=ink.text)
    _table_and_pool(axes, found, name, ink)
    axes.text(0, 8.6, "4", color=ink.used, fontweight="bold", fontsize=13, va="center")
    axes.text(0.6, 8.6, f"scores = q · k / √d  →  softmax over {held}  →  Σ weight · v", va="center",
              fontfamily="monospace")  # fmt: skip
    count = len(found.num_tokens)
    said = f"one call for {'both' if count == 2 else f'all {count}'} requests of the step"
    if found.kernel:
        said += f": {found.kernel}, variant {found.variant}"
    axes.text(0.6, 9.05, said, va="center", fontsize=9.5)
    axes.text(
        0.6,
        9.6,
        "orange: the slot that this step writes; grey: blocks of other requests; block 0 is the null block",
        va="center",
        fontsize=9.5,
    )
    return made


def _table_and_pool(axes: Any, found: Moment, name: str, ink: INK) -> None:
    """A request's table above the pool, arrows from one to the other, and the slot that is written."""
    table, held, size = found.tables[name], found.held[name], found.block_size
    owners, position, slot = found.owners, held - 1, found.slots[name][0]
    logical_y, pool_y = 4.6, 6.9
    axes.text(0, logical_y + 0.4, "table", va="center")
    axes.text(0, pool_y + 0.4, "pool", va="center")
    for block in range(found.num_blocks):
        mine = block in table
        owner = name if mine else next(iter(owners.get(block, [])), "")
        share = found.fill(owner, found.tables[owner].index(block)) if owner else 0
        colour = ink.used if mine else ink.faint
        _block(axes, 2 + block, pool_y, str(block), colour, share, ink, line=1)
    for index, block in enumerate(table):
        x = 2 + index * 1.6
        share = found.fill(name, index)
        _block(axes, x, logical_y, str(block), ink.used, share, ink)
        axes.text(
            x + CELL / 2, logical_y - 0.25, f"{index * size}–{min(held, (index + 1) * size) - 1}", ha="center",
            fontsize=9,
        )  # fmt: skip
        _arrow(axes, (x + CELL / 2, logical_y + 0.8), (2 + block + CELL / 2, pool_y), ink.used)
    last = table[position // size]
    x = 2 + last + (position % size + 0.5) / size
    axes.plot([x, x], [pool_y - 0.08, pool_y + 0.88], color=ink.empty_line, linewidth=3)
    axes.text(
        2 + found.num_blocks + 0.3, pool_y + 0.4, f"slot {slot}", va="center", color=ink.empty_line
    )
