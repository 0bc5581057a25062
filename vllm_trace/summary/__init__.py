"""A trace told in numbers: the engine, its steps, its requests, its kernels.

``Summary.of(trace)`` reads a trace once. ``facts`` is the flat form that scenarios check their
statements against; ``to_dict`` is the JSON form.
"""

from vllm_trace.summary.model import (
    Kernel,
    KernelStep,
    RequestLife,
    RuleCheck,
    ShadowCheck,
    Step,
    Summary,
    WorkerCheck,
)

__all__ = [
    "Kernel",
    "KernelStep",
    "RequestLife",
    "RuleCheck",
    "ShadowCheck",
    "Step",
    "Summary",
    "WorkerCheck",
]
