"""The report's size, the time to make it, and the time until it can be used in a real Chromium:
``python -m bench.report [FOLDER]`` writes ``report.md`` and ``report.json``.

*Usable* is when the pool is
drawn and the slider answers, from the start of navigation by the page's own clock; *a move* is from
a new step on the slider until it is drawn.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench import large
from vllm_trace import report
from vllm_trace.trace import read_trace

ROOT = Path(__file__).resolve().parents[1]
GOLD = ROOT / "tests" / "gold"

MOVE = """async () => {
  const slider = document.getElementById("slider");
  const drawn = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const times = [];
  for (let i = 0; i < 40; i++) {
    const began = performance.now();
    slider.value = String(Math.floor(((i * 37) % 40) / 40 * Number(slider.max)));
    slider.dispatchEvent(new Event("input"));
    await drawn();
    times.push(performance.now() - began);
  }
  return times.sort((a, b) => a - b)[20];
}"""


def measure(rounds: int = 7) -> list[dict[str, Any]]:
    """One row a trace. Raises: ``SystemExit`` when there is no browser."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("bench.report: there is no Chromium; .ci/browser installs one")
    rows = []
    with tempfile.TemporaryDirectory(prefix="vtrace-bench-") as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        version = browser.version
        for name, trace, whole in (
            ("mixed", GOLD / "mixed.vtrace", True),
            ("200 requests × 2,000 steps", large.write(Path(folder) / "large"), False),
        ):
            began = time.perf_counter()
            # The large one is made by hand: there is nothing to replay or to judge.
            asked = report.Asked(label=name, replay=whole, check=whole)
            html = report.build(read_trace(trace), asked).html
            took = time.perf_counter() - began
            path = Path(folder) / f"{len(rows)}.html"
            report.save(html, path)
            ready, moves = zip(*(_look(browser, path) for _ in range(rounds)))
            rows.append(
                {
                    "trace": name,
                    "events": sum(1 for _ in read_trace(trace).records()),
                    "size_mb": len(html) / 1e6,
                    "made_s": took,
                    "usable_ms": statistics.median(ready),
                    "usable_worst_ms": max(ready),
                    "move_ms": statistics.median(moves),
                    "rounds": rounds,
                    "chromium": version,
                }
            )
        browser.close()
    return rows


def _look(browser: Any, path: Path) -> tuple[float, float]:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-ready]")
    ready = float(page.get_attribute("html", "data-ready"))
    move = float(page.evaluate(MOVE))
    page.context.close()
    return ready, move


TARGETS = {"mixed": ("≤ 5 MB", "≤ 1,000 ms"), "200 requests × 2,000 steps": ("", "does not hang")}


def markdown(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    lines = [
        "# The report", "",
        f"- Command: `{facts['command']}`", f"- Date: {facts['date']}",
        f"- Machine: {facts['machine']}; load before {facts['load'][0]}",
        f"- Chromium {rows[0]['chromium']}, no GPU, 1280 × 900; {rows[0]['rounds']} fresh pages each", "",
        "| trace | events | size | target | made in | usable after | worst | target | a move of the slider |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in rows:
        size, usable = TARGETS[row["trace"]]
        lines.append(
            f"| {row['trace']} | {row['events']:,} | {row['size_mb']:.2f} MB | {size} | {row['made_s']:.2f} s |"
            f" {row['usable_ms']:.0f} ms | {row['usable_worst_ms']:.0f} ms | {usable} | {row['move_ms']:.0f} ms |"
        )
    return "\n".join([*lines, "", " ".join((__doc__ or "").split("\n\n")[1].split()), ""])


def write(folder: Path) -> list[dict[str, Any]]:
    """Measure, and leave ``report.md`` and ``report.json`` in a folder."""
    from bench.__main__ import about

    facts = about() | {"command": "python -m bench.report"}
    rows = measure()
    folder.mkdir(parents=True, exist_ok=True)
    document = {"schema": 1, "about": facts, "rows": rows}
    (folder / "report.json").write_text(json.dumps(document, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(rows, facts))
    return rows


if __name__ == "__main__":
    made = write(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "reports" / "bench")
    print(json.dumps(made, indent=1))
