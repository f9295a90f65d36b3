"""A run's two ports reject unknown clients of every kind, which neither stop nor delay the run."""

import pytest

from tests.soak.unknown_clients import PORTS


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("port", PORTS)
def test_a_port_rejects_unknown_clients(port: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = PORTS[port](300, seed)
    assert outcome.is_correct, "every real peer must receive its own bytes"
    assert outcome.clients >= 150
    assert outcome.seconds < 10
    assert capsys.readouterr().out.count("warning") == 2
