"""The calculation against the installed ``KVCacheManager``, and against recorded block tables."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
from recorded import needs_vllm

from vllm_trace import cli
from vllm_trace.errors import EngineError, UsageError
from vllm_trace.memory import calculate, real, workload
from vllm_trace.memory.workload import Request

GOLD = Path(__file__).resolve().parent.parent / "gold"


@needs_vllm
def test_blocks_equal_the_real_managers_on_1000_random_request_sets(capsys):
    """The command of the pages: 1,000 sets are its default."""
    assert 0 == cli.main(["memory", "--check", "--json"])
    told = json.loads(capsys.readouterr().out)["check"]
    assert [] == told["differences"]
    assert 1000 == told["num_sets"]
    # The sets are not all of the easy kind.
    assert told["num_refusals"] > 500 and told["num_hits"] > 500 and told["num_calls"] > 50_000


@needs_vllm
@pytest.mark.parametrize(
    ("what", "wrong"),
    [
        ("blocks_of", lambda tokens, size: tokens // size + 1),
        ("hit_blocks", lambda prefix, prompt, size: min(prefix, prompt) // size),
        ("hit_blocks", lambda prefix, prompt, size: 0),
    ],
)
def test_a_wrong_formula_is_found(monkeypatch, what, wrong):
    monkeypatch.setattr(real, what, wrong)
    verdict = real.check(60)
    assert not verdict.equal
    assert "the manager has" in verdict.text() and "the first: " in verdict.text()


@needs_vllm
@pytest.mark.parametrize(("users", "prefix", "own", "size"), [(100, 500, 100, 16), (7, 64, 1, 32)])
def test_sharing_is_what_the_manager_does(users, prefix, own, size):
    made = calculate.sharing(users, prefix, own, size)
    manager = real.Manager()
    asked = real.RequestSet(
        size, made.shared + 1, tuple(Request(prefix + own, 1) for _ in range(users)), prefix, True
    )
    verdict = real.Verdict(manager.version)
    real.ask(manager, asked, verdict)
    assert verdict.equal, verdict.text()
    assert (0, made.hit_blocks * (users - 1)) == (verdict.num_refusals, verdict.num_hits)
    one_less = dataclasses.replace(asked, num_blocks=made.shared)
    verdict = real.Verdict(manager.version)
    real.ask(manager, one_less, verdict)
    assert verdict.equal and verdict.num_refusals == 1


@needs_vllm
def test_users_that_fit_are_admitted_and_the_next_is_refused():
    manager = real.Manager()
    rng = random.Random(1)
    lengths = [rng.randint(1, 200) for _ in range(40)]
    count = calculate.fitting(lengths, 16, 99)
    requests = tuple(Request(lengths[i % 40], 1) for i in range(count + 1))
    verdict = real.Verdict(manager.version)
    real.ask(manager, real.RequestSet(16, 100, requests), verdict)
    assert verdict.equal and verdict.num_refusals == 1


def test_without_vllm_it_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(EngineError, match="nothing to check against"):
        real.check(1)


def test_a_check_of_nothing_is_refused():
    with pytest.raises(UsageError, match="--check is 0"):
        real.check(0)


@pytest.mark.parametrize(
    "name", ["batch", "boundary", "chunked", "evict", "preempt", "prefix", "mixed"]
)
def test_recorded_block_tables_are_as_calculated(name):
    work, blocks = workload.of_trace(GOLD / f"{name}.vtrace")
    assert len(work.requests) == len(blocks.blocks) > 0
    assert list(blocks.blocks) == [
        calculate.blocks_of(request.held, blocks.block_size) for request in work.requests
    ]
