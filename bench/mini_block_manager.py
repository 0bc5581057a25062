"""mini's KVCacheManager against the installed vLLM's: the same operations, the same ids, timed by kind of call.

    python bench/mini_block_manager.py [--operations 100000] [--seed 0] [--repeat 3]

Both managers go through one random sequence of rounds, shaped like engine steps: some requests are freed, every
running one gets one token more, some are admitted. They take turns, 50 rounds each, so that both meet the same machine
and neither finds the caches full of the other's blocks at every call. After each turn all block ids that were handed
out must be equal, and at the end the free queues and reference counts. Requests and hashes are made outside of the
timing, so what is measured is the manager and not the hash function. Printed is vLLM's time over mini's, CPU time of
the thread less what reading its clock takes; of several repetitions the median.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
from pathlib import Path
from time import thread_time_ns

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.append(str(Path(__file__).resolve().parents[1]))

BLOCK_SIZE = 16
NUM_BLOCKS = 4096
MAX_MODEL_LEN = 8192
MAX_NUM_SEQS = 64
ROUNDS_PER_TURN = 50
KINDS = {
    "allocate": ("allocate and cache full blocks", 4.0),
    "hit": ("prefix hit (lookup and touch)", 4.0),
    "both": ("allocate behind a prefix hit", None),
    "step": ("+1-token step", 8.0),
    "free": ("free", 0.9),
}


class Side:
    """One manager and its way through the rounds. Two sides with one seed do the same, if they get the same ids."""

    def __init__(self, manager, seed: int):
        self.manager = manager
        self.random = random.Random(seed)
        self.running: list = []
        self.ready: list = []
        self.num_requests = 0
        self.spent = dict.fromkeys(KINDS, 0)
        self.calls = dict.fromkeys(KINDS, 0)
        self.stretches = dict.fromkeys(KINDS, 0)
        self.handed_out: list = []
        shared = [[self.random.randrange(1000) for _ in range(1024)] for _ in range(8)]
        self.prefixes = [tokens[: BLOCK_SIZE * self.random.randrange(8, 64)] for tokens in shared]

    def timed(self, kind: str, call, arguments: list) -> list:
        """A row of calls, timed as a whole."""
        start = thread_time_ns()
        results = [call(*each) for each in arguments]
        self.spent[kind] += thread_time_ns() - start
        self.calls[kind] += len(arguments)
        self.stretches[kind] += 1
        return results

    def turn(self) -> list:
        """Returns every id handed out, in order."""
        self.handed_out = []
        # Made at once, so that making them does not empty the caches before each timed call.
        self.ready = [self.next_request() for _ in range(3 * ROUNDS_PER_TURN)]
        for _ in range(ROUNDS_PER_TURN):
            self.round()
        return self.handed_out

    def round(self) -> None:
        self.random.shuffle(self.running)
        num_leaving = self.random.randrange(4) if len(self.running) > MAX_NUM_SEQS // 2 else 0
        self.free([self.running.pop() for _ in range(num_leaving)])
        self.step()
        arriving = [self.ready.pop() for _ in range(self.random.randrange(4))]
        for request in arriving:
            self.hit(request)
        for request in arriving[: max(0, MAX_NUM_SEQS - len(self.running))]:
            self.admit(request)

    def next_request(self):
        self.num_requests += 1
        own = [self.random.randrange(1000) for _ in range(self.random.randrange(16, 768))]
        chance = self.random.random()
        prompt = self.random.choice(self.prefixes) + own if chance < 0.6 else own
        return self.make_request(f"request-{self.num_requests}", prompt)

    def hit(self, request) -> None:
        """Lookup and touch alone, as at admission. Undone untimed, so that ids go on as before."""
        if not self.manager.get_computed_blocks(request)[1]:
            return  # a miss is no hit; it counts with `allocate` only
        pool = self.manager.block_pool

        def look_up_and_touch():
            hits = self.first_group(self.manager.get_computed_blocks(request)[0])
            pool.touch(hits)
            return hits

        (hits,) = self.timed("hit", look_up_and_touch, [()])
        self.handed_out.append([block.block_id for block in hits])
        pool.free_blocks(reversed(hits))

    def admit(self, request) -> None:
        hits, num_hit_tokens, _ = self.manager.get_computed_blocks(request)
        arguments = (request, request.num_tokens - num_hit_tokens, num_hit_tokens, hits)
        kind = "both" if num_hit_tokens else "allocate"
        (new,) = self.timed(kind, self.manager.allocate_slots, [arguments])
        if self.note(new):
            request.num_computed_tokens = request.num_tokens
            request.status = self.running_status
            self.running.append(request)

    def step(self) -> None:
        for request in self.running:
            self.append_token(request, self.random.randrange(1000))
        new_blocks = self.timed("step", self.manager.allocate_slots, [(r, 1) for r in self.running])
        refused = [request for request, new in zip(self.running, new_blocks) if not self.note(new)]
        for request in self.running:
            request.num_computed_tokens += 1
        self.running = [request for request in self.running if request not in refused]
        self.free(refused)

    def free(self, requests: list) -> None:
        self.timed("free", self.manager.free, [(request,) for request in requests])

    def note(self, blocks) -> bool:
        """Whether blocks were handed out; which ones is kept for the comparison."""
        ids = None if blocks is None else [block.block_id for block in self.first_group(blocks)]
        self.handed_out.append(ids)
        return ids is not None


class RealSide(Side):
    """The installed vLLM."""

    def __init__(self, seed: int):
        import torch
        from vllm import SamplingParams
        from vllm.utils.hashing import sha256
        from vllm.v1.core import kv_cache_utils
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
        from vllm.v1.request import Request, RequestStatus

        kv_cache_utils.init_none_hash(sha256)
        spec = FullAttentionSpec(
            block_size=BLOCK_SIZE, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        manager = KVCacheManager(
            KVCacheConfig(NUM_BLOCKS, [], [KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=MAX_MODEL_LEN,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )
        super().__init__(manager, seed)
        hasher = kv_cache_utils.get_request_block_hasher(BLOCK_SIZE, sha256)
        params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
        self.running_status = RequestStatus.RUNNING
        self.make_request = lambda name, prompt: Request(
            name, prompt, params, None, block_hasher=hasher
        )
        self.append_token = lambda request, token: request.append_output_token_ids(token)
        self.first_group = lambda blocks: blocks.blocks[0]

    def free_queue(self) -> list[int]:
        return [b.block_id for b in self.manager.block_pool.free_block_queue.get_all_free_blocks()]


class MiniSide(Side):
    def __init__(self, seed: int):
        import vllm
        from vllm.utils.hashing import sha256

        from vllm_trace.mini.kv_cache_manager import FullAttentionSpec, KVCacheManager
        from vllm_trace.mini.request import Request, RequestStatus, get_request_block_hasher
        from vllm_trace.mini.rules import rules_for

        rules = rules_for(vllm.__version__)
        specs = [FullAttentionSpec(BLOCK_SIZE)]
        super().__init__(KVCacheManager(NUM_BLOCKS, specs, MAX_MODEL_LEN, rules=rules), seed)
        hasher = get_request_block_hasher(BLOCK_SIZE, sha256, sha256(rules.none_hash_seed))
        self.running_status = RequestStatus.RUNNING
        self.make_request = lambda name, prompt: Request(name, prompt, block_hasher=hasher)
        self.append_token = lambda request, token: request.append_output_token_ids([token])
        self.first_group = lambda blocks: blocks[0]

    def free_queue(self) -> list[int]:
        return [block.block_id for block in self.manager.block_pool.free_block_queue]


def run(operations: int, seed: int) -> tuple[Side, Side]:
    real, mini = RealSide(seed), MiniSide(seed)
    gc.collect()
    gc.disable()  # a collection would be charged to whichever side was being timed
    try:
        while sum(real.calls.values()) < operations:
            assert real.turn() == mini.turn()
    finally:
        gc.enable()
    assert real.free_queue() == mini.free_queue()
    ref_cnts = [[b.ref_cnt for b in side.manager.block_pool.blocks] for side in (real, mini)]
    assert ref_cnts[0] == ref_cnts[1]
    return real, mini


def clock_ns() -> float:
    """What reading the clock adds to a stretch: with microseconds a call it would favour the slower side."""
    stretches = []
    for _ in range(2000):
        start = thread_time_ns()
        stretches.append(thread_time_ns() - start)
    return statistics.median(stretches)


def measure(operations: int, seed: int, repeat: int) -> dict:
    """Microseconds a call on both sides, and the ratio of each repetition, less what the clock costs."""
    runs = [run(operations, seed) for _ in range(repeat)]
    clock = clock_ns()

    def each(side: Side, kind: str) -> float:
        return (side.spent[kind] - clock * side.stretches[kind]) / side.calls[kind] / 1000

    kinds = [
        {
            "name": name,
            "target": target,
            "calls": runs[0][0].calls[kind],
            "vllm_us": statistics.median(each(real, kind) for real, _ in runs),
            "mini_us": statistics.median(each(mini, kind) for _, mini in runs),
            "ratios": [each(real, kind) / each(mini, kind) for real, mini in runs],
        }
        for kind, (name, target) in KINDS.items()
    ]
    return {"operations": sum(runs[0][0].calls.values()), "clock_ns": clock, "kinds": kinds}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--operations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    figures = measure(options.operations, options.seed, options.repeat)

    import vllm

    python = sys.version.split()[0]
    print(f"vLLM {vllm.__version__}, Python {python}, block size {BLOCK_SIZE}, {NUM_BLOCKS} blocks")
    print(f"{figures['operations']} operations, seed {options.seed}, every block id equal")
    print(f"median of {options.repeat} repetitions in this run, and their spread")
    print(
        f"{'call':<32}{'calls':>8}{'vLLM us':>10}{'mini us':>10}{'ratio':>8}{'spread':>15}{'target':>8}"
    )
    for kind in figures["kinds"]:
        ratios = kind["ratios"]
        line = (
            f"{kind['name']:<32}{kind['calls']:>8}{kind['vllm_us']:>10.2f}{kind['mini_us']:>10.2f}"
        )
        spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
        print(f"{line}{statistics.median(ratios):>8.2f}{spread:>15}{kind['target'] or '':>8}")


if __name__ == "__main__":
    main()
