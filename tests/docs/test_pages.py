"""The pages under docs/: links resolve, commands run, outputs and event numbers are true."""

import argparse
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import command
from recorded import needs_vllm

from vllm_trace import cli
from vllm_trace.events import to_dict
from vllm_trace.trace import read_trace

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
OURS = ("quickstart", "concepts", "implementation", "comparison", "results")


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


pages = module(DOCS / "pages.py")


def text_of(name):
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def without_code(text):
    return re.sub(r"`[^`\n]+`", "", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))


# Links -----------------------------------------------------------------------------------


def links_of(text):
    plain = without_code(text)
    yield from re.findall(r"\]\(([^)\s]+)\)", plain)
    yield from re.findall(r'(?:src|srcset)="([^"]+)"', plain)
    yield from re.findall(r"<(https?://[^>]+)>", plain)


def anchors_of(text):
    """GitHub's names of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in headings}


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda path: path.stem
)
def test_links_resolve(path):
    """Inside the repository; addresses of the web are looked at, not fetched."""
    text = path.read_text(encoding="utf-8")
    for link in links_of(text):
        if link.startswith("http://127.0.0.1:"):
            continue  # what the page has the reader start
        if link.startswith("http"):
            assert re.fullmatch(r"https://[\w.-]+\.[a-z]+(/[\w./#-]*)?", link), link
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), link


def test_the_link_check_sees_what_it_is_for():
    text = '[a](b.md#c) `[no](x.md)` <img src="p.png"> <https://x.org/y>\n```text\n[n](n.md)\n```\n'
    assert ["b.md#c", "p.png", "https://x.org/y"] == list(links_of(text))
    assert {"a-b-c1"} == anchors_of("# A b: `c1`\n")


def test_the_readme_names_every_page():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in OURS:
        assert f"docs/{name}.md" in readme


# Commands --------------------------------------------------------------------------------


def commands_of(text):
    """Every command line: of ``console`` blocks, then those inside of a sentence."""
    for block in re.findall(r"^```console\n(.*?)^```", text, re.S | re.M):
        yield from filter(None, block.splitlines())
    inline = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    yield from re.findall(r"`((?:vllm-trace|make|python -m) [^`\n]+)`", inline)


def why_not_run(line):
    """Why a test cannot run it; it is parsed, or looked up, instead."""
    if "./my-model" in line or "my_script.py" in line:
        return "wants a model or a program of the reader"
    if line == "vllm-trace memory --check":
        return "tests/memory asks the same 1,000 sets"
    if line.startswith("make "):
        return "make is what runs this test"
    if line.startswith("python -m bench"):
        return "takes minutes; bench has tests of its own"
    if line.startswith("vllm-trace bench --test all") and "--quick" not in line:
        return "takes a minute; tests/benchmark runs it with --quick"
    return ""


ALL = [(name, line) for name in OURS for line in dict.fromkeys(commands_of(text_of(name)))]


def test_there_are_commands():
    assert len(ALL) > 25
    assert sum(not why_not_run(line) for _, line in ALL) > 15


@pytest.mark.parametrize(("name", "line"), ALL)
def test_a_command_is_one_that_exists(name, line):
    words = shlex.split(line)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
    elif words[0] == "python":
        assert (ROOT / words[2] / "__main__.py").exists()
    else:
        assert "vllm-trace" == words[0]
        assert isinstance(cli._parser().parse_args(words[1:]), argparse.Namespace)


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_the_commands_of_a_page_run_one_after_the_other(name, tmp_path):
    for folder in ("docs", "tests"):  # as at the top of the repository; reports/ is the reader's
        (tmp_path / folder).symlink_to(ROOT / folder)
    for line in dict.fromkeys(commands_of(text_of(name))):
        if why_not_run(line):
            continue
        done = subprocess.run(
            command(*shlex.split(line)[1:]),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=200,
            env=dict(os.environ),
        )
        assert 0 == done.returncode, f"{line}\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}"
        assert done.stdout.strip(), line


@pytest.mark.parametrize("name", OURS[:-1])
def test_an_output_on_a_page_is_what_the_command_prints(name):
    text = text_of(name)
    for line, told in pages.pairs(text):
        assert told == pages.printed(line), f"{line}: .venv/bin/python docs/pages.py"
    assert text.count("```text") == sum(1 for _ in pages.pairs(text))


# The walk --------------------------------------------------------------------------------

MARK = re.compile(r"`#(\d+) ([a-z_]+\.[a-z_]+)((?: \w+=[^`]+)?)`", re.S)
HTTP = DOCS / "traces" / "http"


def claims_of(text):
    """The list items of the walk, each with its continuation lines."""
    walk = text.split("## Start")[1].split("## The same")[0]
    return re.findall(r"^- (?:.+\n)(?:  .+\n)*", walk, re.M)


def fields_of(text):
    """``a=1 b=[2, 3]`` as values."""
    parts = re.split(r" ?\b(\w+)=", text.replace("\n", " "))[1:]
    return {key: json.loads(value) for key, value in zip(parts[::2], parts[1::2], strict=True)}


def test_every_claim_of_the_walk_has_an_event():
    claims = claims_of(text_of("implementation"))
    assert len(claims) > 15
    assert [] == [claim for claim in claims if not MARK.search(claim)]


def test_every_event_of_the_walk_is_in_the_trace():
    trace = read_trace(HTTP)
    events = {record.number: to_dict(record.event) for record in trace.records()}
    marks = MARK.findall(text_of("implementation"))
    assert len(marks) > 25
    for number, kind, fields in marks:
        event = events[int(number)]
        assert kind == event["kind"], number
        for key, value in fields_of(fields).items():
            assert value == event[key], f"#{number} {kind} {key}"


def test_the_sums_of_the_walk():
    """Those that stand between the marks."""
    events = {record.number: record.event for record in read_trace(HTTP).records()}
    mapped = events[12]
    assert (32, 74) == (mapped.slots[0], mapped.slots[42])
    assert [1 * 32 + pos if pos < 32 else 2 * 32 + pos - 32 for pos in range(43)] == mapped.slots
    assert 22 == events[159].step and 36 == events[260].step
    assert 43 + 36 - 1 == 78 and -(-78 // 32) == len(events[266].blocks)


def test_a_mark_is_read_with_its_fields():
    (found,) = MARK.findall('`#7 step.scheduled step=1 num_tokens=[4, 3] mode="a b"`')
    assert ("7", "step.scheduled") == found[:2]
    assert {"step": 1, "num_tokens": [4, 3], "mode": "a b"} == fields_of(found[2])


def test_the_source_files_of_the_walk_exist():
    """Those named in backticks, in the installed vLLM and in this repository."""
    found = importlib.util.find_spec("vllm")
    if found is None:
        pytest.skip("no vLLM is installed: its files cannot be looked up")
    vllm = Path(found.submodule_search_locations[0])
    named = re.findall(
        r"`((?:vllm/)?(?:v1|entrypoints)/[\w/]+(?:\.py|/))`", text_of("implementation")
    )
    assert len(named) >= 6
    for name in named:
        assert (vllm / name.removeprefix("vllm/")).exists(), name
    for name in re.findall(r"`(vllm_trace/[\w/]+(?:\.py)?)`", text_of("implementation")):
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), name


# Results ---------------------------------------------------------------------------------


def test_the_results_page_is_what_the_command_made():
    from vllm_trace.benchmark import page

    figures = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))
    assert page.markdown(figures) == text_of("results")
    assert {"throughput", "scaling", "memory"} <= figures.keys()


# Pages are short -------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_page_is_short_and_names_no_path_of_a_machine(name):
    text = text_of(name)
    assert len(text.splitlines()) < 180
    for part in (*(f"/{name}/" for name in ("root", "home", "tmp", "work")), str(Path.home())):
        assert part not in text


def test_make_can_be_found():
    assert shutil.which("make")
