"""A fake vLLM that is importable for the length of a test, and a recorder to hook it with."""

import importlib

import pytest
from fakes.engine import imported, unpack

from vllm_trace.hooks.install import install
from vllm_trace.hooks.resolve import resolve
from vllm_trace.hooks.source import VllmSource
from vllm_trace.hooks.table import HookTable
from vllm_trace.options import Options
from vllm_trace.recorder import Recorder
from vllm_trace.tracefile import TraceFile


class Fake:
    """The package folder, and what tests do with it."""

    def __init__(self, package, folder):
        self.source = VllmSource.at(package)
        self.folder = folder
        self.recorder = Recorder(Options(dir=str(folder), failures=3))
        self.installed = []

    def cls(self, name):
        module = {"Calls": "calls"}.get(name, "block_pool")
        return getattr(importlib.import_module(f"vllm.v1.core.{module}"), name)

    def install(self, *hooks):
        done = install(resolve(HookTable("==7.5.*", hooks), self.source), self.recorder)
        self.installed.append(done)
        return done

    def events(self):
        self.recorder.close()
        return [
            event for path in self.folder.glob("*.vtrace") for event in TraceFile(path).events()
        ]


@pytest.fixture
def fake_with(tmp_path):
    """Makes the fake with edits: (file, old, new) each."""
    open_ones = []

    def make(*edits, version=""):
        package = unpack(tmp_path / "lib", *edits, version=version)
        inside = imported(package)
        inside.__enter__()
        made = Fake(package, tmp_path / "trace")
        open_ones.append((inside, made))
        return made

    yield make
    for inside, made in reversed(open_ones):
        for done in made.installed:
            done.undo()
        made.recorder.close()
        inside.__exit__(None, None, None)


@pytest.fixture
def fake(fake_with):
    return fake_with()
