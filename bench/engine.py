"""vLLM's own EngineCore with the model replaced by an instant fake: what is left of a step is the scheduler.

``EngineCore.step`` is driven as it is: ``schedule``, a finished future, ``update_from_output``, the
outputs that a front end would get. Statistics are on (``log_stats``), as ``vllm serve`` has them,
prefix caching is on, blocks have 16 tokens. Prompts have different lengths, so that block
boundaries are spread over the steps.
"""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Callable
from concurrent.futures import Future
from itertools import count
from typing import Any

from vllm_trace.checkpoints import checkpoint

os.environ.update(
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    TORCH_CPP_LOG_LEVEL="ERROR",
    OMP_NUM_THREADS="1",
)

NUM_REQUESTS = 32
NUM_BLOCKS = 8192
MAX_MODEL_LEN = 4096
PROMPT_LENS = (32, 512)
BLOCK_SIZE = 16


def make_executor_class() -> type:
    """An executor that has the right answers and no worker."""
    import torch
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.outputs import ModelRunnerOutput

    spec = FullAttentionSpec(
        block_size=BLOCK_SIZE, num_kv_heads=4, head_size=32, dtype=torch.float32
    )

    class InstantExecutor(Executor):
        def _init_executor(self) -> None:
            self.cache_config.block_size = BLOCK_SIZE

        def collective_rpc(self, method, timeout=None, args=(), kwargs=None, **options):
            answers = {
                "get_kv_cache_spec": {"layer.0": spec},
                "determine_available_memory": 1 << 34,
                "get_supported_kv_cache_layouts": ["NHD"],
            }
            return [answers[method]] if method in answers else []

        def check_health(self) -> None:
            pass

        def execute_model(self, scheduler_output, non_block=False):
            ids = list(scheduler_output.num_scheduled_tokens)
            future: Future[Any] = Future()
            future.set_result(
                ModelRunnerOutput(
                    req_ids=ids,
                    req_id_to_index={name: index for index, name in enumerate(ids)},
                    # Where it lies in an answer of the real one: a new list for each request.
                    sampled_token_ids=[[7] for _ in ids],
                )
            )
            return future

    return InstantExecutor


class Engine:
    """One EngineCore, filled and emptied again for each stretch of steps."""

    def __init__(self, log_stats: bool = True, num_blocks: int = NUM_BLOCKS) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.core import EngineCore

        config = EngineArgs(
            model=str(checkpoint("tiny-opt")),
            skip_tokenizer_init=True,
            max_num_seqs=NUM_REQUESTS,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=8192,
            num_gpu_blocks_override=num_blocks,
            enforce_eager=True,
            hf_overrides={"max_position_embeddings": MAX_MODEL_LEN},
            load_format="dummy",
            dtype="float32",
            async_scheduling=False,
        ).create_engine_config()
        config.cache_config.block_size = BLOCK_SIZE
        self.core = EngineCore(config, make_executor_class(), log_stats=log_stats)
        assert config.cache_config.block_size == BLOCK_SIZE
        self.step: Callable[[], Any] = self.core.step
        self._names = count()
        self._running: list[str] = []

    def fill(self, seed: int = 0) -> None:
        """Replace all requests by new ones and run their prefill."""
        self.empty()
        rng = random.Random(seed)
        for _ in range(NUM_REQUESTS):
            self.add(rng.randint(*PROMPT_LENS), MAX_MODEL_LEN, rng)
        while any(r.is_prefill_chunk or not r.num_output_tokens for r in self._requests()):
            self.step()

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.step()

    def assert_full(self) -> None:
        """None of the requests may have ended: an arm would have had less to do."""
        assert len(self.core.scheduler.running) == NUM_REQUESTS

    def add(self, prompt_len: int, max_tokens: int, rng: random.Random) -> None:
        from vllm.sampling_params import SamplingParams
        from vllm.v1.request import Request

        # As long as the names that a server gives.
        name = f"cmpl-{next(self._names):032x}-0"
        self._running.append(name)
        self.core.add_request(
            Request(
                request_id=name,
                prompt_token_ids=[rng.randrange(700) for _ in range(prompt_len)],
                sampling_params=SamplingParams(
                    max_tokens=max_tokens, ignore_eos=True, temperature=0
                ),
                pooling_params=None,
                arrival_time=0.0,
                block_hasher=self.core.request_block_hasher,
            )
        )

    def empty(self) -> None:
        self.core.abort_requests(self._running)
        self._running.clear()
        while self.core.scheduler.has_requests():
            self.step()
        self.core.reset_prefix_cache()

    def serve(self, steps: int, seed: int = 0) -> None:
        """Requests come and go: for traces with every common kind of event in them."""
        rng = random.Random(seed)
        scheduler = self.core.scheduler
        system_prompt = rng.getrandbits(32)
        self.empty()
        for _ in range(steps):
            while len(scheduler.running) + len(scheduler.waiting) < NUM_REQUESTS:
                # Every other request begins with the same words.
                shared = rng.random() < 0.5
                words = random.Random(system_prompt) if shared else rng
                self.add(rng.randint(*PROMPT_LENS), int(rng.lognormvariate(4.5, 0.8)) + 1, words)
            self.step()
        self.empty()

    def _requests(self) -> list[Any]:
        return [self.core.scheduler.requests[name] for name in self._running]


_ballast: list[object] = []
_SHAPES: tuple[Callable[[int], object], ...] = (
    lambda size: bytes(8 * size),
    lambda size: (None,) * size,
    lambda size: [None] * size,
    lambda size: {size: size},
)


def shake_heap(rng: random.Random) -> None:
    """Leave small objects and holes of random sizes, so that what comes next lies somewhere else each time.

    Which addresses a step's objects get is worth up to 2 % of it, and whatever was imported or compiled
    before changes them all: no arm shall win or lose by that.
    """
    number = rng.randrange(50_000, 100_000)
    made = [rng.choice(_SHAPES)(rng.randrange(1, 60)) for _ in range(number)]
    rng.shuffle(made)
    _ballast.extend(made[: number // 4])


def settle_heap() -> None:
    """What EngineCore does when it has started; the collector stays on, as it does there."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()
