"""Answer every row of a table with a value, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_trace.errors import HookError
from vllm_trace.hooks.source import Definition, VllmSource
from vllm_trace.hooks.table import Hook, HookTable

OK, CHANGED, INCOMPATIBLE, MISSING = "ok", "changed", "incompatible", "missing"


@dataclass(frozen=True)
class Resolution:
    """One row and what became of it."""

    hook: Hook
    state: str
    """``ok``, ``changed`` (other source than reviewed), ``incompatible`` (a parameter that the
    probe reads is gone), or ``missing``."""
    detail: str = ""
    definition: Definition | None = None

    @property
    def usable(self) -> bool:
        return self.state in (OK, CHANGED)

    def to_dict(self) -> dict[str, str | bool]:
        return {
            "target": self.hook.target,
            "state": self.state,
            "detail": self.detail,
            "emits": self.hook.emits,
            "required": self.hook.required,
            "without": "" if self.usable else self.hook.without,
        }


def choose(tables: Iterable[HookTable], version: str) -> HookTable:
    """The table for a release. Raises: ``HookError`` naming the releases that are known."""
    tables = list(tables)
    for table in tables:
        if version and table.covers(version):
            return table
    known = "; ".join(table.vllm for table in tables)
    raise HookError(
        f"vLLM {version or '(no version)'}: no hook table for this release; nothing was changed",
        hint=f"Known: {known}. Try: vllm-trace doctor --source DIR",
    )


def resolve(
    table: HookTable, source: VllmSource, *, level: str = "full", platform: str = ""
) -> list[Resolution]:
    """Look every row of the table up in the source. Imports and changes nothing."""
    rows = []
    for whole in table.hooks:
        hook = whole.at_level(level)
        if hook is None or (platform and hook.platform not in ("", platform)):
            continue
        rows.append(_resolve_row(hook, source))
    return rows


def _resolve_row(hook: Hook, source: VllmSource) -> Resolution:
    found = source.find(hook.module, hook.qualname)
    if isinstance(found, str):
        return Resolution(hook, MISSING, found)
    gone = [name for name in hook.probe.reads if name not in found.parameters]
    if gone:
        return Resolution(hook, INCOMPATIBLE, f"no parameter {', '.join(gone)}", found)
    if hook.fingerprints and found.fingerprint not in hook.fingerprints:
        return Resolution(hook, CHANGED, "source differs from the one reviewed", found)
    return Resolution(hook, OK, "", found)


def demand(rows: Iterable[Resolution], version: str, *, strict: bool = False) -> None:
    """Raise ``HookError`` when a required row cannot be had, or, if strict, was changed."""
    for row in rows:
        if row.hook.required and not row.usable:
            raise HookError(
                f"vLLM {version}: {row.hook.qualname} is {row.state}"
                f" ({row.detail}; required: {row.hook.without}). Nothing was changed.",
                hint="Try: vllm-trace doctor",
            )
        if strict and row.state == CHANGED:
            raise HookError(
                f"vLLM {version}: {row.hook.qualname} is not the reviewed source, and strict"
                " was asked for. Nothing was changed.",
                hint="Unset VTRACE_STRICT, or try: vllm-trace doctor",
            )
