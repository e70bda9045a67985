"""`ndcheck trace`: which op gives the probe other bits in a batch?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import options as o
from ndcheck.request import DEFAULTS


def trace(
    context: typer.Context,
    model: o.Model = DEFAULTS.model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The probe.", metavar="TEXT")
    ] = None,
    chat: o.Chat = False,
    loads: o.BatchSizes = "2,3,4,8,16",
    mode: o.LoadMode = DEFAULTS.mode,
    step: Annotated[
        str,
        typer.Option(
            "--step", help="0 is the prefill, t the pass that gives token t.", metavar="T,..."
        ),
    ] = "0,1",
    kernels: Annotated[
        str,
        typer.Option("--kernels", help="The arm to trace: stock or invariant.", metavar="ARM"),
    ] = "stock",
    dtype: o.Dtype = DEFAULTS.dtype,
    device: o.Device = DEFAULTS.device,
    attn: o.Attention = DEFAULTS.attention,
    seed: o.Seed = DEFAULTS.seed,
    run: Annotated[
        Path | None,
        typer.Option("--run", help="Explain a recorded sample of this run.", metavar="DIR"),
    ] = None,
    sample: Annotated[
        int | None,
        typer.Option(
            "--sample",
            help="Which [default: one that differs in the smallest batch, prefilled whole].",
            metavar="ID",
        ),
    ] = None,
    swaps: Annotated[
        bool, typer.Option("--swaps/--no-swaps", help="Search the smallest set of swaps.")
    ] = True,
    random_weights: o.RandomWeights = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Name every op that gives the probe's row other bits in a batch than alone.

    Exits with 1 where one does and the logits follow it, with 3 where it could not look.
    """
    from dataclasses import replace

    from ndcheck import request
    from ndcheck.cli import explain_session, run_session, trust
    from ndcheck.errors import UsageError
    from ndcheck.records import Decoding

    steps = explain_session.numbers("--step", step, least=0)
    if run is not None:
        allowed = {*trust.PARAMETERS, "run", "sample", "step", "swaps", "json", "quiet"}
        run_session.refuse_other_options(context, allowed, "--run")
        given = context.get_parameter_source("step")
        chosen = steps if given is not None and given.name == "COMMANDLINE" else None
        code = explain_session.trace_run(
            run,
            sample,
            chosen,
            trust.given_options(context),
            with_swaps=swaps,
            as_json=json,
            quiet=quiet,
        )
        raise typer.Exit(code)
    if sample is not None:
        raise UsageError("--sample names a sample of a run: give --run DIR too")
    spec = replace(
        DEFAULTS,
        model=model,
        probes=request.make_probes([prompt] if prompt is not None else (), None),
        decoding=Decoding(steps[-1] + 1),
        batch_sizes=request.parse_batch_sizes(loads),
        mode=request.parse_mode(mode),
        arms=(explain_session.one_arm(kernels),),
        seed=seed,
        dtype=dtype,
        device=device,
        attention=attn,
        chat=chat,
        random_weights=random_weights,
        trust_remote_code=trust_remote_code,
    )
    request.check(spec)
    raise typer.Exit(
        explain_session.trace_loads(spec, steps, with_swaps=swaps, as_json=json, quiet=quiet)
    )
