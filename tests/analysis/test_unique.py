import hashlib
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ndcheck.analysis import unique
from ndcheck.analysis.divergence import read_stream
from ndcheck.analysis.unique import Completions, Interner

TEXTS = st.lists(st.text("ab", max_size=6), max_size=12)


def intern(samples):
    interner = Interner()
    return interner, [interner.add(sample, read_stream(sample)) for sample in samples]


def completions_of(samples):
    interner, numbers = intern(samples)
    counts = np.bincount(numbers, minlength=len(interner))
    return Completions(interner, counts, counts, np.full(len(interner), -1, np.int32), None)


@given(TEXTS)
def test_numbers_go_by_tokens_in_order_of_arrival(build, texts):
    _, numbers = intern([build.sample(i, text) for i, text in enumerate(texts)])
    assert numbers == [list(dict.fromkeys(texts)).index(text) for text in texts]


@given(TEXTS)
def test_every_completion_is_kept_as_it_was(build, texts):
    completions = completions_of([build.sample(i, text) for i, text in enumerate(texts)])
    assert {c.text: c.count for c in completions} == {t: texts.count(t) for t in texts}
    counts = [c.count for c in completions]
    assert counts == sorted(counts, reverse=True)
    assert [c.completion_id for c in completions] == list(range(1, len(counts) + 1))
    for completion in completions:
        assert completion.token_ids.dtype == np.int32
        assert completion.token_ids.tolist() == list(map(ord, completion.text))
        assert completion.n_tokens == len(completion.text)
        assert completion.share == completion.count / len(texts)


def test_how_a_sample_ended_does_not_matter(build):
    ended, cut = build.sample(1, "ab", finish_reason="stop"), build.sample(2, "ab")
    (completion,) = completions_of([ended, cut])
    assert completion.count == 2
    assert completion.finish_reason == "stop"


def test_ties_go_by_arrival(build):
    samples = [build.sample(i, text) for i, text in enumerate(["c", "b", "a", "a", "b"])]
    assert [c.text for c in completions_of(samples)] == ["b", "a", "c"]


def test_a_token_that_decodes_differently_in_context_keeps_its_text(build):
    token_ids = (7, 7, 8, 7)
    samples = [
        build.sample(1, "", bits=False, token_ids=token_ids, token_texts=("x", "", "\u00e9", "x")),
        build.sample(2, "", bits=False, token_ids=(8, 7), token_texts=("\ufffd", "x")),
    ]
    completions = completions_of(samples)
    assert completions[0].token_texts == ("x", "", "\u00e9", "x")
    assert completions[1].token_texts == ("\ufffd", "x")


def test_sha256_is_of_little_endian_token_ids(build):
    (completion,) = completions_of([build.sample(1, "ab")])
    assert completion.sha256 == hashlib.sha256(struct.pack("<2i", 97, 98)).hexdigest()


def test_a_sequence_of_completions_behaves_like_a_tuple(build):
    completions = completions_of([build.sample(i, text) for i, text in enumerate("abc")])
    assert len(completions) == 3
    assert completions[-1].text == completions[2].text == "c"
    assert [c.text for c in completions[1:]] == ["b", "c"]
    with pytest.raises(IndexError):
        completions[3]
    assert not completions_of([])


def test_the_smallest_margin_is_kept(build):
    samples = [
        build.sample(1, "abc", margins=(3.0, 2.0, float("nan"))),
        build.sample(2, "abc", margins=(1.0, 4.0, 5.0)),
        build.sample(3, "x", margins=()),
        build.sample(4, "abc", margins=(9.0,)),
    ]
    interner, _ = intern(samples)
    assert interner.margins[:3].tolist() == [1.0, 2.0, 5.0]
    assert np.isnan(interner.margins[3])


def test_margins_are_kept_of_the_first_tokens_only(build, monkeypatch):
    monkeypatch.setattr(unique, "MARGINS_KEPT", 5)
    interner, _ = intern([build.sample(i, text) for i, text in enumerate(["abc", "abd", "x"])])
    assert len(interner.margins) == 3
    assert len(interner.tokens) == 7
