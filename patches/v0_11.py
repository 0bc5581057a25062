"""vLLM 0.8.5 to 0.11: the decode path that these releases have and later ones have not.

``PagedAttention.forward_decode`` chooses V1 or V2 in Python and calls one of two ops. Each of its calls is a *step* of
its own here, numbered from 1: the choice with all its inputs, then the op that ran. 0.11.0 was read and run
(`make lane-0.11`); the others have the same three functions, which resolve to ``changed`` where their source differs.

Leaves out: scheduler, KV-cache manager and block pool of these releases.
"""

from __future__ import annotations

from typing import Any

from vllm_trace.decode_rule import choose
from vllm_trace.device_clock import elapsed_ns, give_back, mark, passed
from vllm_trace.events import AttentionCalled, AttentionPlanned
from vllm_trace.hooks.fingerprints import reviewed
from vllm_trace.hooks.table import Hook, HookTable, probe
from vllm_trace.recorder import Recorder


def _mark_query(query):
    return mark(query)


@probe(before=_mark_query)
def paged_attention_v1(defer, started, ended, seen, query):
    defer(op_ran, "paged_attention_v1", "V1", started, ended, (seen, mark(query)))


@probe(before=_mark_query)
def paged_attention_v2(defer, started, ended, seen, query):
    defer(op_ran, "paged_attention_v2", "V2", started, ended, (seen, mark(query)))


def op_ran(
    rec: Recorder, op: str, variant: str, started: int, ended: int, marks: tuple[Any, Any]
) -> None:
    """It waits for ``forward_decode``, inside which it ran."""
    rec.state.setdefault("ops", []).append((op, variant, started, ended - started, marks))


@probe()
def forward_decode(defer, started, query, value_cache, max_seq_len, num_kv_heads):
    defer(decoded, started, tuple(query.shape), value_cache.shape[3], max_seq_len, num_kv_heads)


def decoded(
    rec: Recorder,
    started: int,
    shape: tuple[int, int, int],
    block_size: int,
    max_seq_len: int,
    num_kv_heads: int,
) -> None:
    ran = [op for op in rec.state.pop("ops", ()) if op[2] >= started]
    rec.state["decodes"] = step = rec.state.get("decodes", 0) + 1
    num_seqs, num_heads, head_size = shape
    choice = choose(int(max_seq_len), num_seqs, num_heads)
    sizes = {"block_size": block_size, "head_size": head_size, "num_kv_heads": num_kv_heads}
    values = (step, choice, choice.numbers | sizes, ran)
    marks = [one for op in ran for one in op[4]]
    if any(one is not None for one in marks):
        rec.defer_until(lambda wait: passed(marks, wait), tell_decode, *values)
    else:
        tell_decode(rec, *values)


def tell_decode(rec: Recorder, step: int, choice: Any, numbers: dict[str, int], ran: Any) -> None:
    name = "PagedAttention.forward_decode"
    rec.emit(AttentionPlanned(step, 0, name, choice.variant, numbers, [], choice.reason))
    for op, _, began, dur_ns, marks in ran:
        on_device = marks[0] is not None
        taken = elapsed_ns(*marks) if on_device else dur_ns
        clock = "cuda" if on_device else "host"
        rec.emit(AttentionCalled(step, op, [-1], [began], [taken], clock))
        give_back(marks)


_OPS = "vllm._custom_ops"

HOOKS = (
    Hook(
        "vllm.attention.ops.paged_attn:PagedAttention.forward_decode",
        forward_decode,
        emits="attention.planned attention.called",
        required=True,
        without="the V1/V2 choice and its inputs are unknown",
    ),
    Hook(
        f"{_OPS}:paged_attention_v1",
        paged_attention_v1,
        emits="attention.called",
        without="it is not known whether V1 ran",
    ),
    Hook(
        f"{_OPS}:paged_attention_v2",
        paged_attention_v2,
        emits="attention.called",
        without="it is not known whether V2 ran",
    ),
)

# Printed by `python -m vllm_trace.hooks.fingerprints DIR`; read in the CPU wheel of 0.11.0.
# vLLM 0.11.0.post2
FINGERPRINTS = {
    "vllm.attention.ops.paged_attn:PagedAttention.forward_decode": "6302356fda1c5b3f",
    "vllm._custom_ops:paged_attention_v1": "124ea6a715f5fd64",
    "vllm._custom_ops:paged_attention_v2": "0a01d182e4e0fa26",
}

TABLE = HookTable(vllm=">=0.8.5,<0.12", hooks=reviewed(HOOKS, FINGERPRINTS))
