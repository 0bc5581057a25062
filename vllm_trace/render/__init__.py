"""Everything that is shown in a terminal, as rich renderables for 80 columns."""

from vllm_trace.render.attention import (
    copy_rate_of,
    kernel_notes,
    kernel_sizes,
    kernel_steps,
    kernels,
    kernels_view,
    rule,
    shadow,
    share_of_copy,
)
from vllm_trace.render.basics import (
    MAX_NAME,
    MAX_ROWS,
    duration,
    ids,
    mapping,
    plain,
    short_name,
    shorten,
    size,
    table,
    titled,
)
from vllm_trace.render.doctor import (
    diagnosis,
    hooks,
)
from vllm_trace.render.summary import (
    engine,
    excerpt,
    findings,
    report,
    requests,
    steps,
)

__all__ = [
    "MAX_NAME",
    "MAX_ROWS",
    "copy_rate_of",
    "diagnosis",
    "duration",
    "engine",
    "excerpt",
    "findings",
    "hooks",
    "ids",
    "kernel_notes",
    "kernel_sizes",
    "kernel_steps",
    "kernels",
    "kernels_view",
    "mapping",
    "plain",
    "report",
    "requests",
    "rule",
    "shadow",
    "share_of_copy",
    "short_name",
    "shorten",
    "size",
    "steps",
    "table",
    "titled",
]
