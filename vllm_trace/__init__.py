"""Attach to an unmodified vLLM and see, replay and prove every KV-cache decision."""

import os

__version__ = "0.1.0"

if os.environ.get("VTRACE_PLAIN", "0") not in ("", "0"):
    from vllm_trace.compiled import use_sources

    use_sources()
