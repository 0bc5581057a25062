"""Hook tables, one module for each vLLM minor release that was read and reviewed.

A module ``v0_NN`` holds ``TABLE``. The probes of EngineCore stand in ``scheduler_probes``,
``block_probes`` and ``step_probes``, those of a worker in ``worker_probes`` (``worker_v2_probes``
for its other runner), ``backend_probes`` and ``attention_probes``; a release that needs another
probe defines it beside its table.
"""

from __future__ import annotations

from vllm_trace.hooks.table import HookTable
from vllm_trace.patches import v0_11, v0_20, v0_32, v0_33

TABLES: tuple[HookTable, ...] = (v0_11.TABLE, v0_20.TABLE, v0_32.TABLE, v0_33.TABLE)
