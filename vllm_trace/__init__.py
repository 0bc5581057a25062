"""Attach to an unmodified vLLM and see, replay and prove every KV-cache decision."""

__version__ = "0.1.0"
