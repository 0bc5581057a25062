"""Exercise 3's measurement, plot and questions: the answer is what this machine measured."""

from __future__ import annotations

import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from vllm_trace.errors import UsageError
from vllm_trace.learn.progress import Progress

BLOCKS, SIZE, HEADS, DIM = 256, 16, 8, 64
USED = 64
"""Blocks of the sequence: 1024 tokens."""
CLOSE = 1.1
"""Layouts within 10 % of the best count as the fastest too."""


def measure(module: Any) -> dict[int, float]:
    """Seconds of one attention of all heads over each layout.

    Layouts take turns; the median of the better half of 25 rounds counts.
    """
    import torch

    made = torch.Generator().manual_seed(0)
    blocks = torch.randperm(BLOCKS, generator=made)[:USED]
    query = torch.randn(HEADS, DIM, generator=made)
    caches = {
        layout: (
            module.make_cache(layout, BLOCKS, SIZE, HEADS, DIM),
            module.make_cache(layout, BLOCKS, SIZE, HEADS, DIM),
        )
        for layout in (1, 2, 3)
    }
    times: dict[int, list[float]] = {layout: [] for layout in caches}
    for _ in range(25):
        for layout, (keys, values) in caches.items():
            began = time.perf_counter()
            for head in range(HEADS):
                key = module.read_head(keys, layout, blocks, head)
                weights = torch.softmax(key @ query[head] / DIM**0.5, dim=0)
                weights @ module.read_head(values, layout, blocks, head)
            times[layout].append(time.perf_counter() - began)
    return {layout: statistics.median(sorted(row)[:12]) for layout, row in times.items()}


def keep(path: Path, times: dict[int, float]) -> None:
    """Beside the reader's file."""
    kept = {"seconds": times, "tokens": USED * SIZE, "heads": HEADS, "head_dim": DIM}
    path.with_name("ex3-layouts.json").write_text(json.dumps(kept, indent=1), encoding="utf-8")


def ask(path: Path, progress: Progress, answers: list[str], result: Any) -> None:
    """Draw what was measured, and ask about it. The measurement that was asked about is kept."""
    beside = path.with_name("ex3-layouts.json")
    asked = path.with_name("ex3-asked.json")
    if not answers or not asked.is_file():
        asked.write_text(beside.read_text(encoding="utf-8"), encoding="utf-8")
    seconds = {int(k): v for k, v in json.loads(asked.read_text("utf-8"))["seconds"].items()}
    picture = path.with_name("ex3-layouts.png")
    result.notes.append(
        f"The plot is {picture.name}."
        if _draw(picture, seconds)
        else "matplotlib is not here, so there is no plot."
    )
    layout = random.Random(f"{progress.seed}:ex3").choice((1, 2, 3))
    apart = HEADS * DIM if layout == 1 else DIM
    rows = ", ".join(f"{k}: {v * 1e6:.0f} µs" for k, v in seconds.items())
    questions = [
        f"Measured just now: {rows}. Which layout was the fastest here (1, 2 or 3)?",
        f"In layout {layout}, how many elements lie between the beginnings of two neighbouring tokens of "
        f"one head ({HEADS} heads of {DIM})?",
    ]
    if len(answers) > len(questions):
        raise UsageError(
            f"ex3 has {len(questions)} questions, and there are {len(answers)} answers"
        )
    best = min(seconds.values())
    fastest = {str(k) for k, v in seconds.items() if v <= best * CLOSE}
    right = [fastest, {str(apart)}]
    why = [
        "Look at the smallest time.",
        "In layout 1 all heads of a token stand before the next token."
        if layout == 1
        else "In this layout a head's tokens stand side by side.",
    ]
    for number, (question, given) in enumerate(zip(questions, answers)):
        title = f"question {number + 1}"
        if given.strip() in right[number]:
            result.checks.append({"title": title, "passed": True, "said": "", "hint": ""})
        else:
            result.fail(title, f"{question}\n{given}: no", why[number])
    result.questions = questions[len(answers) :]


def _draw(picture: Path, seconds: dict[int, float]) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.2), layout="constrained")
    names = [
        "[blocks, tokens,\nheads, dim]",
        "[blocks, heads,\ntokens, dim]",
        "[heads, blocks,\ntokens, dim]",
    ]
    axes.bar([f"{k}\n{n}" for k, n in zip(seconds, names)], [v * 1e6 for v in seconds.values()])
    axes.set_ylabel("µs, attention of 8 heads\nover 1024 tokens")
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
    return True
