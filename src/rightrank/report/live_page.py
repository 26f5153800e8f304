"""The report of a running selection in the browser: a page that reloads it when it changes, served to this machine alone.

The report stays as it is on disk. The page around it asks every few seconds whether the file has changed, and keeps the reader's place
when it loads it again. Only 127.0.0.1 is served, only under a path that nobody can guess, and only these two pages.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from rightrank.report.html import script_hash

SECONDS = 2.0
HOST = "127.0.0.1"
WAITING = "<!doctype html><title>rightrank</title><p>The report is written once the first training has ended."


class LivePage:
    """Serves the report in `folder` while the block lasts; `url` is the page."""

    def __init__(self, report: Path, state: Callable[[], str], seconds: float = SECONDS) -> None:
        self._secret = secrets.token_urlsafe(16)
        self._server = ThreadingHTTPServer((HOST, 0), _handler(report, state, self._secret, seconds))
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self._server.server_port}/{self._secret}/"

    def __enter__(self) -> LivePage:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def stamp(report: Path) -> str:
    """What changes when the report is written anew; empty before it is there."""
    try:
        found = report.stat()
    except OSError:
        return ""
    return f"{found.st_mtime_ns}-{found.st_size}"


def live_page(seconds: float) -> str:
    """The page around the report."""
    script = _SCRIPT.replace("SECONDS", f"{seconds:g}")
    policy = f"default-src 'none'; connect-src 'self'; frame-src 'self'; script-src '{script_hash(script)}'; style-src 'unsafe-inline'"
    return _PAGE.replace("POLICY", policy).replace("SCRIPT", script)


def _handler(report: Path, state: Callable[[], str], secret: str, seconds: float) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "rightrank", ""

        def do_GET(self) -> None:
            port = self.connection.getsockname()[1]
            if self.headers.get("Host") != f"{HOST}:{port}":  # another name for this machine may be an attacker's
                self._send(HTTPStatus.FORBIDDEN, "text/plain", "")
            elif self.path == f"/{secret}/":
                self._send(HTTPStatus.OK, "text/html", live_page(seconds))
            elif self.path == f"/{secret}/state":
                self._send(HTTPStatus.OK, "text/plain", f"{stamp(report)} {state()}")
            elif self.path == f"/{secret}/report":
                text = report.read_text(encoding="utf-8") if report.is_file() else WAITING
                self._send(HTTPStatus.OK, "text/html", text)
            else:
                self._send(HTTPStatus.NOT_FOUND, "text/plain", "")

        def _send(self, status: HTTPStatus, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing is logged: stderr is the progress display's."""

    return Handler


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="POLICY">
<meta name="referrer" content="no-referrer">
<title>rightrank: a run</title>
<style>
html, body { height: 100%; margin: 0; }
body { display: flex; flex-direction: column; font: 14px/1.4 system-ui, sans-serif; }
p { margin: .3rem .8rem; }
iframe { flex: 1; border: 0; }
</style>
</head>
<body>
<p id="state" role="status">running</p>
<iframe id="report" title="The report" src="report"></iframe>
<script>SCRIPT</script>
</body>
</html>
"""

_SCRIPT = """"use strict";
const frame = document.getElementById("report");
const shown = document.getElementById("state");
let last = null;
let place = 0;

frame.addEventListener("load", () => frame.contentWindow.scrollTo(0, place));

async function look() {
  let state = "stopped";
  try {
    const [stamp, now] = (await (await fetch("state")).text()).split(" ");
    state = now;
    if (last !== null && stamp !== last) {
      place = frame.contentWindow.scrollY;
      frame.contentWindow.location.reload();
    }
    last = stamp;
  } catch {
    state = "no longer watched";
  }
  shown.textContent = state === "running" ? "running; this page follows" : state;
  if (state === "running") setTimeout(look, SECONDS * 1000);
}

look();
"""
