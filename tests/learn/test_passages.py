"""Every reference of the seeds is found by name, and stands where the table says."""

import os
from pathlib import Path

import pytest

from vllm_trace.hooks.source import VllmSource
from vllm_trace.learn import lesson, passages, plan, sourcemap
from vllm_trace.learn.passages import Tree, begins_as_said, known, known_as, references

SOURCES = [Path(text) for text in os.environ.get("VTRACE_SOURCES", "").split(":") if text]
GONE = ("removed", "never")


def places(tree):
    """What is found, and what the table of that release says of the same files."""
    found, told = {}, {}
    table = known()[known_as(tree.release)]
    for one in references():
        at = tree.find(one)
        if at is not None:
            found[one.id] = at.to_list()
        if one.id in table and (tree.has_cuda or not table[one.id][0].startswith("csrc/")):
            told[one.id] = table[one.id]
    return found, told


def check(tree):
    found, told = places(tree)
    assert told == found
    lost = [one.id for one in references() if one.id not in known()[known_as(tree.release)]]
    if tuple(map(int, tree.release.split(".")[:2])) >= (0, 32):
        # Whatever is not there is known to be gone.
        assert [] == [r.id for r in references() if r.id in lost and r.fate not in GONE]


def test_all_of_them_on_the_installed_0_32(source_0_32):
    check(Tree.of(source_0_32))


def test_all_of_them_on_0_33(source_0_33):
    check(Tree.of(source_0_33))


@pytest.mark.parametrize("folder", SOURCES or [None], ids=lambda f: f.name if f else "none")
def test_all_of_them_on_the_sources_that_are_given(folder):
    if folder is None:
        pytest.skip("VTRACE_SOURCES may name folders of unpacked vLLM sources, by colons")
    tree = Tree.at(folder)
    assert known_as(tree.release), f"{tree.release} is not in the table"
    check(tree)
    for one in references():
        if one.lines and tree.release == one.release:
            at = tree.find(one)
            assert at is not None and not at.successor and begins_as_said(one, at, tree), one.id


@pytest.mark.parametrize("release", ["0.32.0", "0.33.0"])
def test_the_table_of_today_s_releases_is_complete(release):
    table = known()[release]
    for one in references():
        if one.id not in table:
            assert one.fate in GONE, one.id
        elif table[one.id][4]:
            assert one.fate in GONE, f"{one.id}: what does its work is named, and it is not gone"


def test_the_lines_of_the_plan_are_those_of_0_11_2():
    """Definitions, decorators counted as their beginning; one is off by a line."""
    table, off = known()["0.11.2"], {}
    for one in references():
        if one.lines:
            off[one.id] = table[one.id][2] - int(one.lines.partition("-")[0])
    assert len(off) == 28
    others = {"attention-forward": -1, "fwd-kernel": 1, "context-attention-fwd": 1}
    assert others == {id: by for id, by in off.items() if by}


@pytest.mark.parametrize(
    ("id", "line"),
    [
        ("kv-cache-shape", 47),
        ("split-kv-cache", 57),
        ("write-to-paged-cache", 72),
        ("forward-decode", 94),
        ("v1-v2-rule", 134),
        ("forward-prefix", 202),
        ("paged-attention-v1", 160),
        ("paged-attention-kernel", 85),
        ("kernel-block-table", 202),
        ("kernel-first-loop", 198),
        ("kernel-logits", 294),
        ("kernel-second-loop", 354),
        ("kernel-output", 431),
        ("v2-reduce", 562),
    ],
)
def test_a_line_that_the_plan_names(id, line):
    assert line == known()["0.11.2"][id][2]


@pytest.mark.plain
def test_the_page_is_what_the_command_makes():
    assert sourcemap.page() == sourcemap.PAGE.read_text(encoding="utf-8")


def test_references_are_told_apart_and_belong_to_steps():
    names = [one.id for one in references()]
    assert len(names) == len(set(names))
    assert {step.number for step in plan.steps()} == {n for one in references() for n in one.steps}
    for one in references():
        assert one.fate in ("same", "moved", "renamed", "split", "removed", "never"), one.id
        assert one.places or one.successors
        assert one.said or one.seed == "ours"
        assert one.about, one.id


# Finding -----------------------------------------------------------------------------------

PYTHON = """\
import typing

if typing.TYPE_CHECKING:
    def hidden(): ...


class Cache:
    size: int = 4

    @typing.overload
    def get(self): ...

    @typing.overload
    def get(self, a): ...

    def get(self, a=None):
        if a:
            chosen = (
                a
            )
        self.kept = a


@staticmethod
def after(): ...
"""

CUDA = """\
// paged_kernel(nothing)
#define LAUNCH(N) \\
  paged_kernel<N>( \\
      1);
template <int N>
__device__ void paged_kernel(
    int a) {  // {
  if (a) { other(a); }
}
void paged_kernel_launcher(int a) {
  LAUNCH(4);
}
struct Dot {
  int x;
};
"""


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "vllm/v1").mkdir(parents=True)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "vllm/__init__.py").touch()
    (tmp_path / "vllm/cache.py").write_text(PYTHON)
    (tmp_path / "vllm/broken.py").write_text("def f(:")
    (tmp_path / "csrc/paged.cu").write_text(CUDA)
    return Tree(tmp_path, "9.9.0")


@pytest.mark.parametrize(
    ("file", "name", "span"),
    [
        ("vllm/cache.py", "hidden", (4, 4)),
        ("vllm/cache.py", "Cache", (7, 21)),
        ("vllm/cache.py", "Cache.size", (8, 8)),
        ("vllm/cache.py", "Cache.get", (16, 21)),
        ("vllm/cache.py", "Cache.get.chosen", (18, 20)),
        ("vllm/cache.py", "Cache.get.kept", (21, 21)),
        ("vllm/cache.py", "after", (25, 25)),
        ("vllm/cache.py", "text:overload", (10, 10)),
        ("vllm/cache.py", "", (1, 25)),
        ("vllm/cache.py", "Cache.nothing", None),
        ("vllm/cache.py", "text:^    def get", (11, 11)),
        ("vllm/cache.py", "text:^def get", None),
        ("vllm/cache.py", "text:nowhere", None),
        ("vllm/broken.py", "f", None),
        ("vllm/nowhere.py", "f", None),
        ("vllm", "", (0, 0)),
        ("csrc/paged.cu", "LAUNCH", (2, 4)),
        ("csrc/paged.cu", "paged_kernel", (6, 9)),
        ("csrc/paged.cu", "paged_kernel_launcher", (10, 12)),
        ("csrc/paged.cu", "Dot", (13, 15)),
        ("csrc/paged.cu", "other", None),
    ],
)
def test_a_name_is_found(tree, file, name, span):
    assert span == tree.locate(file, name)


def test_the_newest_address_wins_and_successors_come_last(tree):
    def reference(places, successors=()):
        return passages.Reference(
            "r", (1,), "plan", "said", "", "0.11.2", places, successors, "moved", "", ""
        )

    old, new = ("vllm/cache.py", "hidden"), ("vllm/cache.py", "after")
    assert 25 == tree.find(reference((old, new))).line
    assert 4 == tree.find(reference((old, ("vllm/gone.py", "after")))).line
    found = tree.find(reference((("vllm/gone.py", "after"),), (new,)))
    assert found.successor and 25 == found.line
    assert tree.find(reference((("vllm/gone.py", "after"),))) is None


def test_a_release_that_the_table_does_not_know(tree):
    """It shows what it finds by name, and says what it could not."""
    assert "" == known_as(tree.release)
    lines = lesson.reading(plan.step("1"), tree)
    assert any("vLLM 9.9.0 is not in the table" in line for line in lines)
    assert 6 == sum("not found by name" in line for line in lines)
    (tree.root / "vllm/config").mkdir()
    (tree.root / "vllm/config/cache.py").write_text("class CacheConfig:\n    block_size: int = 3\n")
    lines = lesson.reading(plan.step("1"), tree)
    assert any("here     vllm/config/cache.py:1–2" in line for line in lines)
    assert any("here     vllm/config/cache.py:2" in line for line in lines)
    assert 4 == sum("not found by name" in line for line in lines)


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1", "0.32.0+cpu", "0.32"])
def test_a_release_is_known_by_its_first_two_numbers(found):
    assert "0.32.0" == known_as(found)


def test_without_vllm_the_table_speaks():
    lines = lesson.reading(plan.step("4"), None)
    assert any("no vLLM here" in line for line in lines)
    assert any("vllm/v1/worker/block_table.py:49" in line for line in lines)


def test_an_installed_vllm_has_no_cuda_sources_and_the_reader_is_told(source_0_32):
    text = " ".join(" ".join(lesson.reading(plan.step("9"), Tree.of(source_0_32))).split())
    assert "csrc/cache_kernels.cu:266–323 reshape_and_cache_kernel (in the repository only)" in text


def test_an_excerpt_is_the_true_text_at_its_true_line(source_0_32):
    tree = Tree.of(source_0_32)
    (reference,) = [one for one in references() if one.id == "block-pool-get"]
    found = tree.find(reference)
    lines, left = lesson.excerpt(found, tree)
    assert lesson.EXCERPT == len(lines) and "lines more" in left
    file = (VllmSource.installed().folder / "v1/core/block_pool.py").read_text().splitlines()
    for line in lines:
        number, _, text = line.partition(" ")
        assert file[int(number) - 1].strip().startswith(text.strip().rstrip("…"))
    whole, left = lesson.excerpt(found, tree, whole=True)
    assert (found.end - found.line + 1, "") == (len(whole), left)
