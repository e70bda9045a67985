"""The options of `ndcheck run`: a flag wins over its NDCHECK_* variable, that over the default."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ndcheck import records
from ndcheck.cli.completion import Complete, one_of, runs, some_of
from ndcheck.plan.arrivals import NOTATION
from ndcheck.records import ARMS, AXES
from ndcheck.request import DEFAULTS
from ndcheck.samplers.backends import ENGINES, OPTIONS
from ndcheck.samplers.options import DTYPES


def _option(
    name: str, help: str, metavar: str | None = None, values: Complete | None = None
) -> Any:
    """typer's view of a row: its flags and its NDCHECK_* variable."""
    row = OPTIONS[name]
    flags = (row.flag, row.short) if row.short else (row.flag,)
    return typer.Option(
        *flags, help=help, envvar=row.variable, metavar=metavar, autocompletion=values
    )


Model = Annotated[
    str,
    _option(
        "model",
        "builtin, smollm2, a directory, a GGUF file, a hub id, or scripted:NAME; with --endpoint a "
        "served name.",
        "MODEL",
    ),
]
Adapter = Annotated[
    Path | None,
    _option("adapter", "A LoRA or another adapter of peft's, merged into the model.", "DIR"),
]
EndpointUrl = Annotated[
    str | None,
    _option(
        "endpoint",
        "Measure a running server through its OpenAI API, such as http://host:8000/v1.",
        "URL",
    ),
]
Against = Annotated[
    str | None,
    typer.Option(
        "--against",
        help="Measure this server too, under the same loads, and compare the two; the key and "
        "headers of --endpoint go to it.",
        metavar="URL",
    ),
]
ApiKeyFile = Annotated[
    Path | None,
    _option(
        "api_key_file",
        "Holds the API key [default: NDCHECK_API_KEY, OPENAI_API_KEY]; never recorded.",
        "FILE",
    ),
]
Header = Annotated[
    list[str] | None,
    _option(
        "header",
        "Sent with every request; the value is not recorded.",
        "'NAME: V'",
    ),
]
Query = Annotated[
    list[str] | None,
    _option(
        "query",
        "Put into every address, such as api-version=2024-10-21; of others than versions the value "
        "is not recorded.",
        "KEY=VALUE",
    ),
]
ExtraBody = Annotated[
    str | None,
    _option(
        "extra_body",
        "Fields of every request, such as '{\"top_k\": 1}'; recorded, but for secrets.",
        "JSON|@FILE",
    ),
]
NoTemperature = Annotated[
    bool, _option("no_temperature", "Send none: how tokens are drawn is then the server's.")
]
Stop = Annotated[
    list[str] | None,
    _option("stop", "Where it occurs, the completion ends; may be given several times.", "TEXT"),
]
FillerKind = Annotated[str, _option("fillers", "words, or shared-prefix: the prompt and words.")]
Timeout = Annotated[float, _option("timeout", "For one whole answer.", "SECONDS")]
Retries = Annotated[
    int,
    _option("retries", "Of a request that met 429, 5xx or a broken connection.", "N"),
]
Prompt = Annotated[
    list[str] | None,
    _option("prompt", "A probe; may be given several times. - is stdin.", "TEXT"),
]
PromptsFile = Annotated[
    Path | None,
    _option(
        "prompts_file",
        "Probes: text, JSON, JSON lines, CSV or Parquet; conversations too. - is stdin.",
        "FILE",
    ),
]
PromptColumn = Annotated[
    str | None,
    _option("prompt_column", "The column or field of --prompts-file with the prompt.", "NAME"),
]
System = Annotated[
    str | None,
    _option("system", "A system prompt for those that have none; implies --chat.", "TEXT"),
]
ChatTemplateKwargs = Annotated[
    str | None,
    _option(
        "chat_template_kwargs",
        "What the chat template is given, such as '{\"enable_thinking\": false}'.",
        "JSON|@FILE",
    ),
]
Chat = Annotated[bool, _option("chat", "Apply the model's chat template.")]
MaxTokens = Annotated[
    int,
    _option("max_tokens", "Tokens per completion.", "N"),
]
Temperature = Annotated[
    float,
    _option("temperature", "0 is greedy; above, a Gumbel draw seeded by --seed.", "T"),
]
Seed = Annotated[
    int,
    _option("seed", "Of fillers, slots and draws.", "N"),
]
Kernels = Annotated[
    str | None,
    _option(
        "kernels",
        f"Arms to run, interleaved: {', '.join(ARMS)} [default: both].",
        "ARMS",
        some_of(*ARMS),
    ),
]
Dtype = Annotated[
    str,
    _option(
        "dtype",
        f"auto (as stored), {', '.join(DTYPES)}.",
        "DTYPE",
        one_of("auto", *DTYPES),
    ),
]
Device = Annotated[
    str,
    _option("device", "auto, cpu, cuda, cuda:1, ...", "DEVICE", one_of("auto", "cpu", "cuda")),
]
Attention = Annotated[
    str,
    _option(
        "attn",
        "transformers' attention implementation: auto, eager, sdpa, ...",
        "NAME",
    ),
]
Loads = Annotated[
    str,
    _option(
        "loads",
        "Batch sizes, or ranges such as 1-8 and 1-64:x2; auto: up to the largest that fits in "
        "memory.",
        "1,2,...",
    ),
]
BatchSizes = Annotated[
    str,
    _option("loads", "Batch sizes, or ranges such as 1-8 and 1-64:x2.", "1,2,..."),
]
Axes = Annotated[
    str,
    _option(
        "axes",
        f"What varies: all, or some of {', '.join(AXES)}.",
        "AXES",
        some_of("all", *AXES),
    ),
]
Widths = Annotated[
    str | None,
    _option(
        "widths",
        "Tokens of a pass along the axis width, as a draft of one less is verified [default: "
        f"{','.join(map(str, DEFAULTS.widths))}].",
        "2,4,...",
    ),
]
Draft = Annotated[
    str | None,
    _option(
        "draft",
        "Also decode speculatively: this model, or the first N layers of --model (layers:N), "
        "proposes the tokens that passes of --widths verify.",
        "MODEL",
    ),
]
LoadMode = Annotated[
    str,
    _option(
        "mode",
        "copies: rows are copies of the probe, each a sample. mixed: one probe row among fillers.",
        "MODE",
        one_of(*get_args(records.Mode)),
    ),
]
Batching = Annotated[
    str,
    _option(
        "batching",
        "exact: the batch that a load asks for, to the end. continuous: requests come and go "
        "between steps, as in a server.",
        "BATCHING",
        one_of(*get_args(records.Batching)),
    ),
]
Arrivals = Annotated[
    str | None,
    _option(
        "arrivals",
        f"How requests arrive: {NOTATION}; CLOCK is step under continuous batching [default: "
        "closed], s at a server [default: together].",
        "ARRIVALS",
    ),
]
OldArrivals = Annotated[str | None, typer.Option("--arrival", hidden=True)]
Samples = Annotated[
    int,
    _option(
        "samples",
        "Samples of each probe in each arm; fed completions (axes width, scoring) come on top.",
        "N",
    ),
]
TargetRate = Annotated[
    float | None,
    _option(
        "target_rate",
        "Choose the number of trials so that none diverging excludes this rate.",
        "P",
    ),
]
Confidence = Annotated[float, _option("confidence", "Of all bounds.", "LEVEL")]
StopOnDivergence = Annotated[
    bool, _option("stop_on_divergence", "End at the first diverged trial.")
]
AllowLatent = Annotated[
    bool, _option("allow_latent", "Judge tokens alone: equal tokens, other bits pass.")
]
Answer = Annotated[
    str | None,
    _option(
        "answer",
        "Find the answer in each completion and count its flips: "
        f"{', '.join(get_args(records.AnswerKind))}.",
        "KIND",
        one_of(*get_args(records.AnswerKind)),
    ),
]
AnswerPattern = Annotated[
    str | None,
    _option(
        "answer_pattern",
        "The same for a regular expression of the answer (TARa@N).",
        "RE",
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
    typer.Option(
        "--resume",
        help="Go on with an interrupted run, as it was.",
        metavar="DIR",
        autocompletion=runs,
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the plan and its cost, run nothing.")
]
Verbose = Annotated[bool, typer.Option("--verbose", help="With --dry-run: print every trial.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of a screen.")]
ExitCode = Annotated[
    bool, typer.Option("--exit-code", help="Exit with what was found, not with 0.")
]
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
    _option(
        "random_weights",
        "Make weights from the model's config.json and this seed; load none.",
        "SEED",
    ),
]
Dequantise = Annotated[bool, _option("dequantise", "Compute quantised weights as bf16 ones.")]
CacheDtype = Annotated[
    str,
    _option(
        "kv_cache_dtype",
        "What keys and values are kept as: the model's dtype, or FP8 (e4m3, without scales).",
        "DTYPE",
        one_of(*get_args(records.CacheDtype)),
    ),
]
TrustRemoteCode = Annotated[
    bool, _option("trust_remote_code", "Let the model's repository run its code.")
]
EngineChoice = Annotated[
    str,
    _option(
        "engine",
        f"What computes the model: {', '.join(ENGINES)}.",
        "NAME",
        one_of(*ENGINES),
    ),
]
TensorParallel = Annotated[
    int,
    _option(
        "tp",
        "Tensor parallel size. Without an engine, start one process a rank: torchrun "
        "--nproc-per-node N -m ndcheck run --tp N ...",
        "N",
    ),
]
TensorParallelGroups = Annotated[
    int | None,
    _option(
        "tp_groups",
        "Invariant arm: the same bits at --tp 1, 2, 4, ... N; a power of two.",
        "N",
    ),
]
PipelineParallel = Annotated[int, _option("pp", "vLLM: pipeline parallel size.", "N")]
EngineArgument = Annotated[
    list[str] | None,
    _option(
        "engine_arg",
        "vLLM: one of its engine arguments; may be given several times.",
        "KEY=VALUE",
    ),
]
InvariantBy = Annotated[
    str,
    _option(
        "invariant_by",
        "vLLM, invariant arm: ndcheck's kernels, or vllm's own; auto: ndcheck's where they cover "
        "the model.",
        "NAME",
    ),
]

RUN_HELP = "A run's directory, or latest."

LOADS_DEFAULT = ",".join(map(str, DEFAULTS.batch_sizes))
