"""The Triton kernels on a CPU, in processes of their own: the interpreter is chosen before Triton is imported."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent

needs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "triton")),
    reason="torch or triton is not installed: mini's kernels cannot run",
)


@needs
def test_by_the_interpreter():
    """Decode takes as long as the other two together, so they run side by side."""
    decode = HERE / "decode_cases.py"
    others = [path for path in sorted(HERE.glob("*_cases.py")) if path != decode]
    assert 2 == len(others)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    pytest_alone = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    started = [
        subprocess.Popen(
            [*pytest_alone, *map(str, cases)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for cases in ([decode], others)
    ]  # fmt: skip
    for process in started:
        said, _ = process.communicate()
        assert process.returncode == 0, said[-4000:]
        assert " passed" in said and " skipped" not in said


@needs
def test_without_gpu_and_interpreter_it_is_said_before_a_launch():
    code = """
import torch
from vllm_trace.mini import kernels
asked = dict(head_size=300, num_heads=8, num_kv_heads=3, block_size=512, dtype=torch.float64, layout="rows")
print("\\n".join(kernels.unsupported(**asked, device="cpu")))
query, cache = torch.zeros(1, 8, 64), torch.zeros(4, 16, 2, 64)
try:
    kernels.paged_attention_v1(query, cache, cache, torch.zeros(1, 1), torch.ones(1), 1.0)
except ValueError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    *wrong, raised = result.stdout.splitlines()
    assert [
        "head size 300: multiples of 8 from 8 to 256 are supported",
        "8 query heads over 3 KV heads: the first must be a multiple of the second",
        "block size 512: 1 to 256 are supported",
        "dtype float64: float32, float16, bfloat16 are supported",
        "layout 'rows': flash, heads, planes, split are supported",
        "device cpu: Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported",
    ] == wrong, result.stderr
    assert raised == wrong[-1]
