"""The recorder's options: one frozen dataclass that makes the flags and the variables."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from vllm_trace.errors import UsageError, unknown

LEVELS = ("light", "full")
ATTENTIONS = ("engine", "paged", "paged:vllm")

VIEWS = ("summary", "steps", "blocks", "requests", "kernels", "events")
"""What ``show`` can show; here, so that ``--help`` need not load the views themselves."""

#: Variables that begin with ``VTRACE_`` but are not options of the recorder.
OTHER_VARIABLES = {
    "VTRACE_CACHE": "folder for environments, checkpoints and vLLM's own caches",
    "VTRACE_LEARN_DIR": "folder for what `learn` remembers",
    "VTRACE_PLAIN": "1: run the Python sources where the package is compiled",
    "VTRACE_COMPILE": "0: install as plain Python; 1: fail where it cannot be compiled",
    "VTRACE_PYTHON": "the Python 3.11 that the environment is made with, for set-up only",
    "VTRACE_TORCH_INDEX": "PyTorch's CPU wheel index, for set-up only",
    "VTRACE_HYPOTHESIS_EXAMPLES": "how many random examples the tests try",
    "VTRACE_SOURCE_0_20": "folder of an unpacked vLLM 0.20.2 wheel, which the tests read",
    "VTRACE_SOURCE_0_33": "folder of an unpacked vLLM 0.33 wheel, which the tests read",
    "VTRACE_SOURCES": "folders of unpacked vLLM sources, by colons, for the tests of the source map",
}


@dataclass(frozen=True)
class Options:
    """What to record and where. Each field is the variable ``VTRACE_<FIELD>``.

    Children of a traced process inherit the variables, so one setting reaches the front end,
    EngineCore and every worker.
    """

    dir: str = ""
    """Folder for the trace files. Empty: tracing is off."""
    level: str = "full"
    """``full``: every decision. ``light``: a few events a step, meant to stay on."""
    tokens: bool = False
    """Also record token ids. Off by default, because traces travel."""
    strict: bool = False
    """Refuse to trace when a hooked function's source is not the one that was reviewed."""
    failures: int = 100
    """A probe that failed this often is taken off."""
    otlp: str = ""
    """Send spans to this OTLP receiver while the trace is written, from a process beside."""
    attention: str = "engine"
    """``engine``: vLLM's own attention. ``paged``: ours stands in, ``paged:vllm`` with vLLM's ops."""
    shadow: bool = False
    """Compute every attention call a second time, from scratch, and keep the worst error."""
    copy_rate: int = 0
    """Bytes a second that a copy moves on this device, for the share that kernels reach of it."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Options:
        """Read ``VTRACE_*``.

        Raises: ``UsageError`` for an unknown variable or an unreadable value.
        """
        known = {f"VTRACE_{f.name.upper()}": f for f in fields(cls)}
        values: dict[str, object] = {}
        for name in environ:
            if not name.startswith("VTRACE_") or name in OTHER_VARIABLES:
                continue
            if name not in known:
                raise unknown("variable", name, [*known, *OTHER_VARIABLES])
            field = known[name]
            values[field.name] = _read(name, environ[name], type(field.default))
        return cls(**values).checked()  # type: ignore[arg-type]

    def checked(self) -> Options:
        """Return self. Raises: ``UsageError`` when a value is not one that exists."""
        if self.level not in LEVELS:
            raise unknown("level", self.level, LEVELS)
        if self.attention not in ATTENTIONS:
            raise unknown("attention", self.attention, ATTENTIONS)
        if self.shadow and self.level != "full":
            raise UsageError("shadow needs level full", hint="Leave --level light out")
        return self

    def to_environment(self) -> dict[str, str]:
        """Variables that make the same options in a child process."""
        made = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                text = str(int(value)) if isinstance(value, bool) else str(value)
                made[f"VTRACE_{field.name.upper()}"] = text
        return made


def _read(name: str, text: str, kind: type) -> object:
    if kind is bool:
        words = {"1": True, "true": True, "yes": True, "on": True}
        words |= {"0": False, "false": False, "no": False, "off": False, "": False}
        if text.lower() not in words:
            raise UsageError(f"{name}={text!r} is not a yes or a no", hint=f"Set {name}=1 or 0")
        return words[text.lower()]
    if kind is int:
        try:
            return int(text)
        except ValueError:
            raise UsageError(f"{name}={text!r} is not a whole number") from None
    return text


def cache_dir() -> Path:
    """Folder for everything that is made once and kept outside a checkout."""
    asked = os.environ.get("VTRACE_CACHE")
    return Path(asked).expanduser() if asked else Path.home() / ".cache" / "vllm-trace"
