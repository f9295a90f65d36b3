"""Warnings about servers whose weights an unknown client can replace."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rlhf_pl.rewards import exposed_servers
from rlhf_pl.rewards.exposed_servers import warn_about_open_servers

Serve = Callable[[str, bool, bool], str]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a server that replies like `vllm serve` on an address; returns its URL on 127.0.0.1."""
    servers: list[ThreadingHTTPServer] = []

    def start(address: str, dev_mode: bool, requires_key: bool) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                allowed = not requires_key or self.headers["authorization"]
                self.send_response(200 if dev_mode and allowed else 401 if requires_key else 404)
                self.end_headers()
                self.wfile.write(b'{"vllm_config": {}}')

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer((address, 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("address", "dev_mode", "requires_key", "is_warned"),
    [
        ("0.0.0.0", True, False, True),
        ("127.0.0.1", True, False, False),
        ("0.0.0.0", False, False, False),
        ("0.0.0.0", True, True, False),
    ],
)
def test_only_open_servers_cause_a_warning(
    serve: Serve,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    address: str,
    dev_mode: bool,
    requires_key: bool,
    is_warned: bool,
) -> None:
    url = serve(address, dev_mode, requires_key)
    monkeypatch.setattr(
        exposed_servers, "_external_addresses", lambda host: ["127.0.0.2"]
    )  # stands for this host's address
    warn_about_open_servers([url.replace("//", "//me:pw@")])
    output = capsys.readouterr().out
    assert ("answers on 127.0.0.2 without a key" in output) == is_warned
    assert "me:pw" not in output


def test_addresses_of_this_host_alone_are_not_external(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exposed_servers._external_addresses("10.1.2.3") == ["10.1.2.3"]
    assert exposed_servers._external_addresses("2001:db8::1") == ["2001:db8::1"]
    assert exposed_servers._external_addresses("no.such.host.invalid") == []
    monkeypatch.setattr(exposed_servers.socket, "gethostname", lambda: "10.9.8.7")
    assert exposed_servers._external_addresses("127.0.0.1")[0] == "10.9.8.7"
    assert exposed_servers._external_addresses("0.0.0.0")[0] == "10.9.8.7"
