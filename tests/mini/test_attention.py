"""Paged attention beside dense attention. Slots that no sequence owns hold NaN: one wrong read spoils everything."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: mini's attention cannot run")

from vllm_trace.mini.attention import (  # noqa: E402
    LAYOUTS,
    context_attention_fwd,
    copy_blocks,
    forward_decode,
    from_kernel_layout,
    paged_attention_v1,
    paged_attention_v2,
    paged_attention_v2_reduce,
    reshape_and_cache,
    swap_blocks,
    to_kernel_layout,
    unsupported,
    use_v1,
)
from vllm_trace.mini.attention import decode as decode_module  # noqa: E402

HEADS = {"MHA": (4, 4), "GQA": (8, 2), "MQA": (4, 1)}  # query heads, KV heads
CLOSE = dict(atol=2e-6, rtol=1e-5)


class Paged:
    """Sequences of random K and V, written into a cache block by block in shuffled order."""

    def __init__(
        self, seq_lens, heads, head_size=32, block_size=16, dtype=torch.float32, scales=(1.0, 1.0)
    ):
        generator = torch.Generator().manual_seed(len(seq_lens) * 1000 + max(seq_lens))
        self.num_heads, num_kv_heads = heads
        self.head_size, self.block_size, self.scale, self.scales = (
            head_size,
            block_size,
            head_size**-0.5,
            scales,
        )
        self.seq_lens = torch.tensor(seq_lens)
        num_blocks = [-(-length // block_size) for length in seq_lens]
        # Twice as many blocks as needed, in any order; a table's end names a block that belongs to nobody.
        ids = torch.randperm(2 * sum(num_blocks) + 1, generator=generator)
        self.tables = torch.full((len(seq_lens), max(num_blocks) + 1), int(ids[-1]))
        for i, row in enumerate(ids[: sum(num_blocks)].split(num_blocks)):
            self.tables[i, : len(row)] = row
        shape = (len(ids), block_size, num_kv_heads, head_size)
        self.caches = torch.full(shape, torch.nan).to(dtype), torch.full(shape, torch.nan).to(dtype)
        self.keys = [
            torch.randn(length, num_kv_heads, head_size, generator=generator) for length in seq_lens
        ]
        self.values = [
            torch.randn(length, num_kv_heads, head_size, generator=generator) for length in seq_lens
        ]
        slots = [
            self.tables[i, p // block_size] * block_size + p % block_size
            for i, p in enumerate(map(torch.arange, seq_lens))
        ]
        reshape_and_cache(
            torch.cat(self.keys), torch.cat(self.values), *self.caches, torch.cat(slots), *scales
        )
        self.generator = generator

    def query(self, num_tokens):
        return torch.randn(num_tokens, self.num_heads, self.head_size, generator=self.generator)

    def decode(self, kernel, query):
        return kernel(query, *self.caches, self.tables, self.seq_lens, self.scale, *self.scales)

    def dense(self, queries):
        """The same by torch's own attention; `queries[i]` are the last tokens of sequence i."""
        out = []
        for query, key, value in zip(queries, self.keys, self.values):
            mask = torch.ones(len(query), len(key), dtype=torch.bool).tril(len(key) - len(query))
            repeat = self.num_heads // key.shape[1]
            key, value = (
                tensor.repeat_interleave(repeat, dim=1).transpose(0, 1) for tensor in (key, value)
            )
            attend = torch.nn.functional.scaled_dot_product_attention
            out.append(
                attend(
                    query.transpose(0, 1), key, value, attn_mask=mask, scale=self.scale
                ).transpose(0, 1)
            )
        return torch.cat(out)


def borders(block_size):
    return [
        1,
        block_size - 1,
        block_size,
        block_size + 1,
        2 * block_size,
        511,
        512,
        513,
        1024,
        1025,
    ]


@pytest.mark.parametrize("kernel", [paged_attention_v1, paged_attention_v2])
@pytest.mark.parametrize("block_size", [8, 16, 32, 128])
@pytest.mark.parametrize("head_size", [32, 64, 80, 128])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_decode_equals_dense(heads, head_size, block_size, kernel):
    paged = Paged(borders(block_size), heads, head_size, block_size)
    query = paged.query(len(paged.seq_lens))
    torch.testing.assert_close(paged.decode(kernel, query), paged.dense(query[:, None]), **CLOSE)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("length", [1, 15, 16, 17, 511, 512, 513, 1024, 1537, 8192, 8193])
def test_v1_equals_v2(length, heads):
    paged = Paged([length, 5, length], heads)
    query = paged.query(3)
    torch.testing.assert_close(
        paged.decode(paged_attention_v1, query), paged.decode(paged_attention_v2, query), **CLOSE
    )


def test_large_logits_do_not_overflow():
    """Partitions whose largest logits lie hundreds apart: exp of either alone would be infinite or zero."""
    paged = Paged([1100], HEADS["GQA"])
    query = paged.query(1) * 300
    for kernel in (paged_attention_v1, paged_attention_v2):
        torch.testing.assert_close(
            paged.decode(kernel, query), paged.dense(query[:, None]), atol=1e-4, rtol=1e-4
        )


def test_reduce_by_hand():
    """Sums 1 and 3 with maxima log 6 and 0: the parts weigh 6 to 3. A partition without tokens weighs nothing."""
    exp_sums = torch.tensor([[[1.0, 3.0, 0.0]]])
    max_logits = torch.tensor([[[6.0, 1.0, 0.0]]]).log()
    tmp_out = torch.tensor([[[[9.0, 0.0], [0.0, 9.0], [5.0, 5.0]]]])
    torch.testing.assert_close(
        paged_attention_v2_reduce(exp_sums, max_logits, tmp_out), torch.tensor([[[6.0, 3.0]]])
    )


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("block_size", [8, 16, 32])
def test_prefill_with_context_equals_dense(block_size, heads):
    """Whole prompts, chunks behind a context that ends at and beside a block border, and a single token."""
    paged = Paged([1, 33, 64, 65, 513, 600], heads, block_size=block_size)
    chunks = [1, 33, 32, 1, 500, 88]
    queries = paged.query(sum(chunks)).split(chunks)
    starts = torch.tensor([0, *chunks]).cumsum(0)
    out = context_attention_fwd(
        torch.cat(queries), *paged.caches, paged.tables, starts, paged.seq_lens, paged.scale
    )
    torch.testing.assert_close(out, paged.dense(queries), **CLOSE)


@pytest.mark.parametrize(
    "cuts",
    [[200], [64, 64, 64, 8], [1] * 200, [199, 1], [17, 183]],
    ids=lambda cuts: f"{len(cuts)}-chunks",
)
def test_chunks_equal_the_whole(cuts):
    """A prompt in any chunks is the prompt at once: each chunk is written, then read with what came before."""
    whole = Paged([200], HEADS["GQA"])
    query = whole.query(200)
    caches = tuple(torch.full_like(cache, torch.nan) for cache in whole.caches)
    slots = whole.tables[0, torch.arange(200) // 16] * 16 + torch.arange(200) % 16
    out, done = [], 0
    for chunk in cuts:
        now = slice(done, done + chunk)
        done += chunk
        reshape_and_cache(whole.keys[0][now], whole.values[0][now], *caches, slots[now])
        starts, lengths = torch.tensor([0, chunk]), torch.tensor([done])
        out.append(
            context_attention_fwd(query[now], *caches, whole.tables, starts, lengths, whole.scale)
        )
    torch.testing.assert_close(torch.cat(out), whole.dense([query]), **CLOSE)


# What vLLM 0.11.0's forward_decode called, seen by running it (its own ops, fp32, block size 16).
@pytest.mark.parametrize(
    ("num_seqs", "num_heads", "max_seq_len", "expected"),
    [(1, 4, 512, True), (1, 4, 513, False), (129, 4, 513, True), (130, 4, 8192, True), (1, 4, 8193, False),
     (128, 4, 513, False), (1, 513, 513, True), (1000, 8, 8193, False), (1, 1, 1, True)],
)  # fmt: skip
def test_rule(num_seqs, num_heads, max_seq_len, expected, monkeypatch):
    assert expected is use_v1(max_seq_len, num_seqs, num_heads)

    called = []
    for name in ("paged_attention_v1", "paged_attention_v2"):
        monkeypatch.setattr(
            decode_module, name, lambda *arguments, name=name, **options: called.append(name)
        )
    forward_decode(
        torch.empty(num_seqs, num_heads, 8), None, None, None, torch.tensor([1, max_seq_len]), 1.0
    )
    assert ["paged_attention_v1" if expected else "paged_attention_v2"] == called


def test_v2_refuses_blocks_across_partitions():
    paged = Paged([600], HEADS["MHA"], block_size=48)
    with pytest.raises(ValueError, match="48 does not divide the partition size 512"):
        paged.decode(paged_attention_v2, paged.query(1))


def test_write_by_hand():
    """Slot 5 of blocks of 4 is block 1, offset 1; slot -1 is padding; nothing else changes."""
    key_cache, value_cache = torch.zeros(3, 4, 1, 2), torch.zeros(3, 4, 1, 2)
    key = torch.tensor([[[1.0, 2.0]], [[9.0, 9.0]], [[3.0, 4.0]]])
    reshape_and_cache(key, key * 10, key_cache, value_cache, torch.tensor([5, -1, 8]))

    expected = torch.zeros(3, 4, 1, 2)
    expected[1, 1, 0] = torch.tensor([1.0, 2.0])
    expected[2, 0, 0] = torch.tensor([3.0, 4.0])
    assert torch.equal(expected, key_cache)
    assert torch.equal(expected * 10, value_cache)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_cache_dtypes(dtype):
    """K and V lose what the cache's dtype cannot hold and nothing more: dense attention over the rounded agrees."""
    k_scale, v_scale = (0.05, 0.02) if dtype.itemsize == 1 else (1.0, 1.0)
    paged = Paged([1, 40, 600], HEADS["GQA"], dtype=dtype, scales=(k_scale, v_scale))
    paged.keys = [(key / k_scale).to(dtype).float() * k_scale for key in paged.keys]
    paged.values = [(value / v_scale).to(dtype).float() * v_scale for value in paged.values]
    query = paged.query(3)
    for kernel in (paged_attention_v1, paged_attention_v2):
        torch.testing.assert_close(
            paged.decode(kernel, query), paged.dense(query[:, None]), **CLOSE
        )
    out = context_attention_fwd(
        query,
        *paged.caches,
        paged.tables,
        torch.tensor([0, 1, 2, 3]),
        paged.seq_lens,
        paged.scale,
        k_scale,
        v_scale,
    )
    torch.testing.assert_close(out, paged.dense(query[:, None]), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn], ids=str)
def test_copy_blocks(dtype):
    """In every layer, K and V; pairs may share a source."""
    layers = [
        (torch.randn(6, 4, 2, 8).to(dtype), torch.randn(6, 4, 2, 8).to(dtype)) for _ in range(2)
    ]
    before = [(key.clone(), value.clone()) for key, value in layers]
    copy_blocks(
        [key for key, _ in layers],
        [value for _, value in layers],
        torch.tensor([[1, 4], [1, 5], [0, 2]]),
    )
    for caches, old_caches in zip(layers, before):
        for cache, old in zip(caches, old_caches):
            assert torch.equal(old[[0, 1, 0, 3, 1, 1]].float(), cache.float())


def test_swap_out_and_in():
    """Swapped out, its blocks overwritten, swapped into other blocks: the sequence attends as before."""
    paged = Paged([40], HEADS["GQA"])
    query = paged.query(1)
    expected = paged.decode(paged_attention_v1, query)
    gpu = paged.tables[0, :3]
    elsewhere = tuple(torch.full((3, *cache.shape[1:]), torch.nan) for cache in paged.caches)
    for cache, cpu in zip(paged.caches, elsewhere):
        swap_blocks(cache, cpu, torch.stack([gpu, torch.tensor([2, 0, 1])], 1))
        cache[gpu] = torch.nan
    free = torch.tensor([i for i in range(len(paged.caches[0])) if i not in gpu.tolist()][:3])
    for cache, cpu in zip(paged.caches, elsewhere):
        swap_blocks(cpu, cache, torch.stack([torch.tensor([2, 0, 1]), free], 1))
    paged.tables = free[None]
    assert torch.equal(expected, paged.decode(paged_attention_v1, query))


def test_kernel_layout():
    """Element (block, token, head, d) stands where vLLM's kernels look for it, and the way back is exact."""
    key_cache, value_cache = torch.randn(3, 4, 2, 32), torch.randn(3, 4, 2, 32)
    keys, values = to_kernel_layout(key_cache, value_cache)

    assert (3, 2, 8, 4, 4) == tuple(keys.shape)
    assert (3, 2, 32, 4) == tuple(values.shape)
    for block, token, head, d in [(0, 0, 0, 0), (2, 3, 1, 31), (1, 2, 0, 13)]:
        assert key_cache[block, token, head, d] == keys[block, head, d // 4, token, d % 4]
        assert value_cache[block, token, head, d] == values[block, head, d, token]
    for cache, back in zip((key_cache, value_cache), from_kernel_layout(keys, values)):
        assert torch.equal(cache, back)


# -- options: layouts, ALiBi, window, soft cap, int8, empty sequences --------------------------------------------------


def order_of(layout):
    return {"flash": (0, 1, 2, 3), "heads": (0, 2, 1, 3), "planes": (2, 0, 1, 3)}[layout]


def in_layout(caches, layout):
    if layout == "split":
        return to_kernel_layout(*caches)
    return tuple(cache.permute(order_of(layout)).contiguous() for cache in caches)


@pytest.mark.parametrize("kernel", [paged_attention_v1, paged_attention_v2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same(layout, kernel):
    """Read in any layout, the result is bit for bit that of the flash layout; written too."""
    paged = Paged([1, 40, 600], HEADS["GQA"])
    query = paged.query(3)
    expected = paged.decode(kernel, query)
    prefill = (paged.tables, torch.tensor([0, 1, 2, 3]), paged.seq_lens, paged.scale)
    chunk = context_attention_fwd(query, *paged.caches, *prefill)
    slots = torch.tensor([3, 40])
    paged.caches = in_layout(paged.caches, layout)
    rest = (paged.tables, paged.seq_lens, paged.scale)
    torch.testing.assert_close(kernel(query, *paged.caches, *rest, layout=layout), expected)
    torch.testing.assert_close(
        context_attention_fwd(query, *paged.caches, *prefill, layout=layout), chunk
    )
    key, value = torch.randn(2, 2, 32), torch.randn(2, 2, 32)
    empty = torch.zeros(4, 16, 2, 32), torch.zeros(4, 16, 2, 32)
    written = in_layout(empty, layout)
    reshape_and_cache(key, value, *empty, slots)
    reshape_and_cache(key, value, *written, slots, layout=layout)
    for expected, cache in zip(in_layout(empty, layout), written):
        assert torch.equal(expected, cache)
    pairs = torch.tensor([[2, 0], [0, 3]])
    copy_blocks([empty[0]], [empty[1]], pairs)
    copy_blocks([written[0]], [written[1]], pairs, layout=layout)
    for expected, cache in zip(in_layout(empty, layout), written):
        assert torch.equal(expected, cache)


@pytest.mark.parametrize(
    "options",
    [
        dict(sliding_window=1),
        dict(sliding_window=513),
        dict(softcap=2.0),
        dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.125, 0.0625, 1.0, 0.7, 0.3, 0.1])),
        dict(alibi_slopes=torch.full((8,), 0.01), sliding_window=100, softcap=3.0),
    ],
    ids=lambda options: "-".join(options),
)
def test_bends_equal_dense(options):
    """Every token's logits by the formula of the docstring, written out."""
    paged = Paged([5, 512, 700], HEADS["GQA"])
    query = paged.query(3)
    expected = []
    for row, key, value in zip(query, paged.keys, paged.values):
        key, value = key.repeat_interleave(4, 1), value.repeat_interleave(4, 1)
        logits = torch.einsum("hd,khd->hk", row, key) * paged.scale
        if cap := options.get("softcap"):
            logits = cap * torch.tanh(logits / cap)
        distance = torch.arange(len(key)) - (len(key) - 1)
        if (slopes := options.get("alibi_slopes")) is not None:
            logits = logits + slopes[:, None] * distance
        if window := options.get("sliding_window"):
            logits = logits.masked_fill(distance <= -window, -torch.inf)
        expected.append(torch.einsum("hk,khd->hd", logits.softmax(-1), value))
    rest = (query, *paged.caches, paged.tables)
    for kernel in (paged_attention_v1, paged_attention_v2):
        out = kernel(*rest, paged.seq_lens, paged.scale, **options)
        torch.testing.assert_close(out, torch.stack(expected), **CLOSE)
    starts = torch.tensor([0, 1, 2, 3])
    out = context_attention_fwd(*rest, starts, paged.seq_lens, paged.scale, **options)
    torch.testing.assert_close(out, torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("kernel", [paged_attention_v1, paged_attention_v2])
def test_a_sequence_of_no_tokens_gets_zeros(kernel):
    """What a padded decode batch holds; its table may name anything."""
    paged = Paged([40, 3], HEADS["GQA"])
    query = paged.query(3)
    tables = torch.cat([paged.tables, torch.full_like(paged.tables[:1], 10**6)])
    seq_lens = torch.cat([paged.seq_lens, torch.tensor([0])])
    out = kernel(query, *paged.caches, tables, seq_lens, paged.scale)
    assert torch.equal(out[2], torch.zeros_like(out[2]))
    assert torch.equal(out[:2], paged.decode(kernel, query[:2]))


def test_int8_rounds_and_cuts_off():
    """Ties go to even, 127 steps either way, one scale for each head."""
    key = torch.tensor([[[0.5, -1.5, 200.0], [1.0, 3.0, -900.0]]])
    cache = torch.zeros(1, 2, 2, 3, dtype=torch.int8), torch.zeros(1, 2, 2, 3, dtype=torch.int8)
    reshape_and_cache(key, key, *cache, torch.tensor([1]), torch.tensor([1.0, 2.0]), 2.0)
    assert [[0, -2, 127], [0, 2, -127]] == cache[0][0, 1].tolist()
    assert [[0, -1, 100], [0, 2, -127]] == cache[1][0, 1].tolist()


@pytest.mark.parametrize("kernel", [paged_attention_v1, paged_attention_v2])
def test_out_is_written_and_returned(kernel):
    paged = Paged([40, 3], HEADS["GQA"])
    query = paged.query(2)
    out = torch.zeros(2, 8, 32, dtype=torch.float16)
    rest = (paged.tables, paged.seq_lens, paged.scale)
    assert kernel(query, *paged.caches, *rest, out=out) is out
    assert torch.equal(paged.decode(kernel, query).half(), out)


# -- bad input: the offending index -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.tables.__setitem__((1, 2), 99), r"block_tables\[1, 2\] is 99: the cache has blocks 0 to 24"),
        (lambda p: p.tables.__setitem__((0, 0), -1), r"block_tables\[0, 0\] is -1"),
        (lambda p: p.seq_lens.__setitem__(1, -7), r"seq_lens\[1\] is -7: a length cannot be negative"),
        (lambda p: p.seq_lens.__setitem__(0, 500), r"seq_lens\[0\] is 500: that takes 32 blocks of 16, and the table"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kernel", [paged_attention_v1, paged_attention_v2, context_attention_fwd])
def test_tables_and_lengths_are_checked(kernel, change, message):
    paged = Paged([40, 130], HEADS["GQA"])
    assert (25, 10) == (len(paged.caches[0]), paged.tables.shape[1])
    change(paged)
    starts = (torch.tensor([0, 1, 2]),) if kernel is context_attention_fwd else ()
    with pytest.raises(ValueError, match=message):
        kernel(
            paged.query(2), *paged.caches, paged.tables, *starts, paged.seq_lens, paged.scale
        )  # fmt: skip


def test_what_lies_behind_a_sequence_is_not_checked():
    paged = Paged([40, 130], HEADS["GQA"])
    paged.tables[0, 3:] = 10**6
    paged.decode(paged_attention_v1, paged.query(2))


@pytest.mark.parametrize("slot", [64, -2])
def test_a_slot_beyond_the_cache(slot):
    cache = torch.zeros(4, 16, 2, 32)
    key = torch.zeros(3, 2, 32)
    message = rf"slot_mapping\[1\] is {slot}: the cache has slots 0 to 63"
    with pytest.raises(ValueError, match=message):
        reshape_and_cache(key, key, cache, cache.clone(), torch.tensor([0, slot, -1]))
    assert not cache.any()


def test_a_pair_beyond_the_caches():
    with pytest.raises(
        ValueError, match=r"block_mapping\[1, 1\] is 3: that cache has blocks 0 to 2"
    ):
        swap_blocks(
            torch.zeros(5, 4, 1, 8), torch.zeros(3, 4, 1, 8), torch.tensor([[4, 0], [0, 3]])
        )


def test_a_chunk_longer_than_its_sequence():
    paged = Paged([4, 40], HEADS["GQA"])
    starts = torch.tensor([0, 5, 6])
    with pytest.raises(ValueError, match="sequence 0 of 4 tokens has the queries 0 to 5 of 6"):
        context_attention_fwd(
            paged.query(6), *paged.caches, paged.tables, starts, paged.seq_lens, paged.scale
        )


def test_unsupported_says_what_is_supported():
    fits = dict(head_size=64, num_heads=8, num_kv_heads=2, block_size=16, dtype=torch.bfloat16)
    assert [] == unsupported(**fits)
    assert [] == unsupported(**fits, cache_dtype=torch.float8_e4m3fn, layout="split")
    assert [
        "head size 8 in layout split: it must be a multiple of 16 bytes' worth of elements"
    ] == unsupported(**fits | dict(head_size=8), cache_dtype=torch.int8, layout="split")
    assert ["cache dtype uint8: float32, float16, bfloat16, float8_e4m3fn, float8_e5m2, int8 are supported "
            "(a uint8 cache of vLLM's is a view of float8_e4m3fn)"
    ] == unsupported(**fits, cache_dtype=torch.uint8)  # fmt: skip
