"""The report in a real Chromium, of traces that are hostile, damaged, large, or lack something."""

import importlib.util
import json

import pytest
from helpers import run_cli
from recorded import admitted, arrived, engine, step, torn, updated, written

from report.conftest import GOLD
from report.test_report import HOSTILE, hostile, secret
from vllm_trace import report, show
from vllm_trace.events import BlocksFreed, BlocksTaken, KVGroup, SlotsAllocated
from vllm_trace.trace import read_trace

ROOT = GOLD.parent.parent

pytestmark = pytest.mark.timeout(300)


def saved(path, folder, **asked):
    made = folder / "report.html"
    report.save(report.build(read_trace(path), report.Asked(**asked)).html, made)
    return made


# Safety ------------------------------------------------------------------------------------


def test_hostile_text_is_text(tmp_path, browse):
    seen = browse(saved(hostile(tmp_path), tmp_path, label=HOSTILE[0]))
    dialogs = []
    seen.page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    assert HOSTILE[0] == seen.page.locator("h1").inner_text()
    for number, name in enumerate(HOSTILE):
        told = seen.block(number + 1)["owner"]
        if len(name) < 22 and name.isprintable():
            assert told.startswith(name)
    for figure in ("requests", "timeline", "prefix", "kernels", "checks", "events"):
        seen.go(f"#{figure}")
        seen.page.wait_for_timeout(50)
    for number in (0, 1, 3, 5):
        seen.go(f"#requests?request={number}")
        assert HOSTILE[number] == seen.page.locator("#facts dd").first.inner_text()
    assert [] == dialogs
    assert 0 == seen.page.locator("img").count()


def test_the_policy_blocks_network_and_foreign_script(gold, chromium):
    context = chromium.new_context()
    page = context.new_page()
    said = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(gold("hello").as_uri())
    page.wait_for_selector("html[data-ready]")
    failed = page.evaluate("fetch('http://127.0.0.1:9/').then(() => '', error => String(error))")
    assert "Failed to fetch" in failed
    page.evaluate(
        "() => { const i = new Image(); i.src = 'http://127.0.0.1:9/x.png';"
        " const s = document.createElement('style'); s.append('body{color:red}'); document.head.append(s);"
        " const l = document.createElement('link'); l.rel = 'stylesheet'; l.href = 'http://127.0.0.1:9/x.css';"
        " document.head.append(l); const f = document.createElement('iframe'); f.src = 'http://127.0.0.1:9/';"
        " document.body.append(f); }"
    )
    for script in ("document.body.innerHTML = '<b>x</b>'", "document.write('x')"):
        assert "TrustedHTML" in page.evaluate(
            f"() => {{ try {{ {script}; return 'done' }} catch (error) {{ return String(error) }} }}"
        )
    page.wait_for_timeout(200)
    blocked = " ".join(said)
    for directive in ("connect-src", "img-src", "style-src", "frame-src"):
        assert directive in blocked or "default-src" in blocked
    assert 4 <= blocked.count("violates the following Content Security Policy directive")
    context.close()


def test_tokens_are_shown_when_asked_for_only(tmp_path, browse):
    path = secret(tmp_path, True)
    seen = browse(saved(path, tmp_path), "#requests")
    assert "424242" not in seen.page.content()
    assert "Token ids" not in seen.text("#table-box")
    seen = browse(saved(path, tmp_path, tokens=True), "#requests")
    assert "prompt 424242 2 3 4 output 535353" in seen.text("#table-box")


# Traces that are not whole -----------------------------------------------------------------


def test_a_truncated_trace_is_marked_at_the_top(tmp_path, browse):
    path = torn(GOLD / "mixed.vtrace", tmp_path)
    seen = browse(saved(path, tmp_path))
    assert "truncated (torn frame" in seen.text("#problems")
    columns = list(show.pool_columns(read_trace(path), show.Filter()))
    assert 20 < len(columns) < 380
    seen.set_step(len(columns) - 1)
    assert columns[-1].step == seen.step
    seen.go("#checks")
    assert "not judged" in seen.text("#replay-table")


def test_a_busy_server_is_no_longer_list_of_nodes(tmp_path, browse):
    """200 requests in each of 2,000 steps: the page stays small, and every figure answers."""
    path = ROOT / "bench" / "large.py"
    spec = importlib.util.spec_from_file_location("large", path)
    large = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(large)
    trace = large.write(tmp_path / "large")
    columns = {
        column.step: column.owners
        for column in show.pool_columns(
            read_trace(trace), show.Filter(first_step=1201, last_step=1201)
        )
    }
    seen = browse(saved(trace, tmp_path, replay=False, check=False))
    seen.set_step(1200)
    for block in (1, 800, 7000, 12_999):
        owner = columns[1201][block]
        told = seen.block(block)["owner"]
        assert told.startswith(f"cmpl-00000…{owner:09x}-0 (" if owner >= 0 else "none: free")
    for name in ("pool", "requests", "timeline", "prefix", "kernels", "checks"):
        seen.go(f"#{name}")
        assert seen.page.evaluate("document.querySelectorAll('*').length") < 6000, name
    seen.go("#events?kind=blocks.taken&block=7000")
    seen.page.locator("#events-body .line").first.wait_for()
    assert "1 of 65,401 events" == seen.text("#event-count")
    seen.go("#events?n=65000")
    seen.page.locator("#event-detail h3").wait_for()
    assert "Event 65000:" in seen.text("#event-detail")
    assert seen.page.evaluate("document.querySelectorAll('*').length") < 6000


def test_the_null_block_where_a_window_has_passed(tmp_path, browse):
    events = [
        engine(groups=[KVGroup("SlidingWindowSpec", 4, ["layers.0"], sliding_window=8)]),
        arrived(0, "r", 8), *admitted(0, 8, [1, 2], free=6), step(1, [0], [8], new=[0], free=6),
        updated(1, [[1]]), BlocksFreed([1], [0]), BlocksTaken([3]),
        SlotsAllocated(0, 1, 0, [[3]], [], 6), step(2, [0], [1], free=6), updated(2, [[1]]),
    ]  # fmt: skip
    seen = browse(saved(written(tmp_path / "window", events), tmp_path), "#requests")
    seen.set_step(1)
    told = seen.page.locator("#table-box .map button b").all_inner_texts()
    assert ["null", "2", "3"] == told
    seen.go("#pool")
    assert "none: free" == seen.block(1)["owner"]
    assert "r (place 2)" == seen.block(3)["owner"]
    assert "the null block" in seen.block(0)["owner"]


def test_a_trace_without_a_step_and_one_of_level_light(tmp_path, browse):
    seen = browse(saved(written(tmp_path / "none", [engine()]), tmp_path))
    assert "no step" in seen.text("#problems")
    for name in ("requests", "timeline", "prefix", "kernels", "checks", "events"):
        seen.go(f"#{name}")
    events = [engine(), arrived(0, "r", 4)]
    events += [step(n, [0], [4 if n == 1 else 1], free=8 - n) for n in (1, 2)] + [updated(1, [[1]])]
    seen = browse(saved(written(tmp_path / "light", events, level="light"), tmp_path))
    assert "level light" in seen.text("#problems")
    assert "7 of 8 blocks are free at step 1" in seen.text("#panel-pool")
    for name in ("requests", "timeline", "prefix", "kernels", "checks", "events"):
        seen.go(f"#{name}")


def test_a_divergence_and_a_violation_are_shown_with_their_events(tmp_path, browse):
    trace = read_trace(GOLD / "preempt.vtrace")
    events = list(trace.events())
    for event in events:
        if event.kind == "blocks.taken" and event.blocks == [7]:
            event.blocks = [8]
    seen = browse(saved(written(tmp_path / "wrong", events, **trace.header), tmp_path), "#checks")
    done = run_cli("replay", tmp_path / "wrong", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)["replays"][0]["divergence"]
    told = seen.text("#divergence")
    assert f"event {found['event']}" in told
    sides = seen.page.locator("#divergence .side code").all_inner_texts()
    assert [found["recorded"], found["mini"]] == sides
    assert "✗ violated" in seen.text("#invariant-table")
    assert int(seen.text("#tab-checks .count")) >= 1
    seen.page.locator("#divergence h3 a").first.click()
    seen.page.locator("#event-detail h3").wait_for()
    assert f"Event {found['event']}:" in seen.text("#event-detail")
