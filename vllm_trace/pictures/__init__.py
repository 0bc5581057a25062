"""The six pictures of the tutorial, drawn from recorded traces, from the calculator, and from ``bench``'s figures.

Nothing in them is made up: every block id, token count and length is read from the trace that the picture names. Each
is drawn twice, for light and for dark pages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError, unknown
from vllm_trace.plotting import THEMES, figure, save

GOLD = Path(str(resources.files("vllm_trace.gold")))
"""The traces that come with the package."""

RESULTS = Path(__file__).resolve().parent.parent.parent / "docs" / "results.json"
"""The figures of a checkout; a wheel has none."""


@dataclass(frozen=True)
class Sources:
    """Where pictures find what they show."""

    traces: Path = GOLD
    """A folder of ``<scenario>.vtrace`` files, or of runs as in ``reports/``."""
    results: Path = RESULTS
    """The figures that ``bench --page`` wrote."""

    def trace(self, name: str) -> Path:
        """Raises: ``UsageError`` when that scenario's trace is not there."""
        for path in (self.traces / f"{name}.vtrace", self.traces / name / "latest"):
            if path.exists():
                return path
        raise UsageError(
            f"no trace of the scenario {name!r} in {self.traces}",
            hint=f"vllm-trace run {name}, then vllm-trace pictures --traces reports",
        )

    def figures(self) -> dict[str, Any]:
        """Raises: ``UsageError`` when there are no figures of ``bench``."""
        import json

        try:
            told = json.loads(self.results.read_text(encoding="utf-8"))
            if {"throughput", "scaling"} <= told.keys():
                return told
        except (OSError, ValueError, AttributeError) as error:
            raise UsageError(
                f"no figures of bench in {self.results}: {error}",
                hint="vllm-trace bench --page results.md, then --results results.json",
            ) from None
        raise UsageError(f"{self.results} has no throughput and scaling", hint="bench --test all")


def _drawers() -> dict[str, Callable[[Sources, Any], Any]]:
    from vllm_trace.pictures import blocks, comparisons

    return {
        "kv_cache_problem": comparisons.kv_cache_problem,
        "block_structure": blocks.block_structure,
        "memory_comparison": comparisons.memory_comparison,
        "block_sharing": blocks.block_sharing,
        "performance_comparison": comparisons.performance_comparison,
        "attention_flow": blocks.attention_flow,
    }


def draw(
    folder: Path,
    names: Iterable[str] = (),
    themes: Sequence[str] = tuple(THEMES),
    ending: str = "png",
    sources: Sources | None = None,
) -> list[Path]:
    """Write the pictures named (or all six) as ``<name>-<theme>.<ending>``. Returns the files.

    Raises: ``UsageError`` for a name, theme or ending that does not exist, or a source that is not there.
    """
    drawers = _drawers()
    chosen = list(names) or list(drawers)
    for name in chosen:
        if name not in drawers:
            raise unknown("picture", name, drawers)
    if ending not in ("png", "svg"):
        raise unknown("format", ending, ("png", "svg"))
    written = []
    for theme in themes:
        with figure(theme) as ink:
            for name in chosen:
                drawn = drawers[name](sources or Sources(), ink)
                written.append(folder / f"{name}-{theme}.{ending}")
                save(drawn, written[-1])
    return written
