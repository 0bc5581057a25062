"""``vllm serve`` of the tiny model under ``record``, and a client's requests."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import command

from vllm_trace.checkpoints import checkpoint
from vllm_trace.runner import quiet_environment


def clients():
    """An HTTP client for any number of requests at once. Each has a connection of its own: one that was
    kept open may be closed by the server at the moment in which it is used again."""
    import aiohttp

    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=240),
    )


class Server:
    """A server that is started; its trace goes to ``made`` in the folder, what it says to ``log``."""

    def __init__(self, folder: Path, record: Sequence[str] = (), serve: Sequence[str] = ()) -> None:
        """With more words for ``record`` and for ``vllm serve``."""
        pytest.importorskip("aiohttp", reason="aiohttp is not installed: there is no client")
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        folder.mkdir(exist_ok=True)
        words = [
            "vllm", "serve", checkpoint("tiny-llama"), "--served-model-name", "tiny",
            "--port", str(self.port), "--host", "127.0.0.1", "--enforce-eager",
            "--block-size", "32", "--num-gpu-blocks-override", "200", "--max-model-len", "1024",
            "--kv-cache-memory-bytes", str(64 << 20), "--dtype", "float32", *serve,
        ]  # fmt: skip
        environ = os.environ | quiet_environment()
        del environ["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server needs vLLM's own way
        with open(folder / "log", "wb") as log:
            self.process = subprocess.Popen(
                command("record", *record, "-o", folder / "made", "--", *words),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environ,
                cwd=folder,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def kill(self) -> None:
        """With all that it started; nothing when it has ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    async def ready(self, session: Any) -> None:
        """Wait until it answers."""
        import aiohttp

        for _ in range(600):
            assert self.process.poll() is None, self.log
            try:
                async with session.get(f"http://127.0.0.1:{self.port}/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.3)
        raise AssertionError(f"the server did not come up\n{self.log}")

    async def complete(
        self, session: Any, prompt: str, max_tokens: int, headers: Mapping[str, str] | None = None
    ) -> tuple[str, int, int]:
        """(id, prompt tokens, completion tokens) of one request."""
        body = {
            "model": "tiny", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0,
            "ignore_eos": True,
        }  # fmt: skip
        url = f"http://127.0.0.1:{self.port}/v1/completions"
        async with session.post(url, json=body, headers=headers) as answer:
            assert answer.status == 200
            told = await answer.json()
            usage = told["usage"]
            return told["id"], usage["prompt_tokens"], usage["completion_tokens"]
