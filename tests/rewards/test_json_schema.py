"""Untrusted schemas: references to URLs and files are never fetched or opened."""

import json
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from rlhf_pl.rewards import JSONSchema, Sample, ScoringConfig
from rlhf_pl.rewards.guard import score_samples
from rlhf_pl.utils.errors import InputError


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection is opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def score(reward: JSONSchema, response: str, **columns: Any) -> float:
    return reward.one(Sample("p", [{"role": "user", "content": "?"}], response, columns=columns))


FILE = Path(__file__).parent / "other.json"
OUTSIDE = [
    {"$ref": "http://127.0.0.1:9/s.json"},
    {"$ref": "https://example.com/s.json#/$defs/x"},
    {"$ref": "file:///etc/passwd"},
    {"$ref": str(FILE)},
    {"$ref": "other.json"},
    {"$ref": "#/$defs/missing"},
    {"$ref": "#anchor"},
    {"$dynamicRef": "http://127.0.0.1:9/s.json#meta"},
    {"$id": "http://127.0.0.1:9/base/", "$ref": "s.json"},
    {"properties": {"a": {"items": {"anyOf": [{"type": "null"}, {"$ref": "http://127.0.0.1:9/s.json"}]}}}},
    {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"x": {"$ref": "ftp://127.0.0.1/x"}}},
    {"$schema": "https://json-schema.org/draft/2019-09/schema", "$recursiveRef": "http://127.0.0.1:9/s.json"},
]


@pytest.mark.parametrize("schema", OUTSIDE, ids=json.dumps)
def test_an_external_reference_is_an_error_before_any_response(schema: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"refers to .*Nothing is fetched or opened"):
        JSONSchema(schema)
    reward = JSONSchema(column="schema")
    with pytest.raises(InputError, match="Nothing is fetched"):
        score(reward, "{}", schema=json.dumps(schema))
    row = Sample("p", [{"role": "user", "content": "?"}], "{}", columns={"schema": schema})
    config = ScoringConfig(on_failure=0.0, retries=0)
    (failed,) = score_samples(reward, [row], config)
    assert "Nothing is fetched" in failed.detail


def test_references_within_a_schema_and_to_the_drafts_are_resolved() -> None:
    properties = {"next": {"$ref": "#/$defs/node"}, "$ref": {"type": "string"}}
    node = {"type": "object", "properties": properties, "additionalProperties": False}
    recursive = {"$defs": {"node": node}, "$ref": "#/$defs/node"}
    assert score(JSONSchema(recursive), '{"next": {"next": {}, "$ref": "http://a/b"}}') == 1.0
    assert score(JSONSchema(recursive), '{"next": {"next": 1}}') == 0.0
    named = {"$id": "http://me/s", "$defs": {"x": {"$anchor": "x", "type": "integer"}}, "items": {"$ref": "s#x"}}
    assert score(JSONSchema(named), "[1, 2]") == 1.0
    assert score(JSONSchema(named), '["a"]') == 0.0
    meta = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    assert score(JSONSchema(meta), '{"type": "string"}') == 1.0
    assert score(JSONSchema(meta), '{"type": 3}') == 0.0
    data = {"const": {"$ref": "http://127.0.0.1:9/no-reference"}}
    assert score(JSONSchema(data), json.dumps(data["const"])) == 1.0


@pytest.mark.parametrize(
    "schema", [{"$schema": 3}, {"$schema": ["x"]}, {"type": "nothing"}, {"$ref": 4}, {"$id": 5}, [], "text"]
)
def test_an_invalid_schema_is_an_error(schema: Any) -> None:
    with pytest.raises(InputError, match=r"not a JSON Schema|must be a JSON Schema|cannot read"):
        JSONSchema(schema)


def test_an_unknown_draft_is_not_fetched() -> None:
    assert score(JSONSchema({"$schema": "http://127.0.0.1:9/draft", "type": "integer"}), "3") == 1.0


def test_a_schema_with_too_many_levels_is_an_error() -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(3000):
        schema = {"not": schema}
    with pytest.raises(InputError, match="not a JSON Schema"):
        JSONSchema(schema)
