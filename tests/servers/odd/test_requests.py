"""What servers need beside a prompt can be sent, and an error names the option that sends it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from ndcheck.cli.app import run_command_line
from ndcheck.errors import UsageError
from ndcheck.judging.verdict import SERVERS_SAMPLING
from ndcheck.records import Decoding
from ndcheck.samplers.endpoint.private import Private

WORDS = [f" w{i}" for i in range(40)]
SECRET = "open sesame 123"


class Azure:
    """Knows its deployments only with a version, and its key in a header of its own."""

    def refuse(self, path, body):
        parts = urlsplit(path)
        if "api-version" not in parse_qs(parts.query):
            return 404, {"error": {"code": "404", "message": "Resource not found"}}, {}
        if self.headers["api-key"] != SECRET:
            return 401, {"error": {"message": "Access denied due to invalid key."}}, {}
        if parts.path != "/openai/deployments/d/chat/completions":
            return 404, {"error": {"code": "DeploymentNotFound"}}, {}
        return None


def test_a_deployment_of_azures_is_measured_with_its_version_and_header(odd, measure):
    url = odd(Azure).replace("/v1", "/openai/deployments/d")
    with pytest.raises(UsageError, match=r"Resource not found .*--query api-version=2024-10-21"):
        measure(url)
    version = ("api-version=2024-10-21",)
    with pytest.raises(UsageError, match=r"invalid key.*--header 'api-key: VALUE'"):
        measure(url, query=version)
    judgement, *_ = measure(url, query=version, private=Private({"api-key": SECRET}))
    assert judgement.verdict.outcome == "PASS"


class NeedsPositiveTemperature:
    """As text-generation-inference was."""

    def refuse(self, path, body):
        if body.get("temperature", 1) <= 0:
            return 422, {"error": "`temperature` must be strictly positive"}, {}
        return None


class TakesNeither:
    """A reasoning model's: no max_tokens, and no temperature but its own."""

    def refuse(self, path, body):
        if "max_tokens" in body:
            return 400, {"error": {"message": "use max_completion_tokens instead"}}, {}
        if body.get("temperature", 1) != 1:
            return 400, {"error": {"message": "temperature must be 1"}}, {}
        return None


@pytest.mark.parametrize("handler", [NeedsPositiveTemperature, TakesNeither])
def test_without_a_temperature_the_verdict_says_whose_the_sampling_is(odd, measure, handler):
    with pytest.raises(UsageError, match="--no-temperature"):
        measure(odd(handler))
    judgement, *_ = measure(odd(handler), omits_temperature=True)
    assert judgement.verdict.outcome == "PASS"
    assert SERVERS_SAMPLING in judgement.verdict.reasons


def test_with_a_temperature_the_verdict_says_nothing_of_it(odd, measure):
    judgement, *_ = measure(odd())
    assert SERVERS_SAMPLING not in judgement.verdict.reasons


class Draws:
    """Draws its tokens unless it is told not to."""

    def tokens(self, body):
        n = self.limit(body)
        drawn = "temperature" not in body and next(type(self).numbers) % 2
        return [f"{word}{' else' * bool(drawn)}" for word in WORDS[:n]]


@pytest.mark.parametrize(("omits", "outcome"), [(True, "FAIL"), (False, "PASS")])
def test_a_draw_of_the_servers_fails_with_what_it_may_be(odd, measure, omits, outcome):
    judgement, *_ = measure(odd(Draws), omits_temperature=omits)
    assert judgement.verdict.outcome == outcome
    assert (SERVERS_SAMPLING in judgement.verdict.reasons) == omits


class IgnoresTheSeed:
    def tokens(self, body):
        return random.choices(WORDS, k=self.limit(body))


def test_draws_that_follow_no_seed_are_not_laid_to_a_cache_alone(odd, measure):
    judgement, *_ = measure(odd(IgnoresTheSeed), decoding=Decoding(12, temperature=0.7))
    assert judgement.verdict.outcome == "FAIL"
    assert any("draws by more than the seed" in r for r in judgement.verdict.reasons)


class Reasons:
    """Spends all tokens on reasoning that it hides, unless that is turned off."""

    def events(self, body):
        if body.get("chat_template_kwargs") == {"enable_thinking": False}:
            yield from super().events(body)
            return
        n = self.limit(body)
        yield {"choices": [{"delta": {"content": ""}, "finish_reason": "length"}]}
        details = {"reasoning_tokens": n}
        usage = {"completion_tokens": n, "completion_tokens_details": details}
        yield {"choices": [], "usage": usage}


def test_reasoning_is_turned_off_by_an_extra_field(odd, measure):
    with pytest.raises(UsageError, match=r"reasoning .* with --extra-body .*enable_thinking"):
        measure(odd(Reasons))
    body = '{"chat_template_kwargs":{"enable_thinking":false}}'
    judgement, *_ = measure(odd(Reasons), extra_body=body)
    assert judgement.verdict.outcome == "PASS"


class ReasonsFirst:
    """Counts hidden reasoning with what it shows token by token."""

    def usage(self, body, n):
        hidden = min(5, self.limit(body))
        details = {"reasoning_tokens": hidden}
        return {"completion_tokens": n + hidden, "completion_tokens_details": details}

    def tokens(self, body):
        return WORDS[: max(0, self.limit(body) - 5)]

    def fields(self, t, token, body):
        entry = {"token": token, "logprob": -0.012345678, "top_logprobs": []}
        return {"logprobs": {"content": [entry]}} if body.get("logprobs") else {}


def test_hidden_reasoning_is_no_wrong_count(odd, measure):
    judgement, _, samples = measure(odd(ReasonsFirst))
    assert judgement.verdict.outcome == "PASS", judgement
    assert {len(sample.token_ids) for sample in samples} == {12 - 5}


class NeedsField:
    def refuse(self, path, body):
        if "top_k" not in body:
            return 422, {"detail": [{"msg": "Field required", "loc": ["body", "top_k"]}]}, {}
        if body["top_k"] != 1:
            return 400, {"error": {"message": "top_k is out of range"}}, {}
        return None


def test_a_field_that_a_server_needs_goes_with_every_request(odd, measure):
    with pytest.raises(UsageError, match=r"Field required.*--extra-body adds a field"):
        measure(odd(NeedsField))
    with pytest.raises(UsageError, match=r"out of range \(--extra-body sends top_k"):
        measure(odd(NeedsField), extra_body='{"top_k":0}')
    # Fillers and probing requests are refused too, where they lack it.
    judgement, *_ = measure(odd(NeedsField), extra_body='{"top_k":1}', mode="mixed")
    assert judgement.verdict.outcome == "PASS"


class NeedsRoom:
    """Refuses a limit that a model's reasoning, or a field of the request, does not fit in."""

    def refuse(self, path, body):
        least = body.get("min_tokens", 8)
        if self.limit(body) >= least:
            return None
        words = f"model output limit was reached: try again with {least} or more"
        return 400, {"error": {"message": words}}, {}


@pytest.mark.parametrize(
    "options",
    [{}, {"extra_body": '{"min_tokens":12}', "mode": "mixed", "arrival": "closed"}],
)
def test_a_short_limit_that_is_refused_ends_no_run_with_a_longer_one(odd, measure, options):
    with pytest.raises(UsageError, match="try again with"):
        measure(odd(NeedsRoom), decoding=Decoding(7), **options)
    judgement, _, samples = measure(odd(NeedsRoom), **options)
    assert judgement.verdict.outcome == "PASS", judgement
    originals = [sample for sample in samples if sample.role != "control"]
    assert {sample.text for sample in originals} == {"".join(WORDS[:12])}


class HasALongest:
    """Has room for a probe's tokens and no more, and says so of nothing but a refusal."""

    def refuse(self, path, body):
        if self.limit(body) <= 12:
            return None
        return 400, {"error": {"message": "max_tokens: at most 12 completion tokens"}}, {}


def test_a_filler_that_finds_no_room_to_outlast_the_probe_ends_with_it(odd, measure):
    judgement, _, samples = measure(odd(HasALongest), mode="mixed")
    assert not [sample.error for sample in samples if sample.error]
    assert judgement.verdict.outcome == "PASS", judgement


class Stops:
    def refuse(self, path, body):
        if len(body.get("stop", ())) > 4:
            return 400, {"error": {"message": "stop: at most 4"}}, {}
        return None

    def tokens(self, body):
        words = WORDS[: self.limit(body)]
        ends = [i for i, word in enumerate(words) if word in body.get("stop", ())]
        return words[: ends[0]] if ends else words

    def end(self, body):
        return "length" if len(self.tokens(body)) == self.limit(body) else "stop"

    def usage(self, body, n):
        return {"completion_tokens": n + 3 * (self.end(body) == "stop")}


def test_completions_end_where_a_stop_occurs(odd, measure):
    with pytest.raises(UsageError, match=r"at most 4 \(this is what --stop asks for"):
        measure(odd(Stops), stop=tuple("abcde"))
    judgement, _, samples = measure(odd(Stops), stop=(" w5", " never"))
    assert judgement.verdict.outcome == "PASS"
    originals = [sample for sample in samples if sample.role != "control"]
    assert {sample.text for sample in originals} == {"".join(WORDS[:5])}
    assert {sample.finish_reason for sample in originals} == {"stop"}


class Responses:
    """Offers OpenAI's Responses API alone."""

    done = b""
    least = 16

    def limit(self, body):
        return body["max_output_tokens"]

    def refuse(self, path, body):
        if path != "/v1/responses":
            return 404, {"error": {"message": "Unknown request URL"}}, {}
        if self.limit(body) < self.least:
            return 400, {"error": {"message": "integer below minimum value"}}, {}
        return None

    def events(self, body):
        tokens, response = self.tokens(body), {"id": f"resp_{next(type(self).numbers)}"}
        yield {"type": "response.created", "response": {**response, "status": "in_progress"}}
        for token in tokens:
            self.pause()
            entry = {"token": token, "logprob": -0.012345678, "top_logprobs": []}
            logprobs = [entry] if "include" in body else []
            yield {"type": "response.output_text.delta", "delta": token, "logprobs": logprobs}
        yield {"type": "response.output_text.done", "text": "".join(tokens)}
        usage = {"input_tokens": 3, "output_tokens": len(tokens)}
        details = {"reason": "max_output_tokens"}
        response |= {"status": "incomplete", "incomplete_details": details, "usage": usage}
        yield {"type": "response.incomplete", "response": response}


class DrawnResponses(Responses):
    def tokens(self, body):
        n = next(type(self).numbers)
        return [f"{word}{n if t > 9 else ''}" for t, word in enumerate(WORDS[: self.limit(body)])]


@pytest.mark.parametrize(("handler", "outcome"), [(Responses, "PASS"), (DrawnResponses, "FAIL")])
def test_a_server_with_responses_alone_is_measured_by_them(odd, measure, handler, outcome):
    judgement, _, samples = measure(odd(handler), decoding=Decoding(20))
    assert judgement.verdict.outcome == outcome, judgement
    assert {len(sample.token_ids) for sample in samples} == {20}
    assert all(sample.logprobs for sample in samples)


def test_a_limit_that_responses_do_not_have_is_refused(odd, measure):
    with pytest.raises(UsageError, match=r"--max-tokens 12: .* /responses alone, .* 16 or more"):
        measure(odd(Responses))


class Records:
    """Repeats whatever secret it is sent, and keeps what was asked."""

    def secrets(self, path, body):
        return f"{parse_qs(urlsplit(path).query)['code'][0]} {body['auth']['api_key']}"

    def refuse(self, path, body):
        type(self).state.setdefault("bodies", []).append(body)
        if "prompt_logprobs" in body:
            return 400, {"error": {"message": self.secrets(path, body)}}, {}
        self.said = self.secrets(path, body)
        return None

    def frame(self):
        return {"system_fingerprint": f"fp of {self.said}"}


def test_secrets_in_a_query_and_a_body_are_in_nothing_that_is_written(
    odd, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NDCHECK_DEBUG", "1")
    url, small = odd(Records), ("--loads", "1,2", "-n", "11", "--max-tokens", "8")
    secrets = (
        *("--query", f"code={SECRET}", "--query", "api-version=1"),
        *("--extra-body", json.dumps({"auth": {"api_key": SECRET[::-1]}, "top_k": 1})),
    )
    trusted = ("--endpoint", url, *secrets)
    asked = ("--model", "m", "--axes", "run-to-run,batch-size", *small)
    assert run_command_line(["run", *trusted, *asked, "--out", "run", "--html"]) == 0
    assert run_command_line(["run", "--resume", "run", "--endpoint", url]) == 2
    assert "--query code=VALUE" in capfd.readouterr().err
    assert run_command_line(["run", "--resume", "run", *trusted]) == 0
    out, err = capfd.readouterr()
    written = [out, err, *(f.read_text() for f in tmp_path.rglob("*") if f.is_file())]
    assert "[secret]" in "".join(written)
    for secret in (SECRET, SECRET[::-1]):
        assert not [text for text in written if secret in text]
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["spec"]["endpoint"]
    assert recorded["query"] == ["code", "api-version=1"]
    assert json.loads(recorded["extra_body"]) == {"auth": {"api_key": "[secret]"}, "top_k": 1}


def test_a_check_sends_what_its_configuration_holds_and_records_none_of_it(
    odd, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    url = odd(Records)
    Path("ndcheck.toml").write_text(
        f"""
        [checks.served]
        model = "m"
        endpoint = "{url}"
        axes = "run-to-run,batch-size"
        loads = [1, 2]
        samples = 11
        max_tokens = 8
        query = ["code={SECRET}"]
        extra_body = {{ auth = {{ api_key = "{SECRET[::-1]}" }} }}
        """
    )
    assert run_command_line(["gate"]) == 0
    files = [file.read_text() for file in Path("ndcheck-runs").rglob("*") if file.is_file()]
    assert files
    assert not [text for text in files if SECRET in text or SECRET[::-1] in text]


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("--extra-body", "{"), "--extra-body: Expecting property name"),
        (("--extra-body", "[1]"), "--extra-body: give an object"),
        (("--extra-body", "@missing"), "--extra-body @missing: No such file"),
        (("--extra-body", '{"temperature": 1}'), "--extra-body temperature: give --temperature"),
        (("--extra-body", '{"stream": false}'), "--extra-body stream: ndcheck needs it as it is"),
        (("--extra-body", '{"a": NaN}'), "--extra-body: it is no JSON"),
        (("--extra-body", '{"a": "\\ud800"}'), "--extra-body: it is no JSON"),
        (("--header", "content-length: 3"), "--header content-length: ndcheck needs it as it is"),
        (("--header", "TE: trailers"), "--header TE: ndcheck needs it as it is"),
        (("--query", "sesame"), "--query: give it as KEY=VALUE"),
        (("--query", "a=1", "--query", "a=2"), "--query a: it is given twice"),
        (("--stop", ""), "--stop: give a text"),
        (("--system", " "), "--system: give a text"),
        (("--no-temperature", "--temperature", "1"), "--no-temperature: it leaves out what"),
        (("--chat-template-kwargs", "{}"), "--chat-template-kwargs: with --endpoint give --extra"),
    ],
)
def test_what_cannot_be_sent_is_one_line(typed, words, capfd):
    url = "http://127.0.0.1:9/v1"
    assert run_command_line(["run", "--endpoint", url, "--model", "m", *typed]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"ndcheck: {words}")
    assert "sesame" not in line
