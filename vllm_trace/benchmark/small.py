"""A small engine over `mini.model`, with two caches to choose from: everything else is the same code.

    ContiguousCache   a row of max_model_len tokens for each request, reserved when it is admitted
    PagedCache        blocks of block_size tokens, taken as they fill; the last request is preempted when none is left

Follows: Orca (Yu et al., OSDI 2022) for both: iteration-level scheduling, so that the contiguous cache is not also
charged with waiting for the slowest request of a batch. A step is one flattened batch: whole prompts of those who came,
one token of each of the others. Greedy.
Leaves out: chunked prefill, prefix caching, sampling, CUDA graphs, fused kernels; the pages are gathered into one
tensor before attention, which a real kernel does not do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Tokens
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(eq=False)
class Sequence:
    """One request on its way."""

    name: str
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    num_computed: int = 0
    row: int = -1
    """Of a contiguous cache."""
    table: list[int] = field(default_factory=list)
    """Of a paged cache."""

    @property
    def output(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]


class _Cache:
    """K and V of all layers: `[num_tokens, num_kv_heads, head_size]` each."""

    def __init__(self, model: Any, num_tokens: int, device: str, dtype: Any) -> None:
        import torch

        shape = (num_tokens, model.num_kv_heads, model.head_size)
        self.layers = [
            tuple(torch.zeros(shape, device=device, dtype=dtype) for _ in "kv")
            for _ in range(model.num_layers)
        ]
        self.device = device

    @property
    def size_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.layers for t in pair)

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Put `key` and `value [num_tokens, …]` where `slots [num_tokens]` says."""
        keys, values = self.layers[layer]
        keys[slots] = key.to(keys.dtype)
        values[slots] = value.to(values.dtype)


class ContiguousCache(_Cache):
    """Rows of `max_model_len` tokens, all allocated at the start."""

    def __init__(self, model: Any, budget: int, max_model_len: int, device: str, dtype: Any):
        self.length = max_model_len
        self.num_rows = budget // max_model_len
        super().__init__(model, self.num_rows * max_model_len, device, dtype)
        self.free = list(range(self.num_rows))

    def admit(self, sequence: Sequence) -> bool:
        if not self.free:
            return False
        sequence.row = min(self.free)  # low rows, so that few are read for nothing
        self.free.remove(sequence.row)
        return True

    def grow(self, sequence: Sequence) -> bool:
        return True

    def release(self, sequence: Sequence) -> None:
        self.free.append(sequence.row)
        sequence.row = -1

    def reserved(self, sequence: Sequence) -> int:
        return self.length

    def slots(self, sequence: Sequence, first: int, end: int) -> list[int]:
        start = sequence.row * self.length
        return list(range(start + first, start + end))

    def places(self, sequences: Tokens[Sequence]) -> tuple[Any, list[int], int]:
        """What `read` needs, each sequence's index in what it returns, and how many are returned."""
        rows = [sequence.row for sequence in sequences]
        return None, rows, max(rows) + 1

    def read(self, layer: int, place: Any, count: int, longest: int) -> tuple[Tensor, Tensor]:
        """K and V as `[count, longest, num_kv_heads, head_size]`: a view, nothing is copied."""
        keys, values = (
            t.view(self.num_rows, self.length, *t.shape[1:]) for t in self.layers[layer]
        )
        return keys[:count, :longest], values[:count, :longest]


class PagedCache(_Cache):
    """Blocks of `block_size` tokens and a free list."""

    def __init__(self, model: Any, budget: int, block_size: int, device: str, dtype: Any):
        self.block_size = block_size
        self.num_blocks = budget // block_size
        super().__init__(model, self.num_blocks * block_size, device, dtype)
        self.free = deque(range(self.num_blocks))

    def admit(self, sequence: Sequence) -> bool:
        need = -(-len(sequence.token_ids) // self.block_size)
        if need > len(self.free):
            return False
        sequence.table = [self.free.popleft() for _ in range(need)]
        return True

    def grow(self, sequence: Sequence) -> bool:
        if len(sequence.token_ids) <= len(sequence.table) * self.block_size:
            return True
        if not self.free:
            return False
        sequence.table.append(self.free.popleft())
        return True

    def release(self, sequence: Sequence) -> None:
        self.free.extend(reversed(sequence.table))
        sequence.table = []

    def reserved(self, sequence: Sequence) -> int:
        return len(sequence.table) * self.block_size

    def slots(self, sequence: Sequence, first: int, end: int) -> list[int]:
        size, table = self.block_size, sequence.table
        return [table[pos // size] * size + pos % size for pos in range(first, end)]

    def places(self, sequences: Tokens[Sequence]) -> tuple[Any, list[int], int]:
        import torch

        width = max(len(sequence.table) for sequence in sequences)
        tables = [sequence.table + [0] * (width - len(sequence.table)) for sequence in sequences]
        return torch.tensor(tables, device=self.device), list(range(len(tables))), len(tables)

    def read(self, layer: int, place: Any, count: int, longest: int) -> tuple[Tensor, Tensor]:
        """K and V as `[count, longest, num_kv_heads, head_size]`: gathered block by block."""
        keys, values = (
            t.view(self.num_blocks, self.block_size, *t.shape[1:])[place].flatten(1, 2)
            for t in self.layers[layer]
        )
        return keys[:, :longest], values[:, :longest]


@dataclass
class Step:
    """What one step held. Units: requests, tokens."""

    num_running: int
    num_held: int
    """Tokens whose K and V are in the cache when the step is done."""
    num_reserved: int
    """Tokens of memory that the running requests have."""
    num_waiting: int


class SmallEngine:
    """A model and one of the two caches.

    `budget` is the cache's size in tokens, the same for both kinds.
    Raises: ValueError for a model that `mini` does not follow, or a cache too small for one request.
    """

    def __init__(
        self,
        model: str | Path,
        kind: str,
        *,
        budget: int,
        max_model_len: int,
        block_size: int = 16,
        max_num_seqs: int = 256,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        import torch

        from vllm_trace.mini.model import load_model

        self.model = load_model(model)
        numbers = getattr(torch, dtype)
        self.model.weights = {
            name: weight.to(device=device, dtype=numbers)
            for name, weight in self.model.weights.items()
        }
        if budget < max_model_len:
            raise ValueError(
                f"a cache of {budget} tokens does not hold one request of {max_model_len}"
            )
        self.cache: ContiguousCache | PagedCache
        if kind == "contiguous":
            self.cache = ContiguousCache(self.model, budget, max_model_len, device, numbers)
        else:
            self.cache = PagedCache(self.model, budget, block_size, device, numbers)
        self.max_model_len, self.max_num_seqs, self.device = max_model_len, max_num_seqs, device
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.steps: list[Step] = []
        self.num_preemptions = 0

    def add_request(self, name: str, prompt: Tokens[int], max_tokens: int) -> None:
        """Queue a request. Raises: ValueError when it cannot fit."""
        if not 0 < len(prompt) <= len(prompt) + max_tokens <= self.max_model_len:
            raise ValueError(f"{name}: {len(prompt)} + {max_tokens} tokens do not fit")
        self.waiting.append(Sequence(name, list(prompt), len(prompt), max_tokens))

    def has_unfinished_requests(self) -> bool:
        return bool(self.waiting or self.running)

    def step(self) -> list[Sequence]:
        """Make room, admit, run, sample. Returns the sequences that are done."""
        import torch

        self._make_room()
        self._admit()
        batch = [s for s in self.running if len(s.token_ids) - s.num_computed == 1]
        prefills = [s for s in self.running if len(s.token_ids) - s.num_computed > 1]
        with torch.inference_mode():
            tokens = self._forward(batch, prefills)
        held = reserved = 0
        done = []
        for sequence, token in zip([*batch, *prefills], tokens, strict=True):
            sequence.num_computed = len(sequence.token_ids)
            held += sequence.num_computed
            reserved += self.cache.reserved(sequence)
            sequence.token_ids.append(token)
            if len(sequence.output) == sequence.max_tokens:
                done.append(sequence)
        self.steps.append(Step(len(self.running), held, reserved, len(self.waiting)))
        for sequence in done:
            self.cache.release(sequence)
            self.running.remove(sequence)
        return done

    def _make_room(self) -> None:
        """A place for the next token of everybody who runs; who came last gives way."""
        for sequence in list(self.running):
            while sequence in self.running and not self.cache.grow(sequence):
                last = self.running.pop()
                self.cache.release(last)
                last.num_computed = 0
                self.waiting.appendleft(last)
                self.num_preemptions += 1

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.max_num_seqs:
            if not self.cache.admit(self.waiting[0]):
                return
            self.running.append(self.waiting.popleft())

    def _forward(self, decodes: list[Sequence], prefills: list[Sequence]) -> list[int]:
        """The next token of each: decodes, then prefills."""
        import torch

        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        ends: list[int] = []
        for sequence in [*decodes, *prefills]:
            first, end = sequence.num_computed, len(sequence.token_ids)
            ids += sequence.token_ids[first:end]
            positions += range(first, end)
            slots += self.cache.slots(sequence, first, end)
            ends.append(len(ids) - 1)
        attend = _Attention(self.cache, decodes, prefills, slots, self.model)
        hidden = self.model.forward(
            torch.tensor(ids, device=self.device),
            torch.tensor(positions, device=self.device),
            attend,
        )
        return self.model.compute_logits(hidden[ends]).argmax(dim=-1).tolist()


class _Attention:
    """`attend` of one step: all K and V are written, then decodes read the cache, prompts their own."""

    def __init__(
        self,
        cache: ContiguousCache | PagedCache,
        decodes: list[Sequence],
        prefills: list[Sequence],
        slots: list[int],
        model: Any,
    ) -> None:
        import torch

        self.cache, self.num_decodes = cache, len(decodes)
        self.slots = torch.tensor(slots, device=cache.device)
        self.prompts = [len(s.token_ids) for s in prefills]
        self.scale = model.head_size**-0.5
        self.gqa = model.num_heads != model.num_kv_heads
        if decodes:
            lens = [len(s.token_ids) for s in decodes]
            self.longest = max(lens)
            self.place, rows, self.count = cache.places(decodes)
            self.rows = torch.tensor(rows, device=cache.device)
            ends = torch.ones(self.count, dtype=torch.long, device=cache.device)
            ends[self.rows] = torch.tensor(lens, device=cache.device)
            seen = torch.arange(self.longest, device=cache.device) < ends[:, None]
            self.mask = seen[:, None, None]  # [count, 1, 1, longest]

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        import torch
        from torch.nn.functional import scaled_dot_product_attention as attention

        self.cache.write(layer, self.slots, key, value)
        n, parts = self.num_decodes, []
        if n:
            stored = self.cache.read(layer, self.place, self.count, self.longest)
            keys, values = (t.to(query.dtype) for t in stored)
            queries = query.new_zeros((self.count, *query.shape[1:]))
            queries[self.rows] = query[:n]
            out = attention(
                queries[:, :, None],
                keys.transpose(1, 2),
                values.transpose(1, 2),
                attn_mask=self.mask,
                scale=self.scale,
                enable_gqa=self.gqa,
            )
            parts.append(out[self.rows, :, 0])
        start = n
        for length in self.prompts:
            end = start + length
            q, k, v = (t[start:end].transpose(0, 1)[None] for t in (query, key, value))
            out = attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=self.gqa)
            parts.append(out[0].transpose(0, 1))
            start = end
        return torch.cat(parts)
