"""What the runner does around an engine; the engines themselves are in test_scenarios.py."""

import gc
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest

from vllm_trace import runner
from vllm_trace.errors import UsageError
from vllm_trace.scenario import Arrival


def test_what_the_user_has_set_is_kept(monkeypatch):
    monkeypatch.setattr(os, "environ", {"OMP_NUM_THREADS": "4"})
    made = runner.quiet_environment()
    assert "OMP_NUM_THREADS" not in made
    assert "1" == made["VLLM_DISABLE_REQUEST_ID_RANDOMIZATION"]
    assert (
        "2"
        == (monkeypatch.setattr(os, "environ", {}) or runner.quiet_environment(2))[
            "OMP_NUM_THREADS"
        ]
    )


TALKS = """
import os, subprocess, sys
from pathlib import Path
from vllm_trace import runner

print("before")
with runner.output_to(Path("engine.log")) as last_words:
    print("said")
    sys.stdout.flush()
    print("warned", file=sys.stderr)
    subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    os.write(2, b"W1121 08:16:03.858000 27280 torch/_library/triton.py:53] Triton not available\\n")
    os.write(2, b"vllm-trace: the probe of x failed\\n")
    words = last_words()
print(words.splitlines())
"""


def test_output_goes_to_a_file_that_of_children_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TALKS], cwd=tmp_path, capture_output=True, text=True
    )
    said = ["said", "warned", "child", "vllm-trace: the probe of x failed"]
    assert (f"before\n{said}\n", "") == (done.stdout, done.stderr)
    log = tmp_path / "engine.log"
    assert "Triton not available" in log.read_text()
    assert ["vllm-trace: the probe of x failed"] == runner.warnings_of(log)
    assert [] == runner.warnings_of(tmp_path / "absent")


def test_collections_are_put_off_and_come_back():
    collect = gc.collect
    with runner.no_gc():
        assert not gc.isenabled()
        assert 0 == gc.collect()
        assert gc.collect is not collect
    assert gc.isenabled()
    assert gc.collect is collect
    with pytest.raises(ZeroDivisionError), runner.no_gc():
        1 / 0  # noqa: B018
    assert gc.collect is collect


@pytest.mark.parametrize("model", ["./absent", "/absent/model", "~/absent-model", "../absent"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(model):
    with pytest.raises(UsageError, match="there is no model folder"):
        runner.model_folder(model)


def test_other_models_are_left_to_vllm(tmp_path):
    assert "facebook/opt-125m" == runner.model_folder("facebook/opt-125m")
    assert str(tmp_path) == runner.model_folder(str(tmp_path))


@dataclass
class Engine:
    """Two tokens a request and step, in the order of arrival; shaped like vLLM's ``LLMEngine``."""

    engine_core: object = None
    running: dict[str, int] = field(default_factory=dict)
    log: list[tuple[int, str]] = field(default_factory=list)
    steps: int = 0
    limits: dict[str, int] = field(default_factory=dict)

    def has_unfinished_requests(self):
        return bool(self.running)

    def abort_request(self, names):
        for name in names:
            self.log.append((self.steps, f"abort {name}"))
            self.running.pop(name, None)

    def step(self):
        self.steps += 1
        made = []
        for name in list(self.running):
            self.running[name] += 2
            finished = self.running[name] >= self.limits[name]
            made.append(_output(name, self.running[name], finished))
            if finished:
                del self.running[name]
        return made


def _output(name, count, finished):
    @dataclass
    class Part:
        token_ids: list
        text: str

    @dataclass
    class Output:
        request_id: str
        outputs: list
        finished: bool

    return Output(name, [Part(list(range(count)), "x" * count)], finished)


def drive(*arrivals):
    engine = Engine(limits={arrival.name: arrival.max_tokens for arrival in arrivals})

    class Driver(runner._Driver):
        def _add(self, arrival):
            engine.log.append((engine.steps, arrival.name))
            engine.running[arrival.name] = 0

    llm = type("LLM", (), {"llm_engine": engine})()
    outcome = runner.Outcome()
    Driver(llm, list(arrivals), outcome).run()
    return engine.log, outcome


def test_requests_are_added_at_their_step():
    log, outcome = drive(
        Arrival("a", max_tokens=6), Arrival("b", max_tokens=2, step=2), Arrival("c", max_tokens=2)
    )
    assert [(0, "a"), (0, "c"), (2, "b")] == log
    assert {"a": 6, "b": 2, "c": 2} == {n: len(ids) for n, (ids,) in outcome.token_ids.items()}
    assert {"a": ["xxxxxx"], "b": ["xx"], "c": ["xx"]} == outcome.texts


def test_nothing_waits_for_steps_of_an_idle_engine():
    log, _ = drive(Arrival("a", max_tokens=2), Arrival("b", max_tokens=2, step=100))
    assert [(0, "a"), (1, "b")] == log


def test_a_request_comes_after_another_has_finished():
    log, _ = drive(
        Arrival("b", max_tokens=2, after="a"),
        Arrival("a", max_tokens=8),
        Arrival("c", max_tokens=2, after="b"),
    )
    assert [(0, "a"), (4, "b"), (5, "c")] == log


def test_clients_go_away_while_they_run_or_wait():
    log, outcome = drive(
        Arrival("runs", max_tokens=20, abort_after=3),
        Arrival("waits", max_tokens=20, abort_after=-1),
        Arrival("next", max_tokens=2, after="runs"),
    )
    assert [(0, "runs"), (0, "waits"), (0, "abort waits"), (2, "abort runs"), (2, "next")] == log
    assert 4 == len(outcome.token_ids["runs"][0])
    assert "waits" not in outcome.token_ids
