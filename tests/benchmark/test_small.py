"""The small engine: both caches give the tokens of a model without any cache, and lose no memory."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="torch is not installed: the engine computes with it")
pytest.importorskip("tokenizers", reason="checkpoints are made with tokenizers")

from vllm_trace.benchmark.small import SmallEngine  # noqa: E402
from vllm_trace.checkpoints import checkpoint  # noqa: E402
from vllm_trace.mini.model import load_model  # noqa: E402


@pytest.fixture(scope="module", params=["tiny-llama", "tiny-opt"])
def folder(request):
    return checkpoint(request.param)


def jobs(seed, count=7):
    rng = random.Random(seed)
    return [
        ([rng.randrange(3, 700) for _ in range(rng.randint(1, 40))], rng.randint(1, 20))
        for _ in range(count)
    ]


def without_cache(model, prompt, max_tokens):
    """Every token from the whole text before it, with dense attention."""

    def attend(layer, query, key, value):
        repeat = query.shape[1] // key.shape[1]
        keys, values = (t.repeat_interleave(repeat, dim=1).transpose(0, 1) for t in (key, value))
        scores = query.transpose(0, 1) @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(later, -torch.inf).softmax(-1) @ values).transpose(0, 1)

    tokens = list(prompt)
    for _ in range(max_tokens):
        hidden = model.forward(torch.tensor(tokens), torch.arange(len(tokens)), attend)
        tokens.append(int(model.compute_logits(hidden[-1:]).argmax()))
    return tokens[len(prompt) :]


def serve(engine, asked):
    for index, (prompt, max_tokens) in enumerate(asked):
        engine.add_request(str(index), prompt, max_tokens)
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {sequence.name: sequence.output for sequence in engine.step()}
    return [outputs[str(index)] for index in range(len(asked))]


@pytest.mark.parametrize("kind", ["contiguous", "paged"])
def test_the_tokens_are_those_of_a_model_without_a_cache(folder, kind):
    model = load_model(folder)
    with torch.inference_mode():
        expected = [without_cache(model, *job) for job in jobs(1)]
    engine = SmallEngine(folder, kind, budget=192, max_model_len=64, block_size=8)
    assert expected == serve(engine, jobs(1))


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(64, 200), st.sampled_from([1, 4, 16, 32]))
def test_pages_and_rows_agree_whatever_is_preempted(seed, budget, block_size):
    asked = jobs(seed)
    folder = checkpoint("tiny-llama")
    options = dict(budget=budget, max_model_len=64, block_size=block_size)
    rows, pages = (SmallEngine(folder, kind, **options) for kind in ("contiguous", "paged"))
    assert serve(rows, asked) == serve(pages, asked)
    assert budget // 64 == rows.cache.num_rows == len(rows.cache.free)
    assert sorted(pages.cache.free) == list(range(budget // block_size))
    assert all(step.num_held <= step.num_reserved <= budget for step in rows.steps + pages.steps)
    assert max(step.num_running for step in rows.steps) <= budget // 64


def test_pages_admit_more_and_preempt_when_they_run_out():
    asked = [([7] * 10, 30) for _ in range(8)]
    folder = checkpoint("tiny-llama")
    options = dict(budget=128, max_model_len=64, block_size=8)
    rows, pages = (SmallEngine(folder, kind, **options) for kind in ("contiguous", "paged"))
    serve(rows, asked)
    serve(pages, asked)
    assert 2 == max(step.num_running for step in rows.steps) and not rows.num_preemptions
    assert 8 == max(step.num_running for step in pages.steps) and pages.num_preemptions
    assert rows.cache.size_bytes == pages.cache.size_bytes


def test_what_cannot_fit_is_refused():
    folder = checkpoint("tiny-llama")
    with pytest.raises(ValueError, match="does not hold one request"):
        SmallEngine(folder, "paged", budget=32, max_model_len=64)
    engine = SmallEngine(folder, "contiguous", budget=64, max_model_len=64)
    with pytest.raises(ValueError, match="do not fit"):
        engine.add_request("long", [3] * 60, 5)
