"""Runs a scenario on a real vLLM engine in this process, with tracing on.

The engine is made with few surprises: one OpenMP thread unless asked, plain request ids, a
small KV pool, no usage reports, and vLLM's cache of model classes kept between runs.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_trace.errors import EngineError, UsageError, unknown
from vllm_trace.options import cache_dir
from vllm_trace.scenario import Arrival, Scenario

STEADY: dict[str, Any] = {
    "enforce_eager": True,
    "seed": 0,
    "kv_cache_memory_bytes": 256 << 20,
    "use_tqdm_on_load": False,
}
"""Engine arguments of every run; a scenario's own and the user's come over them."""

EXACT = {"dtype": "float32"}
"""For the tiny checkpoints: greedy tokens then do not depend on how a batch was cut."""

_alive: list[Any] = []
"""Engines made here. Dropping one destroys the process groups of the next one (vLLM 0.32)."""


@dataclass
class Outcome:
    """What the engine answered."""

    token_ids: dict[str, list[tuple[int, ...]]] = field(default_factory=dict)
    """Per request the token ids of each of its outputs (n, or beams)."""
    texts: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    """What was not done to the letter, and why."""
    start_seconds: float = 0.0
    run_seconds: float = 0.0


def quiet_environment(threads: int = 1) -> dict[str, str]:
    """Variables for a steady and quiet engine; those that the user has set are kept."""
    wanted = {
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CACHE_ROOT": str(cache_dir() / "vllm"),
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONWARNINGS": "ignore",
        "TOKENIZERS_PARALLELISM": "false",
    }
    return {name: value for name, value in wanted.items() if name not in os.environ}


def start_engine(
    scenario: Scenario,
    *,
    model: str = "",
    engine_args: Mapping[str, Any] | None = None,
    attention: str = "engine",
) -> tuple[Any, list[str]]:
    """Make the ``vllm.LLM`` of a scenario. Returns it with notes.

    ``attention``: ``engine`` for vLLM's own, ``paged`` or ``paged:vllm`` for `vllm_trace.backend`.

    Raises: ``EngineError`` with vLLM's own words when it does not start, ``UsageError`` for an
    engine argument that does not exist.
    """
    os.environ |= quiet_environment()
    try:
        with no_gc(), interrupts_wait():
            from vllm import LLM
            from vllm.engine.arg_utils import EngineArgs
    except ImportError as error:
        raise EngineError(
            f"vLLM cannot be imported: {error}", hint="Try: make demo, or vllm-trace doctor"
        ) from error
    from vllm_trace.hooks import register

    with no_gc(), interrupts_wait():  # it imports what it hooks
        register()
    if attention != "engine":
        from vllm_trace.backend import register_backend

        register_backend(attention)  # also where nothing is recorded
    let_vllm_look_at_llvmlite()
    asked = dict(engine_args or {})
    known = set(EngineArgs.__dataclass_fields__)
    for name in asked:
        if name not in known:
            raise unknown("engine argument", name, known, "All of them: vllm serve --help=all")
    model = model or str(asked.get("model") or scenario.engine["model"])
    folder = model_folder(model)
    arguments, notes = fit_to_platform(
        STEADY | (EXACT if folder != model else {}) | dict(scenario.engine) | asked, attention
    )
    arguments["model"] = folder
    if int(arguments.get("tensor_parallel_size", 1)) > 1:
        # Several workers on one NUMA node: vLLM wants to be told that this is meant.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        with no_gc():
            llm = LLM(**arguments)
    except UsageError:
        raise  # of our attention, that it cannot do this
    except Exception as error:
        raise EngineError(
            f"vLLM did not start: {error}", hint=f"Engine arguments: {arguments}"
        ) from error
    _alive.append(llm)
    return llm, notes


def let_vllm_look_at_llvmlite() -> None:
    """vLLM 0.32 looks at the ``__dict__`` of every global of every module, and fails when numba was loaded before.

    llvmlite's handle of its library answers any name, this one too, with a function of the library.
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    handle: Any = type(getattr(ffi, "lib", None))
    found = vars(handle).get("__getattr__")
    if found is None or hasattr(found, "vllm_trace"):
        return

    def only_functions(self: Any, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return found(self, name)

    only_functions.vllm_trace = True  # type: ignore[attr-defined]
    handle.__getattr__ = only_functions


def fit_to_platform(
    arguments: dict[str, Any], attention: str = "engine"
) -> tuple[dict[str, Any], list[str]]:
    """Change what this platform's attention cannot do, and say so."""
    from vllm.platforms import current_platform

    notes: list[str] = []
    asked = arguments.get("block_size")
    if attention == "engine" and asked and current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        sizes = CPUAttentionBackend.get_supported_kernel_block_sizes()
        base = getattr(sizes[0], "base", 1)
        if asked % base:
            arguments["block_size"] = -(-asked // base) * base
            notes.append(
                f"block size {asked} was asked for; vLLM's CPU attention takes multiples of "
                f"{base}, so it runs with {arguments['block_size']}"
            )
    return arguments, notes


def model_folder(model: str) -> str:
    """A name of ours made a folder; any other is as vLLM takes it.

    Raises: ``UsageError`` for a path that is not there.
    """
    from vllm_trace import checkpoints

    if model in checkpoints.NAMES:
        return str(checkpoints.checkpoint(model))
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().exists():
        # vLLM would take it for a name on the hub and complain of its letters.
        raise UsageError(f"there is no model folder {model}")
    return model


def run_workload(llm: Any, scenario: Scenario) -> Outcome:
    """Drive the engine step by step, adding and aborting requests as the scenario says.

    Raises: ``UsageError`` when a prompt does not fit the engine.
    """
    vocab_size = llm.llm_engine.model_config.get_vocab_size()
    arrivals = scenario.arrivals(vocab_size)
    outcome = Outcome()
    started = time.perf_counter()
    _Driver(llm, [a for a in arrivals if not a.beam_width], outcome).run()
    for arrival in arrivals:
        if arrival.beam_width:
            _beam_search(llm, arrival, outcome)
    outcome.run_seconds = time.perf_counter() - started
    return outcome


def stop_engine(llm: Any) -> None:
    """Shut the engine and its processes down; their traces can be closed then."""
    with no_gc():
        try:
            llm.llm_engine.engine_core.shutdown()
        except AttributeError as error:
            # The worker of 0.20.2 asks its V2 model runner for a method that it lacks; nothing comes after it.
            if "shutdown" not in str(error):
                raise


def warnings_of(log: Path) -> list[str]:
    """What this package itself said while stderr went to the log."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [line for line in lines if line.startswith("vllm-trace:")]


class _Driver:
    """The client of one workload: adds, steps, aborts."""

    def __init__(self, llm: Any, arrivals: list[Arrival], outcome: Outcome) -> None:
        self.engine = llm.llm_engine
        self.waiting = list(arrivals)
        self.outcome = outcome
        self.finished: set[str] = set()
        self.aborts = {a.name: a.abort_after for a in arrivals if a.abort_after}

    def run(self) -> None:
        step = 0
        with self._held():
            self._add_due(step)
        while self.waiting or self.engine.has_unfinished_requests():
            for output in self.engine.step():
                self._take(output)
            step += 1
            if not self.engine.has_unfinished_requests() and self.waiting:
                # Nothing runs: time stands still until the next one comes.
                step = max(step, min(a.step for a in self.waiting if not a.after or self._due(a)))
            self._add_due(step)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        """Requests of the first step reach an engine in another process all at once."""
        core = self.engine.engine_core
        if not hasattr(core, "call_utility"):
            yield
            return
        core.call_utility("pause_scheduler", "keep", False)
        yield
        core.call_utility("resume_scheduler")

    def _due(self, arrival: Arrival) -> bool:
        return arrival.after in self.finished if arrival.after else True

    def _add_due(self, step: int) -> None:
        due = [a for a in self.waiting if a.step <= step and self._due(a)]
        for arrival in due:
            self.waiting.remove(arrival)
            self._add(arrival)
        for arrival in due:
            if self.aborts.get(arrival.name) == -1:
                self._abort(arrival.name)

    def _add(self, arrival: Arrival) -> None:
        from vllm import SamplingParams

        prompt: Any = arrival.text or {"prompt_token_ids": list(arrival.token_ids)}
        params = SamplingParams(
            n=arrival.n,
            temperature=arrival.temperature,
            seed=arrival.seed,
            max_tokens=arrival.max_tokens,
            ignore_eos=True,
        )
        try:
            self.engine.add_request(arrival.name, prompt, params)
        except ValueError as error:
            raise UsageError(f"request {arrival.name}: {error}") from error

    def _take(self, output: Any) -> None:
        name = output.request_id
        tokens = [tuple(part.token_ids) for part in output.outputs]
        self.outcome.token_ids[name] = tokens
        self.outcome.texts[name] = [part.text for part in output.outputs]
        if output.finished:
            self.finished.add(name)
        elif 0 < self.aborts.get(name, 0) <= max(map(len, tokens)):
            self._abort(name)

    def _abort(self, name: str) -> None:
        self.aborts.pop(name)
        self.engine.abort_request([name])
        self.finished.add(name)


def _beam_search(llm: Any, arrival: Arrival, outcome: Outcome) -> None:
    from vllm.sampling_params import BeamSearchParams

    prompt: Any = {"prompt": arrival.text} if arrival.text else None
    prompt = prompt or {"prompt_token_ids": list(arrival.token_ids)}
    params = BeamSearchParams(
        beam_width=arrival.beam_width, max_tokens=arrival.max_tokens, ignore_eos=True
    )
    (output,) = llm.beam_search([prompt], params)
    outcome.token_ids[arrival.name] = [tuple(s.tokens) for s in output.sequences]
    outcome.texts[arrival.name] = [s.text or "" for s in output.sequences]


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Ctrl-C comes at the end of this: C++ that is being loaded does not survive a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def no_gc() -> Iterator[None]:
    """No collection inside, nor any that vLLM asks for: each goes through a million objects of
    torch's and vLLM's modules, and starting and stopping an engine asks for seven."""
    enabled, collect = gc.isenabled(), gc.collect
    gc.disable()
    gc.collect = lambda generation=2: 0
    try:
        yield
    finally:
        gc.collect = collect
        if enabled:
            gc.enable()


def _lines_of(log: Path) -> list[str]:
    """Without torch's warnings that Triton is absent and the like: ``W1121 08:16:03.8 …``."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if not re.match(r"[IW]\d{4} \d\d:", line)]


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[Callable[[], str]]:
    """Send everything that C and Python code print into a file while inside, and that of children.

    vLLM logs to stdout, and its processes print what killed them there. Yields a function that
    reads the file's last lines.
    """
    streams = (sys.stdout, sys.stderr)
    for stream in streams:
        stream.flush()
    kept = [os.dup(1), os.dup(2)]
    with open(path, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield lambda: "\n".join(_lines_of(path)[-15:])
    finally:
        for number, stream in enumerate(streams, 1):
            stream.flush()
            os.dup2(kept[number - 1], number)
            os.close(kept[number - 1])
