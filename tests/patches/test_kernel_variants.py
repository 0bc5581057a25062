"""The variant of a kernel and its numbers, from metadata as vLLM builds it; numbers are integers."""

import struct
from types import SimpleNamespace

import msgspec
import pytest

from vllm_trace.events import AnyEvent, AttentionPlanned
from vllm_trace.patches.kernel_variants import plan_of

BATCH = {"num_actual_tokens": 3, "max_query_len": 1, "max_seq_len": 40}


def metadata(name, **fields):
    return type(name, (), BATCH | fields)()


class Plan(bytes):
    """The CPU build's plan, as far as it is read: an int8 tensor over a C++ struct."""

    def numel(self):
        return len(self)

    def numpy(self):
        return SimpleNamespace(tobytes=lambda: bytes(self))

    def __getitem__(self, some):
        return Plan(super().__getitem__(some))


def plan(isa, splits):
    return Plan(bytes(64) + struct.pack("<7i", isa, 6, 2, splits, 4, 3, 128))


CPU = {
    "work_items": 6,
    "reduction_items": 2,
    "threads": 4,
    "effective_threads": 3,
    "split_threshold": 128,
}
SHAPE = SimpleNamespace(shape=(3,))


@pytest.mark.parametrize(
    ("given", "kernel", "variant", "numbers"),
    [
        (
            metadata("CPUAttentionMetadata", scheduler_metadata=plan(1, 2)),
            "cpu_attention_with_kv_cache",
            "vec/split-kv",
            BATCH | CPU | {"reduction_splits": 2},
        ),
        (
            metadata("CPUAttentionMetadata", scheduler_metadata=plan(0, 0)),
            "cpu_attention_with_kv_cache",
            "amx/whole",
            BATCH | CPU | {"reduction_splits": 0},
        ),
        (metadata("CPUAttentionMetadata"), "cpu_attention_with_kv_cache", "", BATCH),
        (
            metadata("FlashAttentionMetadata", max_num_splits=0, scheduler_metadata=None),
            "flash_attn_varlen_func",
            "kernel-heuristic",
            BATCH | {"max_num_splits": 0, "planned_ahead": 0},
        ),
        (
            metadata("FlashAttentionMetadata", max_num_splits=32, scheduler_metadata=object()),
            "flash_attn_varlen_func",
            "splits<=32",
            BATCH | {"max_num_splits": 32, "planned_ahead": 1},
        ),
        (
            metadata(
                "TritonAttentionMetadata",
                seq_lens=SHAPE,
                seq_threshold_3D=8,
                num_par_softmax_segments=16,
            ),
            "unified_attention",
            "3D",
            BATCH | {"num_seqs": 3, "seq_threshold_3D": 8, "segments": 16},
        ),
        (
            metadata("TritonAttentionMetadata", seq_lens=SHAPE, seq_threshold_3D=2),
            "unified_attention",
            "2D",
            BATCH | {"num_seqs": 3, "seq_threshold_3D": 2, "segments": 0},
        ),
        (
            metadata(
                "TritonAttentionMetadata", seq_lens=SHAPE, seq_threshold_3D=8, max_query_len=2
            ),
            "unified_attention",
            "2D",
            BATCH | {"num_seqs": 3, "seq_threshold_3D": 8, "segments": 0, "max_query_len": 2},
        ),
        (metadata("FlexAttentionMetadata"), "FlexAttention", "", BATCH),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_plan_says_kernel_variant_and_the_numbers_of_the_choice(
    given, kernel, variant, numbers
):
    assert (kernel, variant, numbers) == plan_of(given)
    event = AttentionPlanned(1, 0, *plan_of(given))
    read = msgspec.msgpack.decode(msgspec.msgpack.encode([event]), type=list[AnyEvent])
    assert [event] == read, "what is written can be read: a bool in place of a number cannot"
