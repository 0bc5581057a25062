"""What is measured: one workload through one engine, seen from outside in the same way for all of them."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import exp
from pathlib import Path
from typing import Any, Protocol

from vllm_trace.benchmark.small import SmallEngine, Step
from vllm_trace.errors import EngineError, UsageError


@dataclass(frozen=True)
class Plan:
    """What is run and on how much memory. Units: tokens."""

    model: str = "tiny-llama"
    budget: int = 4096
    """Of the KV cache: the same for every arm."""
    max_model_len: int = 512
    block_size: int = 32
    num_requests: int = 64
    repeats: int = 7
    seed: int = 0
    max_num_seqs: int = 128
    dtype: str = "float32"

    def checked(self) -> Plan:
        """Return self. Raises: ``UsageError`` naming what cannot be."""
        for flag, value, least in (
            ("--block-size", self.block_size, 1), ("--max-model-len", self.max_model_len, 16),
            ("--requests", self.num_requests, 1), ("--repeats", self.repeats, 1),
        ):  # fmt: skip
            if value < least:
                raise UsageError(f"{flag} is {value}, not {least} or more")
        if self.budget < self.max_model_len:
            raise UsageError(
                f"--budget is {self.budget} tokens: not enough for one request of {self.max_model_len}",
                hint="A larger --budget or a smaller --max-model-len",
            )
        if self.budget % self.block_size:
            raise UsageError(
                f"--budget {self.budget} is no multiple of the block size {self.block_size}"
            )
        return self


@dataclass(frozen=True)
class Job:
    """One request."""

    name: str
    prompt: tuple[int, ...]
    max_tokens: int


def workload(plan: Plan, count: int, vocab_size: int) -> list[Job]:
    """Requests whose lengths vary as people's do: log-normal, on average a quarter of what fits.

    Prompts are noise, and no two begin alike: nothing can be shared.
    """
    rng = random.Random(f"bench:{plan.seed}")
    longest = round(plan.max_model_len * 0.45)
    made = []
    for index in range(count):
        lengths = [
            min(longest, max(1, round(exp(rng.gauss(0, 0.6)) * plan.max_model_len * 0.105)))
            for _ in range(2)
        ]
        prompt = tuple(rng.randrange(3, vocab_size) for _ in range(lengths[0]))
        made.append(Job(f"r{index}", prompt, lengths[1]))
    return made


@dataclass
class Outcome:
    """One run. Times in seconds from the moment the first request was handed over."""

    seconds: float
    num_output_tokens: int
    outputs: dict[str, list[int]]
    first_token_s: list[float]
    num_steps: int
    peak_running: int
    mean_running: float
    num_preemptions: int
    steps: list[Step] = field(default_factory=list)
    """Of the small engine only."""

    @property
    def tokens_s(self) -> float:
        return self.num_output_tokens / self.seconds


class Arm(Protocol):
    """An engine that serves jobs."""

    name: str
    what: str

    def run(self, jobs: Sequence[Job]) -> Outcome: ...


class SmallArm:
    """The engine of ``small`` with one of its caches."""

    def __init__(self, kind: str, plan: Plan, model: str | Path, device: str) -> None:
        self.name = kind
        self.what = {
            "contiguous": f"small engine, {plan.budget // plan.max_model_len} rows of {plan.max_model_len} tokens",
            "paged": f"the same small engine, {plan.budget // plan.block_size} blocks of {plan.block_size} tokens",
        }[kind]
        self.engine = SmallEngine(
            model,
            kind,
            budget=plan.budget,
            max_model_len=plan.max_model_len,
            block_size=plan.block_size,
            max_num_seqs=plan.max_num_seqs,
            device=device,
            dtype=plan.dtype,
        )

    def run(self, jobs: Sequence[Job]) -> Outcome:
        engine = self.engine
        engine.steps.clear()
        engine.num_preemptions = 0
        outputs: dict[str, list[int]] = {}
        firsts: dict[str, float] = {}
        began = time.perf_counter()
        for job in jobs:
            engine.add_request(job.name, job.prompt, job.max_tokens)
        while engine.has_unfinished_requests():
            done = engine.step()
            now = time.perf_counter() - began
            for sequence in [*engine.running, *done]:
                firsts.setdefault(sequence.name, now)
            outputs |= {sequence.name: sequence.output for sequence in done}
        seconds = time.perf_counter() - began
        running = [step.num_running for step in engine.steps]
        return _outcome(seconds, outputs, firsts, running, engine.num_preemptions, engine.steps)


def _outcome(
    seconds: float,
    outputs: dict[str, list[int]],
    firsts: dict[str, float],
    running: list[int],
    num_preemptions: int,
    steps: Sequence[Step] = (),
) -> Outcome:
    return Outcome(
        seconds,
        sum(map(len, outputs.values())),
        outputs,
        list(firsts.values()),
        len(running),
        max(running),
        sum(running) / len(running),
        num_preemptions,
        list(steps),
    )


class VllmArm:
    """The installed vLLM: ``LLMEngine`` stepped in this process.

    Prefix caching is off, because a contiguous cache cannot share; text is not made of the tokens.
    """

    name = "vllm"

    def __init__(self, llm: Any, plan: Plan, version: str) -> None:
        self.what = (
            f"vLLM {version}, {plan.budget // plan.block_size} blocks of {plan.block_size} tokens"
        )
        self.engine = llm.llm_engine
        core = getattr(self.engine.engine_core, "engine_core", None)
        if core is None:
            raise EngineError(
                "vLLM runs in another process, where its scheduler cannot be counted",
                hint="Unset VLLM_ENABLE_V1_MULTIPROCESSING",
            )
        self.scheduler = core.scheduler
        self._runs = 0

    def run(self, jobs: Sequence[Job]) -> Outcome:
        from vllm import SamplingParams

        self._runs += 1
        outputs: dict[str, list[int]] = {}
        firsts: dict[str, float] = {}
        running: list[int] = []
        preempted = 0
        began = time.perf_counter()
        for job in jobs:
            params = SamplingParams(
                temperature=0, max_tokens=job.max_tokens, ignore_eos=True, detokenize=False
            )
            prompt = {"prompt_token_ids": list(job.prompt)}
            self.engine.add_request(f"{job.name}.{self._runs}", prompt, params)
        while self.engine.has_unfinished_requests():
            before = len(self.scheduler.running)
            answers = self.engine.step()
            now = time.perf_counter() - began
            finished = sum(answer.finished for answer in answers)
            # Who finished in this step ran in it, and is gone from the list by now.
            count = len(self.scheduler.running) + finished
            running.append(count)
            preempted += max(0, before - count)
            for answer in answers:
                name = answer.request_id.rpartition(".")[0]
                firsts.setdefault(name, now)
                if answer.finished:
                    outputs[name] = list(answer.outputs[0].token_ids)
        return _outcome(time.perf_counter() - began, outputs, firsts, running, preempted)


def start_vllm(plan: Plan) -> tuple[Any, str, list[str]]:
    """A ``vllm.LLM`` on the plan's memory, its version, and what was changed for this platform.

    Raises: ``EngineError`` when it does not start, ``UsageError`` for a block size that it would not take.
    """
    from vllm_trace import runner
    from vllm_trace.scenario import Scenario

    engine = {
        "model": plan.model,
        "block_size": plan.block_size,
        "max_model_len": plan.max_model_len,
        "max_num_seqs": plan.max_num_seqs,
        "max_num_batched_tokens": 8192,
        # One more: block 0 is the null block and holds no token.
        "num_gpu_blocks_override": plan.budget // plan.block_size + 1,
        "enable_prefix_caching": False,
        "dtype": plan.dtype,
    }
    bench = Scenario(name="bench", title="", shows="", engine=engine, requests=())
    llm, notes = runner.start_engine(bench)
    if notes:
        raise UsageError(f"--block-size {plan.block_size}: {notes[0]}")
    import vllm

    return llm, vllm.__version__, notes


def device() -> str:
    """``cuda`` or ``cpu``: where vLLM itself would run."""
    from vllm.platforms import current_platform

    return "cpu" if current_platform.is_cpu() else "cuda"
