"""Every folder of Python files stands in pyproject.toml's list of packages, and the reverse.

A folder that is not listed works in this checkout (the install is editable) and is missing from the
wheel. A mapped folder without `__init__.py` is the other way round: it is in the wheel, and the
editable install does not find it.
"""

import sys
import tomllib
from pathlib import Path

root = Path(__file__).resolve().parent.parent
setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]

there = set()
for package, folder in setuptools["package-dir"].items():
    for path in (root / folder).rglob("*.py"):
        inside = path.parent.relative_to(root / folder).parts
        there.add(".".join((package, *inside)))

listed = set(setuptools["packages"])
for package in sorted(there - listed):
    print(f"pyproject.toml: add {package!r} to [tool.setuptools] packages")
for package in sorted(listed - there):
    print(f"pyproject.toml lists {package!r}, and its folder has no __init__.py")
sys.exit(there != listed)
