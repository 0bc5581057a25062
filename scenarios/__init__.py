"""Workloads as data: one TOML file each. ``vllm_trace.scenario`` reads them."""
