"""A secret is cut out in every form that a server may repeat it in."""

from __future__ import annotations

import base64
import html
import json
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.samplers.endpoint.redaction import MASK, Redactor

FORMS = {
    "plain": str,
    "shouted": str.upper,
    "url": lambda key: urllib.parse.quote(key, safe=""),
    "form": urllib.parse.quote_plus,
    "every byte": lambda key: "".join(f"%{byte:02X}" for byte in key.encode()),
    "twice": lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe=""),
    "json": json.dumps,
    "slashes": lambda key: json.dumps(key).replace("/", "\\/"),
    "json codes": lambda key: "".join(f"\\u{ord(c):04x}" for c in key),
    "html": html.escape,
    "html codes": lambda key: "".join(f"&#{ord(c)};" for c in key),
    "repr": repr,
    "header": lambda key: f"Bearer {key}",
    "base64": lambda key: base64.b64encode(key.encode()).decode(),
    "base64 for urls": lambda key: base64.urlsafe_b64encode(key.encode()).decode().rstrip("="),
}
KEYS = ["sk-a/b+c=d&e\"f'g<h>", "sk-0123456789abcdef", "Zq7", "x7", "~", "key with spaces"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", KEYS)
def test_a_repeated_key_is_cut_out(key, form):
    repeated = FORMS[form](key)
    redactor = Redactor({"Authorization": f"Bearer {key}"})
    text = f"the header {repeated} is wrong"
    assert redactor.finds(text)
    redacted = redactor.redact(text)
    assert MASK in redacted
    assert repeated.strip("\"'") not in redacted
    assert redacted.startswith("the header ")
    assert redacted.endswith(" is wrong")


@pytest.mark.parametrize("key", ["sk-0123456789", "Zq7x", "Zq"])
@pytest.mark.parametrize("user", ["", "u", "us", "use", "user"])
def test_a_key_within_basic_credentials_is_cut_out(key, user):
    pair = base64.b64encode(f"{user}:{key}".encode()).decode()
    redactor = Redactor({"Authorization": f"Bearer {key}"})
    redacted = redactor.redact(f"got Basic {pair} here")
    hidden = [part for part in redacted.split() if part not in ("got", "Basic", "here")]
    assert all(
        key.encode() not in base64.b64decode(part + "==") for part in hidden if MASK not in part
    )
    assert MASK in redacted


def test_what_basic_credentials_hold_is_a_secret_too():
    pair = base64.b64encode(b"user:pass-word").decode()
    redactor = Redactor({"Authorization": f"Basic {pair}"})
    for text in (pair, "user:pass-word", "pass-word"):
        assert redactor.redact(f"<{text}>") == f"<{MASK}>"


def test_a_short_key_leaves_other_words_alone():
    redactor = Redactor({"Authorization": "Bearer a"})
    assert redactor.redact("banana: a") == f"banana: {MASK}"
    assert redactor.redact_value({"model": "alpha", "count": 12}) == {"model": "alpha", "count": 12}


def test_nothing_is_cut_out_without_a_key():
    assert Redactor({}).redact("Bearer abc") == "Bearer abc"
    assert (
        Redactor({"Authorization": "Bearer zzz-000"}).redact("Bearer of news") == "Bearer of news"
    )


def test_a_value_is_redacted_in_names_numbers_and_depth():
    redactor = Redactor({"X-Team": "1234567"})
    value = {"1234567": [{"a": "x1234567y"}, 1234567, 7, None]}
    assert redactor.redact_value(value) == {MASK: [{"a": f"x{MASK}y"}, MASK, 7, None]}


@given(st.data(), st.text("ab c%\\&", max_size=12), st.text("ab c%\\&", max_size=12))
def test_a_key_that_pieces_hold_in_parts_is_cut_out(data, before, after):
    key = "sk-0123456789"
    text = before + key + after
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    redacted = Redactor({"Authorization": f"Bearer {key}"}).redact_pieces(pieces)
    assert "".join(redacted) == before + MASK + after
    assert len(redacted) == len(pieces)


@given(st.text(max_size=40))
def test_a_text_without_the_key_stays_as_it_is(text):
    redactor = Redactor({"Authorization": "Bearer sk-0123456789"})
    assert redactor.redact(text) == text
    assert not redactor.finds(text)


def test_what_a_header_says_in_plain_words_stays_in_answers():
    redactor = Redactor({"X-Title": "My test App", "X-Priority": "0", "api-key": "7"})
    event = {"index": 0, "token_ids": [7], "text": "My App 0 is a test"}
    assert redactor.redact_value(event) == event
    assert redactor.redact("by My test App, 7") == f"by {MASK}, {MASK}"
