"""A proxy of a vLLM server, which counts requests and replies, and can delay them."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Proxy:
    """Forwards requests to a server.

    Args:
        target: URL of the server; to be changed when the server returns elsewhere.
        delay_s: Delay of every completion, seconds.
    """

    def __init__(self, target: str, delay_s: float = 0.0) -> None:
        self.target, self.delay_s = target, delay_s
        self.requested: Counter[int] = Counter()  # requested completions by seed
        self.completed: Counter[int] = Counter()  # completions that reached the trainer
        self.stale = 0  # completions by a server that has received no weights since its start
        self.has_weights = False
        self.gate = threading.Event()  # completions wait until it is set
        self.gate.set()
        self.in_progress = 0
        self.change = threading.Condition()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._forward(None)

            def do_POST(self) -> None:
                self._forward(self.rfile.read(int(self.headers.get("content-length") or 0)))

            def _forward(self, body: bytes | None) -> None:
                seed = proxy.begin(self.path, body)
                try:
                    status, content = proxy.relay(self.path, body)
                except OSError:  # looks to the client like a failure of the server
                    self.close_connection = True
                    return
                finally:
                    proxy.end(seed)
                try:
                    self.send_response(status)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:
                    return
                if seed is not None and status == 200:
                    proxy.completed[seed] += 1

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def begin(self, path: str, body: bytes | None) -> int | None:
        """Record a request; returns the seed of a completion."""
        if not path.startswith("/v1/completions"):
            return None
        seed = int(json.loads(body or b"{}")["seed"])
        with self.change:
            self.requested[seed] += 1
            self.in_progress += 1
            self.change.notify_all()
        time.sleep(self.delay_s)
        self.gate.wait()
        return seed

    def end(self, seed: int | None) -> None:
        if seed is not None:
            with self.change:
                self.in_progress -= 1
                self.change.notify_all()

    def relay(self, path: str, body: bytes | None) -> tuple[int, bytes]:
        """Forward a request; returns status and body of the server's reply."""
        request = urllib.request.Request(self.target + path, data=body, headers={"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as response:
                status, content = response.status, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()
        if path.startswith("/finish_weight_update"):
            self.has_weights = True
        elif path.startswith("/v1/completions"):
            self.stale += not self.has_weights
        return status, content

    def wait_for_work(self) -> None:
        """Wait until a completion is in progress."""
        with self.change:
            while not self.in_progress:
                self.change.wait()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
