"""The key that goes with requests."""

from __future__ import annotations

import pytest

from ndcheck.errors import UsageError
from ndcheck.records import Endpoint
from ndcheck.samplers.endpoint.credentials import request_headers

ENDPOINT = Endpoint("http://127.0.0.1:1/v1")


@pytest.mark.parametrize("held", ["sk-abcdefgh", "sk-abcdefgh\n", " sk-abcdefgh\r\n"])
def test_what_surrounds_a_key_is_no_part_of_it(held, monkeypatch):
    monkeypatch.setenv("NDCHECK_API_KEY", held)
    assert request_headers(ENDPOINT, {}) == {"Authorization": "Bearer sk-abcdefgh"}


def test_a_key_that_no_header_carries_is_refused(monkeypatch):
    monkeypatch.setenv("NDCHECK_API_KEY", "sk-abc\ndef")
    with pytest.raises(UsageError, match="no HTTP header can carry"):
        request_headers(ENDPOINT, {})


def test_an_empty_key_leaves_the_next_one(monkeypatch):
    monkeypatch.setenv("NDCHECK_API_KEY", "\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-other")
    assert request_headers(ENDPOINT, {})["Authorization"] == "Bearer sk-other"
