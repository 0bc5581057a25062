"""``replay --attention FILE``: a saved attention call computed again by our kernels, without vLLM."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_trace.backend.case import AttentionCase, NotFinite, RowError


@dataclass(frozen=True)
class Again:
    """What came of it."""

    about: dict[str, Any]
    num_rows: int
    num_tokens: int
    dtype: str
    tolerance: float
    worst: RowError | None
    by_the_rule: RowError | None
    """Our V1 or V2 (or prefill) against our dense form: whether it is our own kernels that are off."""
    not_finite: NotFinite | None

    @property
    def passed(self) -> bool:
        within = self.worst is None or self.worst.relative <= self.tolerance
        return within and self.not_finite is None

    def to_dict(self) -> dict[str, Any]:
        made = asdict(self) | {"schema": 1, "passed": self.passed}
        for name in ("worst", "by_the_rule", "not_finite"):
            value = getattr(self, name)
            made[name] = value._asdict() if value is not None else None
        return made

    def text(self) -> str:
        """In words."""
        saved = self.about.get("beyond", {})
        lines = [
            f"{self.about.get('kernel')} of layer {self.about.get('layer')} ({self.dtype}):"
            f" {self.num_rows} request, {self.num_tokens} new tokens, context {saved.get('seq_len')}",
            f"table {' '.join(map(str, saved.get('table', ())))}",
            f"slots {' '.join(map(str, saved.get('slots', ())))}",
        ]
        if self.not_finite is not None:
            bad = self.not_finite
            lines.append(
                f"{bad.what} holds {bad.value} at position {bad.position} (block {bad.block}, slot {bad.slot})"
            )
        if self.worst is not None:
            worst = self.worst
            lines.append(
                f"what the engine computed is off by {worst.relative:.3g} of the largest value read (absolute"
                f" {worst.absolute:.3g}) at position {worst.position}; {self.tolerance:g} is allowed"
            )
        if self.by_the_rule is not None:
            lines.append(
                f"our own kernels agree with our dense form to {self.by_the_rule.relative:.2g}"
            )
        lines.append(
            "within the tolerance" if self.passed else "beyond the tolerance, as when it was saved"
        )
        return "\n".join(lines)


def compute_again(path: Path) -> Again:
    """Load a call and compute it. Raises: ``TraceError`` when the file is none."""
    case = AttentionCase.load(path)
    dense = case.reference(dense=True)
    worst = max(case.errors(dense), key=lambda row: row.relative, default=None)
    ours = AttentionCase(**{**vars(case), "output": case.reference()})
    mine = max(ours.errors(dense), key=lambda row: row.relative, default=None)
    return Again(
        about=case.about,
        num_rows=case.num_rows,
        num_tokens=len(case.query),
        dtype=case.dtype,
        tolerance=case.tolerance,
        worst=worst,
        by_the_rule=mine,
        not_finite=case.first_not_finite(),
    )
