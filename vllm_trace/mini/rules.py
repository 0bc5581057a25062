"""What differs between vLLM releases, by name, each with the release that changed it.

Follows: block_pool.py, kv_cache_manager.py, sched/scheduler.py of the releases in `KNOWN_RELEASES`, with which mini
was compared. The release of a rule is the first whose source has it, of 0.8.5, 0.9.2, 0.10.2 and all from 0.11.2 to
0.33.0 but 0.15.
Leaves out: differences in parts that mini does not have (connectors, speculative decoding, Mamba, multimodal input).

A rule is a yes or no that the code of mini asks at one place. `rules_for("0.32.0")` answers all of them at once.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import Any


def _since(release: str, sentence: str, default: bool = False) -> Any:
    """A rule that holds since `release`; `sentence` says what it means."""
    return field(default=default, metadata={"since": release, "sentence": sentence})


def _until(release: str, sentence: str) -> Any:
    """A rule that held in `release` and before, and no longer after it."""
    return field(default=False, metadata={"until": release, "sentence": sentence})


@dataclass(frozen=True)
class Rules:
    """The behaviour of one release: `mini` with these rules hands out the ids that this release hands out."""

    release: str = "0.32.0"

    # The pool and the tables.
    unhashed_blocks_first: bool = _since(
        "0.24.0",
        "A freed block without a hash goes to the front of the free queue, a hashed one to the end;"
        " before, all went to the end (in 0.23, all but those of sliding windows).",
    )
    free_tail_first: bool = _since(
        "0.9.2",
        "A request's blocks are always freed tail first; before, only when prefix caching was on.",
    )
    null_block_counted: bool = _until(
        "0.32.0",
        "touch and free also count on the null block, so its ref_cnt drifts;"
        " afterwards they pass over it.",
    )
    null_head_freed: bool = _until(
        "0.32.0",
        "free hands the leading null blocks of a window's table to the pool too;"
        " afterwards they are cut off first.",
    )
    windows_follow_processed: bool = _since(
        "0.26.0",
        "A window moves on with the tokens whose step has been answered;"
        " before, with those that were planned.",
    )
    fixed_hash_seed: bool = _since(
        "0.29.0",
        "The parent of a first block is the hash of a fixed seed;"
        " before, of random bytes in each process unless PYTHONHASHSEED is set.",
    )
    sparse_window_cache: bool = _since(
        "0.23.0",
        "A sliding-window group hashes only blocks that a later request can resume from"
        " (prefix_cache_retention_interval; before 0.29 an environment variable).",
    )
    # Admission.
    whole_sequence_admission: bool = _since(
        "0.19.0",
        "A waiting request is admitted only when its whole sequence fits, not only its first chunk"
        " (scheduler_reserve_full_isl).",
    )
    whole_sequence_test_inside: bool = _since(
        "0.21.0",
        "That test is part of allocate_slots, and who fails it is refused the chunk of this step;"
        " before, it was a call of its own, about all that is left of the sequence.",
    )
    watermark: bool = _since(
        "0.24.0",
        "A share of the blocks may be kept free when a request is admitted beside running ones.",
    )
    # The step.
    alone_means_unthrottled: bool = _since(
        "0.31.0",
        "long_prefill_token_threshold is ignored while the engine holds one request only.",
    )
    one_position_left: bool = _since(
        "0.9.2",
        "A running request is never given the last position of max_model_len,"
        " which belongs to the token that it samples.",
    )
    index_follows_victim: bool = _since(
        "0.28.0",
        "PRIORITY: nobody is passed over when a victim stood before the request being served;"
        " before, only if the victim was scheduled in this step.",
    )
    self_preempted_goes_on: bool = _since(
        "0.33.0",
        "PRIORITY: when a request preempts itself, the ones behind it are still tried;"
        " before, the loop over running requests ended.",
    )
    stale_output_waits: bool = _since(
        "0.27.0",
        "Async: a preempted request waits until its steps in flight have been answered,"
        " and its placeholders are void.",
    )
    output_caches_processed: bool = _since(
        "0.33.0",
        "Async: when an output arrives, blocks are hashed up to computed minus in-flight tokens;"
        " before, minus the output placeholders.",
    )

    @property
    def none_hash_seed(self) -> str | None:
        """What the parent of a first block is hashed from, or None where each process drew its own."""
        return "vllm-none-hash" if self.fixed_hash_seed else None

    def describe(self) -> list[str]:
        """One line per rule: its value here, the release that changed it, the sentence."""
        lines = []
        for rule in fields(self)[1:]:
            bound = "since" if "since" in rule.metadata else "until"
            value = "yes" if getattr(self, rule.name) else "no"
            lines.append(
                f"{rule.name}: {value} ({bound} {rule.metadata[bound]}). {rule.metadata['sentence']}"
            )
        return lines


KNOWN_RELEASES = ("0.8.5", "0.9.2", "0.11.0", "0.11.2", "0.20.2", "0.32.0", "0.33.0")


def rules_for(release: str) -> Rules:
    """The rules of a vLLM release: `rules_for("0.32.0")`; `"0.32"` means the first 0.32 that is known.

    Local parts are ignored (`0.20.2+cu130` is `0.20.2`).
    Raises: ValueError for a release that nobody has compared with mini; it lists those that are known.
    """
    wanted = release.split("+")[0].removeprefix("v")
    for known in KNOWN_RELEASES:
        if wanted == known or (wanted.count(".") == 1 and known.startswith(wanted + ".")):
            return Rules(
                release=known, **{rule.name: _holds(rule, known) for rule in fields(Rules)[1:]}
            )
    raise ValueError(f"no rules for vLLM {release}; known: {', '.join(KNOWN_RELEASES)}")


def _holds(rule: Field[bool], release: str) -> bool:
    if "since" in rule.metadata:
        return _version(release) >= _version(rule.metadata["since"])
    return _version(release) <= _version(rule.metadata["until"])


def _version(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split("."))
