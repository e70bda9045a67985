"""Which server answers, by what each kind's own pages say."""

import asyncio
from types import SimpleNamespace

import pytest

from ndcheck.samplers.endpoint.identity import Identity, identify

MODELS = {"data": [{"id": "m", "object": "model", "owned_by": "someone"}]}
SETTINGS = {"id": 0, "n_ctx": 4096, "params": {"temperature": 0.8}}
LLAMA_CPP = {
    "default_generation_settings": SETTINGS,
    "total_slots": 4,
    "model_path": "models/m.gguf",
    "build_info": "b6000-abcdef0",
}
VLLM = {"data": [{"id": "m", "owned_by": "vllm", "root": "org/m", "max_model_len": 2048}]}


class AnyPath(dict):
    """A gateway that answers the same at every address."""

    def __init__(self, page):
        super().__init__()
        self.page = page

    def get(self, path, default=None):
        return self.page


@pytest.mark.parametrize(
    ("pages", "found"),
    [
        (
            {"/v1/models": MODELS, "/props": LLAMA_CPP},
            Identity("llama.cpp", "b6000-abcdef0", "models/m.gguf", 4096),
        ),
        (
            {"/v1/models": VLLM, "/version": {"version": "0.26.0"}},
            Identity("vLLM", "0.26.0", "org/m", 2048),
        ),
        (
            {"/v1/models": MODELS, "/server_info": {"model_path": "org/m", "version": "0.5"}},
            Identity("SGLang", "0.5", "org/m"),
        ),
        ({"/v1/models": MODELS}, Identity("OpenAI-compatible server", None, "m")),
        ({}, Identity("OpenAI-compatible server", None, "m")),
        (AnyPath({"status": "ok"}), Identity("OpenAI-compatible server", None, "m")),
        (AnyPath(MODELS), Identity("OpenAI-compatible server", None, "m")),
        (
            AnyPath({"status": "ok", "default_generation_settings": SETTINGS}),
            Identity("OpenAI-compatible server", None, "m"),
        ),
    ],
)
def test_a_server_is_known_by_fields_that_only_its_kind_has(pages, found):
    """Fields as the servers' documentation has them."""

    async def get_object(url):
        return pages.get(url.removeprefix("http://host"), {})

    transport = SimpleNamespace(root="http://host", base="http://host/v1", get_object=get_object)
    assert asyncio.run(identify(transport, "m")) == found
