"""`ndcheck run`: measure."""

from __future__ import annotations

from pathlib import Path

import typer

from ndcheck.cli import options as o
from ndcheck.errors import UsageError
from ndcheck.plan.prompts import typed_prompts
from ndcheck.request import DEFAULTS, add_headers, make_private, make_spec
from ndcheck.samplers.backends import OPTIONS
from ndcheck.samplers.options import TRANSFORMERS
from ndcheck.storage.reading import exists
from ndcheck.storage.run_directory import RUN_FILE


def run(
    context: typer.Context,
    model: o.Model = DEFAULTS.model,
    adapter: o.Adapter = None,
    endpoint: o.EndpointUrl = None,
    against: o.Against = None,
    prompt: o.Prompt = None,
    prompts_file: o.PromptsFile = None,
    prompt_column: o.PromptColumn = None,
    system: o.System = None,
    chat: o.Chat = False,
    chat_template_kwargs: o.ChatTemplateKwargs = None,
    loads: o.Loads = o.LOADS_DEFAULT,
    axes: o.Axes = "all",
    widths: o.Widths = None,
    draft: o.Draft = None,
    mode: o.LoadMode = DEFAULTS.mode,
    batching: o.Batching = DEFAULTS.batching,
    arrivals: o.Arrivals = None,
    kernels: o.Kernels = None,
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
    answer: o.Answer = None,
    answer_pattern: o.AnswerPattern = None,
    random_weights: o.RandomWeights = None,
    dequantise: o.Dequantise = False,
    kv_cache_dtype: o.CacheDtype = DEFAULTS.kv_cache_dtype,
    trust_remote_code: o.TrustRemoteCode = False,
    engine: o.EngineChoice = TRANSFORMERS,
    tp: o.TensorParallel = DEFAULTS.tensor_parallel,
    tp_groups: o.TensorParallelGroups = None,
    pp: o.PipelineParallel = OPTIONS["pp"].default,
    engine_arg: o.EngineArgument = None,
    invariant_by: o.InvariantBy = OPTIONS["invariant_by"].default,
    arrival: o.OldArrivals = None,
    fillers: o.FillerKind = OPTIONS["fillers"].default,
    timeout: o.Timeout = OPTIONS["timeout"].default,
    retries: o.Retries = OPTIONS["retries"].default,
    api_key_file: o.ApiKeyFile = None,
    header: o.Header = None,
    query: o.Query = None,
    extra_body: o.ExtraBody = None,
    no_temperature: o.NoTemperature = False,
    stop: o.Stop = None,
    out: o.Out = None,
    resume: o.Resume = None,
    dry_run: o.DryRun = False,
    verbose: o.Verbose = False,
    html: o.Html = False,
    plots: o.Plots = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Sample prompts again and again under varying batches, and compare tokens and bits.

    Without options: the embedded model, one prompt, stock and batch-invariant kernels, every
    invariance property, a minute or two.
    """
    from ndcheck.cli import run_session, trust
    from ndcheck.cli.console import note
    from ndcheck.cli.usage.hints import misspelt_variables

    if context.args:
        raise UsageError(_stray(context.args[0]))
    for line in misspelt_variables():
        note(line, quiet=quiet)
    private = make_private(header or (), query or (), extra_body)
    if resume is not None:
        also_accepted = {*trust.PARAMETERS, "html", "plots", "json", "quiet"}
        run_session.refuse_other_options(context, allowed={"resume", *also_accepted})
        given = trust.given_options(context)
        code = run_session.resume(
            resume, private, given, as_json=json, quiet=quiet, html=html, plots=plots
        )
        raise typer.Exit(code)
    if arrival is not None:
        note("--arrival is now called --arrivals", quiet=quiet)
    spec = make_spec(
        model=model,
        adapter=adapter,
        prompt=typed_prompts(prompt or (), prompts_file) or None,
        prompts_file=prompts_file,
        prompt_column=prompt_column,
        system=system,
        chat=chat,
        chat_template_kwargs=chat_template_kwargs,
        loads=loads,
        axes=axes,
        widths=widths,
        draft=draft,
        mode=mode,
        batching=batching,
        arrivals=arrivals,
        kernels=kernels,
        samples=samples,
        target_rate=target_rate,
        confidence=confidence,
        stop_on_divergence=stop_on_divergence,
        allow_latent=allow_latent,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        dtype=dtype,
        device=device,
        attn=attn,
        answer=answer,
        answer_pattern=answer_pattern,
        random_weights=random_weights,
        dequantise=dequantise,
        kv_cache_dtype=kv_cache_dtype,
        trust_remote_code=trust_remote_code,
        engine=engine,
        tp=tp,
        tp_groups=tp_groups,
        pp=pp,
        engine_arg=engine_arg or (),
        invariant_by=invariant_by,
        endpoint=endpoint,
        arrival=arrival,
        fillers=fillers,
        timeout=timeout,
        retries=retries,
        api_key_file=api_key_file,
        query=query or (),
        extra_body=extra_body,
        no_temperature=no_temperature,
        stop=stop or (),
    )
    spec = add_headers(spec, private.headers)
    if verbose and not dry_run:
        raise UsageError("--verbose: it prints the trials of a plan: give --dry-run too")
    if against is not None and (html or plots):
        raise UsageError("--against: ndcheck report DIR --html --plots shows each run afterwards")
    if dry_run:
        raise typer.Exit(run_session.print_plan(spec, private, verbose=verbose))
    if against is not None:
        from ndcheck.cli.comparing import against_session

        code = against_session.start(spec, against, private, out, as_json=json, quiet=quiet)
        raise typer.Exit(code)
    code = run_session.start(spec, private, out, as_json=json, quiet=quiet, html=html, plots=plots)
    raise typer.Exit(code)


def _stray(argument: str) -> str:
    """What to do instead of naming something without an option."""
    if exists(Path(argument) / RUN_FILE):
        return f"{argument} holds a run: ndcheck report {argument} shows it, run --resume goes on"
    if argument.startswith(("http://", "https://")):
        return f"{argument}: give a server as --endpoint {argument}"
    return f"{argument}: give a model as --model {argument}, a prompt as --prompt"
