"""Bytes that a plain copy moves in a second on this device, reads and writes counted: what a reading kernel can reach.

python -m vllm_trace.backend.copy_rate    # prints it
"""

from __future__ import annotations

import subprocess
import sys
import time

SIZE = {"cpu": 64 << 20, "cuda": 512 << 20}
"""Bytes copied at once: beyond every cache of the device."""

TRIES = 5


def measure() -> int:
    """The best of five copies. Units: bytes a second. On CUDA memory is taken and given back."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.empty(SIZE[device], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(TRIES + 1):  # the first one also finds the pages
        best = max(best, 2 * SIZE[device] / _seconds(source, target))
    del source, target
    if device == "cuda":
        torch.cuda.empty_cache()
    return round(best)


def _seconds(source: object, target: object) -> float:
    import torch

    assert isinstance(source, torch.Tensor) and isinstance(target, torch.Tensor)
    if not source.is_cuda:
        started = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    target.copy_(source)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measure_apart() -> int:
    """The same in a process of its own, which leaves no CUDA context here; 0 when that fails."""
    command = [sys.executable, "-m", "vllm_trace.backend.copy_rate"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return int(done.stdout.split()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return 0


if __name__ == "__main__":
    print(measure())
