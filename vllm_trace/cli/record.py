"""``record``: any command, with tracing on in every vLLM process that it starts."""

from __future__ import annotations

import argparse
import sys

from vllm_trace.cli.parser import AddVerb, recording_flags, recording_options
from vllm_trace.cli.printing import print_json
from vllm_trace.errors import UsageError


def add(verb: AddVerb) -> None:
    record = verb(
        "record", _record, "Run any command with tracing on in every vLLM process",
        "record -- vllm serve MODEL --port 8000",
    )  # fmt: skip
    recording_flags(record)
    record.add_argument("command", nargs=argparse.REMAINDER, help="-- and the command")


def _record(arguments: argparse.Namespace) -> int:
    from vllm_trace import reports
    from vllm_trace.record import record

    command = arguments.command[1:] if arguments.command[:1] == ["--"] else arguments.command
    if not command:
        raise UsageError("record needs a command", hint="vllm-trace record -- python script.py")
    options = recording_options(arguments)
    run = reports.new_run("record", arguments.output)
    try:
        code = record(command, run.trace, options)
    except UsageError:
        run.discard()
        raise
    said = reports.describe_recording(run)
    print(f"vllm-trace: {said}", file=sys.stderr)
    if arguments.json:
        print_json({"schema": 1, "code": code, "trace": str(run.trace), "said": said})
    return code
