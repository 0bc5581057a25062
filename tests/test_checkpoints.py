"""The tiny checkpoints: the same bytes each time, whole at once, and lively on a real vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_trace.checkpoints import FILES, NAMES, VOCAB_SIZE, checkpoint
from vllm_trace.runner import let_vllm_look_at_llvmlite

ENGINES = []  # kept: the end of an old engine would take the process groups of a new one with it

PROMPTS = [
    "Hello, my name is",
    "The capital of France is",
    "Once upon a time",
    "1, 2, 3,",
    "def attention(",
    "aaaa",
    "The future of computing is shared. " * 40,
]


@pytest.fixture(scope="module", autouse=True)
def _libraries():
    for library in ("numpy", "safetensors", "tokenizers"):
        pytest.importorskip(library, reason=f"checkpoints are made with {library}")


@pytest.mark.parametrize("name", NAMES)
def test_made_twice_is_the_same_bytes(name, tmp_path):
    one, other = checkpoint(name, tmp_path / "one"), checkpoint(name, tmp_path / "other")

    assert one.name == other.name
    assert sorted(FILES) == sorted(file.name for file in one.iterdir())
    for file in FILES:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def test_another_process_makes_the_same_bytes(tmp_path):
    """Nothing depends on the process: hash seed, set order, clock."""
    here = checkpoint("tiny-llama", tmp_path / "here")
    code = "import sys; from vllm_trace.checkpoints import *; print(checkpoint('tiny-llama', sys.argv[1]))"
    there = Path(_python(code, tmp_path / "there", PYTHONHASHSEED="7").communicate()[0].strip())

    assert [(here / file).read_bytes() for file in FILES] == [
        (there / file).read_bytes() for file in FILES
    ]


def test_reused_and_mended(tmp_path):
    folder = checkpoint("tiny-opt", tmp_path)
    made = (folder / "model.safetensors").stat()
    assert folder == checkpoint("tiny-opt", tmp_path)
    assert made.st_mtime_ns == (folder / "model.safetensors").stat().st_mtime_ns

    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    assert folder == checkpoint("tiny-opt", tmp_path)
    assert weights == (folder / "model.safetensors").read_bytes()
    assert [folder] == list(tmp_path.iterdir())  # no temporary folder is left


def test_processes_that_race(tmp_path):
    """Four start together; all get the same whole folder, and nothing else is left."""
    code = (
        "import sys, time; from vllm_trace import checkpoints as c; import numpy, safetensors.numpy, tokenizers\n"
        "while time.time() < float(sys.argv[2]): pass\n"
        "print(c.checkpoint('tiny-llama', sys.argv[1]), c._is_whole(c.checkpoint('tiny-llama', sys.argv[1])))"
    )
    import time

    processes = [_python(code, tmp_path, str(time.time() + 2)) for _ in range(4)]
    answers = {process.communicate()[0].strip() for process in processes}

    assert {0} == {process.returncode for process in processes}
    assert {f"{checkpoint('tiny-llama', tmp_path)} True"} == answers
    assert 1 == len(list(tmp_path.iterdir()))


def test_cache_follows_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("VTRACE_CACHE", str(tmp_path / "cache"))
    assert tmp_path / "cache" / "checkpoints" == checkpoint("tiny-llama").parent


def test_failure_leaves_nothing(tmp_path, monkeypatch):
    import vllm_trace.checkpoints as module

    monkeypatch.setattr(module, "TEXT", "too short for so many tokens")
    with pytest.raises(RuntimeError, match="768 are wanted"):
        checkpoint("tiny-llama", tmp_path)
    assert [] == list(tmp_path.iterdir())


def test_unknown_name():
    with pytest.raises(
        ValueError, match="unknown checkpoint 'tiny-lama'; known: tiny-llama, tiny-opt"
    ):
        checkpoint("tiny-lama")


@pytest.mark.parametrize("name", NAMES)
def test_small_and_consistent(name, tmp_path):
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    folder = checkpoint(name, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    weights = load_file(folder / "model.safetensors")

    assert sum(file.stat().st_size for file in folder.iterdir()) < 4_000_000
    assert {"float32"} == {str(weight.dtype) for weight in weights.values()}
    assert (
        VOCAB_SIZE
        == config["vocab_size"]
        == tokenizer.get_vocab_size()
        == len(weights["lm_head.weight"])
    )
    assert config["bos_token_id"] == tokenizer.token_to_id("<s>") == tokenizer.encode("x").ids[0]
    assert config["eos_token_id"] == tokenizer.token_to_id("</s>")
    # The rows of special tokens are empty, so no output ends before it was asked to.
    assert not weights["lm_head.weight"][[0, 1, 2]].any()


@pytest.mark.parametrize("text", ["Hello, my name is", "Grüße, 你好 🙂", "\x00\n\t  x ", "</s"])
def test_any_text_comes_back(text, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint("tiny-llama", tmp_path) / "tokenizer.json"))
    assert text == tokenizer.decode(tokenizer.encode(text).ids)


def test_transformers_reads_the_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint("tiny-llama", tmp_path))
    chat = [{"role": "user", "content": "Hi"}]

    assert "<s>user: Hi\nassistant:" == tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True
    )
    assert (1, 2, 0) == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_outputs_vary_on_vllm(name, tmp_path):
    """40 greedy tokens for 7 prompts: many different ones, no circle at the end, and no two prompts alike."""
    llm, params = _vllm(name)
    outputs = llm.generate(PROMPTS, params(temperature=0, max_tokens=40), use_tqdm=False)
    tokens = [tuple(output.outputs[0].token_ids) for output in outputs]

    for prompt, ids in zip(PROMPTS, tokens):
        assert 40 == len(ids), f"{prompt!r} ended early"
        assert len(set(ids)) >= 20, f"{prompt!r}: {len(set(ids))} different tokens of 40: {ids}"
        assert _period(ids) is None, f"{prompt!r} runs in a circle of {_period(ids)} tokens: {ids}"
    for i, ids in enumerate(tokens):
        for other in tokens[:i]:
            assert sum(a == b for a, b in zip(ids, other)) < 10, (
                f"two prompts go the same way: {ids} {other}"
            )
    assert all(output.outputs[0].text.isprintable() for output in outputs)


def test_chat_on_vllm():
    llm, params = _vllm("tiny-llama")
    chat = [{"role": "user", "content": "Hello"}]
    (output,) = llm.chat(chat, params(temperature=0, max_tokens=5), use_tqdm=False)
    assert 5 == len(output.outputs[0].token_ids)


def _period(ids):
    """The length of the circle in which the last 12 tokens (or the last two rounds) run, or None."""
    for n in range(1, 21):
        tail = ids[-max(2 * n, 12) :]
        if tail[n:] == tail[:-n]:
            return n
    return None


def _vllm(name):
    vllm = pytest.importorskip(
        "vllm", reason="vllm is not installed: what the checkpoints generate on it cannot be tested"
    )
    let_vllm_look_at_llvmlite()  # other tests load numba
    llm = vllm.LLM(
        str(checkpoint(name)),
        dtype="float32",
        block_size=32,
        num_gpu_blocks_override=80,
        max_model_len=2048,
        # What is free now has nothing to do with it: a long test process holds memory of its own.
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        use_tqdm_on_load=False,
        seed=0,
    )
    ENGINES.append(llm)
    return llm, vllm.SamplingParams


def _python(code, *arguments, **environment):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    root = Path(__file__).parent.parent
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), **environment},
    )
