"""``report``: a trace as one HTML file that needs nothing else, to look at in a browser.

The file holds the figures as compressed JSON, and hand-written CSS and JavaScript. Its content
security policy allows the two by their hashes and nothing else: no network, no other script.
Nothing of a trace is ever written as HTML; ids and names go through Jinja2's escaping or, in the
browser, through ``textContent``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError
from vllm_trace.report import page
from vllm_trace.report.document import document
from vllm_trace.report.salvage import Salvaged
from vllm_trace.trace import Trace
from vllm_trace.writing import whole_file

__all__ = ["Asked", "Made", "build", "save"]


@dataclass(frozen=True)
class Asked:
    """What the report is to hold."""

    label: str = ""
    """Which trace it is: a name for the title."""
    command: str = ""
    tokens: bool = False
    """Show the token ids that the trace holds."""
    first_step: int = 0
    last_step: int = 1 << 62
    check: bool = True
    """Judge the trace by all invariants."""
    replay: bool = True
    """Replay it through ``mini``."""


@dataclass
class Made:
    """A report, and what has to be said about it."""

    html: bytes
    problems: list[str] = field(default_factory=list)
    """What keeps it from being the whole truth; it stands at its top too."""
    damaged: bool = False
    """The trace could not be read to its end."""
    verdicts: dict[str, str] = field(default_factory=dict)

    def to_dict(self, path: Path) -> dict[str, Any]:
        return {
            "schema": 1,
            "report": str(path),
            "size_bytes": len(self.html),
            "problems": self.problems,
            "damaged": self.damaged,
            **self.verdicts,
        }


def build(trace: Trace, asked: Asked = Asked()) -> Made:
    """Make the report of a trace.

    Raises: ``UsageError`` when tokens are asked for that were not recorded.
    """
    if asked.tokens and not any(file.header.get("tokens") for file in trace.files):
        raise UsageError("this trace holds no token ids", hint="Record with --tokens")
    whole = Salvaged(trace)
    told, pages = document(whole, asked)
    html = page.render(told, pages)
    verdicts = {
        "invariants": told["invariants"]["verdict"],
        "replay": told["replay_verdict"],
    }
    return Made(html, told["problems"], bool(whole.damage), verdicts)


def save(html: bytes, path: Path) -> None:
    """Write the file whole, or not at all.

    Raises: ``UsageError`` when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(html)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror}", hint="Give another file with -o"
        ) from None


def label_of(trace: Path) -> str:
    """A title: the scenario and its run, or the file's name."""
    parts = [part for part in trace.absolute().parts if part not in ("trace", "/")]
    if trace.is_file():
        return trace.stem
    run = trace.resolve()
    if run.name == "trace":
        run = run.parent
    if len(parts) > 1 and run.parent.parent.name == "reports":
        return f"{run.parent.name}, {run.name}"
    return run.name or "trace"


def default_path(trace: Path) -> Path:
    """Beside the trace: ``report.html`` in a run's folder, or the file's name with ``.html``."""
    if trace.is_file():
        return trace.with_suffix(".html")
    return (trace.parent if trace.name == "trace" else trace) / "report.html"
