"""What is installed, which hooks resolve and why not, and what each absence costs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_trace import __version__
from vllm_trace.compiled import is_compiled
from vllm_trace.errors import HookError
from vllm_trace.hooks.resolve import Resolution, choose, resolve
from vllm_trace.hooks.source import VllmSource
from vllm_trace.hooks.table import HookTable

PARTS = {
    "torch": "engine, and none of our own (mini)",
    "triton": "Triton kernels, nor their interpreter",
    "pyarrow": "export to Parquet",
    "duckdb": "SQL over a trace",
    "pytest": "invariants as tests",
}


@dataclass
class Diagnosis:
    """What ``doctor`` found."""

    vllm: str
    """Release, or empty."""
    where: str
    tables: list[str]
    """Releases that have a hook table."""
    rows: list[Resolution] = field(default_factory=list)
    problem: str = ""
    hint: str = ""
    packages: dict[str, str] = field(default_factory=dict)
    """Package → version, or the cost of its absence in parentheses."""
    plugin: str = ""
    """Whether vLLM will find the plugin; a sentence."""
    vllm_trace: str = __version__
    compiled: bool = field(default_factory=is_compiled)
    """Whether our own hot rooms run as C."""
    python: str = sys.version.split()[0]

    @property
    def healthy(self) -> bool:
        return not self.problem and all(r.usable for r in self.rows if r.hook.required)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "vllm_trace": self.vllm_trace,
            "compiled": self.compiled,
            "python": self.python,
            "vllm": self.vllm,
            "where": self.where,
            "tables": self.tables,
            "problem": self.problem,
            "hint": self.hint,
            "plugin": self.plugin,
            "packages": self.packages,
            "hooks": [row.to_dict() | {"platform": row.hook.platform} for row in self.rows],
        }


def diagnose(source_dir: Path | None = None) -> Diagnosis:
    """Look at the installed vLLM, or at one unpacked in ``source_dir``. Imports nothing of it.

    Raises: ``UsageError`` when the folder holds no vLLM.
    """
    from vllm_trace.patches import TABLES

    source = VllmSource.at(source_dir) if source_dir else VllmSource.installed()
    made = Diagnosis(
        vllm=source.version if source else "",
        where=str(source.folder) if source else "",
        tables=[table.vllm for table in TABLES],
        packages=_packages(),
        plugin=_plugin(),
    )
    if source is None:
        made.problem = "vLLM is not installed here: traces can be read, not made"
        made.hint = "pip install vllm, or vllm-trace doctor --source DIR for an unpacked one"
        return made
    try:
        made.rows = resolve(choose(TABLES, source.version), source)
    except HookError as error:
        made.problem, made.hint = str(error), error.hint
        nearest = _nearest(TABLES, source)
        made.rows = nearest[1]
        if nearest[1]:
            usable = sum(row.usable for row in nearest[1])
            made.problem += (
                f". Of the table for {nearest[0]}, {usable} of {len(nearest[1])} rows resolve here"
            )
    return made


def _nearest(tables: tuple[HookTable, ...], source: VllmSource) -> tuple[str, list[Resolution]]:
    """The table of which most resolves in a release that has none."""
    tried = [(table.vllm, resolve(table, source)) for table in tables]
    return max(tried, key=lambda pair: sum(row.usable for row in pair[1]))


def _packages() -> dict[str, str]:
    found = {}
    for name, use in PARTS.items():
        if importlib.util.find_spec(name) is None:
            found[name] = f"(absent: no {use})"
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "present"
    return found


def _plugin() -> str:
    group = importlib.metadata.entry_points(group="vllm.general_plugins")
    if any(entry.name == "vllm_trace" for entry in group):
        return "installed: every vLLM process of this environment loads it"
    return "not found: vLLM cannot load it. Install this package: pip install ."
