"""``doctor``: what is installed, which hooks resolve, and what each absence costs."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_trace.cli.parser import AddVerb
from vllm_trace.cli.printing import print_json, print_text


def add(verb: AddVerb) -> None:
    doctor = verb(
        "doctor", _doctor, "What is installed, and which hooks resolve", "doctor --source vllm-src"
    )
    doctor.add_argument(
        "--source", type=Path, help="an unpacked vLLM to look at, not the installed"
    )


def _doctor(arguments: argparse.Namespace) -> int:
    from vllm_trace import render
    from vllm_trace.doctor import diagnose

    found = diagnose(arguments.source)
    if arguments.json:
        print_json(found.to_dict())
        return 0 if found.healthy else 1
    print_text(render.diagnosis(found))
    return 0 if found.healthy else 1
