"""`ndcheck score`: the same token ids again, through another computer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import completion
from ndcheck.cli import options as o
from ndcheck.records import ARMS
from ndcheck.request import DEFAULTS, make_private
from ndcheck.samplers.backends import OPTIONS
from ndcheck.samplers.options import TRANSFORMERS


def score(
    context: typer.Context,
    run: Annotated[
        Path,
        typer.Argument(
            help="A run's directory, latest, or a file of completions (JSON lines).",
            metavar="RUN",
            autocompletion=completion.runs,
        ),
    ],
    model: o.Model = DEFAULTS.model,
    dtype: o.Dtype = DEFAULTS.dtype,
    kernels: Annotated[
        str,
        typer.Option(
            "--kernels",
            help="Those of the scorer: stock or invariant.",
            metavar="ARM",
            autocompletion=completion.one_of(*ARMS),
        ),
    ] = "stock",
    device: o.Device = DEFAULTS.device,
    attn: o.Attention = DEFAULTS.attention,
    dequantise: o.Dequantise = False,
    random_weights: o.RandomWeights = None,
    trust_remote_code: o.TrustRemoteCode = False,
    engine: o.EngineChoice = TRANSFORMERS,
    engine_arg: o.EngineArgument = None,
    invariant_by: o.InvariantBy = OPTIONS["invariant_by"].default,
    endpoint: o.EndpointUrl = None,
    api_key_file: o.ApiKeyFile = None,
    header: o.Header = None,
    query: o.Query = None,
    timeout: o.Timeout = OPTIONS["timeout"].default,
    file: Annotated[
        Path | None,
        typer.Option("--file", help="Read the scores from this file instead.", metavar="FILE"),
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            "--requests",
            help="Only write what another program has to score, the control among it.",
            metavar="FILE",
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option("--arms", help="Those of the run [default: all].", metavar="ARMS"),
    ] = None,
    bitwise: Annotated[
        bool, typer.Option("--bitwise", help="No bit may differ, whatever limit is given too.")
    ] = False,
    max_logprob_difference: Annotated[
        float | None,
        typer.Option("--max-logprob-difference", help="Of any token.", metavar="NATS"),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="By the k3 estimator, a token.", metavar="NATS"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Keep what ndcheck gate judges in this new or empty directory.",
            metavar="DIR",
        ),
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="Write a row for each token.", metavar="FILE", dir_okay=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            help="Draw the difference by position, as .png or .svg; needs ndcheck[plots].",
            metavar="FILE",
            dir_okay=False,
        ),
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Score recorded completions again with another computer, by token ids.

    Without --model, --endpoint or --file: the run's own model, in this process. Without a limit no
    bit may differ. Exits with 1 where one does, with 3 where the evidence is too thin.
    """
    from ndcheck.cli.comparing import score_session
    from ndcheck.cli.latest import latest
    from ndcheck.judging.scores import Limits

    limits = Limits(bitwise, max_logprob_difference, max_kl)
    outputs = score_session.Outputs(out, csv, plot, as_json=json, quiet=quiet)
    recording = score_session.read(latest(run), arms)
    if requests is not None:
        raise typer.Exit(score_session.request(recording, requests, quiet=quiet))
    typed = {
        "model": model,
        "dtype": dtype,
        "kernels": kernels,
        "device": device,
        "attn": attn,
        "dequantise": dequantise,
        "random_weights": random_weights,
        "trust_remote_code": trust_remote_code,
        "engine": engine,
        "engine_arg": engine_arg or (),
        "invariant_by": invariant_by,
        "endpoint": endpoint,
        "api_key_file": api_key_file,
        "query": query or (),
        "timeout": timeout,
    }
    given = {
        name
        for name in typed
        if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE"
    }
    private = make_private(header or (), query or ())
    if private.headers:
        given.add("header")
    scorer = score_session.open_scorer(recording, typed, given, private, file, quiet=quiet)
    raise typer.Exit(score_session.score(recording, scorer, limits, outputs))
