"""Ranks that share a model: one order of sums, the same trials, one end. Real torchrun, on CPU.

It and its ranks are processes that have torch imported already.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import transformers

from ndcheck import ranks, request
from ndcheck.cli.app import run_command_line
from ndcheck.errors import UsageError
from ndcheck.samplers.local.device import own_device
from ndcheck.samplers.local.sharding import check_heads
from ndcheck.storage.run_directory import SampleReader, read_run
from ndcheck_kernels.models.tensor_parallel import ordered_layers
from ndcheck_kernels.ops.collectives import GATHERED_ELEMENTS, add_pairwise
from ndcheck_kernels.scope.state import Scope

SIZES = {
    "vocab_size": 4096,  # The embedded tokenizer's, which a bare config gets.
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "dtype": "float32",  # Every rounding shows; bf16 hides most orders.
}
CONFIGS = {
    "dense": transformers.Qwen3Config(**SIZES, architectures=["Qwen3ForCausalLM"]),
    "moe": transformers.Qwen3MoeConfig(
        **SIZES,
        moe_intermediate_size=64,
        num_experts=8,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        architectures=["Qwen3MoeForCausalLM"],
    ),
}
SHAPES = Path(__file__).parents[3] / "kernels" / "bench" / "shapes"
LOADS = ("--random-weights", "0", "--loads", "1,8", "-n", "8", "--max-tokens", "4")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    for name, config in CONFIGS.items():
        config.save_pretrained(root / name)
    return root


def environment():
    ours = ("NDCHECK_", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    ours = {"COLUMNS": "80", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return {**kept, **ours, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def command(warm_python):
    def build(n_ranks, *arguments):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_ranks}"]
        return [warm_python(), *(launcher if n_ranks > 1 else []), *map(str, arguments)]

    return build


@pytest.fixture
def launch(command):
    return lambda *given: subprocess.run(
        command(*given),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def measure(launch):
    """``measure(n_ranks, model, out)``: what it prints, where there are ranks; one needs no process
    of its own.
    """

    def run(n_ranks, model, out, *options, device="cpu"):
        arguments = ("run", "--model", model, *LOADS, *options, "--out", out)
        if n_ranks == 1:
            run_command_line([*map(str, arguments), "--device", device])
            said = ""
        else:
            done = launch(n_ranks, "-m", "ndcheck", *arguments, "--tp", n_ranks)
            said = done.stdout + done.stderr
        assert (out / "run.json").is_file(), said
        assert read_run(out).status == "finished", said
        return said

    return run


def bits(out, arm):
    """Row digests of every sample but the controls, by trial and slot."""
    return {
        (s.trial_id, s.slot): s.row_digests
        for s in SampleReader(out)
        if s.arm == arm and s.role != "control"
    }


# One order of sums


@pytest.mark.parametrize("n_ranks", [1, 2, 4, 8])
def test_the_sum_of_a_rank_is_a_branch_of_the_whole_sum(n_ranks):
    parts = list(torch.randn(8, 1000, generator=torch.Generator().manual_seed(0)))
    whole = add_pairwise(parts)
    held = 8 // n_ranks
    branches = [add_pairwise(parts[i : i + held]) for i in range(0, 8, held)]
    assert torch.equal(add_pairwise(branches), whole)
    torch.testing.assert_close(whole, torch.stack(parts).double().sum(0).float())
    in_a_row = parts[0]
    for part in parts[1:]:
        in_a_row = in_a_row + part
    assert not torch.equal(in_a_row, whole)  # The order shows on these operands.


def test_an_odd_part_waits_for_the_next_level():
    a, b, c = torch.tensor([1.0, 2.0**24, -(2.0**24)])
    assert add_pairwise([a, b, c]) == (a + b) + c == 0
    assert a + (b + c) == 1


SUMS = f"""
import gc, json, torch, torch.distributed as dist
from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.ops.collectives import add_pairwise, known_ranks, rank_sum_op
from ndcheck_kernels.scope.refusal import UncoveredOpError
dist.init_process_group("gloo")
n, rank = dist.get_world_size(), dist.get_rank()
found = {{"refused": False}}
for size in (1, 7, 1000, {GATHERED_ELEMENTS}, {GATHERED_ELEMENTS} + 3):
    parts = [torch.randn(size, generator=torch.Generator().manual_seed(r)) for r in range(n)]
    with known_ranks(dist.group.WORLD) as group, invariant_kernels() as scope:
        total = rank_sum_op(parts[rank], group)
    stock = parts[rank].clone()
    dist.all_reduce(stock)
    found[size] = [
        torch.equal(total, add_pairwise(parts)),
        torch.equal(total, add_pairwise([parts[0], *parts[:0:-1]])),
        torch.equal(stock, add_pairwise(parts)),
        scope.fires["rank_sum"],
    ]
try:
    with invariant_kernels():
        dist.all_reduce(torch.ones(3))
except UncoveredOpError as error:
    found["refused"] = "allreduce_" in str(error)
if rank == 0:
    print(json.dumps(found))
dist.destroy_process_group()
gc.collect()  # A group that an exception's frames hold would abort the process at its end.
"""


@pytest.mark.parametrize("n_ranks", [2, 4])
def test_ranks_are_added_in_their_order_whatever_the_size(n_ranks, launch, tmp_path):
    script = tmp_path / "sums.py"
    script.write_text(SUMS)
    done = launch(n_ranks, script)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("refused")
    assert all(in_order for in_order, *_ in found.values())
    assert all(fires == 1 for *_, fires in found.values())
    if n_ranks > 2:  # Two summands have one order.
        assert not found["1000"][1]  # The ranks in another order: other bits,
        assert not all(stock for *_, stock, _ in found.values())  # as with gloo's own sum.


def test_a_scope_misses_the_sum_that_did_not_run():
    scope = Scope()
    scope.fires["linear"] = 1
    assert scope.missing(("gemm", "rank_sum")) == ("rank_sum",)


def test_groups_must_nest():
    with (
        pytest.raises(ValueError, match="groups 6: give a power of two"),
        ordered_layers(torch.nn.Module(), 6),
    ):
        pass


# The command


def test_bits_of_a_mixture_are_those_of_one_process(models, measure, tmp_path):
    out = {n: tmp_path / str(n) for n in (1, 2)}
    for n in out:
        measure(n, models / "moe", out[n], "--tp-groups", "8")
    plain = tmp_path / "plain"
    shown = measure(2, models / "moe", plain)
    runs = [read_run(path) for path in (out[1], out[2], plain)]
    assert len({run.environment.model["digest"] for run in runs}) == 1  # The same weights.
    for path in (*out.values(), plain):
        samples = [s for s in SampleReader(path) if s.role != "control"]
        assert all(s.witness.achieved_batch_size == s.load.batch_size for s in samples)
        assert all(s.witness.override_fires for s in samples if s.arm == "invariant")
        assert len(set(bits(path, "invariant").values())) == 1
    assert len(set(bits(plain, "stock").values())) > 1  # The control: stock follows the batch.
    assert bits(out[1], "invariant") == bits(out[2], "invariant")
    assert bits(out[1], "invariant") != bits(plain, "invariant")  # And so would these sums.
    assert "torchrun --nproc-per-node 2 -m ndcheck run" in shown


def test_bits_of_fp8_are_those_of_one_process(measure, tmp_path):
    """A mixture of experts whose ranks hold whole blocks of 128."""
    model = tmp_path / "model"
    model.mkdir()
    config = json.loads((SHAPES / "tiny-moe-fp8" / "config.json").read_text())
    (model / "config.json").write_text(
        json.dumps({**config, "head_dim": 32, "moe_intermediate_size": 256})
    )
    for n, groups in ((1, 2), (2, 2)):
        tp_groups = ("--kernels", "invariant", "--tp-groups", groups)
        measure(n, model, tmp_path / f"{n}-{groups}", *tp_groups)
    shown = measure(2, model, tmp_path / "2-None")
    measure(1, model, tmp_path / "stock", "--kernels", "stock")
    one, two, plain = (bits(tmp_path / name, "invariant") for name in ("1-2", "2-2", "2-None"))
    assert one == two
    assert len(set(one.values())) == len(set(plain.values())) == 1
    assert "weights dequantised for each of them" in shown
    # Stock on ranks computes what stock does in one process, in another order.
    first = [
        next(s.logprobs[0] for s in SampleReader(tmp_path / name) if s.arm == "stock")
        for name in ("stock", "2-None")
    ]
    assert first[0] == pytest.approx(first[1], abs=0.05)
    assert bits(tmp_path / "stock", "stock") != bits(tmp_path / "2-None", "stock")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_computes_experts_of_fp8_in_parts(measure, tmp_path):
    """One process: its sums, in parts or whole, are those of the same numbers."""
    config = json.loads((SHAPES / "tiny-moe-fp8" / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "head_dim": 32, "moe_intermediate_size": 256})
    )
    found = []
    for name, groups in (("parts", ("--tp-groups", "2")), ("whole", ())):
        measure(1, tmp_path, tmp_path / name, "--kernels", "invariant", *groups, device="cuda")
        assert len(set(bits(tmp_path / name, "invariant").values())) == 1
        found.append(next(iter(SampleReader(tmp_path / name))).logprobs[0])
    assert found[0] == pytest.approx(found[1], abs=0.05)


def test_four_ranks_have_the_bits_of_one(models, measure, tmp_path):
    for n in (1, 4):
        measure(n, models / "dense", tmp_path / str(n), "--tp-groups", "4")
    one, four = (bits(tmp_path / str(n), "invariant") for n in (1, 4))
    assert one == four
    assert len(set(one.values())) == 1
    stock = [bits(tmp_path / str(n), "stock") for n in (1, 4)]
    assert stock[0] != stock[1]
    assert len(set(stock[1].values())) > 1


def test_a_killed_rank_ends_the_run_and_resume_completes_it(models, command, launch, tmp_path):
    out = tmp_path / "run"
    loads = (*LOADS, "--kernels", "invariant", "--max-tokens", "24")
    arguments = ("--model", models / "dense", *loads)
    process = subprocess.Popen(
        command(2, "-m", "ndcheck", "run", "--tp", "2", *arguments, "--out", out),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    samples = out / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (samples.exists() and samples.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(_rank(1, out), signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    said = [line for line in stderr.splitlines() if line.startswith("ndcheck: rank")]
    assert len(said) == 1, stderr
    assert "another rank ended" in said[0]
    assert "exitcode  : 4" in stderr  # Rank 0's; torchrun's own is always 1.
    assert 'File "' not in stderr.partition("torch/distributed/elastic")[0]
    assert f"-m ndcheck run --resume {out}" in stderr
    kept = samples.read_bytes()
    assert kept
    assert read_run(out).status == "failed"
    launch(2, "-m", "ndcheck", "run", "--resume", out)
    run = read_run(out)
    assert run.status == "finished"
    assert samples.read_bytes().startswith(kept)
    assert len({s.trial_id for s in SampleReader(out)}) == run.n_trials_planned


def _rank(rank: int, out: Path) -> int:
    """The process that torchrun started as this rank of the run into `out`."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            arguments, variables = (
                (process / name).read_text().split("\0") for name in ("cmdline", "environ")
            )
            if str(out) in arguments and f"RANK={rank}" in variables:
                return int(process.name)
    raise AssertionError(f"no rank {rank}")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp": 0}, "--tp 0: give 1 or more"),
        ({"tp": 2, "loads": "auto"}, "--loads auto: with --tp each rank has memory of its own"),
        ({"tp": 2, "batching": "continuous"}, "with --tp a trial is one exact batch"),
        ({"tp": 2, "model": "scripted:clean"}, "--tp: this needs a model that computes"),
        (
            {"tp": 2, "model": "served", "endpoint": "http://127.0.0.1:1/v1"},
            "--tp: with --endpoint this is the server's own",
        ),
        ({"tp": 2, "device": "cuda:1"}, "--device cuda:1: with --tp each rank takes a GPU"),
        ({"tp_groups": 6}, "--tp-groups 6: give a power of two"),
        ({"tp": 4, "tp_groups": 2}, "--tp-groups 2: give a power of two that --tp 4 divides"),
        ({"tp_groups": 8, "kernels": "stock"}, "--tp-groups is for ndcheck's own kernels"),
        (
            {"tp_groups": 8, "engine": "vllm"},
            "--tp-groups: this is for transformers in this process",
        ),
    ],
)
def test_what_ranks_cannot_do(options, message):
    with pytest.raises(UsageError, match=message):
        request.make_spec(**options)


def test_the_processes_must_be_those_asked_for(monkeypatch):
    spec = request.make_spec(tp=2)
    with pytest.raises(UsageError, match="torchrun --nproc-per-node 2 -m ndcheck run --tp 2"):
        ranks.check_ranks(spec)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ranks.check_ranks(spec)
    assert (ranks.rank(), ranks.n_ranks(), ranks.may_speak()) == (1, 2, False)
    with pytest.raises(UsageError, match="torchrun started 2 processes and the run wants 1"):
        ranks.check_ranks(request.make_spec())


def test_each_rank_needs_a_gpu_of_its_own(monkeypatch):
    """Said by every rank, so rank 0 says it: another one's message would be lost."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(UsageError, match=r"--tp: 2 ranks on this machine .* it has 1; [^\n]*$"):
            own_device(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(torch.device("cuda")) == torch.device("cuda", 1)


def test_a_key_value_head_is_not_cut(models):
    config = transformers.AutoConfig.from_pretrained(models / "moe")
    check_heads(config, 4)
    with pytest.raises(UsageError, match=r"has 4 key-value heads.*that divides 4, such as 4"):
        check_heads(config, 8)
