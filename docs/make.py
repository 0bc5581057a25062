"""Fills what is made by code into the documents: ``.venv/bin/python docs/make.py``.

Between ``<!-- name -->`` and ``<!-- /name -->`` of the documents stand tables of the code and what the
commands print for the golden trace of ``preempt``. A test compares them.
"""

import io
import re
from pathlib import Path

from rich.console import Console

from vllm_trace import render, show
from vllm_trace.export import attributes
from vllm_trace.summary import Summary
from vllm_trace.tables import event_table, support_table
from vllm_trace.trace import read_trace

ROOT = Path(__file__).parent.parent
GOLD = ROOT / "tests" / "gold" / "preempt.vtrace"


def _fenced(thing) -> str:
    out = io.StringIO()
    Console(file=out, width=80, highlight=False).print(thing)
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    return "```text\n" + "\n".join(lines).strip("\n") + "\n```"


def output() -> str:
    """What ``run`` prints of the trace."""
    return _fenced(render.report(Summary.of(read_trace(GOLD))))


def blocks() -> str:
    """What ``show … blocks`` prints."""
    return _fenced(show.view(read_trace(GOLD), "blocks", show.Filter(), 24))


MADE = {
    "support": support_table,
    "events": event_table,
    "output": output,
    "blocks": blocks,
    "spans": attributes.span_table,
    "span events": attributes.event_table,
    "attributes": attributes.attribute_table,
}
DOCUMENTS = ("README.md", "docs/jaeger.md")


def fill(text: str) -> str:
    """The document with everything between its marks made anew."""
    for name, make in MADE.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        text = pattern.sub(f"{begin}\n{make()}\n{end}".replace("\\", r"\\"), text)
    return text


if __name__ == "__main__":
    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
