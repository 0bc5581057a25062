"""The real ``PagedAttention.forward_decode`` of vLLM 0.11.0 with the CPU build's own ops, traced: ``make lane-0.11``.

Three witnesses of each call: the rule as it is recorded, the op hook, and torch's dispatcher, which no hook of ours
touches.
"""

import pytest

BLOCK_SIZE, HEAD_SIZE, KV_HEADS = 16, 32, 2

#: (sequences, query heads, longest context) on both sides of every border of the rule.
BORDERS = [
    (1, 4, 1),
    (1, 4, 511),
    (1, 4, 512),
    (1, 4, 513),
    (1, 4, 8192),
    (1, 4, 8193),
    (128, 4, 513),  # 512 sequences × heads
    (129, 4, 512),
    (129, 4, 513),  # 516
    (171, 3 * KV_HEADS // 2, 513),  # 513
    (129, 4, 8192),
    (129, 4, 8193),
]


def heads_of(num_heads):
    return KV_HEADS if num_heads % KV_HEADS == 0 else 1


@pytest.fixture(scope="module")
def paged_attention():
    """The class, with the ops that its module does not import by itself on a CPU."""
    import vllm._C  # noqa: F401
    import vllm._custom_ops as ops
    from vllm.attention.ops import paged_attn

    before = getattr(paged_attn, "ops", None)
    paged_attn.ops = ops
    yield paged_attn.PagedAttention
    if before is not None:
        paged_attn.ops = before


def inputs(num_seqs, num_heads, longest):
    """Caches in vLLM's split layout; every sequence reads the same blocks, the first one all of them."""
    import torch

    from vllm_trace.mini.attention import to_kernel_layout

    torch.manual_seed(longest * 1000 + num_seqs)
    kv_heads, num_blocks = heads_of(num_heads), -(-longest // BLOCK_SIZE)
    flat = torch.randn(2, num_blocks, BLOCK_SIZE, kv_heads, HEAD_SIZE)
    table = torch.randperm(num_blocks, dtype=torch.int32).repeat(num_seqs, 1)
    lens = torch.full((num_seqs,), min(longest, 40), dtype=torch.int32)
    lens[0] = longest
    query = torch.randn(num_seqs, num_heads, HEAD_SIZE)
    return query, flat, to_kernel_layout(flat[0], flat[1]), table, lens, kv_heads


def watcher():
    """A dispatch mode that notes which of the two ops torch was asked for."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = str(func).split(".")[1]
            if name.startswith("paged_attention"):
                self.seen.append(name)
            return func(*args, **(kwargs or {}))

    return Watch()


@pytest.fixture(scope="module")
def decoded(paged_attention, tmp_path_factory):
    """Every border decoded once under tracing: (outputs, what the dispatcher saw, events)."""
    import torch

    from vllm_trace.hooks import attach, detach
    from vllm_trace.options import Options
    from vllm_trace.trace import read_trace

    folder = tmp_path_factory.mktemp("trace")
    made = attach(Options(dir=str(folder), strict=True))
    assert {"ok"} == {hook["state"] for hook in made.notes["hooks"]}
    outputs, dispatched = [], []
    one = torch.ones(1)
    try:
        for border in BORDERS:
            query, _, caches, table, lens, kv_heads = inputs(*border)
            with watcher() as watch:
                outputs.append(
                    paged_attention.forward_decode(
                        query, *caches, table, lens, border[2], "auto", kv_heads, HEAD_SIZE**-0.5,
                        None, one, one,
                    )
                )  # fmt: skip
            dispatched.append(watch.seen)
        assert {} == made.failures
    finally:
        assert [] == detach()
    return outputs, dispatched, list(read_trace(folder).events())


def test_every_call_left_its_choice_and_what_ran(decoded):
    _, _, events = decoded
    assert ["attention.planned", "attention.called"] * len(BORDERS) == [e.kind for e in events]
    assert [*range(1, len(BORDERS) + 1)] == [e.step for e in events[::2]]


def test_the_recorded_choice_is_what_ran_on_both_sides_of_every_border(decoded):
    _, dispatched, events = decoded
    planned = [event.variant for event in events[::2]]
    called = [[event.kernel] for event in events[1::2]]
    assert [[f"paged_attention_{variant.lower()}"] for variant in planned] == dispatched
    assert called == dispatched
    assert [
        "V1", "V1", "V1", "V2", "V2", "V2", "V2", "V1", "V1", "V1", "V1", "V2"
    ] == planned  # fmt: skip


@pytest.mark.parametrize("index", range(len(BORDERS)), ids=[str(border) for border in BORDERS])
def test_all_inputs_of_the_choice_are_recorded(decoded, index):
    num_seqs, num_heads, longest = BORDERS[index]
    event = decoded[2][2 * index]
    assert {
        "max_seq_len": longest,
        "num_seqs": num_seqs,
        "num_heads": num_heads,
        "num_partitions": -(-longest // 512),
        "partition_size": 512,
        "max_v1_seq_len": 8192,
        "block_size": BLOCK_SIZE,
        "head_size": HEAD_SIZE,
        "num_kv_heads": heads_of(num_heads),
    } == event.numbers
    assert str(longest) in event.reason


@pytest.mark.parametrize("index", range(len(BORDERS)), ids=[str(border) for border in BORDERS])
def test_its_kernels_and_ours_agree(decoded, index):
    import torch

    from vllm_trace.mini.attention import forward_decode

    query, flat, _, table, lens, _ = inputs(*BORDERS[index])
    ours = forward_decode(query, flat[0], flat[1], table, lens, HEAD_SIZE**-0.5)
    torch.testing.assert_close(decoded[0][index], ours, rtol=0, atol=2e-6)


def test_our_form_of_the_rule_is_theirs():
    """The line of the release itself, cut out of its source and run over a grid around the borders."""
    import ast
    import inspect
    import textwrap

    from vllm.attention.ops.paged_attn import PagedAttention

    from vllm_trace.decode_rule import choose

    function = inspect.unwrap(PagedAttention.forward_decode)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    (rule,) = [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "use_v1"
    ]
    code = compile(ast.Expression(rule), "use_v1", "eval")
    lengths = [1, 511, 512, 513, 1024, 1025, 8191, 8192, 8193, 20000]
    for longest in lengths:
        for num_seqs in (1, 2, 63, 64, 65, 127, 128, 129, 512, 513):
            for num_heads in (1, 4, 8, 32):
                known = {
                    "max_seq_len": longest,
                    "max_num_partitions": -(-longest // 512),
                    "num_seqs": num_seqs,
                    "num_heads": num_heads,
                }
                theirs = "V1" if eval(code, known) else "V2"
                assert theirs == choose(longest, num_seqs, num_heads).variant, known
