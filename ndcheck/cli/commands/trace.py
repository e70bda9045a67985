"""`ndcheck trace`: which op gives the probe other bits in a batch?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import completion
from ndcheck.cli import options as o
from ndcheck.records import ARMS
from ndcheck.request import DEFAULTS


def trace(
    context: typer.Context,
    model: o.Model = DEFAULTS.model,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The probe.", metavar="TEXT")
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
    widths: Annotated[
        str | None,
        typer.Option(
            "--widths",
            help="Feed the completion again, in passes of so many tokens of each row.",
            metavar="2,4,...",
        ),
    ] = None,
    kernels: Annotated[
        str,
        typer.Option(
            "--kernels",
            help="The arm to trace: stock or invariant.",
            metavar="ARM",
            autocompletion=completion.one_of(*ARMS),
        ),
    ] = "stock",
    dtype: o.Dtype = DEFAULTS.dtype,
    device: o.Device = DEFAULTS.device,
    attn: o.Attention = DEFAULTS.attention,
    seed: o.Seed = DEFAULTS.seed,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            help="Explain a recorded sample of this run, or of the latest.",
            metavar="DIR",
            autocompletion=completion.runs,
        ),
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
    exit_code: o.ExitCode = False,
    quiet: o.Quiet = False,
) -> None:
    """Name every op that gives the probe's row other bits in a batch than alone.

    With --exit-code it exits with 1 where one does and the logits follow it, with 3 where it could
    not look.
    """
    from ndcheck.cli import explain_session, run_session, trust
    from ndcheck.cli.latest import latest
    from ndcheck.errors import UsageError
    from ndcheck.request import make_spec
    from ndcheck.samplers.options import parse_batch_sizes, parse_widths

    steps = explain_session.numbers("--step", step, least=0)
    if run is not None:
        allowed = {
            *trust.PARAMETERS,
            "run",
            "sample",
            "step",
            "swaps",
            "json",
            "exit_code",
            "quiet",
        }
        run_session.refuse_other_options(context, allowed, "--run")
        given = context.get_parameter_source("step")
        chosen = steps if given is not None and given.name == "COMMANDLINE" else None
        code = explain_session.trace_run(
            latest(run),
            sample,
            chosen,
            trust.given_options(context),
            with_swaps=swaps,
            as_json=json,
            quiet=quiet,
        )
        raise typer.Exit(code if exit_code else 0)
    if sample is not None:
        raise UsageError("--sample names a sample of a run: give --run DIR too")
    fed = () if widths is None else parse_widths(widths)
    spec = make_spec(
        model=model,
        prompt=prompt,
        chat=chat,
        loads=parse_batch_sizes(loads),
        mode=mode,
        kernels=explain_session.one_arm(kernels),
        max_tokens=steps[-1] + max(fed or (1,)),
        seed=seed,
        dtype=dtype,
        device=device,
        attn=attn,
        random_weights=random_weights,
        trust_remote_code=trust_remote_code,
    )
    code = explain_session.trace_loads(
        spec, steps, fed, with_swaps=swaps, as_json=json, quiet=quiet
    )
    raise typer.Exit(code if exit_code else 0)
