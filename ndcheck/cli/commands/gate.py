"""`ndcheck gate`: judge runs by rules, or make the runs of a configuration file first."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.cli import completion
from ndcheck.cli import options as o


def gate(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Directories of runs, or of ndcheck score --out, or latest [default: run the "
            "checks of --config].",
            metavar="RUN",
            autocompletion=completion.runs,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="Checks [default: ndcheck.toml, or [tool.ndcheck] in pyproject.toml].",
            metavar="FILE",
        ),
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            "--check",
            help="Only this check; may be given several times. With RUN: its rules.",
            metavar="NAME",
        ),
    ] = None,
    max_unique: Annotated[
        int | None,
        typer.Option(
            "--max-unique", help="Distinct completions of a probe in an arm.", metavar="N"
        ),
    ] = None,
    max_divergence_rate: Annotated[
        float | None,
        typer.Option(
            "--max-divergence-rate",
            help="Trials that diverge: the upper bound at --confidence.",
            metavar="P",
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option("--confidence", help="Of that bound [default: the run's].", metavar="LEVEL"),
    ] = None,
    min_common_prefix: Annotated[
        int | None,
        typer.Option(
            "--min-common-prefix", help="Tokens that all completions have in common.", metavar="N"
        ),
    ] = None,
    allow_latent: Annotated[
        bool | None,
        typer.Option("--allow-latent/--no-allow-latent", help="Equal tokens, other bits pass."),
    ] = None,
    max_slowdown: Annotated[
        float | None,
        typer.Option("--max-slowdown", help="Time of the invariant arm over stock's.", metavar="X"),
    ] = None,
    bitwise: Annotated[
        bool, typer.Option("--bitwise", help="Of a score: no bit may differ.")
    ] = False,
    max_logprob_difference: Annotated[
        float | None,
        typer.Option("--max-logprob-difference", help="Of a score: of any token.", metavar="NATS"),
    ] = None,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", help="Of a score: by k3, a token.", metavar="NATS"),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            "--arms", help="Those that must pass; stock is invariant's control.", metavar="ARMS"
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline", help="A run's directory or saved name: no drift from it.", metavar="RUN"
        ),
    ] = None,
    fail_on: Annotated[
        str | None,
        typer.Option(
            "--fail-on", help="What counts as drift; see ndcheck compare.", metavar="KINDS"
        ),
    ] = None,
    manifest: Annotated[
        Path | None,
        typer.Option(
            "--manifest",
            help="This stack must have its bits; see ndcheck kernels manifest.",
            metavar="FILE",
        ),
    ] = None,
    save_baseline: Annotated[
        str | None,
        typer.Option(
            "--save-baseline", help="Keep the run as ndcheck-baselines/NAME.", metavar="NAME"
        ),
    ] = None,
    inconclusive: Annotated[
        str | None,
        typer.Option(
            "--inconclusive",
            help="pass or fail: what an inconclusive check is instead of exit code 3.",
            metavar="OUTCOME",
        ),
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option("--junit", help="Write JUnit XML.", metavar="FILE", dir_okay=False),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="New folder of the checks' runs [default: ndcheck-runs].", metavar="DIR"
        ),
    ] = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
) -> None:
    """Fail when outputs are nondeterministic: for CI.

    Without rules no trial may diverge, in tokens or in bits. Without evidence nothing passes.
    """
    from ndcheck.cli import gate_session
    from ndcheck.cli.latest import latest
    from ndcheck.errors import UsageError
    from ndcheck.judging.rules import Rules
    from ndcheck.judging.scores import Limits
    from ndcheck.storage.outputs import check_outputs

    check_outputs(junit, makes_folders=True)
    limits = Rules(
        max_unique, max_divergence_rate, min_common_prefix, allow_latent, confidence, max_slowdown
    )
    wish = gate_session.parse_inconclusive(inconclusive)
    of_scores = Limits(bitwise, max_logprob_difference, max_kl)
    demands = gate_session.Demands(limits, of_scores, arms, baseline, fail_on, manifest)
    if runs and out is not None:
        raise UsageError("--out: this is for the runs of checks; a RUN stays where it is")
    if runs:
        results = gate_session.judge_runs(
            [latest(run) for run in runs], config, check, demands, save_baseline
        )
    elif save_baseline is not None:
        raise UsageError("--save-baseline: give the RUN to save")
    else:
        results = gate_session.run_checks(config, check, demands, out, quiet=quiet)
    raise typer.Exit(gate_session.publish(results, wish, junit, as_json=json))
