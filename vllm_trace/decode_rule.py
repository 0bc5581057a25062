"""The documented rule by which PagedAttention's decode takes one pass (V1) or two (V2), with its reason.

Source: vLLM 0.8.5 to 0.11.2, vllm/attention/ops/paged_attn.py, ``PagedAttention.forward_decode``.
Needs nothing, so that a trace can be judged where there is no torch; `mini.attention.use_v1` is the same rule
where the kernels are.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTITION_SIZE = 512
"""Tokens that one partition of V2 covers."""
MAX_V1_SEQ_LEN = 8192
"""V1 keeps the logits of a whole sequence in shared memory, which ends here."""
ENOUGH_WORK = 512
"""So many (sequence, head) pairs fill the device without partitions."""


@dataclass(frozen=True)
class DecodeChoice:
    """What the rule says of one decode batch, and from which numbers."""

    variant: str
    """``V1`` or ``V2``."""
    reason: str
    max_seq_len: int
    num_seqs: int
    num_heads: int

    @property
    def num_partitions(self) -> int:
        return -(-self.max_seq_len // PARTITION_SIZE)

    @property
    def numbers(self) -> dict[str, int]:
        """All inputs of the rule, its own limits among them."""
        return {
            "max_seq_len": self.max_seq_len,
            "num_seqs": self.num_seqs,
            "num_heads": self.num_heads,
            "num_partitions": self.num_partitions,
            "partition_size": PARTITION_SIZE,
            "max_v1_seq_len": MAX_V1_SEQ_LEN,
        }


def choose(max_seq_len: int, num_seqs: int, num_heads: int) -> DecodeChoice:
    """V1 if the longest context is at most 8192 and either one partition or enough work without them.

    Units: ``max_seq_len`` tokens, of the longest context in the batch; heads are query heads.

    >>> choose(512, 1, 4).reason
    'the longest context, 512, is one partition of 512'
    >>> choose(513, 1, 4).variant, choose(513, 129, 4).variant, choose(8193, 129, 4).variant
    ('V2', 'V1', 'V2')
    """
    pairs = num_seqs * num_heads
    parts = -(-max_seq_len // PARTITION_SIZE)
    longest = f"the longest context, {max_seq_len},"
    work = f"{_of(num_seqs, 'sequence')} × {_of(num_heads, 'head')} are"
    if max_seq_len > MAX_V1_SEQ_LEN:
        variant, reason = "V2", f"{longest} is more than {MAX_V1_SEQ_LEN}"
    elif parts <= 1:
        variant, reason = "V1", f"{longest} is one partition of {PARTITION_SIZE}"
    elif pairs > ENOUGH_WORK:
        variant = "V1"
        reason = f"{work} more than {ENOUGH_WORK}, and {longest} is at most {MAX_V1_SEQ_LEN}"
    else:
        variant = "V2"
        reason = f"{longest} is {parts} partitions, and {work} at most {ENOUGH_WORK}"
    return DecodeChoice(variant, reason, max_seq_len, num_seqs, num_heads)


def _of(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
