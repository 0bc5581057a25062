"""The process beside a traced run that sends its spans: ``vllm-trace export … --follow``.

The engine's processes know nothing of it. It reads the trace files as they grow, gives way to them
(``nice``), and is told by the end of its stdin that the run is over.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_trace.counting import counted, were
from vllm_trace.errors import UsageError
from vllm_trace.tracefile import is_running

WAIT = 90.0
"""Seconds for its last words: above its own patience and an exporter's time-out."""

LOCK = ".otlp"
"""File that the first process of a run makes, so that one sidecar is started and not one each."""


@dataclass
class Told:
    """The sidecar's last words."""

    url: str
    spans: int = 0
    dropped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    requests: int = 0
    error: str = ""
    """Why it could not do its work at all."""

    @property
    def failed(self) -> bool:
        return bool(self.error or self.dropped)

    def to_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def text(self, folder: Path) -> str:
        """One line for the user, and what to do about it."""
        again = f"\n  They are in the trace: vllm-trace export {folder} --to otlp -o {self.url}"
        if self.error:
            return f"no spans were sent to {self.url}: {self.error}{again}"
        said = (
            f"{counted(self.spans, 'spans')} of {counted(self.requests, 'requests')} to {self.url}"
        )
        if not self.dropped:
            return said
        why = "; ".join(f"{count} × {reason}" for reason, count in self.reasons.items())
        return f"{said}; {self.dropped} {were(self.dropped)} not delivered: {why}{again}"


class Sidecar:
    """A running one."""

    def __init__(self, folder: Path, url: str, process: subprocess.Popen[str]) -> None:
        self.folder, self.url, self.process = folder, url, process

    def finish(self) -> Told:
        """Say that the run is over and the files are closed; wait for what it has to tell."""
        try:
            out, _ = self.process.communicate(timeout=WAIT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
            return Told(self.url, error=f"the sending process did not end in {WAIT:.0f} s")
        return read_last_words(self.url, out, self.process.returncode)

    def abandon(self) -> None:
        """There was no run."""
        self.process.kill()
        self.process.communicate()


def read_last_words(url: str, out: str, code: int) -> Told:
    """The JSON document that ``export --follow --json`` prints."""
    try:
        told = json.loads(out)["streamed"]
        return Told(told["url"], told["spans"], told["dropped"], told["reasons"], told["requests"])
    except (ValueError, KeyError, TypeError):
        return Told(url, error=f"the sending process ended with {code} and told nothing")


def start(folder: Path, url: str) -> Sidecar:
    """Begin to send the spans of the run in ``folder``, which may not be there yet."""
    process = subprocess.Popen(
        [*_command(folder, url), "--json", "--while-stdin"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=_own_stderr(),
        text=True,
        # Ctrl-C on the terminal ends the run; the sidecar ends after it.
        start_new_session=True,
    )
    return Sidecar(folder, url, process)


def start_alone(folder: Path, url: str) -> bool:
    """From within a traced process (``VTRACE_OTLP``): nobody waits for this one.

    Returns whether it was started: another process of the run may have done it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / LOCK
    if _is_stale(lock):
        lock.unlink(missing_ok=True)
    try:
        number = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(number, "w") as file:
        process = subprocess.Popen(
            _command(folder, url),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=_own_stderr(),
            start_new_session=True,
        )
        file.write(str(process.pid))
    return True


def _is_stale(lock: Path) -> bool:
    """Whether the sidecar that it names is gone: of an earlier run into the same folder."""
    try:
        pid = lock.read_text()
        if pid:
            return not is_running(int(pid))
        return time.time() - lock.stat().st_mtime > 10  # it is being made, or its maker died
    except (OSError, ValueError):
        return False


def _command(folder: Path, url: str) -> list[str]:
    follow = ["export", str(folder), "--to", "otlp", "-o", url, "--follow"]
    return [sys.executable, "-m", "vllm_trace", *follow]


def _own_stderr() -> int | None:
    """The terminal's, where there is one to inherit."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return sys.stderr.fileno()
    return subprocess.DEVNULL


def check(url: str) -> None:
    """Whether spans can be sent at all.

    Raises: ``UsageError`` for a URL that is none, or when OpenTelemetry's exporters are missing.
    """
    from importlib.util import find_spec

    from vllm_trace.export.endpoint import endpoint_of

    endpoint_of(url)
    for module in (
        "opentelemetry.exporter.otlp.proto.grpc",
        "opentelemetry.exporter.otlp.proto.http",
    ):
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise UsageError(
                f"{module} is not installed", hint="pip install opentelemetry-exporter-otlp"
            )


def give_way() -> None:
    """Let the engine have the processor first."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)


def stdin_is_open() -> bool:
    """Whether whoever started this process still holds the other end. Never waits."""
    import select

    try:
        ready, _, _ = select.select([0], [], [], 0)
        return not ready or os.read(0, 1024) != b""
    except OSError:
        return False


class Watch:
    """When a trace that nobody announces the end of is over: its writers are gone for a while."""

    def __init__(self, seconds: float = 3.0) -> None:
        self.seconds = seconds
        self._since: float | None = None

    def __call__(self, followed: Any) -> bool:
        begun = followed.files or followed.lost
        if followed.is_written or not begun:
            self._since = None
            return False
        if self._since is None:
            self._since = time.monotonic()
        return time.monotonic() - self._since > self.seconds
