"""A conversation is the token ids that transformers' own chat template gives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tokenizers
import transformers

from ndcheck.errors import UsageError
from ndcheck.probe import Message
from ndcheck.records import Probe
from ndcheck.request import DEFAULTS
from ndcheck.samplers.local.prompts import load_prompts

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONVERSATION = (Message("system", "tell"), Message("user", "me about the sum"))


@pytest.fixture
def source(tiny_models, tmp_path):
    """A tokenizer that puts `<|end|>` before every text, and a template that does too."""
    tokenizer = tokenizers.Tokenizer.from_file(str(tiny_models["llama"] / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.token_to_id("<|end|>"))]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for name in ("config.json", "tokenizer_config.json"):
        document = json.loads((tiny_models["llama"] / name).read_text())
        if name == "tokenizer_config.json":
            document |= {"bos_token": "<|end|>", "chat_template": TEMPLATE}
        (tmp_path / name).write_text(json.dumps(document))
    return str(tmp_path)


@pytest.mark.parametrize("content", [CONVERSATION, "me about the sum"], ids=["messages", "text"])
def test_a_conversation_goes_through_the_template(source, content):
    prompts = load_prompts(source, replace(DEFAULTS, chat=True))
    messages = content if isinstance(content, tuple) else (Message("user", content),)
    reference = transformers.AutoTokenizer.from_pretrained(source)
    expected = reference.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in messages],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    rendered = prompts.render(content)
    assert prompts.encode(content) == expected == [token_id for token_id, _ in rendered.tokens]
    assert rendered.text == reference.decode(expected)
    assert rendered.text == "".join(text for _, text in rendered.tokens)
    assert prompts.warnings([Probe("p1", "x", messages)]) == ()


def test_a_doubled_beginning_is_a_warning(source):
    prompts = load_prompts(source, DEFAULTS)
    assert prompts.warnings([Probe("p1", "sum")]) == ()
    (warning,) = prompts.warnings([Probe("p1", "sum"), Probe("p2", "<|end|>sum")])
    assert warning.startswith("warning: prompt p2 begins with '<|end|>' twice")
    twice = load_prompts(source, replace(DEFAULTS, chat=True))
    twice._tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    assert "p1 and 1 more begins" in twice.warnings([Probe("p1", "a"), Probe("p2", "b")])[0]


def test_a_model_without_a_template_takes_no_conversation(tiny_models):
    with pytest.raises(UsageError, match="need a chat template"):
        load_prompts(str(tiny_models["llama"]), replace(DEFAULTS, chat=True))


def test_the_template_is_given_what_is_asked(source):
    switch = "{% if not enable_thinking|default(true) %}<no_think>{% endif %}"
    plain = load_prompts(source, replace(DEFAULTS, chat=True))
    kwargs = '{"enable_thinking":false}'
    asked = load_prompts(source, replace(DEFAULTS, chat=True, chat_template_kwargs=kwargs))
    for prompts in (plain, asked):
        prompts._tokenizer.chat_template = TEMPLATE + switch
    reference = transformers.AutoTokenizer.from_pretrained(source)
    reference.chat_template = TEMPLATE + switch
    expected = reference.apply_chat_template(
        [{"role": "user", "content": "sum"}],
        add_generation_prompt=True,
        return_dict=True,
        enable_thinking=False,
    )["input_ids"]
    assert asked.encode("sum") == expected != plain.encode("sum")


def test_what_the_template_may_not_be_given(source):
    spec = replace(DEFAULTS, chat=True, chat_template_kwargs='{"chat_template":"x"}')
    with pytest.raises(UsageError, match="--chat-template-kwargs chat_template: ndcheck needs"):
        load_prompts(source, spec)


def test_a_prompt_is_the_same_each_time_whatever_its_template_draws(source):
    prompts = load_prompts(source, replace(DEFAULTS, chat=True))
    prompts._tokenizer.chat_template = "{{ range(100000) | random }}" + TEMPLATE
    messages = [{"role": "user", "content": "sum"}]
    drawn = {tuple(prompts._tokenizer.apply_chat_template(messages)["input_ids"]) for _ in "123"}
    assert len(drawn) > 1
    assert len({tuple(prompts.encode("sum")) for _ in "123"}) == 1


def test_a_template_that_says_the_date_is_a_warning(source):
    dated = "{{ date_string or strftime_now('%d %b %Y') }}" + TEMPLATE
    for kwargs, n_warnings in ((None, 1), ('{"date_string":"26 Jul 2024"}', 0)):
        spec = replace(DEFAULTS, chat=True, chat_template_kwargs=kwargs)
        prompts = load_prompts(source, spec)
        assert prompts.warnings([Probe("p1", "sum")]) == ()
        prompts._tokenizer.chat_template = dated
        warnings = prompts.warnings([Probe("p1", "sum")])
        assert len(warnings) == n_warnings
        assert all('--chat-template-kwargs \'{"date_string"' in each for each in warnings)


def test_what_a_template_leaves_out_is_named(source):
    prompts = load_prompts(source, replace(DEFAULTS, chat=True))
    probes = [Probe("p1", "sum"), Probe("p2", "x", CONVERSATION)]
    assert prompts.warnings(probes) == ()
    # As early revisions of Phi-3 did.
    prompts._tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}"
        "{% endfor %}"
    )
    assert prompts.warnings(probes[:1]) == ()
    (warning,) = prompts.warnings(probes)
    assert warning == "warning: the chat template leaves out what the system says"
    prompts._tokenizer.chat_template = "hello"
    with pytest.raises(UsageError, match=r"the chat template of .* leaves out the prompt"):
        prompts.warnings(probes[:1])
