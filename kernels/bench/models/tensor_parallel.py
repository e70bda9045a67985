"""The reference experiment on several GPUs: 1000 completions of 1000 tokens, both arms.

Runs `ndcheck run` under torchrun on shapes with random bf16 weights, of which each rank draws one
module at a time and keeps its shard, and prints a line for every run and arm.

    PYTHONPATH=kernels python -m bench.models.tensor_parallel --out DIR

It takes 4 GPUs of 141 GB, with ``--only 235b-fp8`` two (118 GB of weights on each, so at most 128
rows of 1000 tokens: ``--loads 1,8,64,128``); with ``--only 8b`` GPUs of 80 GB; with ``--tiny`` a
CPU, gloo, two minutes.

Qwen3-235B-A22B has 4 key-value heads, which transformers does not repeat on ranks: 4 ranks at
most, 118 GB of weights on each. The 8B runs at 1, 2 and 4 ranks, as it comes and with
--tp-groups 8, whose bits have to be the same at all three; those of 2 and 4 without it, the
control, are compared too (without it, 1 rank draws other weights). A finished run is not repeated.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from ndcheck.storage.run_directory import SampleReader, read_run

COMMON = {
    "vocab_size": 151936,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
    "dtype": "bfloat16",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "eos_token_id": None,  # Random weights must not end a completion.
}
MIXTURE = {
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
SHAPES = {
    "235b": {
        **COMMON,
        **MIXTURE,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_experts": 128,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
    },
    "8b": {
        **COMMON,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
TINY = {
    "vocab_size": 4096,
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "initializer_range": 0.2,
    "dtype": "float32",  # Few roundings of so small a model show in bf16.
}
FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}
TINY_FP8 = {"hidden_size": 128, "head_dim": 64, "moe_intermediate_size": 256, "dtype": "bfloat16"}
TINY_MIXTURE = {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
SHAPES["235b-fp8"] = {**SHAPES["235b"], "quantization_config": FP8}
RUNS = [
    ("235b", 4, None),
    ("235b-fp8", 2, None),
    *(("8b", n, groups) for groups in (None, 8) for n in (1, 2, 4)),
]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the runs")
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=1000)
    parser.add_argument("--loads", default="1,8,64,256")
    parser.add_argument("--tiny", action="store_true", help="small shapes, on CPU")
    options = parser.parse_args()
    if options.tiny:
        options.samples, options.max_tokens, options.loads = 24, 8, "1,2,8"
    columns = ("shape", "tp", "groups", "arm", "samples", "unique", "common", "tok/s", "slowdown")
    print("  ".join(f"{column:>9}" for column in columns))
    by_groups: dict[tuple[str, int | None], dict[int, Path]] = {}
    for shape, n_ranks, groups in RUNS:
        if options.only in (None, shape):
            path = run(shape, n_ranks, groups, options)
            for row in rows(path):
                cells = (shape, n_ranks, groups or "", *row)
                print("  ".join(f"{cell:>9}" for cell in cells), flush=True)
            if shape == "8b" and (groups or n_ranks > 1):
                by_groups.setdefault((shape, groups), {})[n_ranks] = path
    is_same = True
    for (shape, groups), paths in by_groups.items():
        distinct = {n: bits(path) for n, path in paths.items()}
        same = len({frozenset(found) for found in distinct.values()}) == 1
        is_same = is_same and (same or groups is None)
        sizes = ", ".join(map(str, paths))
        bits_are = "equal" if same else "DIFFER"
        which = f"{shape}, --tp-groups {groups or 'not given'}"
        print(f"{which}: bits at {sizes} ranks {bits_are}")
    return 0 if is_same else 1


def run(shape: str, n_ranks: int, groups: int | None, options: argparse.Namespace) -> Path:
    """Measure, or go on with what is there. Returns the run's directory."""
    path: Path = options.out / f"{shape}-tp{n_ranks}{f'-groups{groups}' if groups else ''}"
    if (path / "run.json").exists():
        if read_run(path).status == "finished":
            return path
        arguments = ["--resume", str(path)]
    else:
        arguments = [
            *("--model", str(write_config(shape, options)), "--random-weights", "0"),
            *("--prompt", "Tell me about Richard Feynman", "-n", str(options.samples)),
            *("--max-tokens", str(options.max_tokens), "--loads", options.loads),
            *("--out", str(path)),
            *(("--tp", str(n_ranks)) if n_ranks > 1 else ()),
            *(("--tp-groups", str(groups)) if groups else ()),
            # transformers shares no FP8 that is drawn.
            *(("--kernels", "invariant") if shape.endswith("fp8") else ()),
        ]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks)]
    launched = launcher if n_ranks > 1 else []
    command = [sys.executable, *launched, "-m", "ndcheck", "run", *arguments]
    # torchrun would set it for several ranks, and threads must not differ between sizes.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False)
    # Not the exit code: torchrun's is 1 for every verdict but PASS.
    if not (path / "run.json").exists() or read_run(path).status != "finished":
        raise SystemExit(
            f"{path.name} did not finish (exit code {done.returncode}); run this again"
        )
    return path


def write_config(shape: str, options: argparse.Namespace) -> Path:
    """The shape's config.json."""
    import transformers

    sizes = dict(SHAPES[shape])
    is_mixture = "num_experts" in sizes
    if options.tiny:
        sizes |= {**TINY, **(TINY_MIXTURE if is_mixture else {})}
        sizes |= TINY_FP8 if shape.endswith("fp8") else {}
    config, name = (
        (transformers.Qwen3MoeConfig, "Qwen3MoeForCausalLM")
        if is_mixture
        else (transformers.Qwen3Config, "Qwen3ForCausalLM")
    )
    directory: Path = options.out / f"{shape}-shape"
    config(**sizes, architectures=[name]).save_pretrained(directory)
    return directory


def rows(path: Path) -> Iterator[tuple[str, ...]]:
    names = ("arm", "n_samples", "n_unique", "common_prefix_tokens", "tokens_per_s")
    with (path / "summary.csv").open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            yield (*(row[name][:9] for name in names), row["slowdown_vs_stock"][:5])


def bits(path: Path) -> set[tuple[tuple[int, ...], tuple[str, ...]]]:
    """The distinct completions of the invariant arm, with the digests of their logits."""
    return {
        (sample.token_ids, sample.row_digests)
        for sample in SampleReader(path)
        if sample.arm == "invariant" and sample.role != "control"
    }


if __name__ == "__main__":
    sys.exit(main())
