"""JSON documents: what ``--json`` prints and what is kept beside a trace."""

from __future__ import annotations

import json
import math
from typing import Any


def as_json(document: Any) -> str:
    """The document as text. JSON has no word for a number that is not finite: it is null."""
    try:
        return json.dumps(document, indent=1, default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(document), indent=1, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value
