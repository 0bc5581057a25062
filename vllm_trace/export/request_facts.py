"""What the arrival of a request says, as attributes of its root."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import RequestArrived
from vllm_trace.export import attributes as a


def arrival_facts(arrival: RequestArrived, continued: bool) -> dict[str, Any]:
    """``continued``: the client's ``traceparent`` could be read. No prompt, no token ids."""
    facts: dict[str, Any] = {
        a.INPUT_TOKENS: arrival.num_prompt_tokens,
        a.MAX_TOKENS: arrival.max_tokens,
    }
    sampling = arrival.sampling
    for key, name, kind in (
        ("temperature", a.TEMPERATURE, float),
        ("top_p", a.TOP_P, float),
        ("top_k", a.TOP_K, float),
        ("seed", a.SEED, int),
    ):
        value = sampling.get(key)
        if isinstance(value, (int, float)) and not (key == "top_k" and value <= 0):
            facts[name] = kind(value)
    choices = sampling.get("n")
    if isinstance(choices, int) and choices > 1:
        facts[a.CHOICES] = choices
    if arrival.priority:
        facts[a.PRIORITY] = arrival.priority
    if arrival.lora:
        facts[a.LORA] = arrival.lora
    if arrival.salted:
        facts[a.SALTED] = True
    if arrival.traceparent and not continued:
        facts[a.BAD_TRACEPARENT] = True
    return facts
