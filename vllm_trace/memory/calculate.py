"""The sums: what each way to reserve memory wastes, how many users fit, what a shared prefix saves.

    reserved   max_model_len tokens for everybody, in one piece     (a contiguous cache)
    pow2       the prompt, and the output rounded up to a power of two
    exact      what the request will need, known beforehand           (nobody knows it)
    paged      blocks of block_size tokens, one at a time as they fill

The first three are those of Kwon et al. 2023, section 6.1 (Orca Max, Pow2, Oracle). A request holds the keys and values
of its prompt and of all sampled tokens but the last, which is never put through the model.

Leaves out: fragmentation between contiguous pieces (it makes the first three worse), preemption, ``max_num_seqs``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

from vllm_trace.errors import UsageError
from vllm_trace.memory.shapes import DTYPES, GIB, GPU, KV_DTYPES, ModelShape
from vllm_trace.memory.workload import Request, Workload

SCHEMES = ("reserved", "pow2", "exact", "paged")

MAX_USERS = 100_000
"""Where counting stops: no scheduler runs so many."""


def blocks_of(num_tokens: int, block_size: int) -> int:
    """Blocks of a request that holds so many tokens.

    >>> blocks_of(0, 16), blocks_of(16, 16), blocks_of(17, 16)
    (0, 1, 2)
    """
    return -(-num_tokens // block_size)


@dataclass(frozen=True)
class Setting:
    """One GPU (or ``tp`` of them), one model, and how vLLM divides the memory."""

    gpu: GPU
    model: ModelShape
    dtype: str = "float16"
    kv_dtype: str = "auto"
    tp: int = 1
    block_size: int = 16
    max_model_len: int = 0
    """0: the model's own."""
    utilization: float = 0.92
    """``gpu_memory_utilization``; vLLM 0.32's default."""
    overhead_gib: float = 1.0
    """Activations, graphs and the CUDA context, for which vLLM measures a dry run; an assumption here."""

    def checked(self) -> Setting:
        """Return self. Raises: ``UsageError`` naming what cannot be."""
        from vllm_trace.errors import unknown

        self.model.checked()
        if self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.kv_dtype not in KV_DTYPES:
            raise unknown("KV dtype", self.kv_dtype, KV_DTYPES)
        if self.block_size < 1:
            raise UsageError(
                f"--block-size is {self.block_size}, not 1 or more",
                hint="16 is vLLM's default on CUDA; its CPU attention takes multiples of 32",
            )
        if not 0 < self.utilization <= 1:
            raise UsageError(f"--utilization is {self.utilization:g}, not between 0 and 1")
        if not 0 <= self.overhead_gib < 1 << 20:
            raise UsageError(f"--overhead is {self.overhead_gib:g} GiB, not 0 or more")
        if self.max_model_len < 0 or self.max_model_len == 1:
            raise UsageError(f"--max-model-len is {self.max_model_len}, not 2 or more")
        if self.max_model_len > self.model.max_model_len:
            raise UsageError(
                f"--max-model-len {self.max_model_len} is more than the {self.model.max_model_len} "
                f"positions of {self.model.name}"
            )
        self.model.kv_heads_of_a_rank(self.tp)
        if self.num_blocks < 2:
            weights = self.model.weights_of_a_rank(self.dtype, self.tp) / GIB
            raise UsageError(
                f"no room for a KV cache: {self.gpu.name} has {self.gpu.memory_gib:g} GiB, of which "
                f"{self.utilization:.0%} may be used; {weights:.1f} GiB of weights and "
                f"{self.overhead_gib:g} GiB of overhead leave {self.kv_bytes / GIB:.1f} GiB",
                hint="A larger --gpu-memory, more ranks (--tp), or smaller weights (--dtype)",
            )
        return self

    @property
    def length(self) -> int:
        """``max_model_len`` in force."""
        return self.max_model_len or self.model.max_model_len

    @property
    def cache_dtype(self) -> str:
        if self.kv_dtype != "auto":
            return self.kv_dtype
        return self.dtype if DTYPES[self.dtype] >= 2 else "float16"

    @property
    def token_bytes(self) -> int:
        """Of one token, on one rank."""
        return self.model.token_bytes(self.cache_dtype, self.tp)

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers, on one rank."""
        return self.block_size * self.token_bytes

    @property
    def kv_bytes(self) -> int:
        """Left for the KV cache on one rank. Source: vLLM 0.32.0, ``Worker.determine_available_memory``."""
        usable = self.gpu.memory_gib * GIB * self.utilization - self.overhead_gib * GIB
        return int(usable - self.model.weights_of_a_rank(self.dtype, self.tp))

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool, the null block included. Source: vLLM 0.32.0, ``get_num_blocks``."""
        return max(0, self.kv_bytes // self.block_bytes)

    @property
    def usable_blocks(self) -> int:
        return self.num_blocks - 1

    @property
    def capacity(self) -> int:
        """Tokens that fit when nothing is wasted."""
        return self.kv_bytes // self.token_bytes

    def reserve(self, scheme: str, request: Request) -> int:
        """Tokens of memory that a scheme gives a request by its end."""
        if scheme == "reserved":
            return self.length
        if scheme == "pow2":
            return min(self.length, request.prompt + (1 << (request.output - 1).bit_length()))
        if scheme == "exact":
            return request.held
        return blocks_of(request.held, self.block_size) * self.block_size


@dataclass(frozen=True)
class Waste:
    """What one scheme reserves for the workload and does not use. Shares of 1."""

    scheme: str
    tokens: int
    """Reserved for all requests at their ends."""
    gib: float
    at_end: float
    """Share of it that is empty when each request is as long as it gets."""
    over_life: float
    """The same averaged over all decode steps: what stands ready for tokens that are to come counts as empty."""
    users: int
    """Requests of the workload, in its order, that fit at their full length."""


def wastes(setting: Setting, workload: Workload) -> list[Waste]:
    """Every scheme's."""
    held = sum(request.held for request in workload.requests)
    made = []
    for scheme in SCHEMES:
        tokens = sum(setting.reserve(scheme, request) for request in workload.requests)
        used, kept = _over_life(setting, scheme, workload.requests)
        made.append(
            Waste(
                scheme,
                tokens,
                tokens * setting.token_bytes / GIB,
                1 - held / tokens,
                1 - used / kept,
                users(setting, scheme, workload.requests),
            )
        )
    return made


def _over_life(setting: Setting, scheme: str, requests: Iterable[Request]) -> tuple[int, int]:
    """(tokens held, tokens of memory kept) summed over all requests and their steps."""
    used = kept = 0
    size = setting.block_size
    for request in requests:
        # From the first step, which holds the prompt, to the last.
        num_steps = max(request.output, 1)
        last = request.prompt + num_steps - 1
        used += num_steps * (request.prompt + last) // 2
        if scheme == "paged":
            kept += (_blocks_up_to(last, size) - _blocks_up_to(request.prompt - 1, size)) * size
        else:
            kept += setting.reserve(scheme, request) * num_steps
    return used, kept


def _blocks_up_to(num_tokens: int, block_size: int) -> int:
    """The sum of ``blocks_of(1)`` to ``blocks_of(num_tokens)``: whole blocks count for each of their tokens.

    >>> _blocks_up_to(5, 2) == 1 + 1 + 2 + 2 + 3
    True
    """
    full, rest = divmod(num_tokens, block_size)
    return block_size * full * (full + 1) // 2 + rest * (full + 1)


def users(setting: Setting, scheme: str, requests: Sequence[Request]) -> int:
    """How many of the requests, taken in order and over again, fit side by side at their full length."""
    if scheme == "paged":
        return fitting([r.held for r in requests], setting.block_size, setting.usable_blocks)
    left, count = setting.capacity, 0
    for request in cycle(requests):
        left -= setting.reserve(scheme, request)
        if left < 0 or count == MAX_USERS:
            return count
        count += 1
    return count


def fitting(held: Sequence[int], block_size: int, num_blocks: int) -> int:
    """How many requests holding so many tokens, in order and over again, fit into so many blocks.

    >>> fitting([20, 5], block_size=16, num_blocks=7)   # 2 + 1 + 2 + 1, and 2 more do not fit
    4
    """
    count = 0
    for tokens in cycle(held):
        num_blocks -= blocks_of(tokens, block_size)
        if num_blocks < 0 or count == MAX_USERS:
            return count
        count += 1
    return count


@dataclass(frozen=True)
class Scaling:
    """Users that fit when the server admits contexts of up to ``max_model_len`` tokens."""

    max_model_len: int
    reserved: int
    paged: int
    reserved_tokens_s: float | None
    """Bound: all users decode, and a step takes as long as reading the weights and their tokens once."""
    paged_tokens_s: float | None


def scaling(setting: Setting, requests: Sequence[Request]) -> list[Scaling]:
    """From 512 tokens to the model's own limit, doubled each time; requests are cut to the limit."""
    from dataclasses import replace

    from vllm_trace.memory.workload import cut

    limits = {setting.length}
    limit = 512
    while limit < setting.model.max_model_len:
        limits.add(limit)
        limit *= 2
    limits.add(setting.model.max_model_len)
    made = []
    for limit in sorted(limits):
        one = replace(setting, max_model_len=limit)
        work = cut("", list(requests), limit, "")
        counts = [users(one, scheme, work.requests) for scheme in ("reserved", "paged")]
        bounds = [bound(one, count, work.mean) for count in counts]
        made.append(Scaling(limit, *counts, *bounds))
    return made


def bound(setting: Setting, num_users: int, tokens_each: float) -> float | None:
    """Tokens a second that memory bandwidth allows ``num_users`` who decode; None where it is not known.

    A step reads all weights once and every user's keys and values once. No engine reaches it.
    """
    if not setting.gpu.bandwidth_gb_s:
        return None
    weights = setting.model.weights_of_a_rank(setting.dtype, setting.tp)
    read = weights + num_users * tokens_each * setting.token_bytes
    return num_users / (read / (setting.gpu.bandwidth_gb_s * 1e9)) if read else None


@dataclass(frozen=True)
class Sharing:
    """``users`` requests that begin with the same ``prefix`` tokens and have ``own`` tokens each."""

    users: int
    prefix: int
    own: int
    block_size: int
    apart: int
    """Blocks without sharing."""
    shared: int
    """Blocks with vLLM's prefix cache, which shares full blocks only."""
    hit_blocks: int
    """Blocks that each user after the first finds in the cache."""
    saved: float
    """Share of ``apart`` that is saved."""
    saved_of_tokens: float
    """What sharing by single tokens would save: the figure without blocks."""


def hit_blocks(prefix: int, prompt: int, block_size: int) -> int:
    """Blocks that a prompt finds when its first ``prefix`` tokens are in the cache.

    The last token of a prompt is always computed anew, because its output is what is sampled from.
    Source: vLLM 0.32.0, ``KVCacheManager.get_computed_blocks`` (``max_cache_hit_length``).

    >>> hit_blocks(500, 600, 16), hit_blocks(512, 512, 16)
    (31, 31)
    """
    return min(prefix, prompt - 1) // block_size


def sharing(num_users: int, prefix: int, own: int, block_size: int) -> Sharing:
    """What a common prefix saves. Raises: ``UsageError`` for a size that cannot be."""
    for flag, value, least in (
        ("--users", num_users, 1),
        ("--prefix", prefix, 0),
        ("--own", own, 0),
    ):
        if value < least:
            raise UsageError(f"{flag} is {value}, not {least} or more")
    if block_size < 1:
        raise UsageError(f"--block-size is {block_size}, not 1 or more")
    if prefix + own < 1:
        raise UsageError("--prefix and --own are both 0: a prompt has 1 token or more")
    each = blocks_of(prefix + own, block_size)
    found = hit_blocks(prefix, prefix + own, block_size)
    apart = num_users * each
    shared = apart - (num_users - 1) * found
    tokens = num_users * (prefix + own)
    return Sharing(
        num_users, prefix, own, block_size, apart, shared, found,
        1 - shared / apart, (num_users - 1) * prefix / tokens,
    )  # fmt: skip


@dataclass(frozen=True)
class Calculation:
    """Everything that ``memory`` says."""

    setting: Setting
    workload: Workload
    wastes: list[Waste]
    scaling: list[Scaling]
    sharing: Sharing

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        setting = self.setting
        return {
            "schema": 1,
            "gpu": asdict(setting.gpu),
            "model": asdict(setting.model) | {"attention": setting.model.attention},
            "setting": {
                "dtype": setting.dtype,
                "kv_dtype": setting.cache_dtype,
                "tensor_parallel_size": setting.tp,
                "block_size": setting.block_size,
                "max_model_len": setting.length,
                "gpu_memory_utilization": setting.utilization,
                "overhead_gib": setting.overhead_gib,
            },
            "pool": {
                "weights_gib": setting.model.weights_of_a_rank(setting.dtype, setting.tp) / GIB,
                "kv_gib": setting.kv_bytes / GIB,
                "token_bytes": setting.token_bytes,
                "block_bytes": setting.block_bytes,
                "num_blocks": setting.num_blocks,
                "capacity_tokens": setting.capacity,
            },
            "workload": {
                "name": self.workload.name,
                "source": self.workload.source,
                "requests": len(self.workload.requests),
                "mean_tokens": self.workload.mean,
                "num_cut": self.workload.num_cut,
            },
            "schemes": [asdict(one) for one in self.wastes],
            "scaling": [asdict(one) for one in self.scaling],
            "sharing": asdict(self.sharing),
        }


def calculate(setting: Setting, workload: Workload, shared: Sharing) -> Calculation:
    """All three parts."""
    return Calculation(
        setting, workload, wastes(setting, workload), scaling(setting, workload.requests), shared
    )
