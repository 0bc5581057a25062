"""vLLM 0.33."""

from __future__ import annotations

from vllm_trace.hooks.table import HookTable
from vllm_trace.patches.v0_32 import SCHEDULER_HOOKS, WORKER_HOOKS

TABLE = HookTable(vllm=">=0.33,<0.34", hooks=SCHEDULER_HOOKS + WORKER_HOOKS)
