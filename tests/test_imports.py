"""Each room imports what the table of rooms allows: read with ``ast``, nothing is run."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "vllm_trace"

#: Room → what it imports of this package, and of others at module level. Imports inside functions are
#: free for `vllm` and `torch` (nothing else of them may be loaded before it is needed) and for what is
#: named under LATE. A new room passes once it has its line here; `explain/cache.py` is part of `explain`.
ROOMS = {
    "__init__": (["compiled"], []),
    "__main__": (["cli"], []),
    "events": ([], ["msgspec"]),
    "extending": (["errors"], []),
    "errors": ([], []),
    "documents": ([], []),
    "writing": ([], []),
    "options": (["errors"], []),
    "packing": (["events"], ["msgspec"]),
    "steady": (["events", "packing"], []),
    "tracefile": (["errors", "events", "steady", "whole"], ["msgspec", "zstandard"]),
    "tracewriter": (
        ["errors", "events", "packing", "steady", "tracefile"],
        ["msgspec", "zstandard"],
    ),
    "compiled": ([], []),
    "recorder": (
        ["__init__", "events", "options", "packing", "steady", "tracefile", "tracewriter"],
        [],
    ),
    "counting": ([], []),
    "whole": (["errors", "events"], []),
    "hooks": (["errors", "events", "options", "recorder", "sidecar"], ["packaging"]),
    "sidecar": (["counting", "errors", "tracefile"], []),
    "decode_rule": ([], []),
    "device_clock": ([], []),
    "patches": (["decode_rule", "device_clock", "events", "hooks", "packing", "recorder"], []),
    "backend": (
        ["decode_rule", "device_clock", "errors", "mini"],
        ["safetensors", "torch", "vllm"],
    ),
    "naming": (["errors"], []),
    "mini": ([], ["torch", "triton", "numpy", "safetensors", "tokenizers"]),
    "checkpoints": (["errors", "options"], []),
    "divergence": ([], []),
    "doctor": (["__init__", "compiled", "errors", "hooks"], []),
    "explain": (["events", "naming", "state", "summary", "trace"], []),
    "record": (["errors", "options", "tracefile", "tracewriter"], []),
    "render": (["doctor", "hooks", "summary"], ["rich"]),
    "reports": (
        ["__init__", "documents", "errors", "render", "summary", "trace", "tracefile"],
        ["rich"],
    ),
    "runner": (["checkpoints", "errors", "hooks", "options", "scenario"], []),
    "show": (
        ["errors", "events", "naming", "render", "state", "summary", "trace"],
        ["msgspec", "rich"],
    ),
    "state": (["events"], []),
    "tables": (["events"], []),
    "trace": (["errors", "events", "tracefile"], ["zstandard"]),
    "summary": (["decode_rule", "events", "state", "trace"], ["rich"]),
    "scenario": (["errors", "events", "trace"], ["tomli", "tomllib"]),
    "scenarios": ([], []),
    "replay": (["divergence", "errors", "events", "mini", "state", "trace", "tracefile"], []),
    "replay_view": (["divergence", "events", "render", "replay", "trace"], ["rich"]),
    "diff": (["errors", "events", "explain", "naming", "state", "trace"], ["msgspec", "rich"]),
    "growing": (["errors", "events", "trace", "tracefile"], ["zstandard"]),
    "live": (["errors", "events", "growing", "render", "show", "state", "summary"], ["rich"]),
    "learn": (
        [
            "decode_rule",
            "errors",
            "events",
            "hooks",
            "mini",
            "scenarios",
            "state",
            "trace",
            "tracewriter",
            "writing",
        ],
        ["tomli", "tomllib"],
    ),
    "invariants": (
        ["decode_rule", "errors", "events", "extending", "trace", "tracefile"],
        ["packaging", "pytest"],
    ),
    "export": (
        [
            "__init__",
            "counting",
            "errors",
            "events",
            "explain",
            "extending",
            "growing",
            "options",
            "state",
            "trace",
            "tracefile",
            "writing",
        ],
        [
            "duckdb",
            "google",
            "grpc",
            "msgspec",
            "numba",
            "numpy",
            "opentelemetry",
            "perfetto",
            "pyarrow",
            "requests",
            "zstandard",
        ],
    ),
    "benchmark": (
        [
            "errors",
            "events",
            "memory",
            "mini",
            "plotting",
            "render",
            "runner",
            "scenario",
            "state",
            "trace",
        ],
        ["rich"],
    ),
    "memory": (["errors", "plotting", "render", "runner", "summary", "trace"], ["rich"]),
    "pictures": (["benchmark", "errors", "events", "memory", "plotting", "state", "trace"], []),
    "plotting": (["errors"], []),
    "report": (
        [
            "__init__",
            "errors",
            "events",
            "invariants",
            "render",
            "replay",
            "state",
            "summary",
            "trace",
            "writing",
        ],
        ["jinja2", "msgspec"],
    ),
}
#: May import every room: nobody imports them.
TOPS = {"cli"}
#: Room → what it may import inside a function only, because it is big, or because it would be a circle.
LATE = {
    "hooks": ["patches", "backend"],
    "runner": ["backend"],
    "doctor": ["patches"],
    "tables": ["patches"],
    "invariants": ["hooks", "options"],
    "reports": ["runner", "scenario"],
    "sidecar": ["export"],
    "plotting": ["matplotlib"],
    "pictures": ["matplotlib"],
    "learn": ["matplotlib", "watchfiles"],
    "checkpoints": ["numpy", "safetensors", "tokenizers", "transformers"],
}
#: Never at module level outside mini and the backend, of which vLLM itself loads what needs them: they take seconds,
#: and readers of traces have neither.
HEAVY = {"vllm", "torch", "triton"}


def room_of(name):
    """The line of the table that a module or folder of the package belongs to."""
    first = name.partition("_")[0]
    return name if name in ROOMS or first not in ROOMS else first


def sources():
    """(room, path) of every module of the package, wherever it lies."""
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        if path.parent.name == "tasks":  # exercises: the reader's files, never imported here
            continue
        yield room_of(path.relative_to(ROOT / PACKAGE).parts[0].removesuffix(".py")), path
    for room in ("patches", "scenarios"):
        for path in sorted((ROOT / room).rglob("*.py")):
            yield room, path


def absolute(path, node):
    """The module of a ``from … import``, spelled out when it is relative."""
    if not node.level:
        return node.module
    package = [PACKAGE, *path.relative_to(ROOT).parts[:-1]]
    package = (
        package[1:] if package[1:2] == [PACKAGE] else package
    )  # patches/ lies beside the package
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def imports_of(path):
    """(what, of this package, at module level, line) of every import of a file."""
    tree = ast.parse(path.read_text())
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    typing = {
        node
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = absolute(path, node)
            whole = module == PACKAGE
            names = [f"{PACKAGE}.{alias.name}" for alias in node.names] if whole else [module]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            room = room_of(rest.partition(".")[0] or "__init__") if top == PACKAGE else ""
            if room.startswith("__"):  # from vllm_trace import __version__
                room = "__init__"
            yield room or top, bool(room), node not in inside | typing, node.lineno


@pytest.mark.parametrize("room", sorted({room for room, _ in sources()} - TOPS))
def test_a_room_imports_what_its_line_in_the_table_allows(room):
    assert room in ROOMS, f"{room} is new: give it a line in ROOMS"
    rooms, others = ROOMS[room]
    wrong = []
    for path in (path for each, path in sources() if each == room):
        for what, ours, at_top, line in imports_of(path):
            late = not at_top and (what in LATE.get(room, ()) or what in HEAVY)
            if ours:
                allowed = what == room or what in rooms or late
            else:
                allowed = what in sys.stdlib_module_names or what in others or late
            if not allowed:
                where = "at module level" if at_top else "inside a function"
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {what} {where}")
    assert [] == wrong


def test_nobody_imports_the_command_line():
    found = [
        f"{path}:{line}"
        for room, path in sources()
        for what, ours, _, line in imports_of(path)
        if ours and what in TOPS and room not in (*TOPS, "__main__")
    ]
    assert [] == found


def test_only_mini_and_the_backend_load_vllm_torch_or_triton_with_their_modules():
    found = {
        room
        for room, path in sources()
        for what, _, at_top, _ in imports_of(path)
        if what in HEAVY and at_top
    }
    assert found <= {"mini", "backend"}


def test_the_front_door_of_the_backend_and_its_observer_load_nothing_heavy():
    """The recorder opens them in every traced process."""
    for name in ("__init__", "calls", "support"):
        path = ROOT / PACKAGE / "backend" / f"{name}.py"
        assert [] == [what for what, _, at_top, _ in imports_of(path) if what in HEAVY and at_top]


def test_mini_knows_nothing_of_the_rest_and_nothing_of_vllm():
    found = {
        what
        for room, path in sources()
        for what, ours, _, _ in imports_of(path)
        if room == "mini" and (ours or what == "vllm")
    }
    assert found <= {"mini"}


def test_the_check_sees_what_it_is_for(tmp_path, monkeypatch):
    """Were an import added to a room, it would be found."""
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / PACKAGE / "mini").mkdir(parents=True)
    path = tmp_path / PACKAGE / "mini" / "module.py"
    path.write_text(
        "import torch.nn as nn\n"
        "from vllm_trace import __version__, events\n"
        "from vllm_trace.hooks.table import Hook\n"
        "if TYPE_CHECKING:\n    import vllm\n"
        "def f():\n    from vllm.v1 import core\n"
        "from . import rules\n"
        "from .request import Request\n"
        "from ..events import Event\n"
    )
    assert [
        ("torch", False, True, 1),
        ("__init__", True, True, 2),
        ("events", True, True, 2),
        ("hooks", True, True, 3),
        ("vllm", False, False, 5),
        ("vllm", False, False, 7),
        ("mini", True, True, 8),
        ("mini", True, True, 9),
        ("events", True, True, 10),
    ] == sorted(imports_of(path), key=lambda found: found[3])
