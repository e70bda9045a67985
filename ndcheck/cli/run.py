"""`ndcheck run`: measure."""

from __future__ import annotations

import typer

from ndcheck.cli import options as o
from ndcheck.request import DEFAULTS, ENDPOINT_DEFAULTS


def run(
    context: typer.Context,
    model: o.Model = DEFAULTS.model,
    endpoint: o.EndpointUrl = None,
    prompt: o.Prompt = None,
    prompts_file: o.PromptsFile = None,
    chat: o.Chat = False,
    loads: o.Loads = o.LOADS_DEFAULT,
    axes: o.Axes = "all",
    mode: o.LoadMode = DEFAULTS.mode,
    kernels: o.Kernels = o.KERNELS_DEFAULT,
    samples: o.Samples = DEFAULTS.n_samples,
    target_rate: o.TargetRate = None,
    confidence: o.Confidence = DEFAULTS.confidence,
    stop_on_divergence: o.StopOnDivergence = False,
    allow_latent: o.AllowLatent = False,
    max_tokens: o.MaxTokens = DEFAULTS.decoding.max_tokens,
    temperature: o.Temperature = DEFAULTS.decoding.temperature,
    seed: o.Seed = DEFAULTS.seed,
    dtype: o.Dtype = DEFAULTS.dtype,
    device: o.Device = DEFAULTS.device,
    attn: o.Attention = DEFAULTS.attention,
    answer_pattern: o.AnswerPattern = None,
    trust_remote_code: o.TrustRemoteCode = False,
    arrival: o.ArrivalMode = ENDPOINT_DEFAULTS.arrival,
    fillers: o.FillerKind = ENDPOINT_DEFAULTS.fillers,
    timeout: o.Timeout = ENDPOINT_DEFAULTS.timeout_s,
    retries: o.Retries = ENDPOINT_DEFAULTS.n_retries,
    api_key_file: o.ApiKeyFile = None,
    header: o.Header = None,
    out: o.Out = None,
    resume: o.Resume = None,
    dry_run: o.DryRun = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Sample prompts again and again under varying batches, and compare tokens and bits.

    Without options: the embedded model, one prompt, every invariance property, about a minute.
    """
    from ndcheck import request
    from ndcheck.cli import session
    from ndcheck.records import Decoding, RunSpec

    headers = request.parse_headers(header or ())
    if resume is not None:
        session.refuse_other_options(context, allowed={"resume", "json", "quiet", "header"})
        raise typer.Exit(session.resume(resume, headers, as_json=json, quiet=quiet))
    spec = RunSpec(
        model=model,
        probes=request.make_probes(prompt or (), prompts_file),
        decoding=Decoding(max_tokens, temperature, seed),
        batch_sizes=request.parse_batch_sizes(loads),
        axes=request.parse_axes(axes),
        mode=request.parse_mode(mode),
        n_samples=samples,
        arms=(request.parse_server_arms if endpoint else request.parse_arms)(kernels),
        seed=seed,
        dtype=dtype,
        device=device,
        attention=attn,
        chat=chat,
        trust_remote_code=trust_remote_code,
        target_rate=target_rate,
        confidence=confidence,
        stop_on_divergence=stop_on_divergence,
        allow_latent=allow_latent,
        answer_pattern=answer_pattern,
        endpoint=request.make_endpoint(
            endpoint, api_key_file, headers, arrival, fillers, timeout, retries
        ),
    )
    request.check(spec)
    if dry_run:
        raise typer.Exit(session.print_plan(spec, headers))
    raise typer.Exit(session.start(spec, headers, out, as_json=json, quiet=quiet))
