"""The report in a real Chromium: what it shows equals ``show --json``, and it can be used."""

import json
import re

import pytest
from helpers import run_cli

from report.conftest import GOLD
from vllm_trace import show
from vllm_trace.events import to_dict
from vllm_trace.trace import read_trace

ROOT = GOLD.parent.parent

pytestmark = pytest.mark.timeout(300)


def shown(name, view, *words):
    """What ``show --json`` prints of a golden trace."""
    done = run_cli("show", GOLD / f"{name}.vtrace", view, "--json", *words, cwd=GOLD)
    assert (0, "") == (done.returncode, done.stderr)
    return json.loads(done.stdout)


def numbers_of(lines):
    """Numbers of the events in sight."""
    return [int(n) for n in lines.evaluate_all("nodes => nodes.map(node => node.dataset.event)")]


# Equal to show --json --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "steps"), [("preempt", [1, 6, 7, 38, 61, 115]), ("prefix", [1, 2, 8])]
)
def test_blocks_are_those_of_show(name, steps, gold, browse):
    columns = {column["step"]: column for column in shown(name, "blocks")["columns"]}
    names = {life["request"]: life["name"] for life in shown(name, "requests")["requests"]}
    seen = browse(gold(name))
    for number in steps:
        column = columns[number]
        seen.set_step(number - 1)
        assert number == seen.step
        owners = column["owners"]
        for block in range(1, len(owners)):
            if len(owners) > 100 and block > 40 and block % 7:
                continue  # of the many that are free, some
            told = seen.block(block)
            if block in column["shared"]:
                assert names[owners[block]] in told["owners"] or "in all" in told["owners"]
                assert int(told["references"]) > 1
            elif owners[block] >= 0:
                assert told["owner"].startswith(f"{names[owners[block]]} (place ")
                assert "1" == told["references"]
            else:
                assert {-1: "none: free, but cached", -2: "none: free"}[owners[block]] == told[
                    "owner"
                ]
                assert "0" == told["references"]
        held = sum(owner >= 0 for owner in owners)
        cached = sum(owner == -1 for owner in owners)
        free = len(owners) - 1 - held
        several = f" ({len(column['shared'])} by several)" if column["shared"] else ""
        assert f"{held} held{several}, {free} free ({cached} of them cached)" == seen.text(
            "#pool-counts"
        )


@pytest.mark.parametrize(("name", "some"), [("preempt", 3), ("prefix", 6)])
def test_requests_are_those_of_show(name, some, gold, browse):
    seen = browse(gold(name), "#requests")
    for life in shown(name, "requests")["requests"][:some]:
        seen.go(f"#requests?request={life['request']}")
        row = seen.page.locator(f".line[data-request='{life['request']}']")
        hit = life["num_hit_tokens"] + life["num_resume_hit_tokens"] or "–"
        expected = [
            life["name"], str(life["num_prompt_tokens"]), str(hit), str(life["num_output_tokens"]),
            str(life["num_preemptions"] or "–"), life["reason"],
        ]  # fmt: skip
        assert expected == [text for text in row.inner_text().split("\n") if text]
        facts = seen.text("#facts")
        assert f"step {life['first_step']} to step {life['last_step']}" in facts


@pytest.mark.parametrize(("name", "steps"), [("preempt", [5, 6, 59, 100]), ("prefix", [1, 8])])
def test_tables_at_the_sliders_step_are_those_of_the_trace(name, steps, gold, browse):
    from vllm_trace.state import KVState

    trace, state, tables = read_trace(GOLD / f"{name}.vtrace"), KVState(), {}
    for event in trace.events():
        state.apply(event)
        if event.kind == "step.scheduled":
            tables[event.step] = {r: [list(row) for row in t] for r, t in state.tables.items()}
    seen = browse(gold(name), "#requests")
    for number in steps:
        seen.set_step(number - 1)
        for request in (0, 2):
            seen.go(f"#requests?request={request}")
            cells = seen.page.locator("#table-box .map button")
            told = [
                tuple(int(cell.get_attribute(f"data-{name}")) for name in ("place", "block"))
                for cell in cells.all()
            ]
            assert list(enumerate(tables[number].get(request, [[]])[0])) == told
            assert [b.split("→")[1].strip() for b in cells.all_inner_texts()] == [
                str(b) for _, b in told
            ]


def test_kernels_checks_and_cards_are_those_of_the_verbs(gold, browse):
    seen = browse(gold("preempt"), "#kernels")
    (kernel,) = shown("preempt", "kernels")["kernels"]
    row = seen.text("#kernel-table tbody")
    assert row.startswith(
        f"{kernel['kernel']} {kernel['variant']} {kernel['num_steps']} {kernel['num_calls']} "
    )
    seen.go("#checks")
    done = run_cli("check", GOLD / "preempt.vtrace", "--json", cwd=GOLD)
    judged = json.loads(done.stdout)["traces"][0]["invariants"]
    for one in judged:
        told = seen.text(f"tr[data-id='{one['id']}']")
        assert one["sentence"] in told
        assert {"holds": "✓ holds", "unjudged": "? not judged"}[one["status"]] in told
    again = json.loads(run_cli("replay", GOLD / "preempt.vtrace", "--json", cwd=GOLD).stdout)
    rows = [f"{r['mode']} {r['events']} 100.0 % {r['compared']}" for r in again["replays"]]
    expected = " ".join(f"{row} ✓ identical" for row in rows)
    assert expected == seen.text("#replay-table tbody")
    cards = seen.text(".cards")
    assert (
        "Preemptions 1 of 1 request" in cards and "Evictions 4" in cards and "Refusals 55" in cards
    )


def test_events_are_those_of_show(gold, browse):
    seen = browse(gold("preempt"), "#events?request=r-2&kind=slots.refused,request&step=6-60")
    trace = read_trace(GOLD / "preempt.vtrace")
    wanted = show.Filter.parse("r-2", "6-60", "slots.refused,request")
    expected = list(show.select_events(trace, wanted))
    assert f"{len(expected)} of 977 events" == seen.text("#event-count")
    lines = seen.page.locator("#events-body .line")
    first = numbers_of(lines)
    assert [record.number for record in expected][: len(first)] == first
    assert len(first) < len(expected)  # only those in sight exist
    lines.nth(1).click()
    record = expected[1]
    assert f"Event {record.number}: {record.event.kind}" in seen.text("#event-detail")
    names = seen.page.locator("#event-fields dt").all_inner_texts()
    values = seen.page.locator("#event-fields dd").all_inner_texts()
    fields = to_dict(record.event)
    fields.pop("kind")
    texts = {k: json.dumps(v) if isinstance(v, list) else str(v) for k, v in fields.items()}
    assert texts == dict(zip(names, values, strict=True))


def test_events_of_a_block_and_one_event_by_its_number(gold, browse):
    seen = browse(gold("preempt"))
    seen.page.locator("#grid").focus()
    for _ in range(7):
        seen.page.keyboard.press("ArrowRight")
    seen.page.keyboard.press("Enter")
    seen.settle()
    assert seen.page.url.endswith("#events?block=7")
    expected = [
        record.number
        for record in read_trace(GOLD / "preempt.vtrace").records()
        if record.event.kind.startswith(("block", "slots.allocated", "prefix.looked_up"))
        and re.search(r"\b7\b", str([to_dict(record.event).get(k) for k in ("block", "blocks", "hit_blocks")]))
    ]  # fmt: skip
    lines = seen.page.locator("#events-body .line")
    lines.first.wait_for()
    assert expected == numbers_of(lines)
    seen.go("#events?n=67")
    seen.page.locator("#event-detail h3").wait_for()
    assert "Event 67: request.preempted" in seen.text("#event-detail")
    seen.page.get_by_text("Show the pool at step 6").click()
    seen.settle()
    assert 6 == seen.step and seen.page.locator("#grid").is_visible()


def test_the_prefix_tree_opens_by_keys(gold, browse):
    seen = browse(gold("prefix"), "#prefix")
    item = seen.page.locator("[role=treeitem]")
    assert 1 == item.count()
    assert "100 requests · 160 tokens" in seen.text("#tree")
    item.focus()
    was = item.get_attribute("aria-expanded")
    seen.page.keyboard.press("Enter")
    assert {was, item.get_attribute("aria-expanded")} == {"true", "false"}
    if item.get_attribute("aria-expanded") == "false":
        seen.page.keyboard.press("ArrowRight")
    assert "block 5" in seen.text("#tree") and "user-0" in seen.text("#tree")
    last = seen.page.get_by_role("button", name="user-99", exact=True)
    assert 0 == last.count()
    seen.page.get_by_role("button", name="and 40 more").click()
    assert 1 == last.count()
    seen.page.get_by_role("button", name="user-3", exact=True).click()
    seen.settle()
    assert "user-3" in seen.text("#facts")


# Use --------------------------------------------------------------------------------------


def test_the_slider_moves_by_mouse_and_by_keys(gold, browse):
    seen = browse(gold("preempt"))
    assert 1 == seen.step
    slider = seen.page.locator("#slider")
    box = slider.bounding_box()
    seen.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    seen.settle()
    assert 55 <= seen.step <= 62
    slider.focus()
    here = seen.step
    for key, expected in (("ArrowRight", here + 1), ("ArrowLeft", here), ("Home", 1)):
        seen.page.keyboard.press(key)
        seen.settle()
        assert expected == seen.step
    seen.page.keyboard.press("End")
    seen.settle()
    assert "The end · after the last step" == seen.text("#where")
    assert "0 held, 8 free" in seen.text("#pool-counts")
    assert "The end" in slider.get_attribute("aria-valuetext")


def test_space_plays_and_pauses(gold, browse):
    seen = browse(gold("preempt"))
    seen.page.locator("#speed").select_option("120")
    seen.page.evaluate("document.activeElement.blur()")
    seen.page.keyboard.press(" ")
    assert "Pause" == seen.page.get_attribute("#play", "aria-label")
    seen.until("document.getElementById('slider').value > 10")
    seen.page.keyboard.press(" ")
    seen.settle()
    assert "Play" == seen.page.get_attribute("#play", "aria-label")
    here = seen.step
    seen.page.wait_for_timeout(200)
    assert here == seen.step
    # To the end, where it stops by itself.
    seen.page.locator("#play").click()
    seen.until("document.getElementById('where').textContent.startsWith('The end')")
    assert "false" == seen.page.get_attribute("#play", "aria-pressed")


def test_every_figure_opens_by_keys_and_has_an_address(gold, browse):
    seen = browse(gold("mixed"))
    names = ["pool", "requests", "timeline", "prefix", "kernels", "checks", "events"]
    for number, name in enumerate(names, 1):
        seen.page.keyboard.press(str(number))
        seen.settle()
        assert seen.page.locator(f"#panel-{name}").is_visible()
        assert 1 == seen.page.locator("[role=tabpanel]:visible").count()
        assert seen.page.url.endswith(f"#{name}")
    seen.page.locator("#tab-events").focus()
    seen.page.keyboard.press("ArrowRight")
    seen.settle()
    assert "pool" == seen.page.evaluate("document.activeElement.dataset.tab")
    assert seen.page.locator("#panel-pool").is_visible()
    seen.page.keyboard.press("?")
    assert seen.page.locator("#keys").is_visible()
    seen.page.keyboard.press("Escape")
    assert not seen.page.locator("#keys").is_visible()


def test_tab_goes_through_with_the_focus_in_sight(gold, browse):
    seen = browse(gold("preempt"))
    reached = []
    for _ in range(22):
        seen.page.keyboard.press("Tab")
        reached.append(
            seen.page.evaluate(
                "(() => { const at = document.activeElement; const s = getComputedStyle(at);"
                " const name = at === document.body ? 'body' : at.id || at.textContent.trim().slice(0, 12);"
                " return [name, s.outlineStyle, parseFloat(s.outlineWidth)] })()"
            )
        )
    names = [name for name, _, _ in reached]
    for expected in ("theme", "play", "slider", "tab-pool", "grid"):
        assert expected in names
    unseen = [name for name, style, width in reached if style == "none" or width < 1]
    assert set(unseen) <= {"body"}  # after the last control


def test_every_control_has_a_name(gold, browse):
    seen = browse(gold("preempt"))
    for name in ("pool", "requests", "timeline", "events"):
        seen.go(f"#{name}")
        nameless = seen.page.evaluate(
            "[...document.querySelectorAll('button, input, select, canvas:not([aria-hidden]), [role=img]')]"
            ".filter(n => !(n.getAttribute('aria-label') || n.textContent.trim())).map(n => n.outerHTML.slice(0, 90))"
        )
        assert [] == nameless


def test_the_timeline_zooms_and_a_click_goes_to_the_step(gold, browse):
    seen = browse(gold("mixed"), "#timeline")
    whole = seen.text("#time-span")
    canvas = seen.page.locator("#time")
    canvas.focus()
    seen.page.keyboard.press("+")
    seen.page.keyboard.press("+")
    seen.settle()
    assert whole != seen.text("#time-span")
    box = canvas.bounding_box()
    seen.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 60)
    seen.page.mouse.wheel(0, -400)
    seen.settle()
    seen.page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 200)
    seen.settle()
    assert 60 < seen.step < 380
    assert f"Step {seen.step}" in seen.text("#step-detail")
    seen.page.keyboard.press("0")
    seen.settle()
    assert whole == seen.text("#time-span")
    # The lane of the forward pass tells its time, that of the trace.
    steps = {step["step"]: step for step in shown("mixed", "steps")["steps"]}
    seen.page.get_by_role("button", name="Zoom to the step of the slider").click()
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    for at in range(10, 95, 4):
        seen.page.mouse.move(box["x"] + box["width"] * at / 100, box["y"] + 20 + 2.5 * 26)
        if seen.page.locator("#tip").is_visible():
            break
    told = seen.text("#tip")
    number = int(re.match(r"step (\d+), forward", told)[1])
    from vllm_trace.render import duration

    assert f"took {duration(steps[number]['forward_ns'])} " in told


def test_names_are_found_and_ordered(gold, browse):
    seen = browse(gold("mixed"), "#requests")
    seen.page.locator("#request-search").fill("chat-4")
    seen.settle()
    names = seen.page.locator(".req .line .ell").all_inner_texts()
    assert {"chat-4", "chat-40", "chat-49"} <= set(names)
    assert all("chat-4" in name for name in names)
    seen.page.locator("#request-search").fill("")
    seen.page.locator("#request-sort").select_option("num_preemptions")
    seen.settle()
    most = max(life["num_preemptions"] for life in shown("mixed", "requests")["requests"])
    assert str(most) == seen.page.locator(".req .line .c.less").nth(1).inner_text()


# Light and dark, narrow, on paper ----------------------------------------------------------


def background(seen):
    colour = seen.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3]))


def grid_colours(seen):
    return seen.page.evaluate(
        "(() => { const c = document.getElementById('grid'); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; const s = new Set();"
        " for (let i = 0; i < d.length; i += 4) s.add(d[i] << 16 | d[i+1] << 8 | d[i+2]); return [...s] })()"
    )


def test_dark_follows_the_system_and_the_button(gold, browse):
    light = browse(gold("preempt"), color_scheme="light")
    dark = browse(gold("preempt"), color_scheme="dark")
    assert background(light) > 700 and background(dark) < 120
    assert set(grid_colours(light)) != set(grid_colours(dark))
    assert 0x0072B2 in grid_colours(light) and 0x0072B2 in grid_colours(dark)  # an owner's stays
    button = dark.page.locator("#theme")
    button.click()
    dark.settle()
    assert background(dark) > 700 and "light" in button.get_attribute("aria-label")
    button.click()
    dark.settle()
    assert background(dark) < 120
    dark.page.emulate_media(color_scheme="light")
    dark.settle()
    assert background(dark) < 120  # chosen
    button.click()
    dark.settle()
    assert background(dark) > 700  # automatic again


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["pool", "requests", "checks", "events"])
def test_text_stands_out_from_its_background(name, scheme, gold, browse):
    """WCAG's contrast of 4.5 for all text of the page."""
    seen = browse(gold("preempt"), f"#{name}", color_scheme=scheme)
    seen.page.wait_for_timeout(150)
    weak = seen.page.evaluate(CONTRAST)
    assert [] == weak


CONTRAST = """() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const lum = (rgb) => {
    const f = rgb.slice(0, 3).map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
    return .2126 * f[0] + .7152 * f[1] + .0722 * f[2]; };
  const behind = (n) => { for (; n; n = n.parentElement) { const c = parse(getComputedStyle(n).backgroundColor);
    if (c.length === 3 || c[3] === 1) return c; } return [255, 255, 255]; };
  const weak = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const n = walk.currentNode.parentElement;
    if (!walk.currentNode.textContent.trim() || !n.checkVisibility()) continue;
    if (['SCRIPT', 'OPTION', 'NOSCRIPT'].includes(n.tagName)) continue;
    const [a, b] = [lum(parse(getComputedStyle(n).color)), lum(behind(n))];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 4.5) weak.push([walk.currentNode.textContent.trim().slice(0, 40), n.className, ratio.toFixed(2)]);
  }
  return weak;
}"""


@pytest.mark.parametrize("width", [1280, 600, 360])
def test_nothing_is_wider_than_the_window(width, gold, browse):
    seen = browse(gold("mixed"), viewport={"width": width, "height": 800})
    for name in ("pool", "requests", "timeline", "prefix", "kernels", "checks", "events"):
        seen.go(f"#{name}")
        seen.page.wait_for_timeout(50)
        wide = seen.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert wide <= 0, name
    seen.go("#pool")
    assert seen.block(1)["owner"]


def test_on_paper_every_figure_is_light_and_under_the_other(gold, browse, tmp_path):
    seen = browse(gold("preempt"), color_scheme="dark")
    pdf = seen.page.pdf(format="A4")
    (num_pages,) = re.findall(rb"/Count (\d+)", pdf)
    assert 7 <= int(num_pages) < 20  # a panel and more on each
    seen.page.emulate_media(media="print")
    seen.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    seen.settle()
    assert 7 == seen.page.locator("[role=tabpanel]:visible").count()
    assert not seen.page.locator("#play").is_visible()
    assert background(seen) > 700
    assert seen.page.locator("#grid").is_visible() and "977 events" in seen.text("#event-count")
    seen.page.evaluate("dispatchEvent(new Event('afterprint'))")
    seen.page.emulate_media(media="screen")
    seen.settle()
    assert 1 == seen.page.locator("[role=tabpanel]:visible").count()
    assert background(seen) < 120
