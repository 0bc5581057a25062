"""``vllm-trace bench``: on the real engine once, its texts and plots from those figures, and bad input."""

import json
from pathlib import Path

import pytest
from helpers import run_cli
from recorded import needs_vllm

from vllm_trace import cli, render
from vllm_trace.benchmark import measure, page, view
from vllm_trace.benchmark.arms import Outcome, Plan, workload
from vllm_trace.errors import UsageError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, figures) of one run of all tests."""
    folder = tmp_path_factory.mktemp("bench")
    done = run_cli("bench", "--quick", "--requests", 24, "--budget", 2048, "--page", "docs/results.md",
                   "-o", "out", "--json", cwd=folder)  # fmt: skip
    assert 0 == done.returncode, done.stderr
    return folder, json.loads(done.stdout)


@needs_vllm
@pytest.mark.slow
def test_all_three_tests_on_the_real_engine(made):
    folder, figures = made
    assert {"about", "throughput", "scaling", "memory"} <= figures.keys()
    arms = {arm["arm"]: arm for arm in figures["throughput"]["arms"]}
    # The same greedy tokens from three caches in two programs: the arms do the same work.
    assert [24, 24, 24] == [arms[name]["same_tokens"] for name in ("contiguous", "paged", "vllm")]
    # 2048 tokens are 4 rows of 512; blocks take in more.
    assert 4 == arms["contiguous"]["peak_running"] < arms["vllm"]["peak_running"]
    assert arms["contiguous"]["num_steps"] > arms["vllm"]["num_steps"]
    # The pages of the small engine are vLLM's policy: the same steps.
    same = ("num_steps", "peak_running", "num_preemptions", "mean_running")
    assert [arms["paged"][key] for key in same] == [arms["vllm"][key] for key in same]
    memory = figures["memory"]
    assert 24 == memory["vllm"]["blocks_as_calculated"] == memory["vllm"]["blocks_compared"]
    assert memory["contiguous"]["fill"] < 0.5 < memory["vllm"]["fill"] <= 1
    assert memory["vllm"]["peak_running"] == arms["vllm"]["peak_running"]
    assert (2048 // 32 + 1) * 32 * 2 * 2 * 2 * 32 * 4 == memory["vllm"]["cache_bytes"]
    assert 2048 * 2 * 2 * 2 * 32 * 4 == memory["contiguous"]["cache_bytes"]
    assert memory["process"]["bytes"] > memory["vllm"]["cache_bytes"]
    assert 24 / arms["vllm"]["requests_s"]["median"] == pytest.approx(
        figures["throughput"]["requests"]["output_tokens"] / arms["vllm"]["tokens_s"]["median"]
    )
    for file in ("out/bench.json", "out/bench.png", "docs/results.md", "docs/results.json"):
        assert (folder / file).stat().st_size > 500
    assert json.loads((folder / "docs/results.json").read_text()) == figures
    assert list((folder / "out/trace").glob("*.vtrace"))


@needs_vllm
@pytest.mark.slow
def test_the_texts_of_those_figures(made):
    folder, figures = made
    text = render.plain(view.report(figures))
    assert max(map(len, text.splitlines())) <= 80
    for part in ("Throughput", "Scaling", "Memory, step by step", "A tiny model on a CPU"):
        assert part in text
    assert (folder / "docs/results.md").read_text() == page.markdown(figures)
    assert "`python -m bench`" in page.markdown(figures)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--test", "troughput"], "did you mean 'throughput'"),
        (["--block-size", "0"], "--block-size is 0"),
        (["--budget", "-1"], "--budget is -1"),
        (["--budget", "4100"], "no multiple of the block size 32"),
        (["--max-model-len", "0"], "--max-model-len is 0"),
        (["--requests", "0"], "--requests is 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--page", "results.html"], "does not end in .md"),
        (["--model", "./nowhere"], "there is no model folder ./nowhere"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(capsys, monkeypatch, tmp_path, words, said):
    if words[0] == "--model":
        pytest.importorskip(
            "vllm", reason="vLLM is not installed: there is no engine to give a model to"
        )
    monkeypatch.chdir(tmp_path)
    assert 2 == cli.main(["bench", *words])
    told = capsys.readouterr()
    assert "" == told.out and said in told.err
    assert [] == [path for path in tmp_path.rglob("*") if path.is_file()]


@needs_vllm
def test_a_block_size_that_this_vllm_does_not_take(capsys, monkeypatch, tmp_path):
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("only the CPU attention wants multiples of 32")
    monkeypatch.chdir(tmp_path)
    assert 2 == cli.main(["bench", "--block-size", "16"])
    assert "multiples of 32" in capsys.readouterr().err


def test_without_vllm_it_says_what_is_there_instead(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    monkeypatch.setitem(__import__("sys").modules, "vllm.platforms", None)
    monkeypatch.chdir(tmp_path)
    assert 2 == cli.main(["bench"])
    told = capsys.readouterr().err
    assert "bench needs a vLLM" in told and "vllm-trace memory" in told


def test_a_model_that_mini_does_not_follow_is_measured_alone(tmp_path):
    from vllm_trace.cli.bench import _small_arms

    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    arms, (note,) = _small_arms(Plan(model=str(tmp_path)), "cpu")
    assert [] == arms and "no contiguous cache beside vLLM: mini follows llama and opt" in note


def test_figures_of_vllm_alone_are_shown():
    alone = Fake("vllm", [1] * 99)
    plan = Plan(num_requests=3, repeats=2)
    figures = {
        "about": {"model": "m", "dtype": "float16", "device": "cuda", "machine": "x", "budget": 4096,
                  "max_model_len": 512, "repeats": 2, "notes": ["no memory test: no table"], "command": "c",
                  "seconds": 1.0, "date": "d", "versions": {"vLLM": "0"}, "seed": 0},
        "throughput": measure.throughput([alone], plan, 768),
        "scaling": measure.scaling([alone], plan, 768, lambda text: None),
    }  # fmt: skip
    text = render.plain(view.report(figures))
    assert "no memory test" in text and "A tiny model on a CPU" not in text
    assert "no memory test" in page.markdown(figures)


def test_requests_fit_differ_and_share_nothing():
    plan = Plan()
    jobs = workload(plan, 500, 768)
    assert jobs == workload(plan, 500, 768)
    assert all(len(job.prompt) + job.max_tokens <= plan.max_model_len for job in jobs)
    mean = sum(len(job.prompt) + job.max_tokens for job in jobs) / 500
    assert 0.2 < mean / plan.max_model_len < 0.3
    assert len({job.prompt[:4] for job in jobs if len(job.prompt) > 3}) > 490


class Fake:
    """An arm that takes the seconds it is told."""

    def __init__(self, name, seconds):
        self.name = self.what = name
        self.seconds = iter(seconds)

    def run(self, jobs):
        outputs = {job.name: [1] * job.max_tokens for job in jobs}
        count = sum(map(len, outputs.values()))
        return Outcome(next(self.seconds), count, outputs, [0.5], 3, 2, 1.5, 0)


def test_figures_are_medians_of_the_rounds_that_count():
    """The first round is thrown away; a ratio is taken within its round."""
    plan = Plan(num_requests=3, repeats=3)
    slow, fast = Fake("slow", [100, 2, 4, 8]), Fake("fast", [100, 1, 1, 1])
    made = measure.throughput([slow, fast], plan, 768)
    tokens = made["requests"]["output_tokens"]
    one, two = made["arms"]
    assert tokens / 4 == one["tokens_s"]["median"]
    # Of tokens/8, tokens/4, tokens/2: halfway to the median, both ways.
    assert (tokens * 3 / 16, tokens * 3 / 8) == (one["tokens_s"]["low"], one["tokens_s"]["high"])
    assert {"low": 3.0, "median": 4.0, "high": 6.0} == two["times"]
    assert 3 == two["same_tokens"]


def test_the_order_of_the_arms_moves_on():
    seen = []

    class Noting(Fake):
        def run(self, jobs):
            seen.append(self.name)
            return super().run(jobs)

    measure.rounds([Noting("a", [1] * 9), Noting("b", [1] * 9), Noting("c", [1] * 9)], [], 2)
    assert list("abcbcacab") == seen


# Another machine's figures -----------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
H200 = ROOT / "reports" / "gpu" / "bench-throughput.json"


def test_another_machine_s_figures_stand_on_the_page():
    here = json.loads((ROOT / "docs" / "results.json").read_text())
    there = page.read(H200)
    text = page.markdown(here | {"also": [there]})
    assert "## On another machine: NVIDIA H200" in text
    paged = there["throughput"]["arms"][1]["tokens_s"]["median"]
    assert f"| paged | {paged:,.0f} |" in text
    assert "that was not measured here" not in text
    assert "that was not measured here" in page.markdown(here | {"also": []})


@pytest.mark.parametrize("content", [None, "{", "[]", '{"about": {"machine": "x"}}'])
def test_figures_that_are_none(content, tmp_path):
    file = tmp_path / "bench.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=r"cannot read|holds no figures"):
        page.read(file)
