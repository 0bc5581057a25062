"""Whether two traces can be compared at all, and in which settings their engines differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from vllm_trace.diff.facts import Seen
from vllm_trace.errors import TraceError
from vllm_trace.trace import Trace


@dataclass
class Setting:
    """A setting in which the two engines differ."""

    name: str
    a: Any
    b: Any


def demand_comparable(a: Trace, b: Trace, seen_a: Seen, seen_b: Seen) -> None:
    """Raises: ``TraceError`` when there is nothing in common to look at."""
    for which, trace, seen in (("A", a, seen_a), ("B", b, seen_b)):
        where = trace.files[0].path.parent
        if not seen.num_steps:
            raise TraceError(
                f"cannot compare: {which} ({where}) holds no step of a scheduler",
                hint="Give the folder of the run, not one worker's file",
            )
        if not seen.arrived:
            raise TraceError(f"cannot compare: {which} ({where}) holds no request's arrival")
    if seen_a.config and seen_b.config:
        kinds_a = [group.kind for group in seen_a.config.groups]
        kinds_b = [group.kind for group in seen_b.config.groups]
        if kinds_a != kinds_b:
            raise TraceError(
                "cannot compare: A has the KV-cache groups "
                f"{', '.join(kinds_a)}, B has {', '.join(kinds_b)}; their block tables do not "
                "stand for the same",
                hint="Compare two runs of one model architecture",
            )
    if len(seen_a.schedulers) != len(seen_b.schedulers):
        raise TraceError(
            f"cannot compare: A has {len(seen_a.schedulers)} schedulers, B has "
            f"{len(seen_b.schedulers)} (data parallel), each with blocks of its own",
            hint="Compare one engine's file with the other's",
        )


def settings_that_differ(
    a: Trace, b: Trace, seen_a: Seen, seen_b: Seen
) -> tuple[list[Setting], list[str]]:
    """Settings that both recorded and that differ; and which only one recorded, in words."""
    left, right = _configuration(a, seen_a), _configuration(b, seen_b)
    differ = [
        Setting(name, value, right[name])
        for name, value in left.items()
        if name in right and value != right[name]
    ]
    only = []
    for which, mine, other in (("A", left, right), ("B", right, left)):
        names = [name for name in mine if name not in other]
        if names:
            only.append(f"settings that only {which} recorded: {', '.join(names)}")
    return differ, only


def _configuration(trace: Trace, seen: Seen) -> dict[str, Any]:
    """Everything that can make an engine decide otherwise, flat."""
    header = trace.header
    made: dict[str, Any] = {key: header.get(key) for key in ("vllm", "torch", "platform")}
    config = seen.config
    if config is not None:
        made |= {
            "block_size": config.block_size,
            "hash_block_size": config.hash_block_size,
            "num_blocks": config.num_blocks,
        }
        made |= {k: v for k, v in config.settings.items() if k != "vllm_version"}
        if "model" in made:
            # A folder elsewhere holds the same model.
            made["model"] = str(made["model"]).rstrip("/").rpartition("/")[2]
        for index, group in enumerate(config.groups):
            fields = msgspec.to_builtins(group)
            fields["layers"] = len(group.layers)
            made |= {f"group {index}: {key}": value for key, value in fields.items()}
    made["attention backends"] = [list(pair) for pair in sorted(seen.backends)]
    return made


def demand_same_work(seen_a: Seen, seen_b: Seen, to_a: dict[int, int], matched_by: str) -> None:
    """Raises: ``TraceError`` when neither names nor shapes of the requests have anything in common."""
    if matched_by.startswith("order") and not any(
        seen_a.shapes[left] == seen_b.shapes[right] for right, left in to_a.items()
    ):
        shapes = [", ".join(str(s.shapes[n][0]) for n in s.arrived[:4]) for s in (seen_a, seen_b)]
        raise TraceError(
            "cannot compare: no request of A is in B. No name is in both, and in the order of "
            f"arrival the prompts have {shapes[0]} … tokens in A and {shapes[1]} … in B",
            hint="Compare two runs of the same work",
        )
