"""Runs any command with tracing on in every vLLM process that it starts."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vllm_trace.errors import UsageError
from vllm_trace.options import Options
from vllm_trace.tracefile import SUFFIX, is_sealed
from vllm_trace.tracewriter import seal

PATIENCE = 5.0
"""Seconds that processes of the command have to die after it."""

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def record(command: Sequence[str], folder: Path, options: Options) -> int:
    """Run the command and wait for it; its trace is whole when this returns.

    Ctrl-C and SIGTERM go to the command, which ends as it always does. vLLM kills its own
    EngineCore and workers without notice then, so their files are closed here.

    Returns the command's exit code, 128 + N when signal N ended it.
    Raises: ``UsageError`` when there is no such command.
    """
    program = find_program(command[0])
    environment = os.environ | replace(options, dir=str(folder.absolute())).to_environment()
    if not options.otlp:
        environment.pop("VTRACE_OTLP", None)
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []
    stopped = False

    def forward(number: int, frame: object) -> None:
        nonlocal stopped
        stopped = True
        if process is None:
            early.append(number)
        # A terminal sends Ctrl-C to the whole group: the command has it already.
        elif number != signal.SIGINT or not sys.stdin.isatty():
            process.send_signal(number)

    # Before the command is there: one that comes in between would end this and leave its files open.
    # What is ignored (nohup) stays so, here and in the command, which inherits it.
    heard = [number for number in FORWARDED if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        process = subprocess.Popen([program, *command[1:]], env=environment)
        for number in early:
            process.send_signal(number)
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    close_files(folder, "stopped" if stopped or code == 0 else "killed")
    return code if code >= 0 else 128 - code


def close_files(folder: Path, ended: str) -> None:
    """Close the files of processes that are gone, waiting a little for those that are dying."""
    patience = time.monotonic() + PATIENCE
    waiting = sorted(folder.glob(f"*{SUFFIX}"))
    while waiting:
        waiting = [path for path in waiting if not (seal(path, ended) or is_sealed(path))]
        if time.monotonic() > patience:
            return
        if waiting:
            time.sleep(0.1)


def find_program(name: str) -> str:
    """The program as the shell would find it, else the one beside this interpreter.

    Raises: ``UsageError`` when there is neither.
    """
    beside = str(Path(sys.executable).parent)
    found = shutil.which(name) or shutil.which(name, path=beside)
    if not found:
        raise UsageError(f"there is no command {name!r}", hint="Is its environment active?")
    return found
