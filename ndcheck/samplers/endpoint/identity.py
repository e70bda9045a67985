"""Who answers: which kind of server, of which version, with which model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ndcheck.samplers.endpoint.answers.events import as_count, as_dict, as_fact, as_list
from ndcheck.samplers.endpoint.transport import Transport


@dataclass(frozen=True, slots=True)
class Identity:
    """Who answers: what of it changes in mid-run makes two completions incomparable."""

    server: str
    version: str | None = None
    model: str | None = None
    context: int | None = None

    def digest(self, *more: object) -> str:
        """16 hexadecimal digits over these facts."""
        facts = "/".join(map(str, (self.server, self.version, self.model, *more)))
        return hashlib.blake2b(facts.encode(), digest_size=8).hexdigest()


async def identify(transport: Transport, model: str) -> Identity:
    """Ask the server what it is, at the addresses where each kind says so.

    A gateway may answer at any address, so a kind is known by fields that only it has.
    """
    root = transport.root
    entries = [as_dict(e) for e in as_list((await get_models(transport)).get("data"))]
    entry = next((entry for entry in entries if entry.get("id") == model), {})
    name = as_fact(entry.get("root")) or as_fact(entry.get("id")) or model
    context = as_count(entry.get("max_model_len")) or None
    props = await transport.get_object(f"{root}/props")
    settings = as_dict(props.get("default_generation_settings"))
    if settings and ("total_slots" in props or "build_info" in props):
        file = as_fact(props.get("model_path")) or name
        length = as_count(settings.get("n_ctx")) or None
        return Identity("llama.cpp", as_fact(props.get("build_info")) or None, file, length)
    for path in ("/server_info", "/get_server_info"):
        info = await transport.get_object(f"{root}{path}")
        if file := as_fact(info.get("model_path")):
            limit = context or as_count(info.get("max_total_num_tokens")) or None
            return Identity("SGLang", as_fact(info.get("version")) or None, file, limit)
    version = as_fact((await transport.get_object(f"{root}/version")).get("version")) or None
    kind = "vLLM" if entry.get("owned_by") == "vllm" else "OpenAI-compatible server"
    return Identity(kind, version, name, context)


async def get_models(transport: Transport) -> dict[str, object]:
    """What the server says that it offers; empty where it does not."""
    return await transport.get_object(f"{transport.base}/models")
