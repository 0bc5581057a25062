"""``memory``: the KV-cache calculator."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_trace.cli.parser import AddVerb
from vllm_trace.cli.printing import print_json, print_text
from vllm_trace.errors import UsageError


def add(verb: AddVerb) -> None:
    memory = verb(
        "memory", _memory, "Calculate what a KV cache wastes, holds and shares",
        "memory --gpu l4 --model llama-3-8b --max-model-len 4096",
    )  # fmt: skip
    memory.add_argument("--gpu", default="v100-32gb", help="a preset (see --list)")
    memory.add_argument("--gpu-memory", type=float, metavar="GIB", help="any other size")
    memory.add_argument("--model", default="llama-2-7b", help="a preset, or a folder of a model")
    shape = memory.add_argument_group("another shape (over the model's)")
    for flag, what in (
        ("--layers", "decoder layers"), ("--heads", "query heads"), ("--kv-heads", "KV heads"),
        ("--head-size", "elements of a head"), ("--params", "weights, in billions"),
    ):  # fmt: skip
        shape.add_argument(flag, type=float if flag == "--params" else int, help=what)
    memory.add_argument("--dtype", default="float16", help="of the weights")
    memory.add_argument("--kv-dtype", default="auto", help="of keys and values")
    memory.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks")
    memory.add_argument("--block-size", type=int, help="tokens (default 16; a trace's own)")
    memory.add_argument("--max-model-len", type=int, default=0, help="tokens (default: model's)")
    memory.add_argument("--utilization", type=float, default=0.92, help="of the GPU's memory")
    memory.add_argument("--overhead", type=float, default=1.0, metavar="GIB", help="beside weights")
    work = memory.add_argument_group("requests")
    work.add_argument("--workload", default="sharegpt", help="how long requests are (see --list)")
    work.add_argument("--requests", type=int, default=1000, help="how many are drawn")
    work.add_argument("--seed", type=int, default=0)
    work.add_argument("--lengths", default="", help="prompt+output,… instead")
    work.add_argument("--trace", type=Path, help="the requests of a trace instead")
    work.add_argument("--users", type=int, default=100, help="who share a prefix")
    work.add_argument("--prefix", type=int, default=500, help="tokens that they share")
    work.add_argument("--own", type=int, default=100, help="tokens of their own")
    memory.add_argument("--plot", type=Path, metavar="FILE", help="four plots, .png or .svg")
    memory.add_argument("--theme", default="light", help="of the plots: light or dark")
    memory.add_argument(
        "--check", type=int, nargs="?", const=1000, metavar="N",
        help="compare with the installed KVCacheManager on N random request sets (1000)",
    )  # fmt: skip
    memory.add_argument("--tutorial", action="store_true", help="judge the tutorial's key numbers")
    memory.add_argument("--list", action="store_true", help="list the presets, calculate nothing")


def _memory(arguments: argparse.Namespace) -> int:
    from vllm_trace.memory import view

    if arguments.list:
        return _list(arguments.json)
    from vllm_trace.memory.calculate import blocks_of, calculate, sharing

    setting, workload, blocks = _question(arguments)
    shared = sharing(arguments.users, arguments.prefix, arguments.own, setting.block_size)
    made = calculate(setting, workload, shared)
    document: dict[str, Any] = made.to_dict()
    checks, failed = [], False
    if blocks is not None:
        ours = [blocks_of(request.held, blocks.block_size) for request in workload.requests]
        checks.append(view.of_trace(blocks, ours))
        document["trace"] = {"blocks": list(blocks.blocks), "calculated": ours}
        failed = bool(blocks.blocks) and list(blocks.blocks) != ours
    if arguments.check is not None:
        from vllm_trace.memory import real

        verdict = real.check(arguments.check, arguments.seed)
        checks.append(verdict.text())
        document["check"] = vars(verdict)
        failed = failed or not verdict.equal
    if arguments.plot:
        from vllm_trace.memory.plot import plot

        plot(made, arguments.plot, arguments.theme)
        print(f"Written: {arguments.plot}", file=sys.stderr)
    found = []
    if arguments.tutorial:
        from vllm_trace.memory.keynumbers import key_numbers

        found = key_numbers()
        document["tutorial"] = [vars(one) for one in found]
    if arguments.json:
        print_json(document)
    else:
        print_text(view.report(made, checks))
        if found:
            print_text("")
            print_text(view.numbers(found))
    return 1 if failed else 0


def _list(as_json: bool) -> int:
    from vllm_trace.memory import view
    from vllm_trace.memory.shapes import GPUS, MODELS
    from vllm_trace.memory.workload import DISTRIBUTIONS

    if as_json:
        tables: dict[str, Any] = {"gpus": GPUS, "models": MODELS, "workloads": DISTRIBUTIONS}
        print_json(
            {"schema": 1}
            | {name: {key: vars(one) for key, one in rows.items()} for name, rows in tables.items()}
        )
    else:
        print_text(view.presets())
    return 0


def _question(arguments: argparse.Namespace) -> tuple[Any, Any, Any]:
    """(setting, workload, the trace's blocks) that the flags ask for."""
    from vllm_trace.memory import shapes, workload
    from vllm_trace.memory.calculate import Setting

    if arguments.lengths and arguments.trace:
        raise UsageError("--lengths and --trace both say how long requests are: give one of them")
    if arguments.params is not None and not 0 <= arguments.params < 1e6:
        raise UsageError(f"--params is {arguments.params:g} billion, not 0 or more")
    model = shapes.model_named(arguments.model)
    asked = {
        "num_layers": arguments.layers,
        "num_heads": arguments.heads,
        "num_kv_heads": arguments.kv_heads,
        "head_size": arguments.head_size,
        "num_params": None if arguments.params is None else int(arguments.params * 1e9),
    }
    over: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    if over:
        weights: dict[str, Any] = {"weight_bytes": 0} if "num_params" in over else {}
        model = replace(model, name=f"{model.name}, changed", **over, **weights)
    blocks, block_size = None, arguments.block_size
    if arguments.trace:
        work, blocks = workload.of_trace(arguments.trace)
        if block_size is None:
            block_size = blocks.block_size or None
    setting = Setting(
        gpu=shapes.gpu_named("" if arguments.gpu_memory is not None else arguments.gpu, arguments.gpu_memory),
        model=model,
        dtype=arguments.dtype,
        kv_dtype=arguments.kv_dtype,
        tp=arguments.tp,
        block_size=16 if block_size is None else block_size,
        max_model_len=arguments.max_model_len,
        utilization=arguments.utilization,
        overhead_gib=arguments.overhead,
    ).checked()  # fmt: skip
    if arguments.lengths:
        work = workload.given(arguments.lengths, setting.length)
    elif not arguments.trace:
        work = workload.drawn(
            arguments.workload, arguments.requests, setting.length, arguments.seed
        )
    return setting, work, blocks
