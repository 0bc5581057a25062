"""The three tests: throughput, scaling, memory. Figures are plain values, ready for JSON.

Every round runs all arms on the same requests, in an order that moves on by one; the first round warms up and does not
count. A figure is the median over the rounds, with quartiles; a ratio is taken within a round and then its median.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vllm_trace.benchmark.arms import Arm, Outcome, Plan, SmallArm, workload

TESTS = ("throughput", "scaling", "memory")
USERS = (1, 2, 4, 8, 16, 32, 64)

Tell = Callable[[str], None]


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles; of one value all three are that value."""
    if len(values) == 1:
        return dict.fromkeys(("low", "median", "high"), values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "median": middle, "high": high}


def rounds(arms: Sequence[Arm], jobs: Sequence[Any], repeats: int) -> dict[str, list[Outcome]]:
    """Each arm's outcomes, one a round, without the first."""
    found: dict[str, list[Outcome]] = {arm.name: [] for arm in arms}
    for number in range(repeats + 1):
        turn = number % len(arms)
        for arm in [*arms[turn:], *arms[:turn]]:
            outcome = arm.run(jobs)
            if number:
                found[arm.name].append(outcome)
    return found


def throughput(arms: Sequence[Arm], plan: Plan, vocab_size: int) -> dict[str, Any]:
    """All requests at once, on the same memory."""
    jobs = workload(plan, plan.num_requests, vocab_size)
    found = rounds(arms, jobs, plan.repeats)
    base = found[arms[0].name]
    made: dict[str, Any] = {"requests": told_of(jobs), "arms": []}
    for arm in arms:
        outcomes = found[arm.name]
        last = outcomes[-1]
        same = sum(last.outputs[job.name] == base[-1].outputs[job.name] for job in jobs)
        made["arms"].append(
            {
                "arm": arm.name,
                "what": arm.what,
                "tokens_s": quartiles([one.tokens_s for one in outcomes]),
                "times": quartiles(
                    [one.tokens_s / other.tokens_s for one, other in zip(outcomes, base)]
                ),
                "requests_s": quartiles([len(jobs) / one.seconds for one in outcomes]),
                "first_token_s": statistics.median(
                    statistics.mean(one.first_token_s) for one in outcomes
                ),
                "num_steps": last.num_steps,
                "peak_running": last.peak_running,
                "mean_running": last.mean_running,
                "num_preemptions": last.num_preemptions,
                "same_tokens": same,
            }
        )
    return made


def told_of(jobs: Sequence[Any]) -> dict[str, Any]:
    """What the requests are like."""
    return {
        "count": len(jobs),
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "output_tokens": sum(job.max_tokens for job in jobs),
        "mean_total": sum(len(job.prompt) + job.max_tokens for job in jobs) / len(jobs),
    }


def scaling(arms: Sequence[Arm], plan: Plan, vocab_size: int, tell: Tell) -> dict[str, Any]:
    """More and more users, each with one request, on the same memory."""
    rows = []
    for users in USERS:
        if users > plan.max_num_seqs:
            break
        tell(f"{users} users")
        found = rounds(arms, workload(plan, users, vocab_size), max(1, plan.repeats // 2))
        rows.append(
            {
                "users": users,
                "arms": {
                    name: {
                        "tokens_s": quartiles([one.tokens_s for one in outcomes]),
                        "peak_running": outcomes[-1].peak_running,
                        "first_token_s": statistics.median(
                            statistics.mean(one.first_token_s) for one in outcomes
                        ),
                    }
                    for name, outcomes in found.items()
                },
            }
        )
    return {"rows": rows}


def memory(
    traced: Arm, contiguous: SmallArm | None, plan: Plan, vocab_size: int, trace: Callable[[], Path]
) -> dict[str, Any]:
    """The same requests once: what vLLM's trace says was held and used, and what rows would have needed.

    ``trace`` closes the recording and returns its folder.
    """
    from vllm_trace.memory.calculate import blocks_of
    from vllm_trace.memory.workload import of_trace

    jobs = workload(plan, plan.num_requests, vocab_size)
    traced.run(jobs)
    folder = trace()
    made: dict[str, Any] = {"requests": told_of(jobs)}
    made["vllm"] = held_in(folder, plan.max_model_len)
    made["process"] = process_memory()
    work, blocks = of_trace(folder)
    ours = [blocks_of(request.held, blocks.block_size) for request in work.requests]
    made["vllm"]["blocks_as_calculated"] = sum(a == b for a, b in zip(ours, blocks.blocks))
    made["vllm"]["blocks_compared"] = len(blocks.blocks)
    if contiguous is not None:
        steps = contiguous.run(jobs).steps
        # Steps in which somebody waits: then memory, not demand, is what limits.
        full = [step for step in steps if step.num_waiting] or steps
        made["contiguous"] = {
            "cache_bytes": contiguous.engine.cache.size_bytes,
            "peak_running": max(step.num_running for step in steps),
            "num_steps": len(steps),
            "fill": sum(s.num_held for s in full) / sum(s.num_reserved for s in full),
            "steps": [[s.num_running, s.num_held, s.num_reserved, s.num_waiting] for s in steps],
        }
    return made


def process_memory() -> dict[str, Any]:
    """What this process has: peak of the device's allocator on CUDA, resident memory on CPU. Units: bytes."""
    import torch

    if torch.cuda.is_available():
        return {"where": "CUDA allocator, peak", "bytes": torch.cuda.max_memory_allocated()}
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return {"where": "unknown", "bytes": 0}
    return {"where": "resident", "bytes": pages * os.sysconf("SC_PAGE_SIZE")}


def held_in(folder: Path, max_model_len: int) -> dict[str, Any]:
    """Step by step from a trace: requests, tokens held, tokens of memory in their tables."""
    from vllm_trace.events import StepScheduled
    from vllm_trace.state import KVState
    from vllm_trace.trace import read_trace

    state, steps = KVState(), []
    for event in read_trace(folder).events():
        state.apply(event)
        if isinstance(event, StepScheduled) and state.tables and state.config:
            running = [number for number in state.tables if number in state.computed]
            blocks = {block for row in state.tables.values() for block in row[0]}
            steps.append(
                [
                    len(running),
                    sum(state.computed[number] for number in running),
                    len(blocks) * state.config.block_size,
                    event.num_waiting,
                ]
            )
    config = state.config
    assert config is not None
    full = [step for step in steps if step[3]] or steps
    page = sum(group.page_size_bytes * len(group.layers) for group in config.groups)
    return {
        "num_blocks": config.num_blocks,
        "block_size": config.block_size,
        "cache_bytes": page * config.num_blocks,
        "peak_running": max(step[0] for step in steps),
        "peak_blocks": max(step[2] for step in steps) // config.block_size,
        "num_steps": len(steps),
        "fill": sum(step[1] for step in full) / sum(step[2] for step in full),
        "as_rows": max(step[0] for step in steps) * max_model_len,
        "steps": steps,
    }
