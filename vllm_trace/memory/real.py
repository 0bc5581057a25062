"""The same questions asked of the installed ``KVCacheManager``: random request sets, block for block.

A set has a block size, a pool, requests that may share a prefix, and prefix caching on or off. The manager admits them
in order, then each grows token by token to its end. After every call the number of blocks that it holds, and whether it
refused, must be what `calculate` says.

Leaves out: preemption, sliding windows, several KV groups: those `mini` is compared with, in tests/mini/.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm_trace.errors import EngineError, UsageError
from vllm_trace.memory.calculate import blocks_of, fitting, hit_blocks
from vllm_trace.memory.workload import Request

BLOCK_SIZES = (1, 4, 8, 16, 32, 48, 64, 128)


@dataclass(frozen=True)
class RequestSet:
    """One question."""

    block_size: int
    num_blocks: int
    """The null block included."""
    requests: tuple[Request, ...]
    prefix: int = 0
    """Tokens that all prompts begin with (those that are shorter: all of theirs)."""
    caching: bool = False

    @classmethod
    def random(cls, rng: random.Random) -> RequestSet:
        block_size = rng.choice(BLOCK_SIZES)
        longest = rng.choice((3, 2 * block_size, 300))
        requests = tuple(
            Request(rng.randint(1, longest), rng.randint(1, 2 * block_size + 3))
            for _ in range(rng.randint(1, 12))
        )
        prefix = rng.choice((0, 0, block_size, rng.randint(0, longest)))
        # Some pools are large enough for all, some refuse.
        wanted = sum(blocks_of(r.held, block_size) for r in requests)
        num_blocks = 2 + rng.randint(0, round(1.3 * wanted) + 1)
        return cls(block_size, num_blocks, requests, prefix, rng.random() < 0.5)


@dataclass
class Verdict:
    """Of many sets."""

    version: str
    num_sets: int = 0
    num_calls: int = 0
    """Calls of ``allocate_slots``."""
    num_blocks: int = 0
    num_refusals: int = 0
    num_hits: int = 0
    """Blocks that were shared."""
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences

    def text(self) -> str:
        if self.equal:
            return (
                f"KVCacheManager of vLLM {self.version}, {self.num_sets:,} random request sets: all equal "
                f"({self.num_calls:,} calls, {self.num_blocks:,} blocks, {self.num_hits:,} shared, "
                f"{self.num_refusals:,} refusals)"
            )
        return (
            f"KVCacheManager of vLLM {self.version} differs in {len(self.differences)} of {self.num_sets} sets; "
            f"the first: {self.differences[0]}"
        )


def check(num_sets: int, seed: int = 0) -> Verdict:
    """Ask about so many random sets.

    Raises: ``UsageError`` for a number below 1, ``EngineError`` when there is no vLLM.
    """
    if num_sets < 1:
        raise UsageError(f"--check is {num_sets}, not 1 or more")
    manager = Manager()
    verdict = Verdict(manager.version)
    for number in range(num_sets):
        ask(manager, RequestSet.random(random.Random(f"{seed}:{number}")), verdict)
    return verdict


def ask(manager: Manager, asked: RequestSet, verdict: Verdict) -> None:
    """Put one set to the manager and to the calculation."""
    verdict.num_sets += 1
    try:
        _ask(manager, asked, verdict)
    except _Different as difference:
        verdict.differences.append(f"{difference} in {asked}")


class _Different(Exception):
    pass


def _equal(what: str, real: object, ours: object) -> None:
    if real != ours:
        raise _Different(f"{what}: the manager has {real}, the calculation {ours}")


def _ask(manager: Manager, asked: RequestSet, verdict: Verdict) -> None:
    real = manager.pool(asked)
    size, free = asked.block_size, asked.num_blocks - 1
    admitted: list[tuple[Any, Request]] = []
    in_cache = 0  # tokens of the prefix that stand in full blocks of somebody
    for index, request in enumerate(asked.requests):
        shared = min(asked.prefix, request.prompt)
        one = manager.request(f"r{index}", shared, request.prompt, size)
        hits = hit_blocks(min(shared, in_cache), request.prompt, size) if asked.caching else 0
        need = blocks_of(request.prompt, size) - hits
        found, num_hit = real.get_computed_blocks(one)[:2]
        _equal(f"hit tokens of request {index}", num_hit, hits * size)
        took = real.allocate_slots(one, request.prompt - num_hit, num_hit, found)
        verdict.num_calls += 1
        _equal(f"request {index} is admitted", took is not None, need <= free)
        if took is None:
            verdict.num_refusals += 1
            continue
        free -= need
        one.num_computed_tokens = request.prompt
        one.status = manager.running
        in_cache = max(in_cache, shared // size * size)
        admitted.append((one, request))
        verdict.num_hits += hits
        _equal(
            f"blocks of request {index}", manager.held(real, one), blocks_of(request.prompt, size)
        )
        _equal(f"free blocks after request {index}", real.block_pool.get_num_free_blocks(), free)
    if not asked.caching and len(admitted) == len(asked.requests) and asked.num_blocks > 1:
        prompts = [r.prompt for r in asked.requests]
        _equal(
            "all prompts fit", fitting(prompts, size, asked.num_blocks - 1) >= len(prompts), True
        )
    for one, request in admitted:
        for held in range(request.prompt + 1, request.held + 1):
            one.append_output_token_ids(manager.next_token())
            need = blocks_of(held, size) - blocks_of(held - 1, size)
            took = real.allocate_slots(one, 1)
            verdict.num_calls += 1
            _equal(f"{one.request_id} grows to {held} tokens", took is not None, need <= free)
            if took is None:
                verdict.num_refusals += 1
                break
            free -= need
            one.num_computed_tokens = held
            _equal(f"blocks at {held} tokens", manager.held(real, one), blocks_of(held, size))
        verdict.num_blocks += manager.held(real, one)
    _equal("free blocks at the end", real.block_pool.get_num_free_blocks(), free)
    for one, _ in admitted:
        real.free(one)
    left = real.block_pool.get_num_free_blocks()
    _equal("free blocks when all are gone", left, asked.num_blocks - 1)


class Manager:
    """Makes the installed vLLM's managers and requests, whatever arguments its release takes.

    Raises: ``EngineError`` when vLLM cannot be imported.
    """

    def __init__(self) -> None:
        import os

        from vllm_trace import runner

        os.environ |= runner.quiet_environment()
        try:
            import torch
            import vllm
            from vllm import SamplingParams
            from vllm.v1 import kv_cache_interface as interface
            from vllm.v1.core import kv_cache_utils
            from vllm.v1.core.kv_cache_manager import KVCacheManager
            from vllm.v1.request import Request as VllmRequest
            from vllm.v1.request import RequestStatus
        except ImportError as error:
            raise EngineError(
                f"nothing to check against: vLLM cannot be imported ({error})",
                hint="Without --check the calculation needs no vLLM. Try: vllm-trace doctor",
            ) from error
        self.version = vllm.__version__
        self.running = RequestStatus.RUNNING
        self._torch, self._interface = torch, interface
        self._manager, self._request, self._params = KVCacheManager, VllmRequest, SamplingParams
        self._hasher: Callable[[int], Any] = _hasher_of(kv_cache_utils)
        self._token = 0

    def next_token(self) -> int:
        """A token that no request has had."""
        self._token += 1
        return self._token

    def pool(self, asked: RequestSet) -> Any:
        """A ``KVCacheManager`` with the pool of that set, for one group of full attention."""
        made = self._interface
        spec = made.FullAttentionSpec(
            **_known(
                made.FullAttentionSpec,
                block_size=asked.block_size,
                num_kv_heads=1,
                head_size=1,
                dtype=self._torch.float32,
            )
        )
        config = made.KVCacheConfig(
            num_blocks=asked.num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[made.KVCacheGroupSpec(["layer"], spec)],
        )
        longest = max(request.total for request in asked.requests) + 1
        return self._manager(
            config,
            **_known(
                self._manager,
                max_model_len=longest,
                scheduler_block_size=asked.block_size,
                hash_block_size=asked.block_size,
                enable_caching=asked.caching,
            ),
        )

    def request(self, name: str, shared: int, prompt: int, block_size: int) -> Any:
        """A request whose first ``shared`` tokens every other one has too."""
        own = [self.next_token() for _ in range(prompt - shared)]
        return self._request(
            **_known(
                self._request,
                request_id=name,
                prompt_token_ids=[*range(-1, -1 - shared, -1), *own],
                sampling_params=self._params(max_tokens=1000, ignore_eos=True, temperature=0),
                pooling_params=None,
                eos_token_id=None,
                arrival_time=0.0,
                block_hasher=self._hasher(block_size),
            )
        )

    @staticmethod
    def held(pool: Any, request: Any) -> int:
        """Blocks in the table of a request."""
        return len(pool.get_block_ids(request.request_id)[0])


def _hasher_of(utils: Any) -> Callable[[int], Any]:
    """Block size → what hashes a request's blocks."""
    try:
        from vllm.utils.hashing import sha256
    except ImportError:  # before 0.12
        from vllm.utils import sha256  # type: ignore[attr-defined, no-redef]
    utils.init_none_hash(sha256)
    return lambda block_size: utils.get_request_block_hasher(block_size, sha256)


def _known(function: Any, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that this release takes."""
    taken = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in taken}
