"""Tables of the documentation that are made from code; ``docs/make.py`` puts them in place."""

from __future__ import annotations

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
