"""Spans of a trace that is still being written, sent while it grows.

This runs in a process of its own and reads the files: the engine pays nothing and is never waited
for. The files are the buffer. A few batches wait in memory; when the receiver is slow the reading
waits, and when it is gone a batch is given up after the exporter's own retries, counted, and the
next one tried. When the run is over the rest has ``patience`` seconds, or until a batch fails.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_trace.export import ExportOptions
from vllm_trace.export.batcher import Batcher
from vllm_trace.export.endpoint import endpoint_of
from vllm_trace.export.otlp import new_fold
from vllm_trace.export.sending import Batch, Delivered, Sender
from vllm_trace.growing import GrowingFile, GrowingTrace

MAX_WAITING = 16
"""Batches in memory: 16 MiB and a little."""

EVERY = 0.2
"""Seconds between two looks at the files."""

IDLE = 1.0
"""Seconds without news after which what is finished is sent, however little."""

LAG = 64
"""Steps that wait for their workers' facts: two files are not read at the same instant."""


def patience() -> float:
    """Seconds for what is left when the run is over: ``OTEL_BSP_EXPORT_TIMEOUT`` (ms), or 30."""
    try:
        return float(os.environ.get("OTEL_BSP_EXPORT_TIMEOUT", "30000")) / 1000
    except ValueError:
        return 30.0


@dataclass
class Streamed:
    """What came of it."""

    url: str
    requests: int = 0
    events: int = 0
    unsampled: int = 0
    late: int = 0
    delivered: Delivered = field(default_factory=Delivered)
    problems: list[str] = field(default_factory=list)
    """Of the trace."""

    def to_dict(self) -> dict[str, Any]:
        told = self.delivered
        return {
            "url": self.url,
            "spans": told.sent,
            "dropped": told.dropped,
            "rejected": told.rejected,
            "reasons": told.reasons,
            "requests": self.requests,
            "events": self.events,
            "unsampled": self.unsampled,
            "late": self.late,
            "problems": self.problems,
        }


class _Pump:
    """The thread that sends, and the few batches that wait for it."""

    def __init__(self, sender: Sender) -> None:
        self.delivered = Delivered()
        self._sender = sender
        self._queue: queue.Queue[Batch | None] = queue.Queue(MAX_WAITING)
        self._deadline = float("inf")
        self._given_up = ""
        self._thread = threading.Thread(target=self._run, name="otlp", daemon=True)
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Hand over a batch; waits while the queue is full, no longer than the deadline."""
        while not self._given_up:
            try:
                self._queue.put(batch, timeout=0.1)
                return
            except queue.Full:
                if time.monotonic() > self._deadline:
                    self._given_up = "no time was left"
        self.delivered.drop(len(batch), self._given_up)

    def hurry(self, seconds: float) -> None:
        """The run is over: only so long from now, and no second try of a receiver that fails."""
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def close(self) -> Delivered:
        """Wait for what is left, as far as there is time. What is not sent then is counted."""
        while self._thread.is_alive():
            try:
                self._queue.put(None, timeout=0.1)
                break
            except queue.Full:
                if time.monotonic() > self._deadline:
                    break
        self._thread.join(max(0.0, self._deadline - time.monotonic()))
        if self._thread.is_alive():
            self._given_up = "no time was left"
            self._sender.close()  # wakes a retry that sleeps
            self._thread.join(2.0)
        while True:
            try:
                left = self._queue.get_nowait()
            except queue.Empty:
                break
            if left is not None:
                self.delivered.drop(len(left), self._given_up or "no time was left")
        return self.delivered

    def _run(self) -> None:
        while True:
            batch = self._queue.get()
            if batch is None:
                return
            if self._given_up:
                self.delivered.drop(len(batch), self._given_up)
            elif not self._sender.send(batch, self.delivered) and self._deadline < float("inf"):
                self._given_up = "given up: the receiver does not take them and the run is over"


def stream(
    folder: Path,
    url: str,
    options: ExportOptions,
    over: Callable[[GrowingTrace], bool],
    give_time: Callable[[], float] = patience,
) -> Streamed:
    """Follow a folder until ``over`` says that nothing more comes and all of it is read.

    Raises: ``UsageError`` for a URL or a setting that is none.
    """
    endpoint = endpoint_of(url)
    sender = Sender(endpoint)
    batcher = Batcher()
    fold = new_fold(options, emit=batcher.add, lag=LAG)
    pump, followed = _Pump(sender), GrowingTrace(folder)
    made = Streamed(endpoint.url, delivered=pump.delivered)
    processes: dict[GrowingFile, Any] = {}
    news = time.monotonic()

    def pass_on() -> None:
        for full in batcher.take():
            pump.put(Batch(*full))

    hurried = False
    while True:
        last = over(followed)  # asked before the files are read: what was written before is read
        if last and not hurried:
            hurried = True
            pump.hurry(give_time())
        any_news = False
        for file, events in followed.new_batches():
            if file not in processes:
                processes[file] = fold.open(file.header)
            fold.feed(processes[file], events)
            any_news = True
            pass_on()
        if any_news:
            news = time.monotonic()
        elif last:
            break
        elif time.monotonic() - news > IDLE:
            fold.idle()
            batcher.cut()
            pass_on()
        if not any_news:
            time.sleep(EVERY)
        elif not last:
            time.sleep(EVERY / 4)
    fold.end()
    batcher.cut()
    pass_on()
    pump.close()
    sender.close()
    made.requests, made.events = fold.num_requests, fold.num_events
    made.unsampled, made.late = fold.num_unsampled, fold.num_late
    made.problems = followed.problems
    return made
