"""The recorder of one process: what the probes append, and one write at the end of a step.

A probe makes its event in place from values that are cheap to read, or, when making it takes
more, calls ``defer(decode, value, …)`` and the decoder runs at the end of the step. Either way
nothing else happens in a hooked call: no lock, no string, no encoding, no wait for a device.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from multiprocessing import current_process, util
from pathlib import Path
from typing import Any
from weakref import WeakSet

from vllm_trace import __version__
from vllm_trace.events import (
    SCHEMA_VERSION,
    Event,
    ProbeFailed,
    RequestSeen,
)
from vllm_trace.options import Options
from vllm_trace.packing import I16, SCHEDULED, U32, U64, encoded, list_head, pack_scheduled
from vllm_trace.steady import SteadyRun
from vllm_trace.tracefile import SUFFIX
from vllm_trace.tracewriter import TraceWriter

MAX_PENDING = 1_000_000
"""Captures held before a flush is forced; reached only when no step ever ends."""

FINISHED_KEPT = 4096
"""Names of finished requests that are still understood when a late event speaks of them."""


class Numbers(dict[str, int]):
    """Request name → number. A name that was not seen to arrive is introduced on first use."""

    def __init__(self, introduce: Callable[[RequestSeen], None]) -> None:
        super().__init__()
        self._next = count()
        self._introduce = introduce

    def new(self, request_id: str) -> int:
        """Number a request that arrives now; a name used before gets a new number."""
        number = self[request_id] = next(self._next)
        return number

    def __missing__(self, request_id: str) -> int:
        number = self.new(request_id)
        self._introduce(RequestSeen(number, request_id))
        return number


class Recorder:
    """Everything that one process records. One at a time in a process: ``vllm_trace.hooks``."""

    # What each step looks at lies together; a class with as many attributes has a slow dictionary.
    __slots__ = (
        "__dict__", "__weakref__", "step", "steady", "steady_of", "tight",
        "pending", "planned", "planned_of", "planned_at", "steady_need", "kept",
        "with_tokens", "write_steady_step", "steady_run",
        "plans_first",
    )  # fmt: skip

    def __init__(self, options: Options) -> None:
        self.options = options
        self.pending: list[Any] = []
        self.append = self.pending.append
        self.numbers = Numbers(self.append)
        self.step = 0
        """Number of the last step that this process scheduled."""
        self.kept: list[Any] = []
        """Requests for which ``allocate_slots`` needed no new block, since the last step; in tight steps."""
        self.keep: Callable[[Any], None] = self.kept.append
        self.tight = True
        """The step may run out of blocks, see ``patches/step_probes.py``."""
        self.steady_need = 0
        """Blocks that a steady step may ask for."""
        self.steady = -1
        """How many requests decode in the steady steps that are going on; -1 when none are."""
        self.steady_of: Any = None
        """The scheduler whose steps those are."""
        self.planned: tuple[int, ...] | None = None
        """Fields of its ``step.scheduled``; None where ``steady_run`` has them."""
        self.planned_of: Any = None
        """The ``SchedulerOutput`` of a steady step that is on its way."""
        self.planned_at = 0
        """How many of ``pending`` stand before it."""
        self.write_steady_step: Callable[..., bool] = _cannot_write
        """The writer's own method while its file is open: a call less in each step."""
        self.steady_run = SteadyRun()
        """The writer's, too."""
        self.with_tokens = options.tokens
        self.plans_first = False
        """Workers are other processes: what they execute must be written by then, whoever is killed."""
        self.rank = 0
        self.notes: dict[str, Any] = {}
        """More for the header, set before the first event: versions, hooks and their state."""
        self.failures: dict[str, int] = {}
        self.on_failures: Callable[[str], None] = lambda hook: None
        self.on_open: Callable[[], None] = lambda: None
        """Called when the file is there, once in a process."""
        self.state: dict[Any, Any] = {}
        """What decoders keep between steps, by their own key."""
        self.shadow: Any = None
        """Computes attention calls a second time (``vllm_trace.backend.shadow``), when asked to."""
        self.waiting: deque[tuple[Callable[[bool], bool], Callable[..., Any], tuple[Any, ...]]]
        self.waiting = deque()
        """Decoders that wait for a device, in order."""
        self.writer: TraceWriter | None = None
        self._finished: OrderedDict[str, int] = OrderedDict()
        self._plain = False
        """The writer is open and ``pending`` holds nothing but events, and blocks that were taken."""
        self._flushing = False
        self._num_lost = 0
        """Before there was a file."""
        self._told: set[str] = set()
        self._closed = False
        _alive.add(self)
        self._finalize_at_exit()
        atexit.register(self.close)
        # It also forgets, as it begins, all finalizers that it inherited.
        util.register_after_fork(self, Recorder._finalize_at_exit)

    def _finalize_at_exit(self) -> None:
        """A child made by multiprocessing leaves by os._exit: atexit does not run there."""
        if not self._closed:
            self._finalizer = util.Finalize(self, self.close, exitpriority=100)

    def _after_fork(self) -> None:
        """A forked child has its own file; what the parent had pending is the parent's."""
        self.writer = None
        self.write_steady_step, self.steady_run = _cannot_write, SteadyRun()
        self._plain = False
        self.kept.clear()
        self.pending.clear()
        self.numbers.clear()
        self._finished.clear()
        self.steady, self.planned_of, self.tight = -1, None, True
        self.state.clear()
        self.waiting.clear()

    # Requests -------------------------------------------------------------------------

    def numbers_of(self, request_ids: Iterable[str]) -> list[int]:
        """Numbers of several requests, in their order."""
        numbers = self.numbers
        return [numbers[request_id] for request_id in request_ids]

    def arrive(self, request_id: str) -> int:
        """Number a request that arrives now."""
        self._finished.pop(request_id, None)
        self.steady = -1
        return self.numbers.new(request_id)

    def retire(self, request_id: str) -> int:
        """Number of a request that is finished; its name is forgotten some time later."""
        number = self.numbers[request_id]
        self._finished[request_id] = number
        if len(self._finished) > FINISHED_KEPT:
            name, old = self._finished.popitem(last=False)
            if self.numbers.get(name) == old:
                del self.numbers[name]
        return number

    # Making events --------------------------------------------------------------------

    def defer(self, decode: Callable[..., Event | None], *values: Any) -> None:
        """Have ``decode(recorder, *values)`` make the event when the step ends."""
        self._plain = False
        self.append((decode, values))
        if len(self.pending) > MAX_PENDING:
            self.flush()

    def defer_until(
        self, ready: Callable[[bool], bool], decode: Callable[..., Event | None], *values: Any
    ) -> None:
        """From a decoder: run another one when a device is done, at that flush or a later one.

        ``ready(wait)`` says whether it is; with ``wait`` it waits, which only closing asks for.
        """
        self.waiting.append((ready, decode, values))

    def _take_ready(self, wait: bool = False) -> None:
        """Run the decoders whose device is done, in their order."""
        while self.waiting:
            ready, decode, values = self.waiting[0]
            taken = False
            try:
                if not ready(wait):
                    return
                taken = True
                event = decode(self, *values)
            except Exception as error:
                self.probe_failed(decode.__name__, error)
                event = None
            except BaseException:  # Ctrl-C
                if taken:
                    self.waiting.popleft()
                    self._lose(1)
                raise
            self.waiting.popleft()
            if event is not None:
                self.append(event)

    def emit(self, event: Event) -> None:
        """From a decoder: add an event before the one that the decoder returns."""
        self.append(event)

    def spell_out_planned(self) -> None:
        """Something came between the two halves of a steady step: it becomes an ordinary event."""
        step, at, dur, running, waiting, free, *kept = self.planned or self.steady_run.planned(
            self.step
        )
        try:
            self.planned_of = None
            event = pack_scheduled(
                SCHEDULED, step, U64, at, U64, dur, U32, running, U32, waiting, U32, free, I16,
                *(kept or [0]),
            )  # fmt: skip
            self.pending[self.planned_at : self.planned_at] = [event]
        except BaseException:
            self._lose(1)
            raise

    def begin_steady_run(self) -> None:
        """Let ``steady_run`` take the steps that follow."""
        if self.writer is not None and not self.pending:
            self.writer.begin_steady_run()

    def flush(self) -> None:
        """Write what is pending as one batch; it is safe when this returns. Never raises.

        Ctrl-C may come anywhere in it: what is not in the file by then stays for the next flush.
        """
        pending = self.pending
        failed = None
        settled = -1
        try:
            if self.planned_of is not None:
                self.spell_out_planned()
            if not pending or self._flushing:
                return
            if self._plain or self._prepare():
                writer = self.writer
                assert writer is not None
                settled = writer.num_events + writer.dropped
                number = len(pending)
                try:
                    data = b"".join(pending)
                except TypeError:  # not only bytes
                    data = b"".join(map(encoded, pending))
                writer.write_encoded(list_head(number) + data, number)
                if writer.failure:
                    self._tell_failure()
            pending.clear()
        except Exception as error:
            failed = error
            self._lose(len(pending))
            pending.clear()
        except BaseException:
            self._flushing = False
            writer = self.writer
            if writer is not None and settled not in (-1, writer.num_events + writer.dropped):
                pending.clear()
            raise
        if failed is not None:
            self.probe_failed("the recorder's flush", failed)

    def _prepare(self) -> bool:
        """Decode what was deferred and have the file open; False when there is nothing to write."""
        if self._closed:
            return False
        self._flushing = True
        try:
            self._decode()
        finally:
            self._flushing = False
        self._plain = self.writer is not None
        return self._plain and bool(self.pending)

    def _decode(self) -> None:
        """Replace what was deferred by the events that its decoders make, in place."""
        rest: Iterator[Any] = iter(())
        try:
            rest, self.pending[:] = iter(self.pending[:]), ()
            for item in rest:
                if type(item) is tuple:
                    decode, values = item
                    try:
                        event = decode(self, *values)
                    except Exception as error:
                        self.probe_failed(decode.__name__, error)
                        continue
                    if event is not None:
                        self.append(event)
                else:
                    self.append(item)
        except BaseException:  # Ctrl-C
            self._lose(1)  # the one that was being decoded: a decoder does not run twice
            self.pending.extend(rest)
            raise
        self._take_ready()
        if self.pending and self.writer is None:
            self._open()

    def _lose(self, num_events: int) -> None:
        """Count events that will never be written."""
        if self.writer is not None:
            self.writer.drop(num_events)
        else:
            self._num_lost += num_events

    def _tell_failure(self) -> None:
        assert self.writer is not None
        self.tell(
            f"the trace cannot be written on ({self.writer.failure}); "
            "the engine goes on, events from here on are counted and dropped"
        )

    def _open(self) -> None:
        if self._closed:
            return
        folder = Path(self.options.dir)
        name = f"{process_role()}-{os.getpid()}{SUFFIX}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.writer = TraceWriter(folder / name, self._header())
            self.writer.drop(self._num_lost)
            self.write_steady_step = self.writer.write_steady_step
            self.steady_run = self.writer.steady_run
        except OSError as error:
            self._closed = True
            self.tell(f"no trace: {error}; the engine goes on untraced")
            return
        self.on_open()

    def _header(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA_VERSION,
            "vllm_trace": __version__,
            "role": process_role(),
            "pid": os.getpid(),
            "parent": os.getppid(),
            "host": socket.gethostname(),
            "rank": self.rank,
            "level": self.options.level,
            "tokens": self.options.tokens,
            "python": sys.version.split()[0],
            "clock": {"monotonic_ns": time.monotonic_ns(), "unix_ns": time.time_ns()},
        } | self.notes

    def close(self) -> None:
        """Flush, write the footer, and take no more events. Safe to call again, after Ctrl-C too."""
        if not self._closed:
            self.flush()
            if self.waiting:
                self._take_ready(wait=True)
                self._plain = False
                self.flush()
        self.write_steady_step, self.steady_run = _cannot_write, SteadyRun()
        self.steady_of = None
        self._closed = True
        self._plain = False
        if self.writer is not None:
            self.writer.close({"dropped": self.writer.dropped, "failures": self.failures})
        self._finalizer.cancel()
        atexit.unregister(self.close)
        _alive.discard(self)

    # What goes wrong ------------------------------------------------------------------

    def probe_failed(self, hook: str, error: Exception) -> None:
        """Count it, name it once, and have the hook taken off when it keeps failing."""
        count = self.failures[hook] = self.failures.get(hook, 0) + 1
        if count == 1:
            text = f"{type(error).__name__}: {error}"[:300]
            self.append(ProbeFailed(hook, text))
            self.tell(f"the probe of {hook} failed ({text}); the engine is not affected")
        if count == self.options.failures:
            self.tell(f"the probe of {hook} failed {count} times and is taken off")
            self.on_failures(hook)

    def tell(self, message: str) -> None:
        """Say something once on stderr."""
        if message not in self._told:
            self._told.add(message)
            # A closed stderr is no reason to raise in a hooked call.
            with contextlib.suppress(Exception):
                print(f"vllm-trace: {message}", file=sys.stderr, flush=True)


def _cannot_write(*values: Any) -> bool:
    """No file is open: the long way opens it."""
    return False


_alive: WeakSet[Recorder] = WeakSet()


def _after_fork() -> None:
    for recorder in list(_alive):
        recorder._after_fork()


os.register_at_fork(after_in_child=_after_fork)


def process_role() -> str:
    """What this process is to vLLM: ``engine``, ``worker`` or ``main``."""
    name = current_process().name
    if "EngineCore" in name or "DPEngine" in name:
        return "engine"
    if "Worker" in name:
        return "worker"
    return "main"
