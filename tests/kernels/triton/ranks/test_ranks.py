"""Fused decoder layers on ranks: gloo's processes, and the kernels under Triton's interpreter."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from ndcheck_kernels.cuda.products.matmul import matmul
from ndcheck_kernels.cuda.rows.add_parts import add_parts
from ndcheck_kernels.ops.collectives import add_pairwise

HERE = Path(__file__).parent
ROOT = HERE.parents[3]
SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "initializer_range": 0.2,
    "dtype": "float16",
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
CONFIGS = {
    "dense": (transformers.Qwen3Config, {"dtype": "float32"}),  # In which every rounding shows.
    "moe": (transformers.Qwen3MoeConfig, {**MIXTURE, "moe_intermediate_size": 64}),
    "moe-fp8": (
        transformers.Qwen3MoeConfig,
        {
            **MIXTURE, "moe_intermediate_size": 256, "hidden_size": 128, "head_dim": 64,
            "quantization_config": FP8,
        },
    ),
}  # fmt: skip

on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="gloo's ranks are on the CPU")


@pytest.fixture
def compute(warm_python, tmp_path):
    """``compute(name, n_ranks, groups)``: what `one_rank` finds."""

    def find(name, n_ranks, groups):
        kind, changes = CONFIGS[name]
        kind(**SIZES | changes).save_pretrained(tmp_path / name)
        out = tmp_path / f"{name}-{n_ranks}-{groups}"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
        model = tmp_path / name
        script = [HERE / "one_rank.py", HERE.parent / "conftest.py", model, str(groups), out]
        done = subprocess.run(
            [warm_python(interpret=True), *(launcher if n_ranks > 1 else []), *map(str, script)],
            cwd=ROOT,
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return torch.load(out)

    return find


def assert_fused(found):
    """The fused layer ran; it gives transformers' numbers, and a row the same bits in company."""
    assert found["n_fused"] == 1
    assert found["fires"]["qkv"] == 2  # In each of two passes.
    assert torch.equal(found["alone"][0], found["fused"][0])
    assert not torch.equal(found["fused"][1], found["fused"][0])
    # The unfused layer rounds more often, so codes of FP8 next to a tie go the other way.
    most = 2.0**-3 if "partial_block_fp8_linear" in found["fires"] else 2.0**-7
    assert (found["fused"] - found["plain"]).norm() < most * found["plain"].norm()


@on_cpu
@pytest.mark.slow
@pytest.mark.parametrize("n_ranks", [2, 4])
def test_groups_give_fused_layers_the_same_bits_on_any_ranks(n_ranks, compute):
    one, several = (compute("dense", n, 4) for n in (1, n_ranks))
    for found in (one, several):
        assert_fused(found)
        assert found["fires"]["partial_linear"] == 2 * 2
    assert torch.equal(several["fused"], one["fused"])
    assert "rank_sum" not in one["fires"]
    assert several["fires"]["rank_sum"] == 2 * (2 + 1)  # One is the embedding's.
    by_rank = compute("dense", 2, 0)
    assert_fused(by_rank)
    assert not torch.equal(by_rank["fused"], one["fused"])  # Two parts, not four: another order.


@on_cpu
@pytest.mark.parametrize(("name", "part"), [("moe", "grouped"), ("moe-fp8", "block_fp8_grouped")])
def test_experts_on_ranks_are_fused(name, part, compute):
    found = compute(name, 2, 0)
    assert_fused(found)
    assert found["fires"][f"partial_{part}"] == 2


@on_cpu
def test_experts_in_groups_run_unfused(compute):
    """Their products are not those of blocks of one width when they are fused."""
    found = compute("moe", 1, 2)
    assert found["n_fused"] == 0
    assert torch.equal(found["fused"], found["plain"])


@pytest.mark.parametrize("n_parts", [1, 2, 4, 8])
def test_parts_are_added_as_ranks_are(n_parts, device, dtype):
    parts = torch.randn(n_parts, 3, 700, device=device)
    assert torch.equal(add_parts(parts), add_pairwise(list(parts)))
    addend = torch.randn(3, 700, device=device).to(dtype)
    total = add_pairwise(list(parts)) + addend.float()
    assert torch.equal(add_parts(parts, addend), total.to(dtype))
    if n_parts == 8:
        in_a_row = parts[0]
        for part in parts[1:]:
            in_a_row = in_a_row + part
        assert not torch.equal(add_parts(parts), in_a_row)  # The order shows on these operands.


def test_parts_that_make_no_tree_are_refused(device):
    with pytest.raises(ValueError, match="add_parts of 3 parts: it takes a power of two"):
        add_parts(torch.zeros(3, 2, 2, device=device))
    with pytest.raises(ValueError, match="cannot add"):
        add_parts(torch.zeros(2, 2, 2, device=device), torch.zeros(3, 2, device=device))


def test_blocks_of_one_width_side_by_side_have_their_own_bits(cancelling, device):
    """2176 columns are wide, so that K is one chunk; of 1088 it is two."""
    x, w = cancelling(2, 2176, 4096, dtype=torch.float16, device=device)
    together = matmul(x, w.t(), width=1088)
    apart = torch.cat([matmul(x, half.t()) for half in w.split(1088)], 1)
    assert torch.equal(together, apart)
    assert not torch.equal(together, matmul(x, w.t()))
