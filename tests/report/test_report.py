"""What the report holds, without a browser: figures, policy, hostile text, traces that are not whole."""

import base64
import hashlib
import json
import re
import subprocess
import zlib
from html.parser import HTMLParser
from itertools import pairwise

import pytest
from helpers import command, configured, run_cli, write_trace
from recorded import admitted, arrived, ended, engine, looked_up, needs_vllm, step, updated, written

from report.conftest import GOLD
from vllm_trace import report, show
from vllm_trace.errors import UsageError
from vllm_trace.report import bodies
from vllm_trace.report import frames as frames_module
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

SCENARIOS = sorted(path.stem for path in GOLD.glob("*.vtrace"))


class Scripts(HTMLParser):
    """What an HTML parser finds in the file: its scripts and styles by their text, and all text."""

    def __init__(self, html):
        super().__init__()
        self.scripts, self.styles, self.texts, self.tags = [], [], [], []
        self.policy, self._inside = "", None
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append((tag, given))
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        self._inside = (tag, given) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, text):
        if self._inside is None:
            self.texts.append(text)
        elif self._inside[0] == "style":
            self.styles.append(text)
        else:
            self.scripts.append((self._inside[1], text))


def opened(html):
    """The file taken apart: (parsed, figures, events by page)."""
    parsed = Scripts(html.decode())
    packed = {
        given["id"]: json.loads(zlib.decompress(base64.b64decode(text)))
        for given, text in parsed.scripts
        if "id" in given
    }
    return parsed, packed.pop("data"), packed


def made(path, **asked):
    return opened(report.build(read_trace(path), report.Asked(**asked)).html)


def columns_of(figures):
    """The pool at each frame as ``show --json blocks`` has it: (step, owners, shared)."""
    pool, steps = figures["pool"], figures["frames"]["step"]
    owners, counts = [-2] * pool["num_blocks"], [0] * pool["num_blocks"]
    for frame, number in enumerate(steps):
        for i in range(pool["starts"][frame], pool["starts"][frame + 1]):
            owners[pool["block"][i]] = pool["owner"][i]
            counts[pool["block"][i]] = pool["count"][i]
        shared = [block for block, count in enumerate(counts) if count > 1]
        yield {"step": number, "owners": list(owners), "shared": shared}


# The figures are the trace's -------------------------------------------------------------


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_pool_is_that_of_show(name):
    trace = read_trace(GOLD / f"{name}.vtrace")
    _, figures, _ = made(GOLD / f"{name}.vtrace", replay=False, check=False)
    expected = [column.to_dict() for column in show.pool_columns(trace, show.Filter())]
    assert expected == list(columns_of(figures))


@pytest.mark.parametrize("name", SCENARIOS)
def test_requests_kernels_and_facts_are_those_of_the_summary(name):
    summary = Summary.of(read_trace(GOLD / f"{name}.vtrace")).to_dict()
    _, figures, _ = made(GOLD / f"{name}.vtrace", replay=False, check=False)
    added = {"short", "mapping", "lookups"}
    lives = [{k: v for k, v in life.items() if k not in added} for life in figures["requests"]]
    assert json.loads(json.dumps(summary["requests"])) == lives
    assert summary["kernels"] == figures["kernels"]
    assert [step["step"] for step in summary["steps"]] == figures["frames"]["step"]
    for column in ("num_running", "num_free_blocks", "num_prefill_tokens", "num_preempted"):
        assert [step[column] for step in summary["steps"]] == figures["steps"][column]
    forward = [one and one[2] for one in figures["frames"]["stages"]["forward"]]
    assert [step["forward_ns"] for step in summary["steps"]] == forward


@pytest.mark.parametrize("name", ["preempt", "prefix", "mixed"])
def test_events_are_those_of_show_events(name):
    _, figures, pages = made(GOLD / f"{name}.vtrace", replay=False, check=False)
    index = figures["events"]
    told = [row for number in range(index["pages"]) for row in pages[f"events-{number}"]]
    expected = list(read_trace(GOLD / f"{name}.vtrace").records())
    assert len(expected) == index["count"] == len(told)
    for place, (record, values) in enumerate(zip(expected, told, strict=True)):
        kind = index["kinds"][index["kind"][place]]
        assert record.event.kind == kind["name"]
        assert list(record.event.__struct_fields__) == kind["fields"]
        if hasattr(record.event, "blocks"):
            assert record.event.blocks == values[kind["fields"].index("blocks")]
    # A step's events are those that `show events --step` prints.
    for number in figures["frames"]["step"][:5]:
        wanted = show.Filter(first_step=number, last_step=number)
        trace = read_trace(GOLD / f"{name}.vtrace")
        shown = [record.number for record in show.select_events(trace, wanted)]
        assert shown == [1 + at for at, step in enumerate(index["step"]) if step == number]


def test_numbers_that_javascript_would_round_are_text():
    _, figures, pages = made(GOLD / "prefix.vtrace", replay=False, check=False)
    texts = [figures, *pages.values()]
    assert all(abs(number) <= 2**53 for number in numbers_in(texts))
    events = read_trace(GOLD / "prefix.vtrace").events()
    hashes = {str(event.hashes[0]) for event in events if event.kind == "blocks.cached"}
    assert hashes <= set(figures["hashes"])


def numbers_in(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from numbers_in(each)
    elif isinstance(value, int):
        yield value


def test_the_prefix_tree_of_prefix_is_one_run_that_a_hundred_share():
    _, figures, _ = made(GOLD / "prefix.vtrace", replay=False, check=False)
    (node,) = figures["prefix"]["nodes"]
    assert (-1, 0, 5, 160, 99, 0) == tuple(
        node[k] for k in ("parent", "first", "num_blocks", "num_tokens", "hits", "evictions")
    )
    assert 100 == len(node["requests"])
    assert [1, 2, 3, 4, 5] == node["blocks"]


def test_a_prefix_within_a_prefix(tmp_path):
    events = [
        engine(num_blocks=16),
        *[arrived(number, f"r{number}", 16, hashes) for number, hashes in enumerate(
            ([1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 5], [9]))],
        step(1, [], []),
    ]  # fmt: skip
    _, figures, _ = made(written(tmp_path / "t", events), replay=False, check=False)
    told = [
        (n["parent"], n["first"], n["num_blocks"], n["requests"])
        for n in figures["prefix"]["nodes"]
    ]
    assert [(-1, 0, 1, [0, 1, 2, 3]), (0, 1, 1, [0, 1, 2]), (1, 2, 1, [0, 1])] == told


def test_spans_of_a_request_that_was_preempted():
    _, figures, _ = made(GOLD / "preempt.vtrace", replay=False, check=False)
    names = figures["spans"]
    spans = figures["frames"]["spans"]["2"]
    assert ["prefill", "decode", "preempted", "prefill", "decode"] == [names[s[0]] for s in spans]
    steps = figures["frames"]["step"]
    assert 6 == steps[spans[2][1]]  # preempted in step 6, as `show` says
    for before, after in pairwise(spans):
        assert before[2] + 1 == after[1]


def test_verdicts_of_check_and_replay(tmp_path):
    built = report.build(read_trace(GOLD / "preempt.vtrace"))
    assert {"invariants": "clean", "replay": "identical"} == built.verdicts
    trace = read_trace(GOLD / "preempt.vtrace")
    events = list(trace.events())
    for event in events:
        if event.kind == "blocks.taken" and event.blocks == [7]:
            event.blocks = [8]
    path = written(tmp_path / "wrong", events, **trace.header)
    built = report.build(read_trace(path))
    assert {"invariants": "violated", "replay": "diverges"} == built.verdicts
    _, figures, _ = opened(built.html)
    (first, _) = figures["replays"]
    assert "[8]" in first["divergence"]["recorded"] and "[7]" in first["divergence"]["mini"]


def test_what_follows_a_sentence_is_folded_below_it():
    """Which steps PagedAttention's rule would have changed at: many lines that few ask for."""
    html = report.build(read_trace(GOLD / "mixed.vtrace"), report.Asked()).html.decode()
    found = re.search(r'class="findings".*?</section>', html, re.S)[0]
    assert 1 == found.count("<details>") == found.count("<summary>in detail</summary>")
    inside = re.search(r"<details>.*?</details>", found, re.S)[0]
    assert 6 == inside.count("<li>") == len(re.findall("would have changed from|<li>…", inside))
    assert "counterfactual: PagedAttention&#39;s rule" in found.replace(inside, "")


def test_without_replay_and_check_it_says_so():
    built = report.build(read_trace(GOLD / "hello.vtrace"), report.Asked(replay=False, check=False))
    assert {"invariants": "not judged", "replay": "not judged"} == built.verdicts


# Safety ----------------------------------------------------------------------------------


def test_the_policy_lets_in_this_script_and_style_and_nothing_else():
    parsed, _, _ = made(GOLD / "hello.vtrace")
    (style,) = parsed.styles
    running = [text for given, text in parsed.scripts if "type" not in given]
    assert 1 == len(running)

    def digest(text):
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    rules = dict(rule.split(" ", 1) for rule in parsed.policy.split("; "))
    assert "'none'" == rules["default-src"]
    assert f"'{digest(running[0])}'" == rules["script-src"]
    assert f"'{digest(style)}'" == rules["style-src"]
    assert "unsafe" not in parsed.policy
    for tag, given in parsed.tags:
        assert not any(name.startswith("on") for name in given), tag
        assert "style" not in given, tag
        for name in ("src", "href"):
            assert not re.match(r"(https?:)?//", given.get(name) or ""), (tag, given)
    assert "innerHTML" not in running[0] and "eval(" not in running[0]


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "-->",
    "<img src=x onerror=alert(1)>",
    "\u2028\u2029",
    "\"'`${alert(1)}&amp;&lt;",
    "\x00\x1b[31m\ud7ff\ufeff",
    "]]>{{ 7*7 }}{% raw %}",
    "a" * 5000,
]


def hostile(tmp_path):
    """A trace whose requests, model and label are meant to break out of the page."""
    events = [engine(num_blocks=40, model=HOSTILE[0], dtype=HOSTILE[3], policy=HOSTILE[2])]
    for number, name in enumerate(HOSTILE):
        events += [arrived(number, name, 4, [number + 1], lora=name)]
        events += admitted(number, 4, [number + 1], [number + 1], free=38 - number)
    everyone = list(range(len(HOSTILE)))
    events += [step(1, everyone, [4] * len(everyone), new=everyone), updated(1, [[1]] * len(everyone))]  # fmt: skip
    for number in everyone:
        events += ended(number, [number + 1], reason=HOSTILE[number])
    return written(tmp_path / "hostile", events, vllm=HOSTILE[1], platform=HOSTILE[3])


def test_hostile_text_adds_no_tag_and_arrives_whole(tmp_path):
    plain, _, _ = made(GOLD / "hello.vtrace", label="hello")
    parsed, figures, _ = made(hostile(tmp_path), label=HOSTILE[0])
    kinds = [tag for tag, _ in parsed.tags]
    assert ["script"] * 3 == [tag for tag in kinds if tag == "script"]
    assert set(kinds) <= {tag for tag, _ in plain.tags} | {"section", "strong", "ul", "li"}
    assert HOSTILE == [life["name"] for life in figures["requests"]]
    assert HOSTILE[0] in "".join(parsed.texts)


def secret(tmp_path, tokens):
    events = [
        engine(num_blocks=9),
        arrived(0, "r", 4, token_ids=[424242, 2, 3, 4] if tokens else None),
        *admitted(0, 4, [1], free=7),
        step(1, [0], [4], new=[0]),
        updated(1, [[535353]]) if tokens else updated(1, [[1]]),
    ]
    if not tokens:
        events[-1].token_ids = None
    return written(tmp_path / f"secret-{tokens}", events, tokens=tokens)


def test_tokens_are_shown_only_when_recorded_and_asked_for(tmp_path):
    path = secret(tmp_path, True)
    _, figures, pages = made(path)
    assert not {424242, 535353} & set(numbers_in([figures, *pages.values()]))
    _, figures, pages = made(path, tokens=True)
    assert [424242, 2, 3, 4] == figures["tokens"]["prompts"]["0"]
    assert [535353] == figures["tokens"]["outputs"]["0"]
    assert {424242, 535353} <= set(numbers_in(list(pages.values())))
    with pytest.raises(UsageError, match="no token ids"):
        made(secret(tmp_path, False), tokens=True)


@needs_vllm
def test_no_token_of_a_real_engine_is_in_the_report():
    from helpers import ran

    done = ran("preempt", "full")  # recorded with tokens
    trace = read_trace(done.folder)
    prompts = [e.token_ids for e in trace.events() if e.kind == "request.arrived"]
    assert prompts and all(prompts)
    _, _, pages = made(done.folder, replay=False, check=False)
    _, asked, _ = made(done.folder, replay=False, check=False, tokens=True)
    assert prompts == list(asked["tokens"]["prompts"].values())
    texts = json.dumps(list(pages.values()))
    for ids in prompts:
        assert json.dumps(ids)[1:-1] not in texts


# Traces that are not whole ----------------------------------------------------------------


def test_a_truncated_trace_goes_as_far_as_it_goes(tmp_path):
    data = (GOLD / "mixed.vtrace").read_bytes()
    path = tmp_path / "cut.vtrace"
    path.write_bytes(data[: len(data) // 2])
    built = report.build(read_trace(path))
    parsed, figures, _ = opened(built.html)
    assert not built.damaged
    assert any("truncated" in problem for problem in built.problems)
    assert any("truncated" in text for text in parsed.texts)
    assert "not judged" == built.verdicts["replay"]
    trace = read_trace(path)
    assert len(list(trace.events())) == figures["events"]["count"]


def test_a_trace_damaged_in_the_middle_is_read_up_to_there(tmp_path):
    whole = read_trace(GOLD / "preempt.vtrace")
    events = list(whole.events())
    (path,) = written(tmp_path / "t", events, **whole.header).iterdir()
    assert [] == report.build(read_trace(path)).problems
    # In place of the footer, a second frame whose checksum is wrong.
    data = path.read_bytes()
    footer = data.rindex(b'{"num_events"') - 13
    assert b"F" == data[footer : footer + 1]
    path.write_bytes(data[:footer] + b"E" + (10).to_bytes(4, "little") * 2 + b"\0" * 14)
    built = report.build(read_trace(path))
    _, figures, _ = opened(built.html)
    assert built.damaged
    assert f"read up to event {len(events)} only" in built.problems[0]
    assert len(events) == figures["events"]["count"]
    done = run_cli("report", path, "-o", tmp_path / "r.html", cwd=tmp_path)
    assert 1 == done.returncode and "the checksum of a frame is wrong" in done.stderr
    assert (tmp_path / "r.html").exists()


@pytest.mark.parametrize("events", [[], [configured()]], ids=["no event", "no step"])
def test_a_trace_in_which_nothing_happened(tmp_path, events):
    path = write_trace(tmp_path, "main", 1, [events] if events else [])
    parsed, figures, _ = made(path)
    assert [] == figures["frames"]["step"]
    assert any("no step" in problem for problem in figures["problems"])
    assert parsed.policy


def test_level_light_says_what_it_does_not_hold(tmp_path):
    events = [
        configured(), arrived(0, "r", 4), step(1, [0], [4], free=7, new=[0]), updated(1, [[1]]),
    ]  # fmt: skip
    path = written(tmp_path / "light", events, level="light")
    _, figures, _ = made(path)
    assert any("level light" in problem for problem in figures["problems"])
    assert [7] == figures["steps"]["num_free_blocks"]


def test_steps_of_a_long_trace(tmp_path):
    _, figures, _ = made(GOLD / "mixed.vtrace", first_step=100, last_step=120, replay=False)
    assert list(range(100, 121)) == figures["frames"]["step"]
    trace = read_trace(GOLD / "mixed.vtrace")
    wanted = show.Filter(first_step=100, last_step=120)
    assert [c.to_dict() for c in show.pool_columns(trace, wanted)] == list(columns_of(figures))
    assert {100 <= step <= 120 for step in figures["events"]["step"]} == {True}
    assert any("only steps 100 to 120 were asked for" in p for p in figures["problems"])


def test_a_report_has_a_limit_and_says_what_it_leaves_out(monkeypatch):
    monkeypatch.setattr(frames_module, "MAX_FRAMES", 10)
    monkeypatch.setattr(bodies, "MAX_EVENTS", 100)
    _, figures, _ = made(GOLD / "preempt.vtrace", replay=False, check=False)
    assert 10 == len(figures["frames"]["step"])
    assert 100 == figures["events"]["count"]
    (said,) = figures["problems"]
    assert "105 of 115 steps and 877 events are left out" in said
    assert "--step N-M" in said


def test_a_long_list_is_cut_and_counted(tmp_path):
    tokens = bodies.MAX_LIST + 7
    events = [engine(num_blocks=2000), arrived(0, "r", tokens), looked_up(0, tokens)]
    events += admitted(0, tokens, list(range(1, tokens + 1)))[1:]
    _, _, pages = made(written(tmp_path / "t", events), replay=False, check=False)
    taken = next(row for row in pages["events-0"] if len(row) == 1)
    assert bodies.MAX_LIST + 1 == len(taken[0])
    assert f"… {tokens} in all" == taken[0][-1]


# The verb --------------------------------------------------------------------------------


def test_the_verb_writes_beside_the_trace_and_tells_where(tmp_path):
    folder = tmp_path / "reports" / "preempt" / "one"
    (folder / "trace").mkdir(parents=True)
    (folder / "trace" / "main-1.vtrace").write_bytes((GOLD / "preempt.vtrace").read_bytes())
    done = run_cli("report", folder, cwd=tmp_path)
    assert (0, "") == (done.returncode, done.stderr)
    html = (folder / "report.html").read_bytes()
    assert done.stdout.startswith(f"{folder}/report.html (0.")
    assert "preempt, one" in Scripts(html.decode()).texts
    assert [folder / "report.html", folder / "trace"] == sorted(folder.iterdir())

    done = run_cli("report", folder, "--json", "-o", "other/r.html", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert ("other/r.html", [], "clean", "identical") == tuple(
        told[k] for k in ("report", "problems", "invariants", "replay")
    )
    assert (tmp_path / "other/r.html").stat().st_size == told["size_bytes"]


def test_the_verb_writes_to_stdout(tmp_path):
    words = command("report", GOLD / "hello.vtrace", "-o", "-")
    done = subprocess.run(words, capture_output=True, timeout=120, cwd=tmp_path)
    assert (0, b"") == (done.returncode, done.stderr)
    assert done.stdout.startswith(b"<!doctype html>") and done.stdout.rstrip().endswith(b"</html>")
    assert [] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--json", "-o", "-"], "-o - and --json do not go together"),
        (["-o", "/proc/nothing/r.html"], "cannot write /proc/nothing/r.html"),
        (["--tokens"], "this trace holds no token ids"),
        (["--step", "x"], "--step 'x' is neither N nor N-M"),
    ],
)
def test_the_verb_names_what_is_wrong(words, said, tmp_path):
    done = run_cli("report", GOLD / "hello.vtrace", *words, cwd=tmp_path)
    assert (2, "") == (done.returncode, done.stdout)
    assert said in done.stderr
    assert [] == list(tmp_path.iterdir())
