"""Serve the report to a browser on this machine, made anew each time that the page is loaded."""

from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from kdzoo.errors import UserError

HERE = "127.0.0.1"  # no other machine can reach it


def server(page: Callable[[], str], port: int = 0) -> ThreadingHTTPServer:
    """Open a port of this machine that answers with the page; ``serve_forever`` answers until it is interrupted.

    Args:
        page: makes the page.
        port: 0 takes a free one.

    Raises:
        UserError: another program has the port.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Host", "").rpartition(":")[0]
            if asked not in (HERE, "localhost"):  # a page of another site whose name was turned to this machine
                self._answer(403, "text/plain", f"expected http://{HERE}")
            elif self.path != "/":
                self._answer(404, "text/plain", "the report is at /")
            else:
                try:
                    self._answer(200, "text/html", page())
                except UserError as error:
                    self._answer(500, "text/plain", str(error))

        def _answer(self, status: int, kind: str, text: str) -> None:
            body = text.encode("utf-8", "backslashreplace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing of requests."""

    try:
        return ThreadingHTTPServer((HERE, port), Handler)
    except OSError as error:
        raise UserError(f"port {port} cannot be opened ({error.strerror or error}); choose another --port") from error
