"""What a server shows of tokens beside their text: names, log-probabilities, alternatives."""

from __future__ import annotations

import json

import pytest

from ndcheck.cli.app import run_command_line
from ndcheck.errors import NdcheckError
from ndcheck.records import Decoding
from ndcheck.samplers.endpoint.answers.rounding import is_rounded

CHOSEN, RUNNER_UP = -0.12345678, -3.2345678
MOVED = -3.2345681
"""The next number of fp32 but one."""


class MovesTheRunnerUp:
    """In a batch one token has another runner-up's log-probability, and nothing else is another."""

    def runner_up(self, t):
        return MOVED if self.running > 1 and t == 7 else RUNNER_UP

    def fields(self, t, token, body):
        if not body.get("logprobs"):
            return {}
        alternatives = {token: CHOSEN, "x": self.runner_up(t)}
        if "prompt" in body:
            top, chosen = [alternatives], [CHOSEN]
            return {"logprobs": {"tokens": [token], "token_logprobs": chosen, "top_logprobs": top}}
        top = [{"token": name, "logprob": value} for name, value in alternatives.items()]
        return {"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


class KeepsTheRunnerUp(MovesTheRunnerUp):
    """Which of two tokens that are alike is shown says nothing."""

    def fields(self, t, token, body):
        found = super().fields(t, token, body)
        if found and "prompt" not in body and self.running > 1:
            found["logprobs"]["content"][0]["top_logprobs"][1]["token"] = "y"
        return found

    def runner_up(self, t):
        return RUNNER_UP


@pytest.mark.parametrize("chat", [True, False])
def test_a_runner_up_whose_logprob_moves_is_a_latent_divergence(odd, measure, chat):
    judgement, summary, _ = measure(odd(MovesTheRunnerUp), chat=chat)
    assert judgement.verdict.outcome == "FAIL"
    assert summary.probes[0].n_unique == 1
    assert summary.probes[0].latent_trials > 0


def test_it_may_be_allowed(odd, measure):
    judgement, *_ = measure(odd(MovesTheRunnerUp), allow_latent=True)
    assert judgement.verdict.outcome == "PASS"


def test_runners_up_that_are_alike_pass(odd, measure):
    judgement, *_ = measure(odd(KeepsTheRunnerUp))
    assert judgement.verdict.outcome == "PASS"


class ShowsIds(MovesTheRunnerUp):
    def name(self, token):
        return token

    def runner_up(self, t):
        return RUNNER_UP

    def fields(self, t, token, body):
        ids = {"token_ids": [t]} if body.get("return_token_ids") else {}
        return ids | super().fields(t, self.name(token), body)


class NamesOtherwise(ShowsIds):
    """Equal token ids and text, but in a batch the tokens have other names."""

    def name(self, token):
        return token if self.running < 2 else token.upper()


def test_names_that_differ_let_nothing_pass(odd, measure):
    judgement, summary, _ = measure(odd(NamesOtherwise))
    assert summary.probes[0].serving.names_differ > 0
    assert judgement.verdict.outcome == "INCONCLUSIVE"
    assert any("names of tokens" in reason for reason in judgement.verdict.reasons)


class NamesSome(ShowsIds):
    """Names and log-probabilities are not shown to requests that come while others run."""

    def events(self, body):
        return super().events(body if self.running < 2 else {**body, "logprobs": None})


@pytest.mark.parametrize("allow_latent", [False, True])
def test_names_that_are_not_shown_do_not_differ(odd, measure, allow_latent):
    judgement, *_ = measure(odd(NamesSome), allow_latent=allow_latent)
    assert judgement.verdict.outcome == ("PASS" if allow_latent else "INCONCLUSIVE")
    assert not any("names of tokens" in reason for reason in judgement.verdict.reasons)


class RespondsWithLogprobs:
    """Responses alone, whose log-probabilities move in a batch."""

    def refuse(self, path, body):
        return None if path == "/v1/responses" else (404, {"error": {"message": "none"}}, {})

    def limit(self, body):
        return body["max_output_tokens"]

    def events(self, body):
        for t, token in enumerate(self.tokens(body)):
            self.pause()
            chosen = CHOSEN - (t == 3 and self.running > 1)
            entry = {"token": token, "logprob": chosen, "top_logprobs": []}
            logprobs = {"logprobs": [entry]} if body.get("include") else {}
            yield {"type": "response.output_text.delta", "delta": token, **logprobs}
        response = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        yield {"type": "response.incomplete", "response": response}


def test_the_shortest_responses_are_compared_by_token(odd, measure):
    judgement, summary, _ = measure(odd(RespondsWithLogprobs), decoding=Decoding(16))
    assert judgement.verdict.outcome == "FAIL"
    assert summary.probes[0].latent_trials > 0


class RepeatsAll:
    """Each event has all of the text so far, the last one too, which has nothing new."""

    def events(self, body):
        text = ""
        for event in super().events(body):
            for choice in event["choices"]:
                text += choice["delta"].get("content", "")
                choice["delta"] = {"content": text}
            yield event


def test_a_stream_that_repeats_all_is_refused_though_it_ends_with_nothing_new(odd, measure):
    with pytest.raises(NdcheckError, match="all of the text so far"):
        measure(odd(RepeatsAll))


class Names:
    """Gives each token a name and a log-probability."""

    def name(self, token):
        return token

    def fields(self, t, token, body):
        if not body.get("logprobs"):
            return {}
        named = {"tokens": [self.name(token)], "token_logprobs": [CHOSEN - t], "top_logprobs": None}
        return {"logprobs": named}


class NamesOfTheVocabulary(Names):
    def name(self, token):
        return token.replace(" ", "\u0120")


class NamesByNumber(Names):
    def name(self, token):
        return f"token_id:{token.removeprefix(' w')}"


class OtherFifth(NamesOfTheVocabulary):
    def tokens(self, body):
        return [" other" if t == 4 else word for t, word in enumerate(super().tokens(body))]


class CutOtherwise(Names):
    """The same text as that of as many other tokens."""

    def tokens(self, body):
        return [" w0 w", "1", *(f" w{i}" for i in range(2, 40))][: self.limit(body)]


@pytest.mark.parametrize(
    ("other", "kind", "at"),
    [
        (NamesOfTheVocabulary, "none", None),
        (NamesByNumber, "none", None),
        (OtherFifth, "tokens", len(" w0 w1 w2 w3 ")),
        (CutOtherwise, "tokens", 0),
    ],
)
def test_servers_that_name_the_same_tokens_otherwise_agree(odd, tmp_path, capfd, other, kind, at):
    servers = ("--endpoint", odd(Names), "--against", odd(other), "--model", "m")
    small = ("--loads", "1,2", "-n", "12", "--max-tokens", "8", "-q", "--json")
    run_command_line(["run", *servers, *small, "--out", str(tmp_path / "both")])
    found = json.loads(capfd.readouterr().out)
    (drift,) = found["drifts"]
    assert (drift["kind"], drift["first_divergence"]) == (kind, at)
    assert drift["n_shared_completions"] == (kind == "none")
    assert {name: verdict["verdict"] for name, verdict in found["fail_on"].items()} == (
        {"tokens": "PASS", "bits": "PASS"} if kind == "none" else {"tokens": "FAIL"}
    )


class Upgrades(Names):
    """After some requests another version names tokens by its own lights."""

    after = 30

    def stream(self, body):
        self.is_new = next(type(self).numbers) >= self.after
        return super().stream(body)

    def name(self, token):
        return self.new_name(token) if self.is_new else token


class ToTheVocabulary(Upgrades):
    def new_name(self, token):
        return token.replace(" ", "\u0120")


class ToNumbers(Upgrades):
    def new_name(self, token):
        return f"token_id:{token.removeprefix(' w')}"


class ToOtherCuts(Upgrades):
    """The same text in as many other tokens."""

    def tokens(self, body):
        return ["ab", "c", *super().tokens(body)[2:]]

    def new_name(self, token):
        return {"ab": "a", "c": "bc"}.get(token, token)


class ToAnUnseenToken(Upgrades):
    """A token without text is another one."""

    def text(self, t, token):
        return "" if t == 5 else token

    def name(self, token):
        unseen = "<b>" if self.is_new else "<a>"
        return unseen if token == " w5" else token


@pytest.mark.parametrize(
    ("upgrade", "outcome"),
    [
        (ToTheVocabulary, "INCONCLUSIVE"),
        (ToNumbers, "INCONCLUSIVE"),
        (ToOtherCuts, "FAIL"),
        (ToAnUnseenToken, "FAIL"),
    ],
)
def test_a_server_that_names_tokens_otherwise_in_mid_run_is_not_accused(
    odd, measure, upgrade, outcome
):
    judgement, summary, _ = measure(odd(upgrade))
    assert judgement.verdict.outcome == outcome
    assert any("names of tokens" in r for r in judgement.verdict.reasons) == (outcome != "FAIL")
    assert (summary.probes[0].n_unique > 1) == (outcome == "FAIL")


class Rounds(Upgrades):
    """After some requests another version writes log-probabilities otherwise."""

    def name(self, token):
        return token

    def fields(self, t, token, body):
        write = self.new if self.is_new else self.old
        found = super().fields(t, token, body)
        if found:
            found["logprobs"]["token_logprobs"] = [write(EXACT - t)]
        return found

    old = new = staticmethod(lambda logprob: logprob)


def to_digits(n):
    return staticmethod(lambda logprob: float(f"{logprob:.{n}g}"))


def to_decimals(n):
    return staticmethod(lambda logprob: round(logprob, n))


EXACT = -0.10234567


@pytest.mark.parametrize(
    ("old", "new", "n_latent"),
    [
        (Rounds.old, to_decimals(4), 0),
        (Rounds.old, to_digits(4), 0),
        (to_decimals(4), Rounds.new, 0),
        (Rounds.old, to_decimals(6), 0),
        (to_decimals(5), to_decimals(3), 0),
        (Rounds.old, lambda logprob: logprob - 1e-6, 1),
        # As many digits of other numbers, and numbers that rounding does not give.
        (to_decimals(4), lambda logprob: round(logprob + 1e-4, 4), 1),
        (Rounds.old, lambda logprob: round(logprob, 4) + 1e-3, 1),
    ],
)
def test_a_server_that_rounds_otherwise_in_mid_run_is_not_accused(odd, measure, old, new, n_latent):
    members = {"old": staticmethod(old), "new": staticmethod(new)}
    judgement, summary, _ = measure(odd(type("Odd", (Rounds,), members)))
    verdict = judgement.verdict
    assert verdict.outcome == ("FAIL" if n_latent else "INCONCLUSIVE")
    assert any("rounded otherwise" in reason for reason in verdict.reasons) != n_latent
    assert summary.probes[0].has_latent == n_latent


def test_peaked_completions_are_not_taken_for_rounded_ones():
    """Zeros are all that fp32 has for a token that is certain: other bits beside them count."""
    certain, nearly = (0.0,) * 8, (0.0, -1.1920929e-07, -2.3841858e-07, *(0.0,) * 5)
    assert not is_rounded(nearly, certain)
    assert not is_rounded(certain, nearly)
    assert not is_rounded((-0.12345678, 0.0), (-0.1235, 0.0))
    assert is_rounded((-0.12345678, -2.3456789), (-0.1235, -2.3457))
