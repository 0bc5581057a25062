"""Every engine that is made in this process is asked for our attention, or does not start.

It is done where vLLM makes a configuration from arguments, so it reaches a user's own script and ``vllm serve`` as
well as ``run``.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm_trace.errors import UsageError

_before: Any = None
"""``EngineArgs.create_engine_config`` as vLLM has it, while ours stands there."""


def stand_in(choice: str) -> None:
    """Wrap ``EngineArgs.create_engine_config`` for a choice of ours; put it back for ``engine``.

    What the wrapper raises when our attention cannot do it: ``UsageError``, before there is an engine.
    """
    global _before
    from vllm.engine.arg_utils import EngineArgs

    if _before is not None:
        EngineArgs.create_engine_config = _before  # type: ignore[method-assign]
        _before = None
    if choice == "engine":
        return
    original = _before = EngineArgs.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *given: Any, **named: Any) -> Any:
        from vllm_trace.backend.support import demand

        _ask_for(choice, self)
        config = original(self, *given, **named)
        demand(choice, config)
        return config

    EngineArgs.create_engine_config = create_engine_config  # type: ignore[method-assign]


def _ask_for(choice: str, arguments: Any) -> None:
    """On the CPU ours has taken the place of the only class; elsewhere it has to be named."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    config = getattr(arguments, "attention_config", None)
    inside = config.get("backend") if isinstance(config, dict) else getattr(config, "backend", None)
    for asked in (getattr(arguments, "attention_backend", None), inside):
        name = getattr(asked, "name", asked)
        if name not in (None, "CUSTOM"):
            raise UsageError(
                f"--attention {choice}: the engine is asked for the attention backend {name} as well",
                hint="Leave one of the two out",
            )
    arguments.attention_backend = "CUSTOM"
