"""Starts the reader's code in a process of its own, and bears whatever it does.

Ten seconds, a few gigabytes and a megabyte of output are its limits; importing torch is not
counted. What it printed is kept in part, its files are never touched.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, Any

from vllm_trace.learn.progress import Progress

LIMIT_S = 10
READY_S = 90
"""To import torch and the like, on a busy machine."""
COMPILE_S = 120
OUTPUT_BYTES = 1 << 20
KEPT_BYTES = 4096


class _Drain(threading.Thread):
    """Reads what the process prints: keeps a little, counts all, never lets it block."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(daemon=True)
        self.stream = stream
        self.head = b""
        self.tail = b""
        self.count = 0
        self.start()

    def run(self) -> None:
        while data := os.read(self.stream.fileno(), 1 << 16):
            self.count += len(data)
            room = KEPT_BYTES - len(self.head)
            self.head += data[:room]
            self.tail = (self.tail + data[room:])[-KEPT_BYTES:] if room < len(data) else self.tail

    def text(self) -> str:
        middle = self.count - len(self.head) - len(self.tail)
        gap = f"\n… {middle} bytes left out …\n".encode() if middle > 0 else b""
        return (self.head + gap + self.tail).decode("utf-8", "replace")


def run_python(one: Any, path: Path, result: Any, progress: Progress) -> None:
    """Grade a Python file."""
    with tempfile.TemporaryDirectory(prefix="vllm-trace-learn-") as scratch:
        report = Path(scratch) / "report.jsonl"
        report.touch()
        command = [sys.executable, "-m", "vllm_trace.learn.exercises.grader"]
        command += [one.name, str(path.absolute()), str(report), str(progress.seed)]
        environ = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if "triton" in one.needs and not _has_gpu():
            environ["TRITON_INTERPRET"] = "1"
        ended, drain = _watch(command, environ, report, path.parent)
        said = _read(report)
    result.output = drain.text()
    checks = [row for row in said if "title" in row]
    result.checks += checks
    result.notes += [row["note"] for row in said if "note" in row]
    planned: list[Any] = next((row["checks"] for row in said if "checks" in row), [])
    at = planned[len(checks)] if len(checks) < len(planned) else "the file"
    result.left = max(0, len(planned) - len(checks))
    if any(not row["passed"] for row in checks):
        return
    if ended or not any("done" in row for row in said):
        result.left = max(0, result.left - 1)
        result.fail(
            str(at),
            ended or "the process ended by itself before the check was over",
            _advice(ended),
        )
    if drain.count > KEPT_BYTES * 2:
        result.notes.append(f"It printed {drain.count} bytes; the middle was left out.")


def _watch(
    command: list[str], environ: dict[str, str], report: Path, cwd: Path
) -> tuple[str, _Drain]:
    """Run until it ends or a limit is reached. Returns what stopped it, in a sentence, or nothing."""
    process = subprocess.Popen(
        command,
        env=environ,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    drain = _Drain(process.stdout)
    began, ready, why = time.monotonic(), False, ""
    try:
        while process.poll() is None and not why:
            time.sleep(0.02)
            if not ready and report.stat().st_size:
                began, ready = time.monotonic(), True
            took = time.monotonic() - began
            if took > (LIMIT_S if ready else READY_S):
                why = f"it did not end within {LIMIT_S} s and was stopped"
            elif drain.count > OUTPUT_BYTES:
                why = f"it printed more than {OUTPUT_BYTES >> 20} MB and was stopped"
    finally:
        _kill(process)
    drain.join(2)
    if not why and process.returncode:
        why = _ended(process.returncode)
    return why, drain


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it started: its own session, nobody else's."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _ended(code: int) -> str:
    if code >= 0:
        return f"the process ended itself with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"the process crashed ({name})"


def _advice(why: str) -> str:
    if "did not end" in why:
        return (
            "Is there a loop that nothing ends? Print what it goes by, and look at the first lines."
        )
    if "printed" in why:
        return "Print less: the first few rounds of a loop are enough."
    if "crashed" in why:
        return "A crash of the interpreter itself: memory, recursion in C, or a wild kernel."
    return "Take out exit() and the like." if "code" in why else ""


def _read(report: Path) -> list[dict[str, Any]]:
    rows = []
    for line in report.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break  # killed while it wrote
    return rows


# CUDA --------------------------------------------------------------------------------------


def _has_gpu() -> bool:
    """Whether there is a CUDA device to run on; asks the driver's own tool, which is quick."""
    tool = shutil.which("nvidia-smi")
    if not tool:
        return False
    try:
        done = subprocess.run([tool, "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False  # a driver that does not answer runs no kernel either
    return done.returncode == 0 and "GPU" in done.stdout


def run_cuda(one: Any, path: Path, result: Any) -> None:
    """Compile a CUDA file with the harness behind it, and run it where there is a GPU."""
    text = path.read_text(encoding="utf-8", errors="replace")
    with tempfile.TemporaryDirectory(prefix="vllm-trace-learn-") as scratch:
        source, program = Path(scratch) / "all.cu", Path(scratch) / "program"
        source.write_text(
            f'#line 1 "{path.name}"\n{text}\n#line 1 "harness"\n{one.text("harness")}'
        )
        command = ["nvcc", "-O1", "-std=c++17", "-o", str(program), str(source)]
        if _has_gpu():
            command[1:1] = ["-arch=native"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_S)
        except subprocess.TimeoutExpired:
            result.fail("it compiles", f"nvcc took more than {COMPILE_S} s and was stopped")
            return
        if done.returncode:
            result.left = 1
            errors = [row for row in (done.stdout + done.stderr).splitlines() if "error" in row]
            said = "\n".join(errors[:4]).replace(f"{scratch}/", "") or done.stderr[-400:]
            result.fail("it compiles", said)
            return
        result.checks.append({"title": "it compiles", "passed": True, "said": "", "hint": ""})
        report = Path(scratch) / "report"
        report.write_text("ready")
        ended, drain = _watch([str(program)], dict(os.environ), report, Path(scratch))
        said = drain.text().strip()
        if "code 3" in ended:
            result.notes.append("There is no GPU here: the kernel was compiled and not run.")
        elif ended:
            why = said if "code 1" in ended and said else f"{ended}\n{said}"
            result.fail("it computes attention", why)
        else:
            title = "it computes attention, on the GPU"
            result.checks.append({"title": title, "passed": True, "said": "", "hint": ""})
