"""Switching on: in every vLLM process by the plugin, or by hand in one process."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_trace.errors import HookError, VllmTraceError
from vllm_trace.hooks.install import Installation, install
from vllm_trace.hooks.resolve import Resolution, choose, demand, resolve
from vllm_trace.hooks.source import VllmSource
from vllm_trace.options import Options
from vllm_trace.recorder import Recorder

_active: tuple[Recorder, Installation] | None = None


def recorder() -> Recorder | None:
    """The recorder of this process while it is attached."""
    return _active[0] if _active else None


def register() -> None:
    """Entry point of ``vllm.general_plugins``: attach when ``VTRACE_DIR`` asks for it.

    vLLM calls this in the front end, EngineCore, every worker and its short-lived inspection
    process, maybe twice. A file is made only with the first event. Raising here would kill the
    engine, so it raises only with ``VTRACE_STRICT=1``; else it says on stderr what is wrong and
    leaves vLLM as it is.
    """
    if _active is not None:
        return
    strict = False
    try:
        options = Options.from_environment()
        if not options.dir:
            return
        strict = options.strict
        attach(options)
        _prepare_attention(options)
    except VllmTraceError as error:
        print(f"vllm-trace: not tracing: {error}\n  {error.hint}", file=sys.stderr, flush=True)
        if strict:
            raise
    except Exception as error:
        text = f"vllm-trace: not tracing: {type(error).__name__}: {error}"
        print(f"{text}\n  Try: vllm-trace doctor", file=sys.stderr, flush=True)
        if strict:
            raise


def attach(options: Options) -> Recorder:
    """Resolve and install the hooks for the vLLM of this process and begin to record.

    Raises: ``HookError`` (nothing was changed) when vLLM is absent, has no table, lacks a
    required row, or tracing is on already.
    """
    global _active
    if _active is not None:
        raise HookError("tracing is on already in this process", hint="Call detach() first")
    from vllm_trace.patches import TABLES

    source = VllmSource.installed()
    if source is None:
        raise HookError("vLLM is not installed here", hint="pip install vllm, or make demo")
    table = choose(TABLES, source.version)
    rows = resolve(table, source, level=options.level, platform=current_platform())
    rows = [row for row in rows if row.hook.can_run]
    source.forget()
    demand(rows, source.version, strict=options.strict)
    made = Recorder(options)
    made.notes = notes(source, rows)
    installation = install(rows, made)
    if options.otlp:
        made.on_open = lambda: _send_spans(options)
    if options.copy_rate:
        made.notes["copy_rate"] = options.copy_rate
    _warn(source.version, rows, made)
    installation.on_skipped = functools.partial(_skipped, source.version, made)
    for row in rows:
        if reason := installation.skipped.get(row.hook.target):
            installation.on_skipped(row, reason)
    _active = (made, installation)
    return made


def _send_spans(options: Options) -> None:
    """``VTRACE_OTLP``, and nobody who ran this process has taken care of it."""
    from vllm_trace import sidecar

    try:
        sidecar.check(options.otlp)
        sidecar.start_alone(Path(options.dir).absolute(), options.otlp)
    except (VllmTraceError, OSError) as error:
        print(f"vllm-trace: no spans are sent: {error}", file=sys.stderr, flush=True)


def _prepare_attention(options: Options) -> None:
    """Our attention backend and the shadow, where they were asked for."""
    from vllm_trace.backend import calls, register_backend
    from vllm_trace.patches.attention_probes import paged_forward

    register_backend(options.attention)
    assert _active is not None
    made = _active[0]
    if options.attention != "engine":
        calls.observe(lambda *forward: _observed(made, paged_forward, forward))
    if options.shadow:
        from vllm_trace.backend.shadow import Shadow

        made.shadow = Shadow(options.dir)


def _observed(made: Recorder, read: Callable[..., None], forward: tuple[Any, ...]) -> None:
    try:
        read(made, *forward)
    except Exception as error:
        made.probe_failed("the paged backend", error)


def detach() -> list[str]:
    """Restore the original functions and close the trace. Returns what could not be restored."""
    global _active
    if _active is None:
        return []
    (made, installation), _active = _active, None
    if calls := sys.modules.get("vllm_trace.backend.calls"):
        calls.observe(None)
    said = installation.undo()
    made.close()
    return said


def current_platform() -> str:
    """``cpu`` or ``cuda``, as vLLM itself decided."""
    from vllm.platforms import current_platform as platform

    return "cpu" if platform.is_cpu() else "cuda"


def notes(source: VllmSource, rows: list[Resolution]) -> dict[str, object]:
    """What the trace's header says of versions and hooks."""
    torch = sys.modules.get("torch")
    return {
        "vllm": source.version,
        "torch": str(getattr(torch, "__version__", "")),
        "platform": current_platform(),
        "hooks": [row.to_dict() for row in rows],
    }


def _warn(version: str, rows: list[Resolution], made: Recorder) -> None:
    for row in rows:
        name = f"vLLM {version}: {row.hook.qualname}"
        if not row.usable:
            made.tell(f"{name} is {row.state} ({row.detail}): {row.hook.without}")
        elif row.state == "changed":
            made.tell(f"{name} differs from the reviewed source")


def _skipped(version: str, made: Recorder, row: Resolution, reason: str) -> None:
    """A row that looked well cannot be hooked; the header says so if there is none yet."""
    for entry in made.notes["hooks"]:
        if entry["target"] == row.hook.target:
            entry |= {"state": "missing", "detail": reason, "without": row.hook.without}
    made.tell(f"vLLM {version}: {row.hook.qualname} is not hooked ({reason}): {row.hook.without}")
