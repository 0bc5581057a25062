"""The tutorial's three key numbers, each worked out under stated assumptions: which hold, and which do not.

The tutorial gives them for a V100 with 32 GB and names no model, no context length and no request lengths. So each is
put beside a setting in which it comes out, and beside what is said with it and does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from vllm_trace.memory.calculate import Setting, blocks_of, fitting, sharing, users, wastes
from vllm_trace.memory.shapes import GPUS, MODELS
from vllm_trace.memory.workload import Request, drawn


@dataclass(frozen=True)
class KeyNumber:
    """A claim, what the calculation gives, and the verdict."""

    claim: str
    found: str
    holds: bool
    under: str
    """The assumptions."""
    value: float


def key_numbers(block_size: int = 16) -> list[KeyNumber]:
    """All of them, calculated now."""
    return [
        *_waste(block_size),
        *_users(block_size),
        *_shared(),
    ]


def _waste(block_size: int) -> list[KeyNumber]:
    setting = Setting(GPUS["v100-32gb"], MODELS["opt-125m"], block_size=block_size)
    work = drawn("sharegpt", 10_000, setting.length, seed=0)
    by_scheme = {one.scheme: one for one in wastes(setting, work)}
    reserved, paged = by_scheme["reserved"], by_scheme["paged"]
    lengths = "10,000 requests of ShareGPT's mean lengths (161 and 338 tokens, log-normal)"
    return [
        KeyNumber(
            "a contiguous cache wastes about 77 %",
            f"{reserved.at_end:.1%} at each request's end",
            abs(reserved.at_end - 0.77) < 0.03,
            f"{lengths}, 2048 tokens reserved for each; requests that fill 23 % of what is reserved for them "
            f"give 77 % on any GPU and for any model; while they grow it is {reserved.over_life:.1%}",
            reserved.at_end,
        ),
        KeyNumber(
            "paging wastes 0 %",
            f"{paged.at_end:.2%} at the end, {paged.over_life:.2%} over their lives",
            paged.at_end < 0.0005,
            f"the same requests in blocks of {block_size}: the last block of each is about half empty, "
            f"{(block_size - 1) / 2:g} tokens of {work.mean:.0f}",
            paged.at_end,
        ),
    ]


def _users(block_size: int) -> list[KeyNumber]:
    setting = Setting(
        GPUS["v100-32gb"], MODELS["llama-3-8b"], max_model_len=4096, utilization=0.9,
        block_size=block_size,
    )  # fmt: skip
    quarter = [Request(512, 513)]  # 1024 tokens held
    apart = users(setting, "reserved", quarter)
    together = fitting([1024], block_size, setting.usable_blocks)
    other = replace(setting, model=MODELS["llama-2-7b"], max_model_len=2048)
    few, more = users(other, "reserved", quarter), fitting([512], block_size, other.usable_blocks)
    return [
        KeyNumber(
            "a V100 with 32 GB serves about 25 users from a contiguous cache and about 100 from pages",
            f"{apart} and {together}: {together / apart:.1f} times",
            abs(apart - 25) <= 2 and abs(together - 100) <= 5,
            "Llama 3 8B in float16 (GQA), 4096 tokens reserved, each user holds a quarter of that, 90 % of the GPU, "
            "1 GiB beside the weights",
            together,
        ),
        KeyNumber(
            "25 and 100 are numbers of the V100",
            f"Llama 2 7B (MHA) on the same GPU: {few} and {more}",
            abs(few - 25) <= 2,
            "float16, 2048 tokens reserved, a quarter used; only the ratio stays: it is "
            "max_model_len / mean length, and the 77 % said another way (1 / 0.23 = 4.3)",
            few,
        ),
    ]


def _shared() -> list[KeyNumber]:
    tokens, blocks = sharing(100, 500, 100, 1), sharing(100, 500, 100, 16)
    whole = sharing(100, 512, 100, 16)
    longer = sharing(100, 500, 400, 16)
    return [
        KeyNumber(
            "100 users who share 500 tokens save 83 %",
            f"{tokens.saved:.1%} when every token could be shared",
            abs(tokens.saved - 0.83) < 0.01,
            "each user has 100 tokens of their own (99 x 500 of 100 x 600 tokens)",
            tokens.saved,
        ),
        KeyNumber(
            "… in vLLM's blocks of 16",
            f"{blocks.saved:.1%} ({blocks.shared} blocks instead of {blocks.apart})",
            abs(blocks.saved - 0.83) < 0.01,
            f"31 full blocks of the 500 tokens are shared, the last 4 tokens are not; 512 shared tokens would save "
            f"{whole.saved:.1%}",
            blocks.saved,
        ),
        KeyNumber(
            "… with longer texts of their own",
            f"{longer.saved:.1%}",
            abs(longer.saved - 0.83) < 0.01,
            f"400 own tokens each: {blocks_of(900, 16)} blocks a user, of which 31 are shared",
            longer.saved,
        ),
    ]
