"""The options of `ndcheck run`: a flag wins over its NDCHECK_* variable, that over the default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ndcheck.engine_request import ENGINES, TRANSFORMERS
from ndcheck.plan.queue import ARRIVALS
from ndcheck.records import ARMS, AXES
from ndcheck.request import DEFAULTS

Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="builtin, smollm2, a directory, a GGUF file, a hub id, or scripted:NAME; with "
        "--endpoint a served name.",
        envvar="NDCHECK_MODEL",
        metavar="MODEL",
    ),
]
Adapter = Annotated[
    Path | None,
    typer.Option(
        "--adapter",
        help="A LoRA or another adapter of peft's, merged into the model.",
        metavar="DIR",
    ),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option(
        "--endpoint",
        help="Measure a running server through its OpenAI API, such as http://host:8000/v1.",
        envvar="NDCHECK_ENDPOINT",
        metavar="URL",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        "--api-key-file",
        help="Holds the API key [default: NDCHECK_API_KEY, OPENAI_API_KEY]; never recorded.",
        metavar="FILE",
    ),
]
Header = Annotated[
    list[str] | None,
    typer.Option(
        "--header",
        help="Sent with every request; the value is not recorded.",
        metavar="'NAME: V'",
    ),
]
ArrivalMode = Annotated[
    str,
    typer.Option(
        "--arrival",
        help="How a trial's requests arrive: together, closed (next when answered), "
        "poisson:RATE or bursts:SIZE:SECONDS.",
        metavar="HOW",
    ),
]
FillerKind = Annotated[
    str, typer.Option("--fillers", help="words, or shared-prefix: the prompt and words.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", help="For one whole answer.", metavar="SECONDS")
]
Retries = Annotated[
    int,
    typer.Option(
        "--retries", help="Of a request that met 429, 5xx or a broken connection.", metavar="N"
    ),
]
Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt", help="A probe; may be given several times. - is stdin.", metavar="TEXT"
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--prompts-file",
        help="Probes: text, JSON, JSON lines, CSV or Parquet; conversations too. - is stdin.",
        metavar="FILE",
    ),
]
PromptColumn = Annotated[
    str | None,
    typer.Option(
        "--prompt-column",
        help="The column or field of --prompts-file that holds the prompt.",
        metavar="NAME",
    ),
]
Chat = Annotated[bool, typer.Option("--chat", help="Apply the model's chat template.")]
MaxTokens = Annotated[
    int,
    typer.Option(
        "--max-tokens", help="Tokens per completion.", envvar="NDCHECK_MAX_TOKENS", metavar="N"
    ),
]
Temperature = Annotated[
    float,
    typer.Option(
        "--temperature", help="0 is greedy; above, a Gumbel draw seeded by --seed.", metavar="T"
    ),
]
Seed = Annotated[
    int,
    typer.Option("--seed", help="Of fillers, slots and draws.", envvar="NDCHECK_SEED", metavar="N"),
]
Kernels = Annotated[
    str | None,
    typer.Option(
        "--kernels",
        help=f"Arms to run, interleaved: {', '.join(ARMS)} [default: both].",
        envvar="NDCHECK_KERNELS",
        metavar="ARMS",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (as stored), bf16, fp16, fp32.",
        envvar="NDCHECK_DTYPE",
        metavar="DTYPE",
    ),
]
Device = Annotated[
    str,
    typer.Option(
        "--device", help="auto, cpu, cuda, cuda:1, ...", envvar="NDCHECK_DEVICE", metavar="DEVICE"
    ),
]
Attention = Annotated[
    str,
    typer.Option(
        "--attn",
        help="transformers' attention implementation: auto, eager, sdpa, ...",
        envvar="NDCHECK_ATTN",
        metavar="NAME",
    ),
]
Loads = Annotated[
    str,
    typer.Option(
        "--loads",
        help="Batch sizes; auto: up to the largest that fits in memory.",
        envvar="NDCHECK_LOADS",
        metavar="1,2,...",
    ),
]
BatchSizes = Annotated[
    str,
    typer.Option("--loads", help="Batch sizes.", envvar="NDCHECK_LOADS", metavar="1,2,..."),
]
Axes = Annotated[
    str,
    typer.Option(
        "--axes",
        help=f"What varies: all, or some of {', '.join(AXES)}.",
        envvar="NDCHECK_AXES",
        metavar="AXES",
    ),
]
LoadMode = Annotated[
    str,
    typer.Option(
        "--mode",
        help="copies: rows are copies of the probe, each a sample. "
        "mixed: one probe row among fillers.",
        envvar="NDCHECK_MODE",
        metavar="MODE",
    ),
]
Batching = Annotated[
    str,
    typer.Option(
        "--batching",
        help="exact: the batch that a load asks for, to the end. continuous: requests come and go "
        "between steps, as in a server.",
        envvar="NDCHECK_BATCHING",
        metavar="BATCHING",
    ),
]
Arrivals = Annotated[
    str,
    typer.Option(
        "--arrivals",
        help=f"Under continuous batching: {ARRIVALS} (requests a decode step); --loads says how "
        "many are in flight.",
        envvar="NDCHECK_ARRIVALS",
        metavar="ARRIVALS",
    ),
]
Samples = Annotated[
    int,
    typer.Option(
        "--samples",
        "-n",
        help="Samples of each probe in each arm.",
        envvar="NDCHECK_SAMPLES",
        metavar="N",
    ),
]
TargetRate = Annotated[
    float | None,
    typer.Option(
        "--target-rate",
        help="Choose the number of trials so that none diverging excludes this rate.",
        metavar="P",
    ),
]
Confidence = Annotated[float, typer.Option("--confidence", help="Of all bounds.", metavar="LEVEL")]
StopOnDivergence = Annotated[
    bool, typer.Option("--stop-on-divergence", help="End at the first diverged trial.")
]
AllowLatent = Annotated[
    bool, typer.Option("--allow-latent", help="Judge tokens alone: equal tokens, other bits pass.")
]
AnswerPattern = Annotated[
    str | None,
    typer.Option(
        "--answer-pattern",
        help="Regular expression of the answer in a completion (TARa@N).",
        metavar="RE",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", help="New or empty directory [default: ndcheck-runs/TIME-MODEL].", metavar="DIR"
    ),
]
Resume = Annotated[
    Path | None,
    typer.Option("--resume", help="Go on with an interrupted run, as it was.", metavar="DIR"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and its cost, run nothing.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a screen.")]
Html = Annotated[
    bool, typer.Option("--html", help="Also write report.html, one page with everything in it.")
]
Plots = Annotated[
    bool,
    typer.Option("--plots", help="Also write plots/ as PNG and SVG; needs ndcheck[plots]."),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress line.")]
RandomWeights = Annotated[
    int | None,
    typer.Option(
        "--random-weights",
        help="Make weights from the model's config.json and this seed; load none.",
        metavar="SEED",
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model's repository run its code.")
]
EngineChoice = Annotated[
    str,
    typer.Option(
        "--engine",
        help=f"What computes the model: {', '.join((TRANSFORMERS, *ENGINES))}.",
        envvar="NDCHECK_ENGINE",
        metavar="NAME",
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tp",
        help="Tensor parallel size. Without an engine, start one process a rank: torchrun "
        "--nproc-per-node N -m ndcheck run --tp N ...",
        metavar="N",
    ),
]
TensorParallelGroups = Annotated[
    int | None,
    typer.Option(
        "--tp-groups",
        help="Invariant arm: the same bits at --tp 1, 2, 4, ... N; a power of two.",
        metavar="N",
    ),
]
PipelineParallel = Annotated[
    int, typer.Option("--pp", help="vLLM: pipeline parallel size.", metavar="N")
]
EngineArgument = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-arg",
        help="vLLM: one of its engine arguments; may be given several times.",
        metavar="KEY=VALUE",
    ),
]

LOADS_DEFAULT = ",".join(map(str, DEFAULTS.batch_sizes))
