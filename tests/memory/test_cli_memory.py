"""``vllm-trace memory``: text, JSON, plots, and what it says to bad input."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_trace import cli
from vllm_trace.memory.shapes import GPUS, MODELS

GOLD = Path(__file__).resolve().parent.parent / "gold"


def run(capsys, *words):
    code = cli.main(["memory", *map(str, words)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_text_fits_80_columns_and_has_all_three_parts(capsys):
    code, out, _ = run(
        capsys, "--tutorial", "--gpu", "h200", "--model", "llama-3.1-405b", "--tp", 8
    )
    assert 0 == code
    assert max(map(len, out.splitlines())) <= 80
    for part in (
        "Memory of 1,000 requests",
        "Users that fit",
        "100 users share 500 tokens",
        "does not hold",
    ):
        assert part in out


def test_json_is_one_document_with_the_same_figures(capsys):
    _, out, _ = run(capsys, "--json", "--tutorial", "--lengths", "20+13,5+1", "--block-size", 16)
    told = json.loads(out)
    assert 1 == told["schema"]
    assert [48] == [one["tokens"] for one in told["schemes"] if one["scheme"] == "paged"]
    assert 731 == told["sharing"]["shared"]
    assert 7 == len(told["tutorial"])


def test_a_trace_brings_its_requests_and_its_tables(capsys):
    code, out, _ = run(capsys, "--trace", GOLD / "mixed.vtrace", "--model", "tiny-llama")
    assert 0 == code
    assert "blocks of all 200 finished requests of the trace: equal" in out


def test_a_trace_with_other_blocks_is_a_finding(capsys, monkeypatch):
    from vllm_trace.memory import calculate

    monkeypatch.setattr(calculate, "blocks_of", lambda tokens, size: tokens // size + 1)
    code, out, _ = run(capsys, "--trace", GOLD / "boundary.vtrace", "--model", "tiny-llama")
    assert 1 == code and "other numbers of blocks" in out


@pytest.mark.parametrize(("ending", "theme"), [("png", "light"), ("svg", "dark")])
def test_four_plots(capsys, tmp_path, ending, theme):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: nothing can be drawn")
    path = tmp_path / f"four.{ending}"
    code, _, err = run(capsys, "--plot", path, "--theme", theme)
    assert 0 == code and str(path) in err
    assert path.read_bytes().startswith(b"\x89PNG" if ending == "png" else b"<?xml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpu", "v100"], "did you mean 'v100-16gb'"),
        (["--model", "lama-2-7b"], "did you mean 'llama-2-7b'"),
        (["--model", "./nowhere"], "cannot read nowhere"),
        (["--workload", "sharegtp"], "did you mean 'sharegpt'"),
        (["--dtype", "fp16"], "unknown dtype 'fp16'"),
        (["--kv-dtype", "int4"], "unknown KV dtype 'int4'"),
        (["--block-size", "0"], "--block-size is 0, not 1 or more"),
        (["--block-size", "-16"], "--block-size is -16"),
        (["--gpu-memory", "-1"], "--gpu-memory is -1 GiB"),
        (["--gpu-memory", "nan"], "--gpu-memory is nan GiB"),
        (["--gpu-memory", "8"], "no room for a KV cache"),
        (["--utilization", "1.5"], "--utilization is 1.5"),
        (["--utilization", "nan"], "--utilization is nan"),
        (["--overhead", "-2"], "--overhead is -2 GiB"),
        (["--overhead", "nan"], "--overhead is nan GiB"),
        (["--tp", "0"], "--tp is 0"),
        (["--tp", "3"], "cannot be split over 3 ranks"),
        (["--heads", "32", "--kv-heads", "5"], "do not share 5 KV heads evenly"),
        (["--layers", "0"], "num_layers is 0"),
        (["--params", "-1"], "--params is -1 billion"),
        (["--params", "nan"], "--params is nan"),
        (["--max-model-len", "-5"], "--max-model-len is -5"),
        (["--max-model-len", "1"], "--max-model-len is 1"),
        (["--max-model-len", "99999"], "more than the 4096 positions"),
        (["--requests", "0"], "--requests is 0"),
        (["--lengths", "12+x"], "'12+x' is no length"),
        (["--lengths", "0+1"], "prompt and output are 1 or more"),
        (["--lengths", ","], "names no request"),
        (["--users", "0"], "--users is 0"),
        (["--prefix", "-1"], "--prefix is -1"),
        (["--prefix", "0", "--own", "0"], "are both 0"),
        (["--plot", "x.jpg"], "neither in .png nor in .svg"),
        (["--theme", "drak", "--plot", "x.png"], "did you mean 'dark'"),
        (["--trace", "nowhere"], "nowhere"),
        (["--trace", str(GOLD / "batch.vtrace"), "--lengths", "1"], "give one of them"),
        (["--check", "0"], "--check is 0"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_printed(capsys, words, said):
    code, out, err = run(capsys, *words)
    assert (2, "") == (code, out)
    assert said in err and "Traceback" not in err


def test_without_matplotlib_the_plot_is_refused_and_the_table_is_not(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "--plot", "x.png")
    assert 2 == code and "pictures need matplotlib" in err and "pip install matplotlib" in err
    assert 0 == run(capsys)[0]


def test_the_presets_are_listed_with_their_sources(capsys):
    _, out, _ = run(capsys, "--list")
    for name in (*GPUS, *MODELS):
        assert name in out
    told = json.loads(run(capsys, "--list", "--json")[1])
    assert all(
        one["source"] for table in ("gpus", "models", "workloads") for one in told[table].values()
    )


def test_it_calculates_where_there_is_nothing_but_the_package():
    """No vLLM, no torch, no numpy, no matplotlib: their imports fail."""
    code = (
        "import sys\n"
        "for name in ('vllm', 'torch', 'numpy', 'matplotlib', 'triton'): sys.modules[name] = None\n"
        "from vllm_trace import cli\n"
        f"sys.exit(cli.main(['memory', '--tutorial', '--trace', {str(GOLD / 'mixed.vtrace')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert 0 == done.returncode, done.stderr
    assert "does not hold" in done.stdout and "equal" in done.stdout


numbers = st.one_of(st.integers(-3, 70), st.sampled_from([100, 128, 1000, 4096, 10**6]))
flags = st.dictionaries(
    st.sampled_from(
        ["--layers", "--heads", "--kv-heads", "--head-size", "--params", "--tp", "--block-size", "--max-model-len",
         "--overhead", "--users", "--prefix", "--own", "--gpu-memory", "--seed"]
    ),
    numbers, max_size=4,
)  # fmt: skip


def test_whatever_is_asked_there_is_an_answer_or_a_sentence():
    codes = []
    ask = settings(max_examples=200)(given(flags, models, gpus, st.integers(0, 20))(_ask))
    ask(codes)
    assert codes.count(0) > 20 and codes.count(2) > 20


models, gpus = st.sampled_from(sorted(MODELS)), st.sampled_from(sorted(GPUS))


def _ask(codes, given_flags, model, gpu, count):
    words = [f"{flag}={value}" for flag, value in given_flags.items()]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(
            ["memory", "--model", model, "--gpu", gpu, "--requests", str(count), *words]
        )
    assert code in (0, 2)
    codes.append(code)
    assert bool(out.getvalue()) == (code == 0) == (not err.getvalue())
    if code == 0:
        assert max(map(len, out.getvalue().splitlines())) <= 80
