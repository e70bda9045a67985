"""The plug-in in a stand-in for vLLM: when it acts, what it replaces, what it refuses."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from ndcheck_kernels.engines import coverage, layers
from ndcheck_kernels.engines.plugin import CoverageError, register
from ndcheck_kernels.engines.seams import RELEASES
from ndcheck_kernels.scope.refusal import UnsupportedCallError

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


IN_LORA = "vllm.lora.layers.column_parallel_linear"


def functions(vllm):
    """What stands at every seam now."""
    found = {}
    for use, seam in vllm.places.items():
        holder = vllm.modules[seam.module]
        *path, name = seam.name.split(".")
        for part in path:
            holder = getattr(holder, part)
        found[use] = vars(holder)[name]
    return found


@pytest.mark.parametrize("release", [RELEASES[0], RELEASES[-1]])
def test_a_model_is_computed_by_our_ops_alone(begin, release):
    vllm = begin(release=release)
    model = vllm.model()
    worker = vllm.worker(model)
    worker.load_model()
    assert worker.compile_or_warm_up_model() == "times"
    assert vllm.calls == ["start", "load"]
    answer = worker.ndcheck_coverage()
    assert answer["by"] == "ndcheck"
    assert answer["fires"] == {"linear": 2, "experts": 1, "output": 1}
    assert answer["uncovered"] == []


def largest_graph(vllm, requests, **asked):
    """What vLLM is told when it chooses the sizes of its graphs."""
    config = vllm.VllmConfig()
    graphs = {"max_cudagraph_capture_size": None, "cudagraph_capture_sizes": None} | asked
    config.compilation_config = SimpleNamespace(**graphs)
    config.scheduler_config = SimpleNamespace(max_num_seqs=requests)
    config.speculative_config = None
    config.parallel_config = SimpleNamespace(tensor_parallel_size=1)
    config.compilation_config.pass_config = SimpleNamespace(fuse_allreduce_rms=True)
    config._set_cudagraph_sizes()
    assert vllm.calls[-1] == "graph_sizes"
    return config.compilation_config.max_cudagraph_capture_size


def test_steps_of_more_requests_than_vllm_captures_are_graphs_too(install, monkeypatch):
    vllm = install()
    monkeypatch.setenv("NDCHECK_VLLM", "1")
    register()
    # vLLM's own largest is 512, in steps of 16.
    assert [largest_graph(vllm, n) for n in (256, 512, 513, 1000, 4096)] == [
        *(None, None, 528, 1008, 1024)
    ]
    assert largest_graph(vllm, 1000, max_cudagraph_capture_size=256) == 256
    assert largest_graph(vllm, 1000, cudagraph_capture_sizes=[8]) is None


@pytest.mark.parametrize(("mode", "invariant"), [("0", True), ("1", False)])
def test_graphs_stay_vllms_where_the_plugin_is_not_asked_for(install, monkeypatch, mode, invariant):
    vllm = install()
    monkeypatch.setenv("NDCHECK_VLLM", mode)
    vllm.modules["vllm.envs"].VLLM_BATCH_INVARIANT = invariant
    register()
    assert largest_graph(vllm, 1000) is None


def test_the_result_is_that_of_vllm(begin):
    vllm = begin("0")
    x = torch.randn(5, 32).to(torch.float16)
    model = vllm.model()
    del model.layers[0].experts  # The stand-in's computes nothing.
    expected = model(x)
    vllm = begin("1")
    moved = vllm.model()
    del moved.layers[0].experts
    moved.load_state_dict(model.state_dict())
    vllm.worker(moved).load_model()
    assert_close(moved(x), expected, rtol=1e-2, atol=5e-2)
    assert layers.fires["linear"] == 2


def test_experts_compute_what_each_says(begin):
    """Against plain torch in float64, token by token."""
    vllm = begin()
    own = vllm.model().layers[0].experts
    x = torch.randn(5, 32).to(torch.float16)
    got = own(x)
    for t, row in enumerate(x.double()):
        expected = torch.zeros(32, dtype=torch.float64)
        for i in range(2):
            e = (2 * t + i) % 4
            gate, up = (own.w13_weight[e].double() @ row).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            expected += 0.5 * (own.w2_weight[e].double() @ hidden)
        assert_close(got[t].double(), expected, rtol=2e-2, atol=1.0)
    assert layers.fires["experts"] == 1
    assert "experts" not in vllm.calls


@pytest.mark.parametrize(
    ("name", "value"),
    [("w1_bias", torch.ones(1)), ("quant_dtype", torch.int8), ("gemm1_clamp_limit", 7.0)],
)
def test_experts_that_we_do_not_cover_stay_vllms(begin, name, value):
    vllm = begin()
    setattr(vllm.TritonExperts, name, value)
    vllm.model().layers[0].experts(torch.randn(2, 32).to(torch.float16))
    assert vllm.calls[-1] == "experts"
    assert not layers.fires["experts"]


def ranks_of(vllm, parts):
    """vLLM's communicator of one of so many ranks, whose parts are gathered."""
    ours = vllm.CudaCommunicator(world_size=len(parts))
    ours.pynccl_comm = SimpleNamespace(
        disabled=False, all_gather=lambda out, part: out.copy_(torch.stack(parts))
    )
    return ours


def test_ranks_are_added_in_their_order(begin):
    vllm = begin()
    parts = [torch.randn(3, 70).to(torch.float16) for _ in range(4)]
    a, b, c, d = (part.float() for part in parts)
    got = ranks_of(vllm, parts).all_reduce(parts[1])
    assert torch.equal(got, ((a + b) + (c + d)).half())
    in_a_row = parts[0]
    for part in parts[1:]:
        in_a_row = in_a_row + part
    assert not torch.equal(got, in_a_row)  # The order and the roundings show on these operands.
    assert layers.fires["all_reduce"] == 1
    assert "all_reduce" not in vllm.calls
    counts = torch.ones(2, dtype=torch.int64)
    assert ranks_of(vllm, [counts, counts]).all_reduce(counts) is counts
    assert vllm.CudaCommunicator().all_reduce(parts[0]) is parts[0]
    assert vllm.calls[-2:] == ["all_reduce", "all_reduce"]  # One rank, or integers.


def test_two_ranks_add_by_vllms_kernel_what_it_takes(begin):
    vllm = begin()
    few, many = ([torch.randn(n, 70).to(torch.float16) for _ in range(2)] for n in (3, 30))
    ours = ranks_of(vllm, many)
    assert vllm.calls[-1] == "pair gloo cuda:0"
    ours.ca_comm.other = few[1]
    assert torch.equal(ours.all_reduce(few[0]), (few[0].float() + few[1].float()).half())
    assert vllm.calls[-1] == "pair_sum"
    assert torch.equal(ours.all_reduce(many[0]), (many[0].float() + many[1].float()).half())
    assert vllm.calls.count("pair_sum") == 1  # What it does not take is gathered.
    assert layers.fires["all_reduce"] == 2
    assert ranks_of(vllm, [*many, *many]).ca_comm is None  # Its order follows the size there.
    assert vllm.CudaCommunicator(world_size=2, unique_name="dp:0").ca_comm is None


@pytest.mark.parametrize(("mode", "nccl"), [("1", "LL128"), ("partial", "Simple")])
def test_nccl_is_free_where_it_adds_nothing(begin, mode, nccl):
    vllm = begin(mode)
    assert os.environ["NCCL_PROTO"] == nccl
    x = torch.ones(2)
    if mode == "partial":
        assert vllm.CudaCommunicator().reduce_scatter(x) is x
    else:
        with pytest.raises(UnsupportedCallError, match="have no fixed order"):
            vllm.CudaCommunicator().reduce_scatter(x)


def test_a_model_that_is_left_to_vllm_keeps_our_sums_over_ranks(begin):
    """NCCL was set free before the model was known."""
    vllm = begin()
    model = vllm.model("UnknownForCausalLM")
    vllm.worker(model).load_model()
    model(torch.randn(2, 32).to(torch.float16))
    assert "linear" in vllm.calls  # The control: the rest is vLLM's own.
    parts = [torch.randn(30, 70).to(torch.float16) for _ in range(2)]
    got = ranks_of(vllm, parts).all_reduce(parts[0])
    assert torch.equal(got, (parts[0].float() + parts[1].float()).half())
    assert "all_reduce" not in vllm.calls


@pytest.mark.parametrize("mode", ["", "0"])
def test_unless_it_is_asked_for_nothing_changes(install, monkeypatch, mode):
    vllm = install()
    before = functions(vllm)
    monkeypatch.setenv("NDCHECK_VLLM", mode)
    register()
    assert functions(vllm) == before


def test_a_misspelt_switch_is_said(install, monkeypatch, caplog):
    vllm = install()
    before = functions(vllm)
    monkeypatch.delenv("NDCHECK_VLLM", raising=False)
    monkeypatch.setenv("NDCHECK_VLLM_SOURCES", "elsewhere")
    register()
    assert caplog.text == ""
    monkeypatch.setenv("NDCHECK_VLM", "1")
    register()
    assert functions(vllm) == before
    assert "nothing reads NDCHECK_VLM, did you mean NDCHECK_VLLM?" in caplog.text


def test_without_vllms_own_switch_nothing_changes(install, monkeypatch, caplog):
    vllm = install()
    vllm.modules["vllm.envs"].VLLM_BATCH_INVARIANT = False
    before = functions(vllm)
    monkeypatch.setenv("NDCHECK_VLLM", "1")
    register()
    assert functions(vllm) == before
    assert "does nothing without VLLM_BATCH_INVARIANT=1" in caplog.text


def test_another_mode_is_named(install, monkeypatch):
    install()
    monkeypatch.setenv("NDCHECK_VLLM", "yes")
    with pytest.raises(ValueError, match="choose from 1, strict, partial, auto, audit, or 0"):
        register()


def unknown_version(vllm):
    vllm.modules["vllm"].__version__ = "0.99.1"


def renamed(vllm):
    del vllm.modules["vllm.v1.worker.gpu_worker"].Worker.load_model


def other_parameters(vllm):
    vllm.modules[vllm.places["linear"].module].linear_batch_invariant = lambda x, w: x @ w.t()


@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (unknown_version, "vLLM 0.99.1 is not among the releases 0.26"),
        (renamed, "Worker.load_model is not there"),
        (other_parameters, "linear_batch_invariant takes other parameters: (x, w)"),
    ],
)
def test_another_vllm_keeps_its_own_mode(begin, caplog, alter, said):
    before = {}

    def alter_and_look(vllm):
        alter(vllm)
        if alter is not renamed:
            before.update(functions(vllm))

    vllm = begin(alter=alter_and_look)
    assert said in caplog.text
    assert "vLLM's own invariant mode goes on" in caplog.text
    assert vllm.calls == ["start"]
    if before:
        assert functions(vllm) == before


def test_another_gpu_keeps_vllms_own_mode(install, monkeypatch, caplog):
    vllm = install()
    before = functions(vllm)
    monkeypatch.setenv("NDCHECK_VLLM", "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    register()
    vllm.start()
    assert "compute capability 8.0" in caplog.text
    assert functions(vllm) == before
    assert vllm.calls == ["start"]


def test_an_unknown_model_keeps_vllms_own_mode(begin, caplog):
    vllm = begin()
    model = vllm.model("MambaForCausalLM")
    worker = vllm.worker(model)
    worker.load_model()
    worker.compile_or_warm_up_model()
    assert "the forward pass of MambaForCausalLM is not known" in caplog.text
    assert vllm.calls == ["start", "load", "linear", "linear", "experts", "linear"]
    assert worker.ndcheck_coverage()["by"] == "vllm"


class Mixer(torch.nn.Linear):
    """A planted layer that nothing covers."""


def plant_mixer(vllm):
    return vllm.model(mixer=Mixer(32, 32, dtype=torch.float16))


def test_a_planted_uncovered_layer_is_refused_by_name(begin):
    vllm = begin()
    with pytest.raises(CoverageError, match=r"nothing covers layers\.0\.mixer \(Mixer: nothing\)"):
        vllm.worker(plant_mixer(vllm)).load_model()


def test_a_class_of_a_models_own_code_is_not_known_by_its_name(begin, caplog):
    vllm = begin()
    norm = type("RMSNorm", (torch.nn.Identity,), {"__module__": "my_model"})
    with pytest.raises(CoverageError, match=r"own_norm \(my_model\.RMSNorm: nothing\)"):
        vllm.worker(vllm.model(own_norm=norm())).load_model()
    model = vllm.model()
    type(model).__module__ = "my_model"
    vllm.worker(model).load_model()
    assert "the forward pass of my_model.Qwen3MoeForCausalLM is not known" in caplog.text


def test_a_layer_inside_one_of_lora_does_not_cover_it(begin, monkeypatch):
    """With --enable-lora vLLM wraps each, and the wrapper adds products by its own kernels."""
    monkeypatch.setattr(coverage, "PACKAGES", (*coverage.PACKAGES, "vllm"))
    vllm = begin()
    model = vllm.model()
    kind = type("QKVParallelLinearWithLoRA", (torch.nn.Module,), {"__module__": IN_LORA})
    wrapper = kind()
    wrapper.base_layer = model.layers[0].qkv_proj
    model.layers[0].qkv_proj = wrapper
    said = r"qkv_proj \(QKVParallelLinearWithLoRA: vLLM's LoRA kernels\); NDCHECK_VLLM=partial"
    with pytest.raises(CoverageError, match=said):
        vllm.worker(model).load_model()


def test_partial_leaves_it_to_vllm_and_says_so(begin, caplog):
    vllm = begin("partial")
    worker = vllm.worker(plant_mixer(vllm))
    worker.load_model()
    worker.compile_or_warm_up_model()
    assert "layers.0.mixer (Mixer: nothing): left to vLLM" in caplog.text
    assert worker.ndcheck_coverage()["uncovered"] == ["layers.0.mixer"]


def test_auto_leaves_all_to_vllm(begin, caplog):
    vllm = begin("auto")
    worker = vllm.worker(plant_mixer(vllm))
    worker.load_model()
    worker.compile_or_warm_up_model()
    answer = worker.ndcheck_coverage()
    assert (answer["by"], answer["fires"]) == ("vllm", {})
    assert "layers.0.mixer" in answer["reason"]
    assert vllm.calls.count("linear") == 3


def test_a_planted_dead_override_is_refused(begin):
    """A layer that calls vLLM's own by another name, as a release that moved it would."""
    vllm = begin()
    model = vllm.model()
    model.layers[0].gate.quant_method.apply = lambda layer, x: x @ layer.weight.t()
    worker = vllm.worker(model)
    worker.load_model()
    with pytest.raises(CoverageError, match=r"1 layers never came .* layers\.0\.gate"):
        worker.compile_or_warm_up_model()


def test_audit_prints_every_layer_and_stops(begin, capsys):
    vllm = begin("audit")
    with pytest.raises(SystemExit) as stop:
        vllm.worker(plant_mixer(vllm)).load_model()
    assert not stop.value.code
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:2] == ["Qwen3MoeForCausalLM", "layer n kind computed by"]
    assert "layers.*.qkv_proj 1 QKVParallelLinear ndcheck linear" in lines
    assert "layers.*.attn 1 Attention vLLM's FLASH_ATTN in one split, by one kernel" in lines
    assert "layers.*.mixer 1 Mixer NOT COVERED: nothing" in lines
    assert "lm_head 1 ParallelLMHead ndcheck output" in lines


def test_log_softmax_is_ours_until_all_is_left_to_vllm(begin):
    vllm = begin("auto")
    place = vllm.places["log_softmax"]
    kept = getattr(vllm.modules[place.module], place.name)  # What torch keeps.
    x = torch.randn(3, 40)
    assert_close(kept(x, -1, False), x.log_softmax(-1))
    assert layers.fires["log_softmax"] == 1
    vllm.worker(plant_mixer(vllm)).load_model()
    kept(x, -1, False)
    assert vllm.calls[-1] == "log_softmax"


def test_what_was_covered_is_logged(begin, caplog):
    caplog.set_level(logging.INFO, "vllm.ndcheck")
    vllm = begin()
    worker = vllm.worker(vllm.model())
    worker.load_model()
    worker.compile_or_warm_up_model()
    assert "7 layers covered; calls: experts 1, linear 2, output 1" in caplog.text
