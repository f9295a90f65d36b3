"""The retry policy, alone and as rewards, the guard around them, and samplers on servers use it."""

import asyncio
import json
import time
from typing import Any

import httpx
import pytest

from rlhf_pl.rewards import Failure, FunctionReward, RewardResult, Sample, ScoringConfig
from rlhf_pl.rewards.guard import score_samples
from rlhf_pl.rewards.remote import Service
from rlhf_pl.rollout.fleet import Fleet
from rlhf_pl.rollout.served_engine import ServedEngine, ServerError
from rlhf_pl.utils.errors import InputError
from rlhf_pl.utils.retries import RETRYABLE, Retries, check_requests, retry_after


def test_pauses_double_and_end() -> None:
    policy = Retries(3, 0.5)
    assert list(policy.pauses()) == [0.5, 1.0, 2.0]
    assert [policy.pause(failures) for failures in (1, 2, 3, 4)] == [0.5, 1.0, 2.0, None]
    assert list(Retries(0, 1.0).pauses()) == []
    assert Retries(0, 1.0).pause(1) is None


def test_a_service_may_request_a_longer_pause_of_at_most_a_minute() -> None:
    policy = Retries(2, 4.0)
    assert [policy.pause(1, requested_s) for requested_s in (0.0, 3.0, 7.0, 1e9)] == [4.0, 4.0, 7.0, 60.0]
    assert policy.pause(3, 7.0) is None
    assert Retries(1, 90.0).pause(1, 1e9) == 90.0


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("7", 7.0),
        ("", 0.0),
        ("-1", 0.0),
        ("1.5", 0.0),
        ("²", 0.0),
        ("٣", 0.0),
        ("9" * 400, float("inf")),
        ("soon", 0.0),
    ],
)
def test_every_retry_after_header_is_read_as_seconds(header: str, seconds: float) -> None:
    assert retry_after({"retry-after": header}) == seconds
    assert retry_after({}) == 0.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "`some.retries` must be 0 or more, got -1"),
        ({"backoff_s": float("inf")}, "`some.backoff_s` must be a finite number"),
        ({"concurrency": 0}, "`some.concurrency` must be 1 or more"),
        ({"timeout_s": 0.0}, "`some.timeout_s` must be above 0 seconds, got 0.0"),
        ({"timeout_s": float("nan")}, "`some.timeout_s` must be a finite number"),
    ],
)
def test_options_of_requests_are_checked_by_name(options: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {"concurrency": 1, "timeout_s": 1.0, "retries": 2, "backoff_s": 0.5}
    assert check_requests("some", **valid) == Retries(2, 0.5)
    with pytest.raises(InputError, match=message):
        check_requests("some", **valid | options)


class FakeServer:
    """Replies with the given statuses in order, repeats the last one, and sends a `Retry-After` header."""

    def __init__(self, *statuses: int, retry_after: str = "") -> None:
        self.statuses, self.headers = list(statuses), {"retry-after": retry_after.encode("latin-1")}
        self.requests = 0

    def __call__(self, _: httpx.Request) -> httpx.Response:
        status = self.statuses[min(self.requests, len(self.statuses) - 1)]
        self.requests += 1
        return httpx.Response(status, headers=self.headers, text=json.dumps({"reward": 1.0}))


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The requested pauses, which take no time."""
    pauses: list[float] = []

    async def record(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", record)
    monkeypatch.setattr(time, "sleep", pauses.append)
    return pauses


def request_reward(monkeypatch: pytest.MonkeyPatch, server: FakeServer, retries: int, backoff_s: float) -> Any:
    client = httpx.AsyncClient
    transport = httpx.MockTransport(server)
    monkeypatch.setattr(httpx, "AsyncClient", lambda **_: client(transport=transport))
    service = Service("http://reward", 5.0, retries, backoff_s, 1, None)
    return service.map([{}], lambda _, body: body["reward"])[0]


@pytest.mark.parametrize("requested", ["86400", "9" * 400])
def test_a_reward_service_is_called_again_after_a_minute_at_most(
    monkeypatch: pytest.MonkeyPatch, slept: list[float], requested: str
) -> None:
    assert request_reward(monkeypatch, FakeServer(429, 503, 200, retry_after=requested), 3, 2.0) == 1.0
    assert slept == [60.0, 60.0]


def test_a_reward_service_without_a_request_is_called_again_after_doubled_pauses(
    monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    failed = request_reward(monkeypatch, server := FakeServer(500, retry_after="²"), 3, 0.5)
    assert isinstance(failed, Failure)
    assert failed.detail.endswith("(4 attempts).")
    assert (server.requests, slept) == (4, [0.5, 1.0, 2.0])


@pytest.mark.parametrize("status", [400, 401, 404, 409, 429, 501, 503])
def test_rewards_and_samplers_retry_the_same_statuses(
    monkeypatch: pytest.MonkeyPatch, slept: list[float], status: int
) -> None:
    assert isinstance(request_reward(monkeypatch, server := FakeServer(status), 1, 0.1), Failure)
    engine = ServedEngine("http://server", 1.0)
    engine._http = httpx.Client(transport=httpx.MockTransport(FakeServer(status)))
    with pytest.raises(ServerError) as refused:
        engine.get_model_info()
    assert (server.requests == 2) == refused.value.is_retryable == (status in RETRYABLE)


def test_an_unreachable_server_is_dropped_after_its_retries(slept: list[float]) -> None:
    def refuse(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("refused")

    engine = ServedEngine("http://server", 1.0)
    engine._http = httpx.Client(transport=httpx.MockTransport(refuse))
    problem = Fleet([engine], Retries(2, 0.25)).find_problem(engine, "v1", None, lambda: False)
    assert isinstance(problem, ServerError)
    assert slept == [0.0, 0.25, 0.5]


def test_a_reward_function_that_fails_is_called_again_after_the_same_pauses() -> None:
    calls: list[float] = []

    def succeed_at_third_call(response: str) -> float:
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise ValueError("not yet")
        return 2.0

    sample = Sample("p", [{"role": "user", "content": "?"}], "a")
    config = ScoringConfig(retries=2, backoff_s=0.05)
    assert score_samples(FunctionReward(succeed_at_third_call), [sample], config) == [RewardResult(2.0)]
    first, second = calls[1] - calls[0], calls[2] - calls[1]
    assert first >= 0.05
    assert second >= 0.1
