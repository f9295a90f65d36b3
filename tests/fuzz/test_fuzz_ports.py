"""No stranger comes in at a port of a run, stops it or holds it up: seeded ones, of every kind, at both ports."""

import pytest

from tests.soak.strangers import PORTS


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("port", PORTS)
def test_strangers_at_a_port(port: str, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = PORTS[port](300, seed)
    assert outcome.whole, "every real peer must have got its own bytes"
    assert outcome.came >= 150
    assert outcome.seconds < 10
    assert capsys.readouterr().out.count("warning") == 2
