"""The six pictures: drawn from what the traces say, legible on both themes, and those that are shipped."""

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: nothing can be drawn")

from vllm_trace import cli, pictures
from vllm_trace.errors import UsageError
from vllm_trace.pictures import blocks
from vllm_trace.pictures.facts import moment
from vllm_trace.plotting import THEMES
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "reports" / "pictures"
SIX = [
    "attention_flow",
    "block_sharing",
    "block_structure",
    "kv_cache_problem",
    "memory_comparison",
    "performance_comparison",
]


def run(capsys, *words):
    code = cli.main(["pictures", *map(str, words)])
    told = capsys.readouterr()
    return code, told.out, told.err


@pytest.mark.plain
def test_one_command_draws_all_six_twice(capsys, tmp_path):
    code, out, _ = run(capsys, "-o", tmp_path)
    assert 0 == code
    made = sorted(path.name for path in tmp_path.iterdir())
    assert sorted(f"{name}-{theme}.png" for name in SIX for theme in THEMES) == made
    assert len(made) == len(out.splitlines())


def lane_version():
    pins = (ROOT / ".ci" / "lanes" / "cpu.txt").read_text()
    return re.search(r"^matplotlib==(\S+)", pins, re.M)[1]


@pytest.mark.plain
@pytest.mark.parametrize("theme", THEMES)
def test_the_shipped_pictures_are_what_the_command_draws(tmp_path, theme):
    import matplotlib
    import numpy
    from matplotlib.image import imread

    if matplotlib.__version__ != lane_version():
        pytest.skip("another matplotlib draws other pixels")
    pictures.draw(tmp_path, themes=[theme])
    for name in SIX:
        file = f"{name}-{theme}.png"
        shipped, drawn = imread(SHIPPED / file), imread(tmp_path / file)
        same = shipped.shape == drawn.shape and numpy.abs(shipped - drawn).max() < 0.02
        assert same, f"{file}: vllm-trace pictures"


def texts(tmp_path, name, **more):
    """The words of a picture, from its SVG."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        (path,) = pictures.draw(tmp_path, [name], ["light"], "svg", **more)
    return re.findall(r"<(?:text|tspan)[^>]*>([^<]+)</", path.read_text(encoding="utf-8"))


def test_block_structure_shows_the_tables_of_the_trace(tmp_path):
    """Tables and fills against the summary's own reading of the same trace."""
    path = pictures.Sources().trace("preempt")
    found = moment(path, lambda one: one.step)  # the last step with tables
    lives = {life.name: life for life in Summary.of(read_trace(path)).requests}
    for name, table in found.tables.items():
        assert table == lives[name].table[0]
        life = lives[name]
        assert found.final[name] == life.num_prompt_tokens + life.num_output_tokens - 1
        assert found.held[name] <= found.final[name]
        filled = sum(found.fill(name, index) for index in range(len(table)))
        assert round(filled * found.block_size) == found.held[name]
    drawn = moment(path, blocks._scattered)
    words = " ".join(texts(tmp_path, "block_structure"))
    assert f"Step {drawn.step} of `preempt`" in words
    for name, held in drawn.held.items():
        assert f"{name} {held} tokens" in words
    # What the picture is for: a table that does not lie in a row, and blocks half full.
    assert any(table != sorted(table) for table in drawn.tables.values())
    assert any(0 < drawn.fill(name, len(t) - 1) < 1 for name, t in drawn.tables.items())


def test_block_sharing_counts_what_the_scenario_states(tmp_path):
    """The scenario: 100 users, 160 tokens of system prompt, blocks of 32."""
    words = " ".join(texts(tmp_path, "block_sharing"))
    assert "100 requests" in words and "reference count of those: 100" in words
    entries, blocks = map(
        int, re.search(r"(\d+) entries in their tables, (\d+) blocks", words).groups()
    )
    assert entries - blocks == 99 * 5


def test_attention_flow_names_the_slot_that_the_worker_wrote(tmp_path):
    words = " ".join(texts(tmp_path, "attention_flow"))
    block, size, position, slot = map(
        int, re.search(r"slot (\d+) x (\d+) \+ (\d+) % \d+ = (\d+)", words).groups()
    )
    assert slot == block * size + position % size
    assert "cpu_attention_with_kv_cache" in words


def contrast(one, other):
    """WCAG 2.1 contrast of two ``#rrggbb``."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("ink", THEMES.values(), ids=THEMES)
def test_colours_are_legible(ink):
    assert contrast(ink.text, ink.page) > 7
    for colour in (ink.used, ink.empty_line, ink.shared, *ink.requests):
        assert contrast(colour, ink.page) > 3, colour
    assert contrast(ink.used, ink.empty) > 2  # areas that lie beside each other


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["block_struct"], "did you mean 'block_structure'"),
        (["--theme", "lihgt"], "did you mean 'light'"),
        (["--format", "jpg"], "unknown format 'jpg'"),
        (["block_sharing", "--traces", "nowhere"], "no trace of the scenario 'prefix' in nowhere"),
        (["performance_comparison", "--results", "nowhere.json"], "no figures of bench in nowhere"),
    ],
)
def test_bad_input_is_named(capsys, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (2, "") == (code, out) and said in err
    assert [] == list(tmp_path.rglob("*"))


@pytest.mark.parametrize("content", ["{", "[]", '{"throughput": {}}'])
def test_figures_that_are_none(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UsageError):
        pictures.Sources(results=path).figures()


def test_without_matplotlib_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    code, _, err = run(capsys, "-o", tmp_path)
    assert 2 == code and "pictures need matplotlib" in err


def test_runs_of_the_reader_are_found(tmp_path):
    latest = tmp_path / "prefix" / "latest"
    latest.mkdir(parents=True)
    assert latest == pictures.Sources(traces=tmp_path).trace("prefix")
