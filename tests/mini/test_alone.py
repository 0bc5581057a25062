"""The manager and scheduler half of mini needs neither vLLM nor torch, and no sibling of its package."""

import subprocess
import sys


def test_no_vllm_no_torch_no_sibling():
    code = """
import sys
sys.modules["torch"] = sys.modules["vllm"] = None   # importing either one raises
from vllm_trace.mini import block_pool, kv_cache_manager, pages, request, rules, scheduler, v0
ours = [name for name in sys.modules if name.startswith("vllm_trace.")]
print(sorted(name for name in ours if not name.startswith("vllm_trace.mini")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "[]\n"
