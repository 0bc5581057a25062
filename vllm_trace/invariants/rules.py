"""The built-in invariants, in the order of the documentation."""

from vllm_trace.invariants import rules_pool, rules_prefix, rules_steps, rules_tables

__all__ = ["rules_pool", "rules_prefix", "rules_steps", "rules_tables"]
