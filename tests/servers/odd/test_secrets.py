"""Keys, passwords and settings of the environment: used, and never shown."""

from __future__ import annotations

import base64
import random
import re
import urllib.parse

import pytest

from ndcheck.cli.app import run_command_line


class Repeats:
    """Repeats the key wherever a server can put words, within the text in two parts."""

    @property
    def key(self):
        return self.headers["authorization"].removeprefix("Bearer ")

    def pages(self):
        return {
            "/v1/models": {"data": [{"id": "m", "root": self.key}]},
            "/version": {"version": f"1.0 for {self.key}"},
        }

    def refuse(self, path, body):
        if "prompt_logprobs" in body or "refuse" in body["prompt"]:
            words = f"{self.key}, {urllib.parse.quote(self.key)}, {base64_of(self.key)}"
            return 400, {"error": {"message": words, self.key: [self.key]}}, {"x_key": self.key}
        return None

    def text(self, t, token):
        half = (len(self.key) + 1) // 2
        return {4: f" {self.key[:half]}", 5: f"{self.key[half:]} "}.get(t, token)

    def end(self, body):
        number = next(type(self).numbers)
        return f"error {self.key}" if number > 24 and number % 4 == 0 else "length"

    def frame(self):
        return {"system_fingerprint": f"fp of {self.key}", "id": f"{self.key}-{random.random()}"}


def base64_of(key):
    return base64.b64encode(f"user:{key}".encode()).decode()


@pytest.mark.parametrize("key", ["sk-0123456789/abcdef", "Zq7x", "Z9", "Q"])
@pytest.mark.parametrize("prompt", ["class Queue:", "refuse"])
def test_a_key_is_in_nothing_that_is_written(odd, tmp_path, monkeypatch, capfd, key, prompt):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NDCHECK_API_KEY", key)
    monkeypatch.setenv("NDCHECK_DEBUG", "1")
    options = ("--model", "m", "--loads", "1,2", "-n", "8", "--max-tokens", "8", "--retries", "0")
    url = odd(Repeats)
    code = run_command_line(
        ["run", "--endpoint", url, *options, "--prompt", prompt, "--out", "run"]
        + ["--html"] * (len(key) > 1)  # The page's own scripts hold single letters.
    )
    assert code == (3 if prompt == "class Queue:" else 2)
    out, err = capfd.readouterr()
    written = [out, err, *(f.read_text() for f in tmp_path.rglob("*") if f.is_file())]
    assert len(written) > (8 if prompt == "class Queue:" else 1)
    assert "[secret]" in "".join(written)
    for form in (key, urllib.parse.quote(key, safe=""), base64_of(key)):
        found = re.compile(rf"(?<![0-9A-Za-z]){re.escape(form)}(?![0-9A-Za-z])")
        assert not [text for text in written if found.search(text)]


ADDRESSES = [
    "http://me:hunter2@host/v1", "htp://me:hunter2@host/v1", "http://me:hunter2@host:99999/v1",
    "me:hunter2@host/v1", "http://me:hunter2@[::1/v1", "http://me:hunter2%40host/v1",
    "http://host/v1?key=hunter2", "http://host/v1#hunter2", "http:// me:hunter2@host /v1",
    "//me:hunter2@host", "http://me:hunter2@\x00host/v1", "http://hunter2@/v1",
]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_with_a_password_is_never_shown(address, capfd, monkeypatch):
    assert run_command_line(["run", "--endpoint", address, "--model", "m"]) == 2
    monkeypatch.setenv("NDCHECK_ENDPOINT", address.replace("\x00", ""))
    assert run_command_line(["run", "--model", "m"]) == 2
    out, err = capfd.readouterr()
    assert "hunter2" not in out + err
    assert err.count("\n") == 2


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("HTTP_PROXY", "foo://me:hunter2@proxy:1", "the proxy settings in HTTP_PROXY cannot be"),
        ("HTTP_PROXY", "http://me:hunter2@proxy:notaport", "the proxy settings in HTTP_PROXY"),
        ("ALL_PROXY", "socks5://me:hunter2@127.0.0.1:9", "the proxy settings in ALL_PROXY"),
        ("HTTP_PROXY", "http://me:hunter2@127.0.0.1:9", "through the proxy of HTTP_PROXY"),
        ("SSL_CERT_FILE", "/does/not/exist.pem", "SSL_CERT_FILE=/does/not/exist.pem: "),
        ("SSLKEYLOGFILE", "/does/not/exist/log", "SSLKEYLOGFILE=/does/not/exist/log: "),
        ("SSL_CERT_FILE", __file__, f"SSL_CERT_FILE={__file__}: it holds no certificate"),
        ("SSL_CERT_FILE", "/", "SSL_CERT_FILE=/: "),
    ],
)
def test_settings_that_no_connection_can_be_made_with(
    odd, capfd, monkeypatch, variable, value, words
):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    code = run_command_line(["run", "--endpoint", odd(), "--model", "m", "--retries", "0", "-q"])
    out, err = capfd.readouterr()
    assert code == (4 if "through" in words else 2)
    assert words in err
    assert err.count("\n") == 1
    assert "hunter2" not in out + err
