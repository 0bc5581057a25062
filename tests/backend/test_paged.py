"""Paged attention inside the real engine: block size 16, V1 and V2 by the rule, the engine's own tokens."""

import pytest
from backend.conftest import work, worked
from helpers import run_cli

from vllm_trace.errors import UsageError
from vllm_trace.events import AttentionCalled, AttentionPlanned, BackendSelected, SlotsMapped
from vllm_trace.invariants import checking, judgements
from vllm_trace.replay import MODES, replay
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace


def events_of(folder, kind):
    return [event for event in read_trace(folder).events() if type(event) is kind]


def decodes(folder):
    return [e for e in events_of(folder, AttentionPlanned) if e.variant in ("V1", "V2")]


def test_hello_runs_with_blocks_of_16_and_every_decode_call_is_v1_with_its_reason():
    _, folder = worked("hello", "paged")
    assert {16} == {event.block_size for event in events_of(folder, SlotsMapped)}
    assert {16} == {event.kernel_block_size for event in events_of(folder, SlotsMapped)}
    assert {("PAGED", "PagedImpl")} == {
        (event.backend, event.impl) for event in events_of(folder, BackendSelected)
    }
    found = decodes(folder)
    assert 19 == len(found)
    for number, event in enumerate(found):
        context = 7 + number
        assert ("V1", [0, 1]) == (event.variant, event.layers)
        assert f"the longest context, {context}, is one partition of 512" == event.reason
        assert (context, 1, 4, 1, 16) == tuple(
            event.numbers[name]
            for name in ("max_seq_len", "num_seqs", "num_heads", "num_partitions", "block_size")
        )


def test_every_call_of_every_layer_stands_beside_its_choice():
    _, folder = worked("hello", "paged")
    planned = {(e.step, e.kernel): e.layers for e in events_of(folder, AttentionPlanned)}
    called = {(e.step, e.kernel): e.layers for e in events_of(folder, AttentionCalled)}
    assert planned == called
    assert 40 == sum(map(len, called.values()))
    assert all(ns > 0 for e in events_of(folder, AttentionCalled) for ns in e.dur_ns)


def test_long_shows_v1_and_v2_and_the_call_at_which_it_changes():
    _, folder = worked("long", "paged")
    found = {event.numbers["max_seq_len"]: event.variant for event in decodes(folder)}
    assert {"V1"} == {variant for length, variant in found.items() if length <= 512}
    assert {"V2"} == {variant for length, variant in found.items() if length > 512}
    assert {512, 513, 8192, 8193} <= set(found)
    rule = Summary.of(read_trace(folder)).rule
    ((step, before, after, reason),) = rule.changes
    assert ("V1", "V2", False) == (before, after, rule.counterfactual)
    assert reason.startswith("the longest context, 513, is 2 partitions")
    first = next(event for event in decodes(folder) if event.variant == "V2")
    assert step == first.step


@pytest.mark.parametrize("name", ["hello", "long", "chunked", "preempt"])
def test_greedy_tokens_are_those_of_the_engines_own_attention_at_the_same_block_size(name):
    engine, _ = worked(name, "engine", block_size=32)
    paged, _ = worked(name, "paged", block_size=32)
    assert engine == paged


@pytest.mark.parametrize("name", ["hello", "long", "preempt", "batch", "chunked"])
def test_its_traces_hold_every_invariant_and_replay_identically(name):
    _, folder = worked(name, "paged")
    (report,) = checking.check_all([folder], [])
    assert 0 == judgements.exit_code([report]), report.text()
    for mode in MODES:
        assert replay(read_trace(folder), mode).passed


def test_with_the_engines_attention_the_rule_is_only_asked():
    _, folder = worked("long", "engine", block_size=32)
    rule = Summary.of(read_trace(folder)).rule
    assert rule.counterfactual
    mine = Summary.of(read_trace(worked("long", "paged")[1])).rule
    assert (mine.num_v1, mine.num_v2, mine.changes) == (rule.num_v1, rule.num_v2, rule.changes)
    assert [] == decodes(folder)


def test_the_engines_own_class_is_back_afterwards():
    worked("hello", "paged")
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert not AttentionBackendEnum.CPU_ATTN.is_overridden()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--attention", "paged:vllm"],
            "the CPU build of vLLM 0.32.0 has no paged_attention_v1 and no paged_attention_v2",
        ),
        (["--attention", "pagde"], "unknown attention 'pagde'; did you mean 'paged'?"),
        (["--shadow", "--level", "light"], "shadow needs level full"),
    ],
)
def test_what_cannot_be_done_is_said_before_the_engine_starts(tmp_path, arguments, said):
    done = run_cli("run", "hello", *arguments, "-o", tmp_path / "run", cwd=tmp_path)
    assert 2 == done.returncode
    assert said in done.stderr
    assert "" == done.stdout


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        (
            {"block_size": 20},
            "block size 20 is not supported (multiples of supported: 8, 16, 32, 64, 128, 256)",
        ),
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            "a KV cache of fp8_e5m2 is not supported (supported: auto, float16, bfloat16, fp8, fp8_e4m3)",
        ),
    ],
)
def test_an_engine_that_our_attention_cannot_serve_is_not_made(tmp_path, argument, said):
    with pytest.raises(UsageError) as caught:
        work("hello", tmp_path, "paged", **argument)
    assert said in str(caught.value)
    assert [] == list(tmp_path.iterdir())


def test_all_that_stands_against_a_model_is_said_at_once():
    from types import SimpleNamespace

    import torch

    from vllm_trace.backend.support import demand

    model = SimpleNamespace(
        get_head_size=lambda: 60, dtype=torch.float64, use_mla=True, get_num_attention_heads=None
    )
    config = SimpleNamespace(
        model_config=model,
        cache_config=SimpleNamespace(cache_dtype="int8", block_size=20),
        speculative_config=object(),
    )
    with pytest.raises(UsageError) as caught:
        demand("paged", config)
    for part in (
        "head size 60",
        "dtype float64",
        "KV cache of int8",
        "block size 20",
        "MLA",
        "speculative",
    ):
        assert part in str(caught.value)
    assert "--attention engine" in caught.value.hint
