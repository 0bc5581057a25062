"""What became of each invariant on a trace, and how that is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from vllm_trace.errors import TraceError
from vllm_trace.invariants.registry import Invariant, Violation


@dataclass
class Judgement:
    """What became of one invariant on one trace."""

    invariant: Invariant
    status: str = "holds"
    """``holds``, ``violated``, ``unjudged``, or ``raised`` (the rule itself failed)."""
    violation: Violation | None = None
    story: list[str] = field(default_factory=list)
    reason: str = ""
    """Why it was not judged."""
    whole: bool = True
    """False when the reason is that the trace is not the whole truth: that is no pass."""

    def to_dict(self, names: dict[int, str]) -> dict[str, Any]:
        made: dict[str, Any] = {
            "id": self.invariant.id,
            "sentence": self.invariant.sentence,
            "status": self.status,
        }
        if self.reason:
            made |= {"reason": self.reason, "whole": self.whole}
        if self.violation is not None:
            found = self.violation
            made |= {
                "event": found.event_number,
                "step": found.step,
                "request": None if found.request is None else names.get(found.request),
                "block": found.block,
                "message": found.message,
                "story": self.story,
            }
        return made


@dataclass
class Report:
    """Every invariant's judgement on one trace."""

    trace: str
    judgements: list[Judgement]
    problems: list[str]
    """What keeps the trace from being the whole truth."""
    num_events: int
    release: str
    names: dict[int, str]

    def of(self, status: str) -> list[Judgement]:
        """The judgements of one status."""
        return [each for each in self.judgements if each.status == status]

    @property
    def violations(self) -> list[Violation]:
        """What was found, the first event first."""
        found = [each.violation for each in self.of("violated") if each.violation is not None]
        return sorted(found, key=lambda violation: violation.event_number)

    @property
    def incomplete(self) -> list[str]:
        """Why this is no pass even if nothing was found: each reason once."""
        reasons = [each.reason for each in self.judgements if each.reason and not each.whole]
        return list(dict.fromkeys([*self.problems, *reasons]))

    @property
    def verdict(self) -> str:
        """``clean``, ``violated`` or ``incomplete``."""
        if self.of("violated"):
            return "violated"
        return "incomplete" if self.incomplete or self.of("raised") else "clean"

    @property
    def exit_code(self) -> int:
        """0 clean, 1 something was found, 2 nothing was found but not all could be judged."""
        return {"clean": 0, "violated": 1, "incomplete": 2}[self.verdict]

    def to_dict(self) -> dict[str, Any]:
        return {
            "trace": self.trace,
            "verdict": self.verdict,
            "num_events": self.num_events,
            "vllm": self.release,
            "problems": self.incomplete,
            "invariants": [each.to_dict(self.names) for each in self.judgements],
        }

    def text(self, width: int = 80) -> str:
        """For a terminal: what was found on top of everything, what came first before the rest."""
        room = max((len(each.invariant.id) for each in self.judgements), default=0)
        lines = [f"{self.trace}: {self.num_events} events, vLLM {self.release or 'unknown'}"]
        for each in sorted(self.judgements, key=_found_at):
            said = _SAID[each.status]
            head = f"  {said:<10}  {each.invariant.id.ljust(room)}  "
            if each.violation is not None and each.status == "violated":
                lines.append(f"{head}at {where(each.violation)}")
                lines += _wrapped("    ", each.invariant.sentence, width)
                lines += _wrapped("    ", each.violation.message, width)
                for told in each.story:
                    lines += _wrapped("      ", told, width)
            else:
                lines += _wrapped(head, each.reason or each.invariant.sentence, width)
        counts = [
            f"{len(self.of(status))} {_COUNTED[status]}" for status in _SAID if self.of(status)
        ]
        lines.append(f"{len(self.judgements)} invariants: {', '.join(counts)}")
        if self.verdict == "incomplete":
            lines.append("This is not a pass:")
        for problem in self.incomplete:
            lines += _wrapped("  ", problem, width)
        return "\n".join(lines)


def _found_at(each: Judgement) -> float:
    if each.status != "violated" or each.violation is None:
        return float("inf")
    return each.violation.event_number


_SAID = {
    "violated": "VIOLATED", "holds": "holds", "unjudged": "not judged", "raised": "RAISED",
}  # fmt: skip
_COUNTED = {"violated": "violated", "holds": "hold", "unjudged": "not judged", "raised": "raised"}


def _wrapped(head: str, text: str, width: int) -> list[str]:
    """The text behind a head, further lines as far in as the text (or, of an event, a little)."""
    indent = " " * (len(head) + (2 if len(head.split()) == 0 else 0))
    return wrap(head + text, width, subsequent_indent=indent, break_long_words=False) or [head]


@dataclass
class Unreadable:
    """A trace that could not be judged at all; the others are."""

    trace: str
    error: TraceError
    exit_code = 2

    def to_dict(self) -> dict[str, Any]:
        return {"trace": self.trace, "verdict": "unreadable", "error": str(self.error)}

    def text(self, width: int = 80) -> str:
        hint = f"\n  {self.error.hint}" if self.error.hint else ""
        return f"{self.trace}: {self.error}{hint}"


def exit_code(reports: Iterable[Report | Unreadable]) -> int:
    """Of several: 1 when any was violated, else the highest."""
    codes = {report.exit_code for report in reports}
    return 1 if 1 in codes else max(codes, default=0)


def catalogue(invariants: Iterable[Invariant], width: int = 80) -> str:
    """All rules, each with its sentence and what it is for."""
    lines: list[str] = []
    for one in invariants:
        lines.append(f"{one.id}  (vLLM {one.releases or 'any'})")
        for text in (one.sentence, one.doc, one.mutation and f"Fails when {one.mutation}."):
            lines += _wrapped("    ", text, width) if text else []
    return "\n".join(lines)


def where(violation: Violation) -> str:
    """``event 812, step 31``."""
    step = "" if violation.step is None else f", step {violation.step}"
    return f"event {violation.event_number}{step}"
