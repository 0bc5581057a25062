"""Puts the fake vLLM of this folder where tests can change it, read it and import it."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).with_name("vllm")


def unpack(folder: Path, *edits: tuple[str, str, str], version: str = "") -> Path:
    """Copy the fake to ``folder/vllm`` with each (file, old, new) applied; returns ``folder/vllm``."""
    made = folder / "vllm"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(FOLDER, made, ignore=shutil.ignore_patterns("__pycache__"))
    for name, old, new in edits:
        text = (made / name).read_text()
        assert old in text, f"{name} has no {old!r}"
        (made / name).write_text(text.replace(old, new))
    if version:
        (made / "_version.py").write_text(f'__version__ = version = "{version}"\n')
    return made


@contextmanager
def imported(package: Path) -> Iterator[None]:
    """Inside, ``import vllm`` means the package given; a real one that is loaded comes back after."""
    real = _take_out()
    sys.path.insert(0, str(package.parent))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(package.parent))
        _take_out()
        sys.modules.update(real)
        importlib.invalidate_caches()


def _take_out() -> dict[str, object]:
    names = [name for name in sys.modules if name.partition(".")[0] == "vllm"]
    return {name: sys.modules.pop(name) for name in names}
