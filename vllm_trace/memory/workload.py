"""How long requests are: drawn from a distribution, given, or those of a trace."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import exp, log
from pathlib import Path

from vllm_trace.errors import UsageError, unknown


@dataclass(frozen=True)
class Request:
    """Units: tokens. ``output`` counts sampled tokens, the last one included."""

    prompt: int
    output: int

    @property
    def held(self) -> int:
        """Tokens whose keys and values are in the cache at the end: the last sampled token's never are."""
        return self.prompt + max(self.output, 1) - 1

    @property
    def total(self) -> int:
        return self.prompt + self.output


@dataclass(frozen=True)
class Distribution:
    """Log-normal lengths with these means. Units: tokens."""

    prompt_mean: float
    output_mean: float
    source: str
    sigma: float = 1.0
    """Of the logarithm; ours: the source gives means."""


DISTRIBUTIONS = {
    "sharegpt": Distribution(161.31, 337.99, "Kwon et al. 2023 (arXiv 2309.06180), figure 11a"),
    "alpaca": Distribution(19.31, 58.45, "Kwon et al. 2023 (arXiv 2309.06180), figure 11b"),
}


@dataclass(frozen=True)
class Workload:
    """A set of requests and where it comes from."""

    name: str
    requests: tuple[Request, ...]
    source: str
    num_cut: int = 0
    """Requests that were longer than the model and were cut."""

    @property
    def mean(self) -> float:
        """Tokens held by a request at its end, on average."""
        return sum(request.held for request in self.requests) / len(self.requests)


def drawn(name: str, count: int, max_model_len: int, seed: int) -> Workload:
    """``count`` requests of a named distribution, the same for the same seed.

    Raises: ``UsageError`` for an unknown name, or a count below 1.
    """
    if name not in DISTRIBUTIONS:
        raise unknown("workload", name, DISTRIBUTIONS)
    if count < 1:
        raise UsageError(f"--requests is {count}, not 1 or more")
    told = DISTRIBUTIONS[name]
    rng = random.Random(f"{name}:{seed}")
    made = [
        Request(_draw(rng, told.prompt_mean, told.sigma), _draw(rng, told.output_mean, told.sigma))
        for _ in range(count)
    ]
    return cut(name, made, max_model_len, f"{told.source}; log-normal, sigma {told.sigma:g}")


def _draw(rng: random.Random, mean: float, sigma: float) -> int:
    return max(1, round(exp(rng.gauss(log(mean) - sigma**2 / 2, sigma))))


def given(text: str, max_model_len: int) -> Workload:
    """Lengths from the command line: ``prompt+output,prompt+output`` (one number: a prompt and one token).

    Raises: ``UsageError`` for what is no length.
    """
    made = []
    for word in text.replace("\n", ",").split(","):
        if not word.strip():
            continue
        prompt, _, output = word.partition("+")
        try:
            request = Request(int(prompt), int(output or 1))
        except ValueError:
            raise UsageError(
                f"{word.strip()!r} is no length", hint="--lengths 500+200,30+40,1200+10"
            ) from None
        if request.prompt < 1 or request.output < 1:
            raise UsageError(f"length {word.strip()!r}: prompt and output are 1 or more tokens")
        made.append(request)
    if not made:
        raise UsageError("--lengths names no request", hint="--lengths 500+200,30+40,1200+10")
    return cut("given", made, max_model_len, "--lengths")


def cut(name: str, requests: list[Request], max_model_len: int, source: str) -> Workload:
    """The requests as a model of that length would have them: prompts leave room for one token."""
    kept, num_cut = [], 0
    for request in requests:
        prompt = min(request.prompt, max_model_len - 1)
        output = min(request.output, max_model_len - prompt)
        num_cut += (prompt, output) != (request.prompt, request.output)
        kept.append(Request(prompt, output))
    return Workload(name, tuple(kept), source, num_cut)


def of_trace(path: Path) -> tuple[Workload, TraceBlocks]:
    """The finished requests of a trace, and the blocks that each of them really had.

    Raises: ``UsageError`` when none finished, ``TraceError`` when the trace cannot be read.
    """
    from vllm_trace.summary import Summary
    from vllm_trace.trace import read_trace

    summary = Summary.of(read_trace(path))
    lives = [
        life
        for life in summary.requests
        if life.reason in ("length", "stop") and life.num_output_tokens > 0
    ]
    if not lives:
        raise UsageError(f"{path}: no request finished in this trace")
    made = [Request(life.num_prompt_tokens, life.num_output_tokens) for life in lives]
    groups = summary.groups
    plain = len(groups) == 1 and not groups[0].get("sliding_window")
    real = [len(life.table[0]) if life.table else 0 for life in lives]
    block_size = int(summary.engine.get("block_size", 0))
    return (
        Workload("trace", tuple(made), str(path)),
        TraceBlocks(block_size, tuple(real) if plain and any(real) else ()),
    )


@dataclass(frozen=True)
class TraceBlocks:
    """Block table lengths of a trace's requests; empty at level light, and for models with windows."""

    block_size: int
    blocks: tuple[int, ...]
