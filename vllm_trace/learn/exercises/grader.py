"""The process that runs the reader's file: ``python -m … grader NAME FILE REPORT SEED``.

Writes a line of JSON to the report for each check, so that nothing is lost when it is killed.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

MEMORY_BYTES = 3 << 30
Check = tuple[str, Callable[[Any, "Desk"], None]]


class Failed(Exception):
    """A check that did not hold, with what to say about it."""

    def __init__(self, said: str, hint: str = "") -> None:
        super().__init__(said)
        self.hint = hint


class Desk:
    """What a check may use."""

    def __init__(self, path: Path, seed: int, note: Callable[[str], None]) -> None:
        self.path = path
        self.seed = seed
        self.note = note


def require(holds: bool, said: str, hint: str = "") -> None:
    """Raises: ``Failed`` unless it holds."""
    if not holds:
        raise Failed(said, hint)


def main(name: str, file: str, report: str, seed: str) -> None:
    with open(report, "a", encoding="utf-8", buffering=1) as out:

        def write(**row: Any) -> None:
            out.write(json.dumps(row, default=str) + "\n")

        checks = _checks(name)
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
        write(checks=["it loads", *(title for title, _ in checks)])
        path = Path(file)
        desk = Desk(path, int(seed), lambda text: write(note=text))
        module = None
        for title, check in [("it loads", None), *checks]:
            try:
                if check is None:
                    module = _load(path)
                else:
                    check(module, desk)
            except BaseException as error:  # whatever the reader's code raises
                said, hint = explain(error, path)
                write(title=title, passed=False, said=said, hint=hint)
                return
            write(title=title, passed=True, said="", hint="")
        write(done=True)


def _checks(name: str) -> list[Check]:
    """The checks of an exercise; heavy imports happen here, before the clock runs."""
    if name.startswith(("ex2", "ex3", "ex7")):
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(1)
        if name == "ex2-triton":
            import triton.language  # noqa: F401
        from vllm_trace.learn.exercises import checks_kernels as home
    elif name in ("ex8", "ex9"):
        from vllm_trace.learn.exercises import checks_scheduler as home  # type: ignore[no-redef]
    else:
        from vllm_trace.learn.exercises import checks_blocks as home  # type: ignore[no-redef]
    return home.CHECKS[name]


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("exercise", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["exercise"] = module
    spec.loader.exec_module(module)
    return module


def explain(error: BaseException, path: Path) -> tuple[str, str]:
    """What to tell the reader about an exception: the line of their file, and in which words."""
    if isinstance(error, Failed):
        return str(error), error.hint
    if isinstance(error, NotImplementedError):
        what = str(error) or "something"
        return f"{what} is not written yet", "Its docstring says what it has to do."
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f"line {error.lineno}: {error.msg}", ""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    where = f"line {frames[-1].lineno}, in {frames[-1].name}: " if frames else ""
    code = f"\n  {frames[-1].line}" if frames and frames[-1].line else ""
    if isinstance(error, SystemExit):
        return f"{where}it calls exit(){code}", "A file that exits cannot be checked."
    if isinstance(error, RecursionError):
        return f"{where}it calls itself without end{code}", ""
    missing = isinstance(error, AttributeError) and "module 'exercise'" in str(error)
    if missing:
        return (
            f"{str(error).rpartition(' ')[2]} is missing from your file",
            "Keep the names of the skeleton.",
        )
    return f"{where}{type(error).__name__}: {error}{code}", ""


if __name__ == "__main__":
    # As the module that the checks import: what they raise is its Failed, not this one's.
    from vllm_trace.learn.exercises import grader

    grader.main(*sys.argv[1:])
