"""What is read of the choice of an attention backend: candidates, why they were rejected, and who was taken."""

from __future__ import annotations

from typing import Any

from vllm_trace.events import BackendSelected
from vllm_trace.hooks.table import probe
from vllm_trace.recorder import Recorder


@probe()
def attention_made(defer, self):
    # Now: a backend may ask vLLM's current configuration for its block sizes.
    defer(backend_selected, self, self.attn_backend.get_supported_kernel_block_sizes())


def backend_selected(rec: Recorder, layer: Any, sizes: Any) -> BackendSelected:
    backend = layer.attn_backend
    ours = getattr(backend, "trace_name", None)
    name = ours() if ours is not None else backend.get_name()
    candidates = list(rec.state.get("candidates", ()))
    if name not in [candidate[0] for candidate in candidates]:
        candidates.append((name, ""))
    return BackendSelected(
        layer=layer.layer_name,
        backend=name,
        impl=type(layer.impl).__name__,
        candidates=candidates,
        settings={
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_size": layer.head_size,
            "kv_cache_dtype": str(layer.kv_cache_dtype),
            "block_sizes": [_size_rule(size) for size in sizes],
        }
        | ({"asked_for": True} if rec.state.get("asked_for") else {}),
    )


def _size_rule(size: Any) -> str:
    """``16`` for a fixed kernel block size, ``multiple of 32`` for vLLM's ``MultipleOf``."""
    base = getattr(size, "base", None)
    return f"multiple of {base}" if base else str(size)


@probe()
def cpu_backend_chosen(defer, result, selected_backend):
    defer(cpu_candidates, selected_backend, result)


def cpu_candidates(rec: Recorder, asked: Any, path: str) -> None:
    """The CPU platform has one class for a layer; another one asked for is only logged."""
    name = getattr(asked, "name", None)
    rejected = f"Cannot use {name} backend on CPU."
    chosen = "CPU_MLA" if "mla" in path.lower() else "CPU_ATTN"
    rec.state["candidates"] = [(name, rejected)] if name and name != chosen else []


@probe()
def cuda_backend_chosen(defer, selected_backend):
    defer(cuda_backend_asked, selected_backend)


def cuda_backend_asked(rec: Recorder, asked: Any) -> None:
    """A backend that the user names is taken if it is valid: no other one is looked at."""
    rec.state["asked_for"] = asked is not None
    if asked is not None:
        rec.state["candidates"] = []


@probe()
def cuda_backends_ranked_0_20(defer, result):
    defer(cuda_candidates_0_20, result)


def cuda_candidates_0_20(
    rec: Recorder, result: tuple[list[tuple[Any, int]], dict[Any, tuple[int, list[str]]]]
) -> None:
    """0.20 gives pairs of backend and priority."""
    valid, invalid = result
    ranked = [(p, backend.name, "; ".join(reasons)) for backend, (p, reasons) in invalid.items()]
    for place, (backend, priority) in enumerate(sorted(valid, key=lambda pair: pair[1])):
        ranked.append((priority, backend.name, "" if place == 0 else "valid, of lower priority"))
    rec.state["candidates"] = [(name, why) for _, name, why in sorted(ranked)]


@probe()
def cuda_backends_ranked(defer, result):
    defer(cuda_candidates, result)


def cuda_candidates(rec: Recorder, result: tuple[list[Any], dict[Any, tuple[int, list[str]]]]):
    """Rejected ones with vLLM's reasons; valid ones that were outranked say so."""
    valid, invalid = result
    ranked = [(p, backend.name, "; ".join(reasons)) for backend, (p, reasons) in invalid.items()]
    for place, candidate in enumerate(sorted(valid, key=lambda c: c.priority)):
        why = "" if place == 0 else "valid, of lower priority"
        ranked.append((candidate.priority, candidate.backend.name, why))
    rec.state["candidates"] = [(name, why) for _, name, why in sorted(ranked)]
