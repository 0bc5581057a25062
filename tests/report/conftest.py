"""A real Chromium, driven by Playwright; what it showed is kept when a test fails."""

import re
import time
from pathlib import Path

import browser
import pytest

from vllm_trace import report
from vllm_trace.trace import read_trace

HERE = Path(__file__).resolve().parent
GOLD = HERE.parent / "gold"
FAILED = HERE / "failed"
"""Screenshots of failed tests; git ignores it."""


@pytest.fixture(scope="session")
def gold(tmp_path_factory):
    """``gold(name)``: the report of a golden trace, made once."""
    folder = tmp_path_factory.mktemp("reports")
    made = {}

    def report_of(name, **asked):
        key = (name, *sorted(asked.items()))
        if key not in made:
            path = folder / f"{name}-{len(made)}.html"
            trace = read_trace(GOLD / f"{name}.vtrace")
            report.save(report.build(trace, report.Asked(label=name, **asked)).html, path)
            made[key] = path
        return made[key]

    return report_of


@pytest.fixture(scope="module")
def chromium():
    with browser.chromium() as started:
        yield started


class Seen:
    """A report in the browser: the page, and all that must not have happened in it."""

    def __init__(self, page):
        self.page = page
        self.errors: list[str] = []
        self.requests: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))

    def _console(self, message):
        if message.type == "error":
            self.errors.append(message.text)

    def open(self, path, anchor=""):
        self.page.goto(path.as_uri() + anchor)
        self.page.wait_for_selector("html[data-ready], html[data-failed]")
        assert self.page.get_attribute("html", "data-failed") is None
        self.settle()
        return self

    def settle(self):
        """Until what was asked for is drawn."""
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
        )

    def until(self, expression, seconds=10):
        """Until it is true in the page. (Playwright's own waiting evaluates text, which the policy forbids.)"""
        end = time.monotonic() + seconds
        while not self.page.evaluate(f"() => Boolean({expression})"):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(20)

    def go(self, anchor):
        self.page.evaluate("anchor => { location.hash = anchor }", anchor)
        self.settle()

    def set_step(self, place):
        """As a hand on the slider does: its value, and the event of it."""
        self.page.locator("#slider").fill(str(place))
        self.settle()

    def text(self, selector):
        return " ".join(self.page.locator(selector).inner_text().split())

    @property
    def step(self):
        found = re.match(r"Step (\d+)", self.text("#where"))
        return int(found[1]) if found else None

    def block(self, number):
        """What the grid says of a block under the pointer."""
        grid = self.page.locator("#grid")
        columns, cell = (int(grid.get_attribute(f"data-{name}")) for name in ("columns", "cell"))
        x, y = (number % columns + 0.4) * cell, (number // columns + 0.4) * cell
        grid.hover(position={"x": x, "y": y}, force=True)
        names = self.page.locator("#tip dt").all_inner_texts()
        return dict(zip(names, self.page.locator("#tip dd").all_inner_texts(), strict=True))


@pytest.fixture
def browse(chromium, request):
    """``browse(path, …)`` opens a report; at the end no error may have come up and nothing been fetched."""
    opened = []

    def start(path, anchor="", **context):
        context.setdefault("viewport", {"width": 1280, "height": 900})
        seen = Seen(chromium.new_context(**context).new_page())
        opened.append(seen)
        return seen.open(path, anchor)

    yield start
    failed = getattr(request.node, "failed", False)
    for number, seen in enumerate(opened):
        if failed:
            FAILED.mkdir(exist_ok=True)
            name = re.sub(r"[^\w-]+", "_", request.node.name)
            seen.page.screenshot(path=FAILED / f"{name}-{number}.png", full_page=True)
    problems = [error for seen in opened for error in seen.errors]
    fetched = [url for seen in opened for url in seen.requests if not url.startswith("file:")]
    for seen in opened:
        seen.page.context.close()
    if not failed:
        assert [] == problems
        assert [] == fetched


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    if call.when == "call" and outcome.get_result().failed:
        item.failed = True
