"""Makes C of the rooms that look at every event, when the package is installed and a C compiler is there.

mypyc compiles the annotated Python as it stands: ``[tool.vllm_trace] compiled`` in pyproject.toml lists the modules.
Without a compiler, and in a checkout (the editable install), the same modules run as plain Python and do the same,
slower. VTRACE_COMPILE=0 leaves it out, VTRACE_COMPILE=1 fails where it cannot be done.
"""

import os
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WISH = os.environ.get("VTRACE_COMPILE", "")
"""``0``, ``1`` or nothing."""


def compiled_modules() -> list[str]:
    """Their files, relative to the project's root."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    names = tomllib.loads(text)["tool"]["vllm_trace"]["compiled"]
    return [name.replace(".", "/") + ".py" for name in names]


def extensions() -> list:
    """What is to be compiled; nothing where mypyc is not there or does not understand the sources."""
    if WISH == "0" or "editable_wheel" in sys.argv:
        return []
    try:
        from mypyc.build import mypycify

        # Types that are not installed where this is built (vLLM's, numba's) are unknown, not wrong.
        flags = ["--config-file=", "--ignore-missing-imports", "--check-untyped-defs"]
        return mypycify([*flags, *compiled_modules()], group_name="vllm_trace", debug_level="0")
    except (Exception, SystemExit) as error:
        plain_instead(error)
        return []


def plain_instead(reason: BaseException) -> None:
    """Say that it stays plain Python, or fail if that was not wanted."""
    if WISH == "1":
        raise RuntimeError("VTRACE_COMPILE=1, and vllm_trace could not be compiled") from reason
    print(f"vllm_trace is installed as plain Python: {reason!r}", file=sys.stderr)


class CompileOrNot(build_ext):
    """All modules or none: compiled ones call each other past their Python names."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:
            plain_instead(error)
            for path in map(Path, self.get_outputs()):
                path.unlink(missing_ok=True)
            self.extensions = []


setup(ext_modules=extensions(), cmdclass={"build_ext": CompileOrNot})
