"""Makes the README's pictures of the report: ``.venv/bin/python docs/pictures.py``, or ``make pictures``.

A report of the golden trace of ``preempt``, opened in Chromium and photographed at a step, light and
dark, into ``docs/pictures/``. Colours are cut down to a palette, so that a picture stays small.
"""

import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from vllm_trace import report
from vllm_trace.trace import read_trace

ROOT = Path(__file__).resolve().parent.parent
MADE = ROOT / "docs" / "pictures"
TRACE = ROOT / "tests" / "gold" / "preempt.vtrace"

STEP = 38
"""r-2 was preempted, and its cached blocks are being handed out to the others."""

SIZE = {"width": 1180, "height": 880}


def main() -> None:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("docs/pictures.py: there is no Chromium; .ci/browser installs one")
    MADE.mkdir(exist_ok=True)
    asked = report.Asked(label="preempt", command="vllm-trace report reports/preempt/latest")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "report.html"
        report.save(report.build(read_trace(TRACE), asked).html, path)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport=SIZE, color_scheme=scheme, device_scale_factor=1.5)
            page.goto(path.as_uri())
            page.wait_for_selector("html[data-ready]")
            page.locator("#slider").fill(str(STEP - 1))
            page.evaluate("document.activeElement.blur()")
            page.wait_for_timeout(300)
            save(page.screenshot(), MADE / f"report-{scheme}.png")
        browser.close()


def save(png: bytes, path: Path) -> None:
    """Write a picture with the 128 colours that do it best."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
