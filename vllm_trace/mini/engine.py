"""The engine: requests in, steps, tokens out.

Follows: vLLM 0.32.0, v1/engine/llm_engine.py, v1/engine/core.py (`step`), v1/worker/gpu_model_runner.py
(`_prepare_inputs`, `_update_states`, one batch of tokens without padding).
Leaves out: sampling other than greedy, tokenizers (prompts are token ids), async planning, several devices, graphs.

    add_request --> Scheduler.schedule --> ModelRunner.execute_model --> Scheduler.update_from_output --> outputs
                    who, how many tokens,  K and V to their slots,       append, stop, free blocks
                    which blocks           attention, argmax
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .attention import (
    PARTITION_SIZE,
    context_attention_fwd,
    forward_decode,
    reshape_and_cache,
    use_v1,
)
from .block_pool import Tell
from .block_table import BlockTable
from .kv_cache_manager import FullAttentionSpec, KVCacheManager
from .model import LlamaForCausalLM, OPTForCausalLM, load_model
from .request import Request, get_request_block_hasher, sha256
from .rules import Rules, rules_for
from .scheduler import Scheduler, SchedulerConfig, SchedulerOutput
from .single_type_kv_cache_manager import cdiv


@dataclass
class RequestOutput:
    """What one step gave one request."""

    request_id: Hashable
    new_token_ids: list[int]
    finish_reason: str | None = None  # `stop` or `length`


class LLMEngine:
    """A model, a scheduler and a pool of blocks.

    Options have vLLM's names and meanings; `num_gpu_blocks` counts the null block.
    `tell((kind, *fields))` hears the events of manager, scheduler and runner in the order in which they happen.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        block_size: int = 16,
        num_gpu_blocks: int = 512,
        max_model_len: int | None = None,
        enable_prefix_caching: bool = True,
        scheduler_config: SchedulerConfig | None = None,
        rules: Rules | None = None,
        tell: Tell | None = None,
    ):
        config = scheduler_config or SchedulerConfig()
        if config.async_scheduling:
            raise ValueError(
                "this engine plans a step from the last one's tokens: async_scheduling must be off"
            )
        self.model = load_model(model)
        fitting = min(self.model.max_model_len, (num_gpu_blocks - 1) * block_size)
        self.max_model_len = fitting if max_model_len is None else max_model_len
        if not 1 < self.max_model_len <= fitting:
            raise ValueError(
                f"max_model_len {self.max_model_len}: this model has {self.model.max_model_len} positions, and "
                f"{num_gpu_blocks} blocks of {block_size}, one of them the null block, hold "
                f"{(num_gpu_blocks - 1) * block_size} tokens"
            )
        if not config.enable_chunked_prefill and config.max_num_batched_tokens < self.max_model_len:
            raise ValueError(
                f"without chunked prefill a prompt of {self.max_model_len} tokens never fits into a step of "
                f"{config.max_num_batched_tokens}: raise max_num_batched_tokens or lower max_model_len"
            )
        if self.max_model_len > PARTITION_SIZE and PARTITION_SIZE % block_size:
            raise ValueError(
                f"block size {block_size} does not divide {PARTITION_SIZE}, so paged_attention_v2 cannot read contexts "
                f"of {self.max_model_len} tokens; take another one, or max_model_len {PARTITION_SIZE} at most"
            )
        rules = rules or rules_for("0.32.0")
        manager = KVCacheManager(
            num_gpu_blocks,
            [FullAttentionSpec(block_size)],
            self.max_model_len,
            enable_caching=enable_prefix_caching,
            rules=rules,
            tell=tell,
        )
        self.scheduler = Scheduler(manager, config, tell)
        self.runner = ModelRunner(
            self.model, num_gpu_blocks, block_size, self.max_model_len, config.max_num_seqs, tell
        )
        self.block_hasher = None
        if enable_prefix_caching:
            none_hash = sha256(rules.none_hash_seed)
            self.block_hasher = get_request_block_hasher(block_size, sha256, none_hash)
        self._next_id = 0

    def add_request(
        self,
        request_id: Hashable,
        prompt_token_ids: Sequence[int],
        max_tokens: int = 16,
        *,
        ignore_eos: bool = False,
        stop_token_ids: Iterable[int] = (),
        priority: int = 0,
    ) -> None:
        """Queue a request.

        Raises: ValueError when the prompt is empty, too long for the model, or holds an id that is no token.
        """
        if not 0 < len(prompt_token_ids) < self.max_model_len:
            most = self.max_model_len - 1
            raise ValueError(
                f"request {request_id!r}: {len(prompt_token_ids)} prompt tokens; 1 to {most} are possible"
            )
        last = self.model.vocab_size - 1
        if not 0 <= min(prompt_token_ids) <= max(prompt_token_ids) <= last:
            raise ValueError(f"request {request_id!r}: token ids are 0 to {last}")
        if max_tokens < 1:
            raise ValueError(f"request {request_id!r}: max_tokens is {max_tokens}, not 1 or more")
        request = Request(
            request_id,
            prompt_token_ids,
            max_tokens,
            block_hasher=self.block_hasher,
            arrival_time=float(self._next_id),
            priority=priority,
            stop_token_ids=[*stop_token_ids, *([] if ignore_eos else self.model.eos_token_ids)],
        )
        self._next_id += 1
        self.scheduler.add_request(request)

    def abort_request(self, request_ids: Iterable[Hashable]) -> None:
        """End requests now; their blocks are free at once."""
        self.scheduler.finish_requests(request_ids)

    def has_unfinished_requests(self) -> bool:
        return bool(self.scheduler.requests)

    def step(self) -> list[RequestOutput]:
        """One iteration: plan it, run it, take its tokens, say what came out."""
        scheduled = self.scheduler.schedule()
        sampled = self.runner.execute_model(scheduled, self.scheduler.requests)
        finished = self.scheduler.update_from_output(scheduled, sampled)
        return [RequestOutput(key, tokens, finished.get(key)) for key, tokens in sampled.items()]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int] = 16,
        *,
        ignore_eos: bool = False,
    ) -> list[list[int]]:
        """The greedy continuation of each prompt, all together. `max_tokens` is one number or one for each prompt.

        Raises: ValueError while other requests are under way, because their tokens would be lost.
        """
        if self.has_unfinished_requests():
            raise ValueError("requests are under way: go on with step() until they have finished")
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        outputs: dict[Hashable, list[int]] = {}
        for prompt, limit in zip(prompts, limits, strict=True):
            key = str(self._next_id)
            self.add_request(key, prompt, limit, ignore_eos=ignore_eos)
            outputs[key] = []
        while self.has_unfinished_requests():
            for output in self.step():
                outputs[output.request_id] += output.new_token_ids
        return list(outputs.values())


@dataclass
class InputBatch:
    """One step as the kernels see it: the tokens of all requests in a row, without padding; decodes first.

    req_ids            a      b        c
    input_ids        | a7 | b12 | c0 c1 c2 c3 c4 |     num_decodes 2
    query_start_loc  0    1     2                7
    """

    req_ids: list[Hashable]
    num_decodes: int  # the first requests, which have one token each
    input_ids: Tensor  # [num_tokens]
    positions: Tensor  # [num_tokens]
    slot_mapping: Tensor  # [num_tokens]
    query_start_loc: Tensor  # [num_reqs + 1]
    seq_lens: Tensor  # [num_reqs]
    block_tables: Tensor  # [num_reqs, max_num_blocks]
    sampling: list[int]  # numbers of the requests that have caught up and sample a token


class ModelRunner:
    """What a worker holds: the weights, the caches of all layers, and its own copy of the block tables."""

    def __init__(
        self,
        model: LlamaForCausalLM | OPTForCausalLM,
        num_gpu_blocks: int,
        block_size: int,
        max_model_len: int,
        max_num_seqs: int,
        tell: Tell | None = None,
    ):
        self.model = model
        self.tell = tell
        self.scale = model.head_size**-0.5
        shape = (num_gpu_blocks, block_size, model.num_kv_heads, model.head_size)
        self.kv_caches = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(model.num_layers)]
        self.block_table = BlockTable(max_num_seqs, cdiv(max_model_len, block_size), block_size)
        self.rows: dict[Hashable, int] = {}  # request -> its row in the block table

    @torch.inference_mode()
    def execute_model(
        self, scheduled: SchedulerOutput, requests: Mapping[Hashable, Request]
    ) -> dict[Hashable, list[int]]:
        """Run the planned step. Returns the token of each request that has caught up with its own tokens."""
        self._update_states(scheduled, requests)
        if not scheduled.num_scheduled_tokens:
            return {}
        batch = self._prepare_inputs(scheduled, requests)
        hidden = self.model.forward(batch.input_ids, batch.positions, partial(self._attend, batch))
        last_tokens = batch.query_start_loc[1:][batch.sampling] - 1
        sampled = self.model.compute_logits(hidden[last_tokens]).argmax(dim=-1).tolist()
        return {batch.req_ids[i]: [token] for i, token in zip(batch.sampling, sampled)}

    def _update_states(
        self, scheduled: SchedulerOutput, requests: Mapping[Hashable, Request]
    ) -> None:
        """Bring the block tables up to date: who left gives up the row, who comes gets one, who runs gets blocks."""
        for key in [*scheduled.preempted_req_ids, *scheduled.finished_req_ids]:
            if key in self.rows:
                self._remove_row(key)
        for key, (block_ids,) in scheduled.new_block_ids.items():
            if key in self.rows:
                self.block_table.append_row(block_ids, self.rows[key])
            else:
                self.rows[key] = len(self.rows)
                self.block_table.add_row(block_ids, self.rows[key])

    def _remove_row(self, key: Hashable) -> None:
        """Rows stay dense: the last one moves into the gap."""
        row = self.rows.pop(key)
        last = len(self.rows)
        if row != last:
            moved = next(other for other, its_row in self.rows.items() if its_row == last)
            self.block_table.move_row(last, row)
            self.rows[moved] = row

    def _prepare_inputs(
        self, scheduled: SchedulerOutput, requests: Mapping[Hashable, Request]
    ) -> InputBatch:
        num_tokens = scheduled.num_scheduled_tokens
        # Decodes, then prefills; within each as they were scheduled.
        req_ids = sorted(num_tokens, key=lambda key: num_tokens[key] > 1)
        starts = scheduled.num_computed_tokens
        ends = {key: starts[key] + num_tokens[key] for key in req_ids}
        counts = np.array([num_tokens[key] for key in req_ids])
        rows = np.array([self.rows[key] for key in req_ids])
        positions = np.concatenate([np.arange(starts[key], ends[key]) for key in req_ids])
        tokens = np.concatenate(
            [requests[key].all_token_ids[starts[key] : ends[key]] for key in req_ids]  # type: ignore[index]
        )
        slots = self.block_table.compute_slot_mapping(rows.repeat(counts), positions)
        if self.tell is not None:
            tables = [self.block_table.get_row(row).tolist() for row in rows]
            told = scheduled.step, req_ids, counts.tolist(), tables, slots.tolist()
            self.tell(("batch.prepared", *told))
        return InputBatch(
            req_ids=req_ids,
            num_decodes=int((counts == 1).sum()),
            input_ids=torch.from_numpy(tokens),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(slots),
            query_start_loc=torch.from_numpy(np.concatenate([[0], counts.cumsum()])),
            seq_lens=torch.tensor([ends[key] for key in req_ids]),
            block_tables=torch.from_numpy(self.block_table.table[rows]).long(),
            sampling=[i for i, key in enumerate(req_ids) if ends[key] == requests[key].num_tokens],
        )

    def _attend(
        self, batch: InputBatch, layer: int, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Write first, for the whole batch: two requests may share a block that one of them computes in this step."""
        caches = self.kv_caches[layer]
        reshape_and_cache(key, value, *caches, batch.slot_mapping)
        n, tables, seq_lens = batch.num_decodes, batch.block_tables, batch.seq_lens
        out = []
        if n:
            if self.tell is not None:
                numbers = int(seq_lens[:n].max()), n, self.model.num_heads
                version = "v1" if use_v1(*numbers) else "v2"
                self.tell(("attention.decoded", layer, version, *numbers))
            out.append(forward_decode(query[:n], *caches, tables[:n], seq_lens[:n], self.scale))
        if n < len(batch.req_ids):
            chunks = tables[n:], batch.query_start_loc[n:] - n, seq_lens[n:]
            out.append(context_attention_fwd(query[n:], *caches, *chunks, self.scale))
        return torch.cat(out)
