"""Endpoints with valid and invalid replies, on a real server in this process."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from examples.reward_server import Handler as ExampleHandler
from rlhf_pl.rewards import (
    CombinedReward,
    Failure,
    HTTPReward,
    JudgePairReward,
    JudgeScoreReward,
    LengthWindow,
    RewardResult,
    Sample,
    ScoringConfig,
    WeightedReward,
)
from rlhf_pl.rewards.guard import score_samples, try_reward
from rlhf_pl.utils.errors import InputError

Reply = Callable[[dict[str, Any], int], tuple[int, bytes]]


def samples(*responses: str, prompt_id: str = "p") -> list[Sample]:
    return [Sample(prompt_id, [{"role": "user", "content": "Why?"}], r, columns={"key": 1}) for r in responses]


@pytest.fixture
def serve() -> Iterator[Callable[..., tuple[str, list[dict[str, Any]]]]]:
    """Starts a server that replies with `reply(request, number of the request)`; returns its URL and the requests."""
    servers: list[ThreadingHTTPServer] = []

    def start(reply: Reply | type[BaseHTTPRequestHandler]) -> tuple[str, list[dict[str, Any]]]:
        requests: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                requests.append(request)
                status, body = reply(request, len(requests))  # type: ignore[operator]
                self.send_response(status)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), reply if isinstance(reply, type) else Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}", requests

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def rewards(request: dict[str, Any], _number: int = 0) -> tuple[int, bytes]:
    return 200, json.dumps({"rewards": [len(s["response"]) for s in request["samples"]]}).encode()


def test_services_and_judges_receive_tool_calls(serve: Callable[..., Any]) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    messages = [{"role": "user", "content": [{"type": "text", "text": "Why?"}]}, call, {"role": "tool", "content": "4"}]
    sample = Sample("p", messages, "", message=call, tools=[{"name": "add"}])
    url, requests = serve(rewards)
    HTTPReward(url).score([sample])
    sent = requests[0]["samples"][0]
    assert (sent["messages"], sent["response_message"], sent["tools"]) == (messages, call, [{"name": "add"}])

    def judge(request: dict[str, Any], _number: int) -> tuple[int, bytes]:
        return 200, json.dumps({"choices": [{"message": {"content": '{"score": 10}'}}]}).encode()

    url, requests = serve(judge)
    assert JudgeScoreReward(url, "judge").score([sample])[0] == RewardResult(1.0, {"score": 10.0})
    task = requests[0]["messages"][0]["content"]
    assert "[user]\nWhy?\n\n[assistant]\n" in task
    assert task.count(json.dumps(call["tool_calls"])) == 2


def test_scores_in_order_over_many_requests(serve: Callable[..., Any]) -> None:
    url, requests = serve(rewards)
    reward = HTTPReward(url, samples_per_request=3, concurrency=4)
    texts = ["x" * n for n in range(20)]
    assert [r.reward for r in reward.score(samples(*texts)) if isinstance(r, RewardResult)] == list(range(20))
    assert len(requests) == 7
    first = next(r for r in requests if r["samples"][0]["response"] == "")["samples"][0]
    assert first == {
        "prompt_id": "p",
        "messages": [{"role": "user", "content": "Why?"}],
        "response": "",
        "finished": True,
        "columns": {"key": 1},
    }


def test_the_example_server_works(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExampleHandler, "log_message", lambda *_: None)
    url, _ = serve(ExampleHandler)
    (result,) = HTTPReward(url).score(samples("one two three"))
    assert result == RewardResult(0.25)


def test_requests_and_replies_match_the_schema_in_the_docs(serve: Callable[..., Any]) -> None:
    import jsonschema

    page = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    schema = next(s for s in map(json.loads, re.findall(r"```json\n(.*?)```", page, re.DOTALL)) if "request" in s)
    url, requests = serve(rewards)
    HTTPReward(url).score(samples("a", "b"))
    jsonschema.validate(requests[0], schema["request"])
    jsonschema.validate({"rewards": [0.5, {"reward": 0.7, "components": {"style": 0.2}}, None]}, schema["response"])


def test_components_and_nulls(serve: Callable[..., Any]) -> None:
    body = {"rewards": [{"reward": 1, "components": {"style": 0.5}}, None]}
    url, _ = serve(lambda request, n: (200, json.dumps(body).encode()))
    good, bad = HTTPReward(url).score(samples("a", "b"))
    assert good == RewardResult(1.0, {"style": 0.5})
    assert isinstance(bad, Failure)


def test_a_server_error_is_retried(serve: Callable[..., Any]) -> None:
    url, requests = serve(lambda request, n: (503, b"busy") if n < 3 else rewards(request))
    (result,) = HTTPReward(url, backoff_s=0.01).score(samples("abc"))
    assert result == RewardResult(3.0)
    assert len(requests) == 3


@pytest.mark.parametrize(
    ("reply", "detail"),
    [
        (lambda r, n: (200, b"<html>Welcome</html>"), "returned no JSON: '<html>"),
        (lambda r, n: (200, b'{"rewards": [1, 2]}'), "2 rewards for 1 samples"),
        (lambda r, n: (200, b'{"scores": [1]}'), 'a list under "rewards"'),
        (lambda r, n: (200, b'{"rewards": ["1"]}'), "a reward is '1'; expected a number"),
        (lambda r, n: (404, b"nothing here"), "status 404: nothing here"),
        (lambda r, n: (500, b"oh no"), "status 500: oh no .3 attempts."),
    ],
)
def test_an_invalid_reply_is_a_failure_with_the_reason(serve: Callable[..., Any], reply: Reply, detail: str) -> None:
    url, _ = serve(reply)
    (result,) = HTTPReward(url, retries=2, backoff_s=0.01).score(samples("a"))
    assert isinstance(result, Failure)
    assert detail.replace(".", "") in result.detail.replace("(", "").replace(")", "").replace(".", "")


def test_nan_is_an_error_that_names_it(serve: Callable[..., Any]) -> None:
    url, _ = serve(lambda r, n: (200, b'{"rewards": [NaN]}'))
    with pytest.raises(InputError, match=r"prompt_id 'p'.*nan.*finite number"):
        score_samples(HTTPReward(url), samples("a"), ScoringConfig(retries=0))


def test_one_bad_response_only_loses_its_own_score(serve: Callable[..., Any]) -> None:
    def reply(request: dict[str, Any], n: int) -> tuple[int, bytes]:
        return (500, b"") if any(s["response"] == "bad" for s in request["samples"]) else rewards(request)

    url, _ = serve(reply)
    reward = HTTPReward(url, retries=1, backoff_s=0.01)
    outcomes = score_samples(reward, samples("a", "bad", "abc"), ScoringConfig(on_failure="drop", retries=0))
    assert [getattr(o, "reward", None) for o in outcomes] == [1.0, None, 3.0]


def test_a_server_that_sends_slowly_times_out(serve: Callable[..., Any]) -> None:
    class SlowHandler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            for _ in range(100):
                try:
                    self.wfile.write(b" ")
                except OSError:
                    return
                time.sleep(0.05)

        def log_message(self, *_: object) -> None:
            pass

    url, _ = serve(SlowHandler)
    started = time.monotonic()
    (result,) = HTTPReward(url, timeout_s=0.3, retries=0).score(samples("a"))
    assert isinstance(result, Failure)
    assert result.kind == "timeout"
    assert time.monotonic() - started < 2


def test_an_unreachable_endpoint_is_found_before_any_model_loads() -> None:
    reward = HTTPReward("http://127.0.0.1:9", retries=1, backoff_s=0.01)
    with pytest.raises(InputError, match=r"can't be reached.*2 attempts.*trial call before loading any model"):
        try_reward(reward, samples("a", "b"), ScoringConfig())
    with pytest.raises(InputError, match="must begin with http"):
        HTTPReward("localhost:8000")


def test_a_failure_of_a_part_is_a_failure_of_the_sum(serve: Callable[..., Any]) -> None:
    url, _ = serve(lambda r, n: (404, b"gone"))
    parts = [WeightedReward(LengthWindow()), WeightedReward(HTTPReward(url, retries=0), 2.0)]
    (result,) = CombinedReward(parts).score(samples("a"))
    assert isinstance(result, Failure)
    assert "HTTPReward" in result.detail


def make_completion(content: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.mark.parametrize("verdict", ['{"score": 7}', 'Clear and right.\n{"score": 7}', "**Score:** 7", "score = 7."])
def test_judges_score_is_read_and_scaled(serve: Callable[..., Any], verdict: str) -> None:
    """7 on a scale of 1 to 10 is 6/9 of the range."""
    url, requests = serve(lambda request, n: (200, make_completion(verdict)))
    (result,) = JudgeScoreReward(url + "/v1", "judge").score(samples("Because."))
    assert result == RewardResult(pytest.approx(6 / 9), {"score": pytest.approx(7)})
    assert "Because." in requests[0]["messages"][0]["content"]
    assert requests[0]["response_format"]["json_schema"]["schema"]["required"] == ["score"]


@pytest.mark.parametrize("verdict", ["", "I like it.", '{"score": 70}', '{"score": "good"}'])
def test_invalid_verdicts_are_failures(serve: Callable[..., Any], verdict: str) -> None:
    url, _ = serve(lambda request, n: (200, make_completion(verdict)))
    (result,) = JudgeScoreReward(url, "judge", retries=0).score(samples("Because."))
    assert isinstance(result, Failure)


def prefer_longer(request: dict[str, Any], _number: int) -> tuple[int, bytes]:
    """A judge that prefers the longer text, or the first of two equal ones."""
    text = request["messages"][0]["content"]
    a, b = text.split("# Answer A\n\n")[1].split("\n\n# Your")[0].split("\n\n# Answer B\n\n")
    return 200, make_completion(json.dumps({"better": "A" if len(a) >= len(b) else "B"}))


def test_pairwise_judge_gives_the_share_of_wins_in_both_orders(serve: Callable[..., Any]) -> None:
    """The longest of four responses wins all three comparisons; two of equal length tie, in both orders."""
    url, requests = serve(prefer_longer)
    results = JudgePairReward(url, "judge").score(samples("aaaa", "bb", "cc", "d"))
    assert [r.reward for r in results if isinstance(r, RewardResult)] == [1.0, 0.5, 0.5, 0.0]
    assert len(requests) == 12


def test_pairwise_judge_against_a_reference(serve: Callable[..., Any]) -> None:
    url, _ = serve(prefer_longer)
    rows = [Sample("p", [{"role": "user", "content": "?"}], r, columns={"human": "333"}) for r in ("4444", "22")]
    reward = JudgePairReward(url, "judge", reference_column="human")
    assert [r.reward for r in reward.score(rows) if isinstance(r, RewardResult)] == [1.0, 0.0]
    with pytest.raises(InputError, match="no text in the column `human`"):
        reward.check(samples("a"))


def test_pairwise_judge_keeps_a_prompts_responses_together(serve: Callable[..., Any]) -> None:
    """A failed verdict for the second prompt does not affect the first prompt's rewards."""
    url, _ = serve(lambda r, n: (500, b"") if "bad" in r["messages"][0]["content"] else prefer_longer(r, n))
    batch = [*samples("aa", "b", prompt_id="1"), *samples("bad", "c", prompt_id="2")]
    config = ScoringConfig(on_failure="drop", retries=1, backoff_s=0)
    outcomes = score_samples(JudgePairReward(url, "judge", retries=0), batch, config)
    assert [getattr(o, "reward", None) for o in outcomes] == [1.0, 0.0, None, None]


KEY = "sk-judge-0123456789abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("offset", [0, 60, 85, 100, 130, 165, 190])
@pytest.mark.parametrize("kind", ["status", "no JSON", "verdict", "score"])
def test_an_echoed_key_is_removed_from_failures_wherever_they_are_truncated(
    serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, kind: str, offset: int
) -> None:
    monkeypatch.setenv("MY_JUDGE", KEY)
    verdict = "x" * offset + KEY + "y" * (150 - offset // 2)
    bodies = {
        "status": (401, verdict.encode()),
        "no JSON": (200, verdict.encode()),
        "verdict": (200, json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()),
        "score": (200, json.dumps({"choices": [{"message": {"content": json.dumps({"score": verdict})}}]}).encode()),
    }
    url, _ = serve(lambda request, number: bodies[kind])
    judge = JudgeScoreReward(url, "m", retries=0, api_key_env="MY_JUDGE")
    (failed,) = judge.score(samples("So."))
    assert isinstance(failed, Failure)
    assert not any(KEY[i : i + 8] in failed.detail for i in range(len(KEY) - 8))


def test_component_names_contain_no_secrets(serve: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE", KEY)
    body = json.dumps({"rewards": [{"reward": 1.0, "components": {f"of {KEY}": 2.0}}]}).encode()
    url, _ = serve(lambda request, number: (200, body))
    reward = HTTPReward(url, api_key_env="MY_JUDGE")
    assert score_samples(reward, samples("a"), ScoringConfig()) == [RewardResult(1.0, {"of <secret>": 2.0})]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sk-0123456789", "holds a key, it seems"),
        ("NO_SUCH_KEY", "the environment variable NO_SUCH_KEY is not set"),
        ("ODD_KEY", "characters that no HTTP header may have"),
    ],
)
def test_invalid_keys_are_found_before_any_request(monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setenv("ODD_KEY", "sk-ö-0123456789")
    with pytest.raises(InputError, match=message) as refused:
        HTTPReward("http://127.0.0.1:9", api_key_env=name).check([])
    assert "0123456789" not in str(refused.value)
