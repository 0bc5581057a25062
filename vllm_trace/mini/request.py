"""A request as the scheduler and the manager see it: counts, hashes, a status. Tokens only when they are known.

Follows: vLLM 0.32.0, v1/request.py and v1/core/kv_cache_utils.py (`hash_block_tokens`, `get_request_block_hasher`).
Leaves out: sampling parameters other than the stops, multimodal input, streaming input. LoRA and salt: give their keys
as `extra_keys`, for example `(("cache_salt", "s"),)` for the first block, as vLLM 0.32 does.

With tokens, hashes are made here; without, the owner appends to `block_hashes` what was recorded:

>>> hasher = get_request_block_hasher(2, lambda block: str(block[1]))
>>> request = Request("a", [1, 2, 3], block_hasher=hasher)
>>> request.append_output_token_ids([4])
>>> request.num_tokens, request.block_hashes
(4, ['(1, 2)', '(3, 4)'])
>>> recorded = Request("b", num_prompt_tokens=3, block_hashes=["h0"])
>>> recorded.append_output_tokens(1); recorded.block_hashes.append("h1")
>>> recorded.num_tokens, recorded.num_output_tokens
(4, 1)
"""

from __future__ import annotations

import enum
import hashlib
import pickle
from collections.abc import Callable, Hashable, Iterable, Sequence


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Request:
    """Counts that move: `num_tokens` (prompt and output so far), `num_computed_tokens` (planned, ahead of the device).

    With async planning a step is planned before the last one's tokens are known:
    `num_output_placeholders` stand for tokens to come, `num_in_flight_tokens` were scheduled and not yet answered,
    `num_stale_output_tokens` were in flight when the request was preempted.
    """

    def __init__(
        self,
        request_id: Hashable,
        prompt_token_ids: Sequence[int] | None = None,
        max_tokens: int = 16,
        *,
        num_prompt_tokens: int | None = None,
        block_hashes: Iterable[Hashable] = (),
        block_hasher: Callable[[Request], list[Hashable]] | None = None,
        extra_keys: Callable[[int, int], tuple | None] | None = None,
        arrival_time: float = 0.0,
        priority: int = 0,
        eos_token_id: int | None = None,
        stop_token_ids: Iterable[int] = (),
        skip_reading_prefix_cache: bool = False,
    ):
        if (prompt_token_ids is None) == (num_prompt_tokens is None):
            raise ValueError("give prompt_token_ids or num_prompt_tokens, and not both")
        self.request_id = request_id
        self.all_token_ids: list[int] | None = (
            None if prompt_token_ids is None else list(prompt_token_ids)
        )
        self.num_prompt_tokens = num_prompt_tokens or len(prompt_token_ids or ())
        self.num_tokens = self.num_prompt_tokens
        self.max_tokens = max_tokens
        self.arrival_time = arrival_time
        self.priority = priority
        self.eos_token_id = eos_token_id
        self.stop_token_ids = frozenset(stop_token_ids)
        self.skip_reading_prefix_cache = skip_reading_prefix_cache

        self.status = RequestStatus.WAITING
        self.num_computed_tokens = 0
        self.num_in_flight_tokens = 0
        self.num_output_placeholders = 0
        self.num_stale_output_tokens = 0
        self.num_preemptions = 0
        self.is_prefill_chunk = False
        # Where another group's hit was longer: window groups keep the blocks that end here. 0: nowhere.
        self.shared_prefix_boundary = 0

        self.extra_keys = extra_keys
        self.block_hashes = list(block_hashes)
        self._block_hasher = block_hasher
        self._update_block_hashes()

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens

    def append_output_token_ids(self, token_ids: Sequence[int]) -> None:
        """Known tokens: they fill blocks, and a full block gets a hash."""
        assert self.all_token_ids is not None
        self.all_token_ids.extend(token_ids)
        self.append_output_tokens(len(token_ids))

    def append_output_tokens(self, num_tokens: int) -> None:
        """Tokens that are only counted; hashes come from outside."""
        self.num_tokens += num_tokens
        self._update_block_hashes()

    def _update_block_hashes(self) -> None:
        if self._block_hasher is not None:
            self.block_hashes.extend(self._block_hasher(self))

    def __repr__(self) -> str:
        progress = f"{self.num_computed_tokens} of {self.num_tokens} computed"
        return f"Request({self.request_id!r}, {self.status.value}, {progress})"


def sha256(value: object) -> bytes:
    """vLLM's default hash function: SHA-256 of a pickle."""
    return hashlib.sha256(pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)).digest()


def get_request_block_hasher(
    block_size: int,
    hash_function: Callable[[object], Hashable] = sha256,
    none_hash: Hashable | None = None,
) -> Callable[[Request], list[Hashable]]:
    """A function that returns the hashes which a request's tokens allow and it does not have yet.

    A hash covers the block and, through its parent, everything before it: equal hashes mean equal prefixes.
    `none_hash` is the parent of a first block (`hash_function(rules.none_hash_seed)` where the release fixes it).
    """

    def hash_new_blocks(request: Request) -> list[Hashable]:
        parent = request.block_hashes[-1] if request.block_hashes else none_hash
        new_hashes: list[Hashable] = []
        token_ids = request.all_token_ids
        assert token_ids is not None, "hashes are made from token ids"
        first_token = len(request.block_hashes) * block_size
        for start in range(first_token, request.num_tokens - block_size + 1, block_size):
            tokens = tuple(token_ids[start : start + block_size])
            extra_keys = (
                request.extra_keys(start, start + block_size) if request.extra_keys else None
            )
            parent = hash_function((parent, tokens, extra_keys))
            new_hashes.append(parent)
        return new_hashes

    return hash_new_blocks
