"""Records the trace that docs/implementation.md tells: ``.venv/bin/python docs/traces/make.py``.

One completion over HTTP from ``vllm serve`` of the tiny Llama. Make it again when the schema changes; then the test of
the page says which event numbers moved.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from vllm_trace.checkpoints import checkpoint
from vllm_trace.runner import quiet_environment

FOLDER = Path(__file__).parent / "http"

PROMPT = (
    "A page of memory holds sixteen tokens. When a request arrives, the scheduler looks whether its first words "
    "were seen before; blocks that hold the same words are shared, and only the rest is computed."
)
MAX_TOKENS = 36


def main() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    serve = [
        "vllm", "serve", str(checkpoint("tiny-llama")), "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32",
        "--block-size", "32", "--num-gpu-blocks-override", "33", "--max-model-len", "512",
        "--kv-cache-memory-bytes", str(64 << 20),
    ]  # fmt: skip
    environ = os.environ | quiet_environment()
    environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)  # a server has its engine in a process
    made = Path(tempfile.mkdtemp()) / "made"
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_trace", "record", "-o", str(made), "--", *serve],
        env=environ,
        stdout=subprocess.DEVNULL,
    )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process)
        asked = {
            "model": "tiny", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(asked).encode(),
            {"Content-Type": "application/json"},
        )
        print(json.load(urllib.request.urlopen(request, timeout=60))["usage"])
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree(made / "trace", FOLDER)
    print(*sorted(path.name for path in FOLDER.iterdir()))


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            if process.poll() is not None:
                raise SystemExit("the server did not come up") from None
        time.sleep(0.3)
    raise SystemExit("the server did not answer")


if __name__ == "__main__":
    main()
