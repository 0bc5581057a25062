"""Checks of the exercises that compute: torch, Triton, layouts, the reduce."""

from __future__ import annotations

from typing import Any

from vllm_trace.learn.exercises import layouts
from vllm_trace.learn.exercises.grader import Check, Desk, Failed, require

# Exercise 2 --------------------------------------------------------------------------------


def _case(tokens: int, context: int, dim: int, size: int, scale: float = 1.0, seed: int = 0) -> Any:
    """(arguments, what dense attention gives); everything that is not ours is NaN."""
    import torch

    made = torch.Generator().manual_seed(seed)
    used = -(-context // size)
    total = 2 * used + 1
    table = torch.randperm(total, generator=made)[:used].to(torch.int32)
    k_cache = torch.full((total, size, dim), torch.nan)
    v_cache = torch.full((total, size, dim), torch.nan)
    query = torch.randn(tokens, dim, generator=made) * scale
    key = torch.randn(context, dim, generator=made) * scale
    value = torch.randn(context, dim, generator=made)
    for position in range(context):
        block, place = int(table[position // size]), position % size
        k_cache[block, place], v_cache[block, place] = key[position], value[position]
    wanted = torch.softmax(query @ key.T / dim**0.5, dim=1) @ value
    return (query, k_cache, v_cache, table, context), wanted


def _attention(
    tokens: int, context: int, dim: int, size: int, hint: str, scale: float = 1.0
) -> Any:
    def check(module: Any, desk: Desk) -> None:
        import torch

        arguments, wanted = _case(tokens, context, dim, size, scale, desk.seed)
        if _on_gpu(module):
            arguments = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments)
        before = [a.clone() for a in arguments[:4]]
        got = module.simple_paged_attention(*arguments)
        require(isinstance(got, torch.Tensor), f"it returned {type(got).__name__}, not a tensor")
        require(
            got.shape == wanted.shape,
            f"the result has shape {list(got.shape)}, and it should be {list(wanted.shape)}",
        )
        for old, new, name in zip(before, arguments, ("q", "k_cache", "v_cache", "block_table")):
            same = (
                torch.equal(old.nan_to_num(0.25), new.nan_to_num(0.25))
                if old.is_floating_point()
                else torch.equal(old, new)
            )
            require(same, f"{name} was changed")
        got = got.float().cpu()
        if bool(got.isnan().any()):
            raise Failed("the result is NaN: something was read that is not this sequence's", hint)
        worst = float((got - wanted).abs().max())
        require(worst < 1e-3, f"context {context}, blocks of {size}: off by {worst:.3g}", hint)

    return check


def _on_gpu(module: Any) -> bool:
    import torch

    return hasattr(module, "triton") and torch.cuda.is_available()


ATTENTION: list[Check] = [
    ("one full block", _attention(1, 4, 8, 4, "Scale by 1 / sqrt(head_dim); softmax over tokens.")),
    ("blocks in any order", _attention(2, 12, 8, 4, "Look each block up in block_table.")),
    ("a last block that is not full", _attention(
        3, 10, 16, 4, "Only context_len tokens count; leave the rest out before the softmax.")),
    ("one token", _attention(1, 1, 8, 4, "A single token has weight 1.")),
    ("large scores", _attention(2, 20, 16, 4, "Take the largest off before exp.", 12.0)),
    ("512 tokens and one", _attention(1, 513, 32, 16, "Nothing special about 512 here.")),
]  # fmt: skip


def _has_kernel(module: Any, desk: Desk) -> None:
    import torch

    names = {type(value).__name__ for value in vars(module).values()}
    require(
        bool(names & {"JITFunction", "InterpretedFunction", "Autotuner"}),
        "there is no @triton.jit function in your file",
    )
    arguments, _ = _case(1, 4, 8, 4)
    arguments = tuple(
        a.cuda() if _on_gpu(module) and isinstance(a, torch.Tensor) else a for a in arguments
    )
    module.simple_paged_attention(*arguments)
    where = "on the GPU" if _on_gpu(module) else "in Triton's interpreter: there is no GPU here"
    desk.note(f"The kernel ran {where}.")


# Exercise 3 --------------------------------------------------------------------------------

SHAPES = {1: (5, 4, 3, 8), 2: (5, 3, 4, 8), 3: (3, 5, 4, 8)}


def _shapes(module: Any, desk: Desk) -> None:
    for layout, shape in SHAPES.items():
        got = tuple(module.make_cache(layout, 5, 4, 3, 8).shape)
        require(got == shape, f"layout {layout}: shape {got}, and it should be {shape}")


def _round_trip(module: Any, desk: Desk) -> None:
    import torch

    for layout in SHAPES:
        cache = module.make_cache(layout, 5, 4, 3, 8)
        blocks = torch.tensor([3, 0, 4])
        vectors = torch.randn(12, 3, 8, generator=torch.Generator().manual_seed(desk.seed))
        for position in range(12):
            block = int(blocks[position // 4])
            module.write_token(cache, layout, block, position % 4, vectors[position])
        for head in range(3):
            got = module.read_head(cache, layout, blocks, head)
            require(
                tuple(got.shape) == (12, 8), f"layout {layout}: read_head gives {list(got.shape)}"
            )
            require(
                torch.equal(got, vectors[:, head]),
                f"layout {layout}, head {head}: what comes out is not what was written",
                "Which dimension is the block, which the place, which the head?",
            )


def _measured(module: Any, desk: Desk) -> None:
    times = layouts.measure(module)
    layouts.keep(desk.path, times)
    rows = ", ".join(f"layout {k}: {v * 1e6:.0f} µs" for k, v in times.items())
    desk.note(f"Attention over 1024 tokens of 8 heads, best of several: {rows}.")


# Exercise 7 --------------------------------------------------------------------------------


def _parts(logits: Any, values: Any, cuts: list[int]) -> Any:
    """exp_sums, max_logits, tmp_out of the pieces of one softmax."""
    import torch

    sums, maxima, outs = [], [], []
    for low, high in zip([0, *cuts], [*cuts, len(logits)]):
        piece = logits[low:high]
        if not len(piece):
            sums.append(torch.tensor(0.0))
            maxima.append(torch.tensor(-torch.inf))
            outs.append(torch.zeros(values.shape[1]))
            continue
        weights = torch.exp(piece - piece.max())
        sums.append(weights.sum())
        maxima.append(piece.max())
        outs.append(weights @ values[low:high] / weights.sum())
    return torch.stack(sums), torch.stack(maxima), torch.stack(outs)


def _reduces(count: int, cuts: list[int], scale: float, hint: str) -> Any:
    def check(module: Any, desk: Desk) -> None:
        import torch

        made = torch.Generator().manual_seed(desk.seed)
        logits = torch.randn(count, generator=made) * scale
        values = torch.randn(count, 4, generator=made)
        wanted = torch.softmax(logits, 0) @ values
        parts = _parts(logits, values, cuts)
        got = module.reduce(*[part.clone() for part in parts])
        require(isinstance(got, torch.Tensor), f"it returned {type(got).__name__}, not a tensor")
        require(got.shape == (4,), f"the result has shape {list(got.shape)}, and it should be [4]")
        require(not bool(got.isnan().any()), "the result is NaN", hint)
        worst = float((got - wanted).abs().max())
        require(worst < 1e-4, f"{len(cuts) + 1} partitions: off by {worst:.3g}", hint)

    return check


CHECKS: dict[str, list[Check]] = {
    "ex2": ATTENTION,
    "ex2-triton": [("it has a Triton kernel", _has_kernel), *ATTENTION[:5]],
    "ex3": [
        ("shapes", _shapes),
        ("what is written is read", _round_trip),
        ("measured on this machine", _measured),
    ],
    "ex7": [
        ("one partition", _reduces(6, [], 1.0, "With one partition tmp_out is the answer.")),
        ("two partitions", _reduces(12, [7], 2.0, "Weigh each by exp(own maximum - overall maximum) x own sum.")),
        ("large logits", _reduces(40, [10, 20, 30], 900.0, "exp(900) is infinite: take the overall maximum off.")),
        ("an empty partition", _reduces(9, [4, 4], 1.0, "Its sum is 0, so its weight is 0.")),
        ("seventeen partitions", _reduces(170, list(range(10, 170, 10)), 1.0, "All at once.")),
    ],
}  # fmt: skip
