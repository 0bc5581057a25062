"""Formats: how one is added, and the one place that writes them."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import stat
from pathlib import Path

import pytest
from helpers import run_cli

from vllm_trace import export
from vllm_trace.cli import main
from vllm_trace.errors import UsageError
from vllm_trace.export import Exported, ExportError, _write

ROOT = Path(__file__).resolve().parents[2]
GOLD = ROOT / "tests" / "gold" / "preempt.vtrace"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    for name in export.BUILT_IN:
        with contextlib.suppress(ExportError):
            export.format_of(name)
    monkeypatch.setattr(export, "FORMATS", dict(export.FORMATS))


def test_the_documents_are_what_the_code_says():
    spec = importlib.util.spec_from_file_location("docs_make", ROOT / "docs" / "make.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    for document in made.DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert made.fill(text) == text, f"{document}: .venv/bin/python docs/make.py"


def test_commands_of_the_page_are_taken(monkeypatch):
    from vllm_trace import cli

    text = (ROOT / "docs" / "jaeger.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", text, re.S | re.M)
    lines = [
        line for block in blocks for line in block.splitlines() if line.startswith("vllm-trace")
    ]
    assert len(lines) >= 6
    for line in lines:
        assert cli._parser().parse_args(line.split()[1:]).verb in ("run", "record", "export")


def test_the_example_of_the_page_works(tmp_path, capfdbinary):
    text = (ROOT / "docs" / "jaeger.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    (tmp_path / "arrivals.py").write_text(example)
    load = ["--load", str(tmp_path / "arrivals.py")]
    assert 0 == main(["export", str(GOLD), *load, "--to", "arrivals", "-o", "-"])
    out, err = capfdbinary.readouterr()
    assert b"r-0\nr-1\nr-2\n" == out and b"wrote 3 requests\n" in err


def test_a_function_that_does_not_fit_is_named_with_its_signature():
    with pytest.raises(UsageError, match=r"wrong\(trace\) must take \(trace, out, options\)"):

        @export.exporter("wrong", "…")
        def wrong(trace):
            pass

    with pytest.raises(UsageError, match="did you mean 'folder'"):
        export.exporter("wrong", "…", to="folders")(lambda a, b, c: None)


def test_a_name_is_given_once():
    def mine(trace, out, options):
        return Exported()

    with pytest.raises(UsageError, match="two exporters 'otlp'"):
        export.exporter("otlp", "…")(mine)


def test_an_unknown_format_names_the_nearest(capsys):
    assert 2 == main(["export", str(GOLD), "--to", "jaeger"])
    assert "unknown format 'jaeger'; did you mean 'jaeger-json'?" in capsys.readouterr().err
    assert 2 == main(["export", str(GOLD)])
    assert "export needs a format" in capsys.readouterr().err
    assert 2 == main(["export", "--to", "otlp"])
    assert "export needs a trace" in capsys.readouterr().err


def test_the_list_says_what_there_is(capsys):
    assert 0 == main(["export", "--list", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert set(export.BUILT_IN) == {one["name"] for one in document["formats"]} | {
        *document["missing"]
    }
    assert 0 == main(["export", "--list"])
    assert "jaeger-json" in capsys.readouterr().out


def test_a_library_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(export.BUILT_IN, "pictures", "no_such_library.inside")
    assert 2 == main(["export", str(GOLD), "--to", "pictures"])
    assert "pictures needs the library no_such_library" in capsys.readouterr().err
    assert 0 == main(["export", "--list"])
    assert "not here: pictures needs" in capsys.readouterr().out


def test_json_and_stdout_do_not_mix(capsys):
    assert 2 == main(["export", str(GOLD), "--to", "jaeger-json", "-o", "-", "--json"])
    assert "both want stdout" in capsys.readouterr().err


# Writing ----------------------------------------------------------------------------------


def test_half_a_file_is_removed_and_the_old_one_stays(tmp_path):
    path = tmp_path / "made.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), _write.file(str(path)) as out:
        out.write(b"half")
        raise RuntimeError
    assert b"old" == path.read_bytes() and [path] == list(tmp_path.iterdir())
    with _write.file(str(path)) as out:
        out.write(b"new")
    assert b"new" == path.read_bytes() and [path] == list(tmp_path.iterdir())
    mask = os.umask(0)
    os.umask(mask)
    assert 0o666 & ~mask == stat.S_IMODE(path.stat().st_mode)


def test_where_nothing_can_be_written(tmp_path):
    for bad in (tmp_path, tmp_path / "no" / "such" / "place", tmp_path / ("x" * 300)):
        with pytest.raises(ExportError, match="cannot write"), _write.file(str(bad)):
            raise AssertionError("it was opened")
    assert [] == list(tmp_path.iterdir())


def test_a_device_is_written_to_as_it_is():
    with _write.file("/dev/null") as out:
        out.write(b"gone")
    assert Path("/dev/null").exists()
    if Path("/dev/full").exists():
        with pytest.raises(ExportError, match="No space left"), _write.file("/dev/full") as out:
            out.write(b"x" * 100_000)


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    path = tmp_path / "tables"
    with pytest.raises(RuntimeError), _write.folder(str(path), ".parquet") as out:
        (out / "a.parquet").write_bytes(b"1")
        raise RuntimeError
    assert [] == list(tmp_path.iterdir())
    with _write.folder(str(path), ".parquet") as out:
        (out / "a.parquet").write_bytes(b"1")
    with _write.folder(str(path), ".parquet") as out:
        (out / "b.parquet").write_bytes(b"2")
    assert ["b.parquet"] == [one.name for one in path.iterdir()]
    (path / "mine.txt").write_text("keep")
    with pytest.raises(UsageError, match=r"holds mine.txt, which is no .parquet file"):
        with _write.folder(str(path), ".parquet"):
            raise AssertionError("it was opened")
    assert {"b.parquet", "mine.txt"} == {one.name for one in path.iterdir()}
    with pytest.raises(UsageError, match="several files"), _write.folder("-", ".parquet"):
        pass


def test_a_damaged_trace_leaves_no_file(tmp_path):
    data = bytearray(GOLD.read_bytes())
    data[-800] ^= 0xFF
    (tmp_path / "main-1.vtrace").write_bytes(data)
    done = run_cli(
        "export", tmp_path / "main-1.vtrace", "--to", "jaeger-json", "-o", "made.json", cwd=tmp_path
    )
    assert 2 == done.returncode and "damaged" in done.stderr
    assert not (tmp_path / "made.json").exists()


def test_a_truncated_trace_is_exported_and_said_to_be(tmp_path):
    path = tmp_path / "main-1.vtrace"
    path.write_bytes(GOLD.read_bytes()[:-400])
    done = run_cli("export", path, "--to", "otlp", "-o", "made.binpb", "--json", cwd=tmp_path)
    assert 0 == done.returncode
    assert (
        "truncated" in done.stderr and "truncated" in json.loads(done.stdout)["trace_problems"][0]
    )
    assert (tmp_path / "made.binpb").exists()


def test_a_closed_pipe_is_no_error(tmp_path):
    import subprocess

    from helpers import command

    words = command("export", GOLD, "--to", "jaeger-json", "-o", "-")
    first = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path)
    first.stdout.read(10)
    first.stdout.close()
    assert b"Traceback" not in first.stderr.read()
    first.wait()
