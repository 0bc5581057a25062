"""The manager and scheduler half of mini needs neither vLLM nor torch, and no sibling of its package."""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from vllm_trace import mini

MINI = Path(mini.__file__).parent
FACES = {"pages", "v0"}
WORDS = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def test_no_vllm_no_torch_no_sibling():
    code = """
import sys
sys.modules["torch"] = sys.modules["vllm"] = None   # importing either one raises
from vllm_trace.mini import block_pool, kv_cache_manager, pages, request, rules, scheduler, v0
ours = [name for name in sys.modules if name.startswith("vllm_trace.")]
print(sorted(name for name in ours if not name.startswith("vllm_trace.mini")))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "[]\n"


def lines_of_code(path):
    """Without blank lines, comments and docstrings."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {
        line
        for token in tokens
        if token.type not in WORDS
        for line in range(token.start[0], token.end[0] + 1)
    }
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            said = node.body[0]
            lines -= set(range(said.lineno, said.end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize(
    ("what", "files", "said"),
    [
        ("the engine", [p for p in MINI.glob("*.py") if p.stem not in FACES | {"model"}], 1380),
        ("the models", [MINI / "model.py"], 150),
        ("attention", [*(MINI / "attention").glob("*.py")], 500),
        ("the faces", [MINI / f"{name}.py" for name in FACES], 250),
    ],
)
def test_mini_is_as_long_as_it_says(what, files, said):
    count = sum(map(lines_of_code, files))
    assert abs(count - said) <= 25, f"{what}: {count} lines of code, {said} in mini/__init__.py"
