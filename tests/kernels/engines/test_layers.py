"""The ops that vLLM's layers call: as torch.compile takes them, and at any number of requests."""

from __future__ import annotations

import pytest
import torch

from ndcheck_kernels.cuda.products import matmul
from ndcheck_kernels.engines import layers, warm_up

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def draw(m, n=48, k=32):
    return torch.randn(m, k).half(), torch.randn(n, k).half(), torch.randn(n).half()


@pytest.mark.parametrize("op", [layers.linear, layers.output])
def test_torch_compile_keeps_the_op_whole_at_every_number_of_rows(op):
    graphs = []

    def keep(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph

    x, weight, bias = draw(7)
    compiled = torch.compile(
        lambda x: op(x * 2, weight, bias) + 1, backend=keep, fullgraph=True, dynamic=True
    )
    for m in (7, 3, 5):
        rows = x[:m].clone()
        assert torch.equal(compiled(rows), op(rows * 2, weight, bias) + 1)
    (targets,) = graphs
    assert f"ndcheck_engines.{op.__name__}" in targets


def test_the_fake_implementation_says_what_the_op_gives():
    x, weight, bias = draw(6)
    torch.library.opcheck(
        torch.ops.ndcheck_engines.linear.default,
        (x.view(2, 3, 32), weight, bias),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_output_layer_is_filled_up_to_rows_that_were_proven(monkeypatch):
    x, weight, _ = draw(5)
    alone = layers.output(x, weight)
    sizes = []

    def seen(rows, *rest):
        sizes.append(len(rows))
        return linear(rows, *rest)

    linear = matmul.linear
    monkeypatch.setattr(matmul, "linear", seen)
    layers.output_sizes[:] = [1, 4, 8]
    layers.output(x, weight)
    monkeypatch.setattr(layers, "borrows", lambda *_: True)
    assert torch.equal(layers.output(x, weight), alone)
    layers.output(x[:4], weight)
    layers.output(torch.cat([x, x]), weight)
    assert sizes == [5, 8, 4, 10]


def test_warm_up_runs_vllms_own_sizes_and_one_above_each_launch_table(make_config):
    found = make_config(cudagraph_capture_sizes=[1, 2, 8, 512])
    found.scheduler_config.max_num_batched_tokens = 5000
    found.scheduler_config.max_num_seqs = 700
    assert warm_up.token_counts(found) == [1, 2, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 5000]
    assert warm_up.request_counts(found) == [1, 2, 8, 512, 576, 640, 700]
    eager = make_config(cudagraph_capture_sizes=None)
    assert warm_up.token_counts(eager) == [1, 4]
    assert warm_up.request_counts(eager) == [4]
