"""What a record holds of a request: settings as they are, and no secret."""

from __future__ import annotations

import json

import pytest

from ndcheck.samplers.endpoint.private import (
    query_secrets,
    recorded_body,
    recorded_query,
    secrets_of,
)

SECRET = "open-sesame-123"


@pytest.mark.parametrize(
    "body",
    [
        {"api_keys": [SECRET]},
        {"connectionString": SECRET},
        {"data_sources": [{"parameters": {"authentication": {"key": SECRET}}}]},
        {"auth": {"user": SECRET}},
        {"store": f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={SECRET}"},
        {"url": f"https://me:{SECRET}@example.com/"},
        {"url": f"https://example.com/a?sv=1&sig={SECRET}"},
        {"note": f"github_pat_{SECRET}"},
        {"password": 12345678},
    ],
)
def test_a_secret_is_masked_and_looked_for(body):
    recorded = recorded_body(body)
    assert "[secret]" in recorded
    assert SECRET not in recorded
    assert "12345678" not in recorded
    (secret,) = secrets_of(body)
    assert secret in json.dumps(body)


@pytest.mark.parametrize(
    "body",
    [
        {"top_k": 1, "max_tokens_to_think": 9, "stop_token_ids": [1], "logit_bias": {"5": -100}},
        {"see": "https://example.com/a?b=c", "user": "sketch"},
        # The word of a schema is in every answer.
        {"response_format": {"json_schema": {"schema": {
            "properties": {"key": {"type": "string"}, "token": {"type": "integer"}},
            "required": ["key", "token"]}}}},
    ],
)  # fmt: skip
def test_settings_are_recorded_as_they_are(body):
    assert json.loads(recorded_body(body)) == body
    assert not list(secrets_of(body))


def test_a_short_number_is_masked_and_left_in_answers():
    assert recorded_body({"pin": 42}) == '{"pin":"[secret]"}'
    assert not list(secrets_of({"pin": 42}))


def test_of_a_query_versions_alone_are_recorded():
    given = ("api-version=1", "apiVersion=2", "x.version=3", "conversion-token=s", "code=s")
    assert recorded_query(given) == (*given[:3], "conversion-token", "code")


def test_words_of_a_query_stay_in_answers():
    query = {"beta": "true", "code": SECRET, "sig": "x7", "api-version": "2024-10-21"}
    assert list(query_secrets(query, ("api-version=2024-10-21",))) == [SECRET, "x7"]
