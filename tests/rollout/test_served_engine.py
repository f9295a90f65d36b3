"""Replies of servers that are not vLLM, or are broken."""

import json
from functools import partial
from typing import Any

import httpx
import pytest

from rlhf_pl.rollout.base import Response
from rlhf_pl.rollout.served_engine import ServedEngine, ServerError
from rlhf_pl.rollout.vllm_client import parse_responses
from rlhf_pl.utils.errors import InputError


def engine_with_reply(text: str) -> ServedEngine:
    engine = ServedEngine("http://server", 1.0)
    engine._http = httpx.Client(transport=httpx.MockTransport(lambda _: httpx.Response(200, text=text)))
    return engine


def choice(index: int, **changes: Any) -> dict[str, Any]:
    logprobs = {"token_logprobs": [-0.5, -1.5]}
    return {"index": index, "token_ids": [4, 5], "logprobs": logprobs, "finish_reason": "stop"} | changes


def test_responses_are_in_order() -> None:
    text = json.dumps({"choices": [choice(1, token_ids=[6, 7]), choice(0)]})
    parse = partial(parse_responses, count=2, with_logps=True)
    responses = engine_with_reply(text).call("/v1/completions", {}, parse=parse)
    assert responses == [Response([4, 5], [-0.5, -1.5], True), Response([6, 7], [-0.5, -1.5], True)]


WRONG = ["", "null", "[]", "{}", "1", "<html>", "[" * 100_000, '{"data": {}}', '{"choices": {}}', '{"vllm_config": 3}']
SHORT = [[choice(0)], [choice(0), choice(0)], [choice(0), choice(2)], [choice(0), choice(1, token_ids=None)]]


@pytest.mark.parametrize("text", [*WRONG, *(json.dumps({"choices": choices}) for choices in SHORT)])
def test_an_invalid_reply_is_a_server_error(text: str) -> None:
    engine = engine_with_reply(text)
    for query in (engine.get_model_info, engine.count_workers, engine.get_weight_version):
        with pytest.raises(ServerError, match="sent a reply that is not vLLM") as refused:
            query()
        assert refused.value.is_retryable
    with pytest.raises(ServerError, match="sent a reply that is not vLLM"):
        engine.call("/v1/completions", {}, parse=partial(parse_responses, count=2, with_logps=True))
    with pytest.raises(InputError, match="does not accept weights"):
        engine.get_config("rlhf_pl")
