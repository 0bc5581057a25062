"""Where made things go: ``reports/<what>/<run>/``, each with its command, versions and date."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from vllm_trace import __version__, render
from vllm_trace.documents import as_json
from vllm_trace.errors import TraceError, UsageError
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace
from vllm_trace.tracefile import SUFFIX

if TYPE_CHECKING:
    from vllm_trace.runner import Outcome
    from vllm_trace.scenario import Scenario


@dataclass(frozen=True)
class Run:
    """The folder of one run."""

    folder: Path
    date: str
    link: Path | None = None
    """``latest``, when it points here."""
    link_before: str = ""
    """Where it pointed before."""

    @property
    def trace(self) -> Path:
        return self.folder / "trace"

    def discard(self, *, keep_log: bool = False) -> None:
        """Nothing came of it: ``latest`` is what it was, and a folder without a trace goes."""
        if any(self.trace.glob(f"*{SUFFIX}")):
            return
        with contextlib.suppress(OSError):
            if self.link is not None and os.readlink(self.link) == self.folder.name:
                self.link.unlink()
                if self.link_before:
                    self.link.symlink_to(self.link_before)
            if not keep_log:
                (self.folder / "engine.log").unlink(missing_ok=True)
                self.folder.rmdir()


def new_run(what: str, output: Path | None = None) -> Run:
    """Make the folder of a new run; ``reports/<what>/latest`` points at it.

    Raises: ``UsageError`` when it cannot be made, or is not empty.
    """
    now = datetime.now()
    name, again = f"{now:%Y%m%d-%H%M%S}-{os.getpid()}", 1
    folder = output or Path("reports") / what / name
    while output is None and folder.exists():
        again += 1
        folder = folder.with_name(f"{name}-{again}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty", hint="Give another folder with -o")
        link, before = None, ""
        if output is None:
            link = folder.with_name("latest")
            before = os.readlink(link) if link.is_symlink() else ""
            # At once: another run may begin at the same time.
            fresh = folder.with_name(f".latest-{folder.name}")
            fresh.symlink_to(folder.name)
            fresh.replace(link)
    except OSError as error:
        raise UsageError(f"cannot write to {folder}: {error.strerror}") from None
    return Run(folder, now.isoformat(timespec="seconds"), link, before)


def save(
    run: Run, document: dict[str, Any], summary: Summary, scenario: Scenario, outcome: Outcome
) -> Group:
    """Write ``summary.txt`` and ``summary.json``; returns the text for the terminal."""
    head = [
        Text(f"{scenario.name}: {scenario.title}", style="bold"),
        Text(" ".join(scenario.shows.split()), style="dim"),
        Text(),
    ]
    notes = [Text(f"Note: {note}.", style="yellow") for note in outcome.notes]
    if notes:
        notes.append(Text())
    text = Group(*head, *notes, render.report(summary), *_verdict(document, scenario))
    stamp = (
        f"command: {document['command']}\n"
        f"versions: vllm_trace {__version__}, vLLM {summary.header.get('vllm')}, "
        f"torch {summary.header.get('torch')}, Python {sys.version.split()[0]}\n"
        f"date: {run.date}\n\n"
    )
    (run.folder / "summary.txt").write_text(stamp + render.plain(text), encoding="utf-8")
    (run.folder / "summary.json").write_text(as_json(document), encoding="utf-8")
    return text


def _verdict(document: dict[str, Any], scenario: Scenario) -> list[Text]:
    if document["failures"]:
        return [Text(f"It did not show: {f}", style="red") for f in document["failures"]]
    checked = len(scenario.expect)
    if document["header"].get("level") == "light":
        return [Text("Level light: what the scenario must show was not checked")]
    return [Text(f"Shown as stated: all {checked} expectations hold", style="green")]


def describe_recording(run: Run) -> str:
    """One sentence on what a ``record`` left behind, and what to do with it."""
    files = sorted(run.trace.glob(f"*{SUFFIX}"))
    if not files:
        return (
            "no vLLM process of that command wrote a trace. Is this package installed in its "
            "environment? Try: vllm-trace doctor"
        )
    try:
        engines = [Summary.of(trace) for trace in read_trace(run.trace).engines()]
    except TraceError as error:
        return f"a trace was written, but: {error}"
    told = (
        f"{sum(len(engine.requests) for engine in engines)} requests, "
        f"{sum(len(engine.steps) for engine in engines)} steps"
        + (f" of {len(engines)} engines" if len(engines) > 1 else "")
        + f", {sum(engine.num_events for engine in engines)} events of {len(files)} processes"
    )
    for engine in engines:
        for line in [*engine.problems, *render.shadow(engine)]:
            told += f"\n  {line}"
    return f"{told}\n  vllm-trace show {shlex.quote(str(run.folder))}"
