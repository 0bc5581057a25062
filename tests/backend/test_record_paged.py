"""`record` with our attention: a user's own script, which knows nothing of it."""

import os
import sys
import textwrap

import pytest
from helpers import run_cli

from vllm_trace.checkpoints import checkpoint
from vllm_trace.runner import quiet_environment
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

SCRIPT = """
    import sys
    from vllm import LLM, SamplingParams

    if __name__ == "__main__":
        llm = LLM(model=sys.argv[1], block_size=int(sys.argv[2]), dtype="float32", enforce_eager=True,
                  max_model_len=128, num_gpu_blocks_override=16, kv_cache_memory_bytes=64 << 20)
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        (made,) = llm.generate([{"prompt_token_ids": [5, 6, 7, 8]}], params, use_tqdm=False)
        print(made.outputs[0].token_ids)
"""


def record(tmp_path, block_size, *flags):
    script = tmp_path / "user.py"
    script.write_text(textwrap.dedent(SCRIPT))
    return run_cli(
        "record", *flags, "-o", tmp_path / "made", "--",
        sys.executable, script, checkpoint("tiny-llama"), str(block_size),
        cwd=tmp_path, env=os.environ | quiet_environment(),
    )  # fmt: skip


def test_a_users_script_gets_our_attention_and_its_shadow(tmp_path):
    done = record(tmp_path, 16, "--attention", "paged", "--shadow")
    assert 0 == done.returncode, done.stderr
    summary = Summary.of(read_trace(tmp_path / "made"))
    assert {("PAGED", "PagedImpl")} == {(b["backend"], b["impl"]) for b in summary.backends}
    facts = summary.facts()
    assert (5, 0) == (facts["v1_steps"], facts["v2_steps"])
    assert (12, 0) == (facts["shadow_calls"], facts["shadow_beyond"])
    said = "shadow: 12 attention calls computed again from scratch, all within 2e-05"
    assert said in done.stderr


@pytest.mark.parametrize(
    ("flags", "block_size", "said"),
    [
        (["--attention", "paged"], 20, "--attention paged: block size 20 is not supported"),
        (["--attention", "pagde"], 16, "unknown attention 'pagde'; did you mean 'paged'?"),
        (["--shadow", "--level", "light"], 16, "shadow needs level full"),
    ],
)
def test_what_cannot_be_done_ends_the_script_before_its_engine_starts(
    tmp_path, flags, block_size, said
):
    done = record(tmp_path, block_size, *flags)
    assert 0 != done.returncode
    assert said in done.stderr
    assert not list(tmp_path.glob("made/trace/*.vtrace"))
