"""What the arrival of a request says, as values of its root. No prompt, no token ids."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import RequestArrived


def sampling_facts(arrival: RequestArrived | None) -> tuple[Any, ...]:
    """``max_tokens``, ``temperature``, ``top_p``, ``top_k``, ``seed``, choices; None for what is not known."""
    if arrival is None:
        return (None,) * 6
    given = arrival.sampling
    top_k, seed, choices = _double(given.get("top_k")), given.get("seed"), given.get("n")
    return (
        arrival.max_tokens,
        _double(given.get("temperature")),
        _double(given.get("top_p")),
        top_k if top_k is not None and top_k > 0 else None,
        seed if isinstance(seed, int) else None,
        choices if isinstance(choices, int) and choices > 1 else None,
    )


def _double(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def arrival_facts(arrival: RequestArrived | None, continued: bool) -> tuple[Any, ...]:
    """Priority, LoRA, salt, a bad ``traceparent``. ``continued``: the client's could be read."""
    if arrival is None:
        return (None,) * 4
    return (
        arrival.priority or None,
        arrival.lora or None,
        True if arrival.salted else None,
        True if arrival.traceparent and not continued else None,
    )
