"""A ``Diff`` as text for a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

from vllm_trace.diff import Diff, Divergence, Side
from vllm_trace.diff.config import Setting
from vllm_trace.explain.words import WIDTH, groups, listed, many, wrapped

MAX_TABLES = 6
MAX_OUTPUTS = 5


def render(found: Diff, width: int = WIDTH) -> str:
    """The answer first, then configuration, divergence, classes, outputs, and what is open."""
    out = [answer(found), ""]
    out += _lines("", f"{many(found.num_requests, 'request')} matched by {found.matched_by}; "
                      f"{found.num_compared} facts compared, times left out", width)  # fmt: skip
    for which, names in (("A", found.only_a), ("B", found.only_b)):
        if names:
            out += _lines("", f"only in {which}: {listed(names, 5)}", width)
    for note in found.notes:
        out += _lines("", note, width)
    if found.settings:
        out += ["", "Configuration"]
        for setting in found.settings:
            out += _lines("", _setting(setting), width)
    if found.divergence:
        out += ["", *_divergence("First divergence", found.divergence, width)]
    for renamed in found.renamed:
        what = "hash" if renamed.kind == "hash" else "block"
        title = f"The same decision about another {what}"
        out += ["", *_divergence(title, renamed, width)]
    if found.classes:
        out += ["", "Classes of difference"]
        for kind, count in found.classes.items():
            out.append(f"  {kind:<14} {count}")
        if sum(found.classes.values()) > 1:
            out += _lines("", "What comes after the first can be its consequence.", width)
    out += _outputs(found, width)
    if found.not_judged:
        out += ["", "Not compared"]
        for sentence in found.not_judged:
            out += wrapped("-", sentence, margin=4, width=width)
    return "\n".join(out)


def answer(found: Diff) -> str:
    """One line."""
    if found.is_same:
        if found.incomplete:
            return f"no difference as far as they go: {' and '.join(found.incomplete)} incomplete"
        return "no difference" if not found.not_judged else "no difference in what was compared"
    if found.divergence:
        first = found.divergence
        return (
            f"the traces differ first at event {first.a.event} of A and {first.b.event} of B: "
            f"{first.kind}"
        )
    if found.outputs:
        return "the same decisions, other output tokens"
    if found.renamed:
        first = min(found.renamed, key=lambda one: one.a.event)
        what = "hashes" if first.kind == "hash" else "blocks"
        return f"the same decisions, about other {what} from event {first.a.event} of A on"
    if found.only_a or found.only_b:
        return "the traces hold other requests"
    return f"the same decisions in spite of {many(len(found.settings), 'other setting')}"


def _lines(label: Any, text: str, width: int) -> list[str]:
    return wrapped(label, text, margin=2, width=width)


def _setting(setting: Setting) -> str:
    def said(value: Any) -> str:
        return "–" if value is None else str(value)

    return f"{setting.name}: {said(setting.a)} in A, {said(setting.b)} in B"


def _divergence(title: str, found: Divergence, width: int) -> list[str]:
    where = f", step {found.step}" if found.step else ""
    out = [f"{title} ({found.kind}, {found.lane}{where})"]
    for which, side in (("A", found.a), ("B", found.b)):
        said = side.said or "nothing here; the next event"
        out += wrapped(which, f"event {side.event}: {said}", margin=6, width=width)
    if found.note:
        out += _lines("", found.note, width)
    for which, side in (("A", found.a), ("B", found.b)):
        out += _state(which, side, width)
    return out


def _state(which: str, side: Side, width: int) -> list[str]:
    out = [f"  {which} just before:"]
    if side.num_free_blocks is not None:
        out.append(f"      {many(side.num_free_blocks, 'block')} free")
    for name, rows in list(side.tables.items())[:MAX_TABLES]:
        out += wrapped("", f"{name}: {groups(rows)}", margin=6, width=width)
    if len(side.tables) > MAX_TABLES:
        out.append(f"      and {len(side.tables) - MAX_TABLES} more tables")
    for line in side.before:
        number, _, text = line.partition(" ")
        out += wrapped(number, text, margin=12, width=width)
    return out


def _outputs(found: Diff, width: int) -> list[str]:
    if not found.outputs:
        if found.num_equal_tokens:
            return ["", f"Output tokens: all {found.num_equal_tokens} that both have are equal"]
        return []
    out = ["", f"Output tokens differ in {many(len(found.outputs), 'request')}"]
    for one in found.outputs[:MAX_OUTPUTS]:
        text = (
            f"{one.request}: token {one.position} is {one.token_a} in A (event {one.event_a}, step "
            f"{one.step_a}) and {one.token_b} in B (event {one.event_b}, step {one.step_b})"
        )
        out += _lines("", text, width)
    if len(found.outputs) > MAX_OUTPUTS:
        out.append(f"  and {len(found.outputs) - MAX_OUTPUTS} more")
    if found.verdict:
        out += ["", *_lines("", f"Verdict: {found.verdict.text}", width), "  Not checked:"]
        for sentence in found.verdict.not_checked:
            out += wrapped("-", sentence, margin=6, width=width)
    return out
