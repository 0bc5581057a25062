"""Tables of the documentation that are made from code: ``python -m vllm_trace.tables README.md``
writes them between their ``<!-- name -->`` marks."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from vllm_trace.events import EVENT_TYPES


def support_table() -> str:
    """vLLM releases with a hook table, and what it hooks."""
    from vllm_trace.patches import TABLES

    lines = [
        "| vLLM | hooks for every platform | CPU | CUDA | level `light` |",
        "|---|---|---|---|---|",
    ]
    for table in TABLES:
        rows = table.hooks
        counts = [
            sum(not hook.platform for hook in rows),
            sum(hook.platform == "cpu" for hook in rows),
            sum(hook.platform == "cuda" for hook in rows),
            sum(hook.light is not None and not hook.platform for hook in rows),
        ]
        lines.append(f"| `{table.vllm}` | " + " | ".join(map(str, counts)) + " |")
    return "\n".join(lines)


def event_table() -> str:
    """Every kind of event: what it says, and its fields."""
    lines = ["| event | what it says | fields |", "|---|---|---|"]
    for cls in sorted(EVENT_TYPES, key=lambda c: c.kind):
        first = (cls.__doc__ or "").strip().split("\n\n")[0]
        text = " ".join(first.split()).replace("``", "`")
        fields = " ".join(f"`{name}`" for name in cls.__struct_fields__)
        lines.append(f"| `{cls.kind}` | {text} | {fields} |")
    return "\n".join(lines)


TABLES = {"support": support_table, "events": event_table}


def fill(text: str) -> str:
    """The document with each table between its marks made anew."""
    for name, make in TABLES.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.S)
        table = f"{begin}\n{make()}\n{end}"
        text = pattern.sub(lambda _, table=table: table, text)
    return text


if __name__ == "__main__":
    for given in sys.argv[1:]:
        path = Path(given)
        path.write_text(fill(path.read_text(encoding="utf-8")), encoding="utf-8")
