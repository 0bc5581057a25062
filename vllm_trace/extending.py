"""A user's own Python file, run for what it registers: invariants, exporters."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from vllm_trace.errors import UsageError


def run_file(path: Path, kind: str) -> str:
    """Run a file that has ``@kind`` in it; returns the name of the module that it became.

    Raises: ``UsageError`` when it is no Python file, or cannot be run.
    """
    name = f"vllm_trace_{kind}s_{path.stem}"
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise UsageError(f"{path} is no Python file", hint=f"Give a file with @{kind} in it")
    module = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise UsageError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    return name
