"""A reward server in 20 lines: `python examples/reward_server.py`, then `url: http://localhost:8100` in HTTPReward."""

import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def score(sample: dict) -> float:
    """Replace this with your reward; a sample has `prompt_id`, `messages`, `response`, `finished` and `columns`."""
    return 1.0 / (1 + len(sample["response"].split()))


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        samples = json.loads(self.rfile.read(int(self.headers["content-length"])))["samples"]
        body = json.dumps({"rewards": [score(sample) for sample in samples]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("localhost", 8100), Handler).serve_forever()
