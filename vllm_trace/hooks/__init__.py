"""Attach to a vLLM: tables say where, ``resolve`` says whether, ``install`` does it.

``register`` is the entry point of ``vllm.general_plugins``; ``attach`` and ``detach`` are the
same for code that already holds a Python process with vLLM in it.
"""

from vllm_trace.hooks.register import attach, detach, recorder, register
from vllm_trace.hooks.table import Hook, HookTable, Probe, probe

__all__ = ["Hook", "HookTable", "Probe", "attach", "detach", "probe", "recorder", "register"]
