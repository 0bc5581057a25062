"""The shadow inside the real engine: within tolerance where all is well, at the first call where it is not."""

import math
import sys

import pytest
import torch
from backend.conftest import asked, work, worked
from helpers import run_cli

from vllm_trace.backend.case import TOLERANCE, AttentionCase
from vllm_trace.events import AttentionCalled
from vllm_trace.render import shadow as said_of
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace


def calls_of(folder):
    return [e for e in read_trace(folder).events() if type(e) is AttentionCalled]


@pytest.fixture
def wrong_kernel(monkeypatch):
    """The engine's attention with its output changed by ``change(output, metadata, layer)``."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    def install(change):
        original = CPUAttentionBackendImpl.forward

        def forward(
            self, layer, query, key, value, kv_cache, attn_metadata, output,
            output_scale=None, output_block_scale=None,
        ):  # fmt: skip
            made = original(self, layer, query, key, value, kv_cache, attn_metadata, output)
            if attn_metadata is not None:
                change(output, attn_metadata, layer, kv_cache)
            return made

        monkeypatch.setattr(CPUAttentionBackendImpl, "forward", forward)

    return install


def test_mixed_is_within_tolerance_in_every_call():
    _, folder = worked("mixed", "engine", shadow=True)
    summary = Summary.of(read_trace(folder))
    assert summary.facts()["kernel_calls"] == summary.shadow.num_calls
    assert summary.shadow.num_calls > 500
    assert 0 == summary.shadow.num_beyond
    assert 0 < summary.shadow.max_relative < TOLERANCE["float32"] / 10
    assert "" != summary.shadow.request and summary.shadow.position >= 0
    assert "all within 2e-05" in said_of(summary)[0]
    assert [] == list(folder.glob("*.safetensors"))


def test_computing_it_twice_changes_no_token():
    assert worked("mixed", "engine")[0] == worked("mixed", "engine", shadow=True)[0]


def test_errors_are_kept_with_layer_request_and_position():
    _, folder = worked("hello", "engine", shadow=True)
    for event in calls_of(folder):
        assert [0, 1] == event.layers
        assert 2 == len(event.worst)
        for absolute, relative, request, position in event.worst:
            assert 0 <= relative <= absolute
            assert 0 == request
            assert 0 <= position < 26
            assert event.step == 1 or position == event.step + 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_within_its_own_tolerance(tmp_path, dtype):
    """bfloat16 also reads the layout that AMX kernels want, where the machine has them."""
    work("hello", tmp_path, "engine", True, dtype=dtype)
    check = Summary.of(read_trace(tmp_path)).shadow
    assert (40, 0, TOLERANCE[dtype]) == (check.num_calls, check.num_beyond, check.tolerance)
    assert check.max_relative > 1e-6  # it is that dtype


def test_a_wrong_kernel_is_caught_at_its_first_call_and_the_call_can_be_computed_again(
    tmp_path, wrong_kernel
):
    seen = []

    def change(output, metadata, layer, kv_cache):
        if metadata.max_query_len == 1 and metadata.max_seq_len >= 10 and "1" in layer.layer_name:
            seen.append(layer.layer_name)
            output[0, 3, 5] += 0.25

    wrong_kernel(change)
    work("hello", tmp_path, "engine", True)
    assert seen
    bad = [event for event in calls_of(tmp_path) if event.beyond]
    (event,) = bad
    assert 5 == event.step  # the context of step 5 is 10 tokens
    beyond = event.beyond
    assert (1, 9, [1], [32 + 9]) == (
        beyond["layer"], beyond["position"], beyond["table"], beyond["slots"],
    )  # fmt: skip
    assert 0.25 == pytest.approx(beyond["absolute"], rel=1e-4)
    summary = Summary.of(read_trace(tmp_path))
    assert len(seen) == summary.shadow.num_beyond
    assert "hello" == summary.shadow.beyond["request"]
    said = said_of(summary)
    assert f"{len(seen)} of 40 attention calls are beyond 2e-05" in said[0]
    assert "step 5, layer 1, request hello: position 9 is off by" in said[1]
    (file,) = tmp_path.glob("*.safetensors")
    assert file.name == beyond["file"]
    done = run_cli(
        "replay", "--attention", file, cwd=tmp_path, env={"PYTHONPATH": without_vllm(tmp_path)}
    )
    assert 1 == done.returncode, done.stderr
    assert "absolute 0.25) at position 9" in done.stdout
    assert "beyond the tolerance, as when it was saved" in done.stdout


def without_vllm(tmp_path):
    """A folder that stands before vLLM on the path and cannot be imported."""
    folder = tmp_path / "no"
    folder.mkdir()
    (folder / "vllm.py").write_text("raise ImportError('this test has no vLLM')\n")
    return str(folder)


def test_a_wrong_kernel_of_ours_is_caught_too(tmp_path, monkeypatch):
    """With our own backend the reference is the dense form, so V1 does not judge itself."""
    from vllm_trace.mini import attention

    original = attention.paged_attention_v1

    def forgets_the_newest(query, keys, values, tables, seq_lens, *rest, **more):
        return original(query, keys, values, tables, seq_lens - 1, *rest, **more)

    monkeypatch.setattr(attention, "paged_attention_v1", forgets_the_newest)
    work("hello", tmp_path, "paged", True)
    (event,) = [event for event in calls_of(tmp_path) if event.beyond]
    assert (2, "mini.paged_attention_v1", 0) == (event.step, event.kernel, event.beyond["layer"])


def test_nan_in_the_cache_is_named_by_its_first_position(tmp_path, wrong_kernel):
    def change(output, metadata, layer, kv_cache):
        if metadata.max_seq_len == 12 and "0" in layer.layer_name:
            # Position 3 of request hello: V, second half of the block's memory, head 2.
            block = int(metadata.block_table[0, 0])
            size, double = kv_cache.shape[2:]
            kv_cache[block].view(kv_cache.shape[1], 2, size, double // 2)[2, 1, 3, 0] = math.nan

    wrong_kernel(change)
    work("hello", tmp_path, "engine", True)
    (event,) = [event for event in calls_of(tmp_path) if event.beyond]
    bad = event.beyond["not_finite"]
    assert (7, "V", 3, 1, 32 + 3, "nan") == (
        event.step, bad["what"], bad["position"], bad["block"], bad["slot"], bad["value"],
    )  # fmt: skip
    said = said_of(Summary.of(read_trace(tmp_path)))
    assert "V holds nan at position 3 (block 1, slot 35)" in said[1]


def test_run_shadow_exits_with_1_when_a_call_is_beyond(tmp_path):
    """The front door, on a kernel that is wrong in the process that it starts."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'run' in sys.argv:\n"
        "    from vllm_trace.backend import case\n"
        "    case.TOLERANCE['float32'] = 1e-12\n"
    )
    done = run_cli("run", "hello", "--shadow", "-o", tmp_path / "run", cwd=tmp_path,
                   env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert 1 == done.returncode, done.stderr
    assert "attention calls are beyond 1e-12" in done.stdout
    assert list((tmp_path / "run" / "trace").glob("attention-*.safetensors"))


def test_a_call_that_the_shadow_cannot_compute_is_a_failed_probe_and_not_a_pass(
    tmp_path, monkeypatch
):
    from vllm_trace.backend import engine_cache

    monkeypatch.delitem(engine_cache._READERS, "CPUAttentionBackendImpl")
    work("hello", tmp_path, "engine", True)
    summary = Summary.of(read_trace(tmp_path))
    assert 0 == summary.shadow.num_calls
    assert any("CPUAttentionBackendImpl" in problem for problem in summary.problems)


def test_our_own_backend_passes_its_shadow():
    _, folder = worked("preempt", "paged", shadow=True)
    check = Summary.of(read_trace(folder)).shadow
    assert check.num_calls > 200
    assert 0 == check.num_beyond


def test_tracing_without_the_shadow_loads_none_of_it(tmp_path):
    with asked(tmp_path):
        from vllm_trace.hooks import register

        register()
        from vllm_trace.hooks import recorder

        assert recorder().shadow is None
    assert AttentionCase.__module__ in sys.modules  # of this test, not of the recorder
    assert torch.get_default_dtype() == torch.float32
