"""What a server answers that is no vLLM, or a broken one."""

import json
from functools import partial
from typing import Any

import httpx
import pytest

from rlhf_pl.rollout.base import Response
from rlhf_pl.rollout.served_engine import ServedEngine, ServerError
from rlhf_pl.rollout.vllm_client import _responses
from rlhf_pl.utils.errors import InputError


def engine_that_says(text: str) -> ServedEngine:
    engine = ServedEngine("http://server", 1.0)
    engine._http = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text=text)))
    return engine


def choice(index: int, **changes: Any) -> dict[str, Any]:
    logprobs = {"token_logprobs": [-0.5, -1.5]}
    return {"index": index, "token_ids": [4, 5], "logprobs": logprobs, "finish_reason": "stop"} | changes


def test_answers_come_in_order() -> None:
    text = json.dumps({"choices": [choice(1, token_ids=[6, 7]), choice(0)]})
    found = engine_that_says(text).call("/v1/completions", {}, read=partial(_responses, count=2, wanted=True))
    assert found == [Response([4, 5], [-0.5, -1.5], True), Response([6, 7], [-0.5, -1.5], True)]


WRONG = ["", "null", "[]", "{}", "1", "<html>", "[" * 100_000, '{"data": {}}', '{"choices": {}}', '{"vllm_config": 3}']
SHORT = [[choice(0)], [choice(0), choice(0)], [choice(0), choice(2)], [choice(0), choice(1, token_ids=None)]]


@pytest.mark.parametrize("text", [*WRONG, *(json.dumps({"choices": choices}) for choices in SHORT)])
def test_an_answer_that_is_none_is_an_error_of_the_server(text: str) -> None:
    engine = engine_that_says(text)
    for ask in (engine.served, engine.workers, engine.weight_version):
        with pytest.raises(ServerError, match="answered with what vLLM does not") as refused:
            ask()
        assert refused.value.again
    with pytest.raises(ServerError, match="answered with what vLLM does not"):
        engine.call("/v1/completions", {}, read=partial(_responses, count=2, wanted=True))
    with pytest.raises(InputError, match="does not take weights"):
        engine.config("rlhf_pl")
