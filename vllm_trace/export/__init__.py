"""Out of the trace: a format is a function behind one small protocol.

A user's own is a few lines, given to ``export --load FILE``::

    @exporter("arrivals", "Names of the requests, one a line", suffix=".txt")
    def arrivals(trace, out, options):
        count = 0
        for event in trace.events():
            if event.kind == "request.arrived":
                out.write(f"{event.request_id}\\n".encode())
                count += 1
        return Exported({"requests": count})

The built-in ones stand in ``BUILT_IN``; their modules, and the libraries that these need, are
imported when a format is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_trace.errors import UsageError, VllmTraceError, unknown
from vllm_trace.extending import run_file

if TYPE_CHECKING:
    from vllm_trace.trace import Trace

BUILT_IN = {
    "otlp": "vllm_trace.export.otlp",
    "jaeger-json": "vllm_trace.export.jaeger_json",
    "perfetto": "vllm_trace.export.perfetto",
    "parquet": "vllm_trace.export.parquet",
    "json": "vllm_trace.export.jsonl",
}
"""Name → the module that registers it."""

TARGETS = ("file", "folder", "any")
"""What ``-o`` is to a format, and what its function gets: ``file`` an open binary file, ``folder``
the path of an empty folder, ``any`` the words of ``-o`` themselves (a URL, a file, or nothing)."""


class ExportError(VllmTraceError):
    """A trace could not be brought where it should go: no room, no right, no receiver."""

    slug = "export"


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked for. A format takes what concerns it."""

    detail: bool = False
    """Spans: one for each decode step, not one for the whole decode."""
    tokens: bool = False
    """Token ids too, if the trace has them."""


@dataclass
class Exported:
    """What an exporter did."""

    counts: dict[str, int] = field(default_factory=dict)
    """What was written, by noun in the plural: ``{"spans": 812}``."""
    problems: list[str] = field(default_factory=list)
    """What is missing from it that the trace had, in sentences. Any makes the exit code 1."""
    notes: list[str] = field(default_factory=list)
    """What the user may want to know."""


class Exporter(Protocol):
    """Reads a trace once and writes it in one format; raises ``VllmTraceError`` when it cannot."""

    def __call__(self, trace: Trace, out: Any, options: ExportOptions) -> Exported: ...


@dataclass(frozen=True)
class Format:
    """A registered exporter."""

    name: str
    text: str
    run: Exporter
    to: str = "file"
    """One of ``TARGETS``."""
    suffix: str = ""
    """Of the file, or of the files in the folder; also what the default of ``-o`` ends in."""


FORMATS: dict[str, Format] = {}
"""Those that are registered, by name: built-in ones once they are used."""


def exporter(
    name: str, text: str, *, to: str = "file", suffix: str = ""
) -> Callable[[Exporter], Exporter]:
    """Register the function that follows as the format ``name``.

    Raises: ``UsageError`` when it does not fit, with its signature.
    """

    import inspect

    def register(function: Exporter) -> Exporter:
        if to not in TARGETS:
            raise unknown("target of an exporter", to, TARGETS)
        try:
            inspect.signature(function).bind(1, 2, 3)
        except (TypeError, ValueError):
            called = getattr(function, "__name__", repr(function))
            raise UsageError(
                f"exporter {name!r}: {called}{inspect.signature(function)} "
                "must take (trace, out, options)",
                hint=f"def {called}(trace, out, options)",
            ) from None
        other = FORMATS.get(name)
        module = getattr(function, "__module__", "")
        if other is not None or BUILT_IN.get(name, module) != module:
            if other is None or getattr(other.run, "__module__", "") != module:
                raise UsageError(f"there are two exporters {name!r}", hint="Give one another name")
        FORMATS[name] = Format(name, text, function, to, suffix)
        return function

    return register


def names() -> list[str]:
    """All formats, without importing their modules."""
    return [*BUILT_IN, *(name for name in FORMATS if name not in BUILT_IN)]


def format_of(name: str) -> Format:
    """The format of that name, its module imported.

    Raises: ``UsageError`` when there is none; ``ExportError`` when a library that it needs is not
    installed.
    """
    if name not in names():
        raise unknown("format", name, names())
    if name not in FORMATS:
        try:
            import_module(BUILT_IN[name])
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "vllm_trace":
                raise
            raise ExportError(
                f"{name} needs the library {error.name}, which is not installed",
                hint="pip install 'vllm-trace[export]'",
            ) from None
    return FORMATS[name]


def load(path: Path) -> None:
    """Run a Python file that registers exporters.

    Raises: ``UsageError`` when it cannot be run, or registers none.
    """
    name = run_file(path, "exporter")
    if not any(getattr(known.run, "__module__", "") == name for known in FORMATS.values()):
        raise UsageError(f"{path} registers no exporter", hint="Give a file with @exporter in it")


def export(trace: Trace, name: str, output: str, options: ExportOptions | None = None) -> Exported:
    """Write the trace in the format ``name`` to ``output`` (``-`` is stdout).

    What was half written when it fails is removed.
    """
    from vllm_trace.export import _write

    chosen, options = format_of(name), options or ExportOptions()
    if chosen.to == "any":
        return chosen.run(trace, output, options)
    if chosen.to == "folder":
        with _write.folder(output, chosen.suffix) as made:
            return chosen.run(trace, made, options)
    with _write.file(output) as out:
        return chosen.run(trace, out, options)
