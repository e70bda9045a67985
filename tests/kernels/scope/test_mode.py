"""The scope: what it replaces, passes, decomposes and refuses, and that it ends."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn.functional as F

import ndcheck_kernels
from ndcheck_kernels import (
    UncoveredOpError,
    UnsupportedCallError,
    active_scope,
    covered_ops,
    implements,
    invariant_kernels,
)
from ndcheck_kernels.scope import registry


class Inner(torch.nn.Module):
    def forward(self, x):
        return F.conv1d(x, torch.ones(1, 1, 2, dtype=x.dtype))


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList([Inner(), Inner()])

    def forward(self, x):
        return self.layers[1](x)


def test_fires_are_counted_by_op():
    x, weight = torch.rand(3, 8), torch.rand(4, 8)
    with invariant_kernels() as scope:
        assert scope.missing() == ("gemm", "attention")
        F.linear(x, weight)
        F.linear(x, weight)
        torch.einsum("mk,nk->mn", x, weight)
        F.silu(x).softmax(-1)
        x + 1
        x.view(-1).contiguous()
    assert scope.fires == {"linear": 2, "bmm": 1, "silu": 1, "softmax": 1}
    assert scope.missing(["gemm", "softmax"]) == ()
    assert scope.missing(["attention", "softmax", "mean"]) == ("attention", "mean")
    assert not scope.refused


def test_out_and_in_place_forms_are_replaced_and_write_where_they_should():
    x, weight = torch.rand(3, 8), torch.rand(8, 4)
    expected = x @ weight
    with invariant_kernels() as scope:
        out = torch.empty(0)
        assert torch.mm(x, weight, out=out) is out
        assert torch.allclose(out, expected)
        buffer = torch.zeros(5, 4)
        torch.mm(x, weight, out=buffer[1:4])
        assert torch.allclose(buffer[1:4], expected)
        y = x.clone()
        assert y.sigmoid_() is y
        assert torch.allclose(y, x.sigmoid())
        values, indices = torch.empty(3), torch.empty(3, dtype=torch.int64)
        torch.max(x, 1, out=(values, indices))
        assert torch.equal(values, x.gather(1, indices[:, None])[:, 0])
    assert scope.fires["mm"] == 2
    assert scope.fires["sigmoid_"] == 1


def test_nesting_joins_the_outer_scope_and_leaves_it_running():
    with invariant_kernels() as outer:
        with invariant_kernels() as inner:
            assert inner is outer
        assert active_scope() is outer
        F.silu(torch.rand(3))
    assert outer.fires["silu"] == 1
    assert active_scope() is None


def test_a_block_that_outlives_the_outer_one_is_still_in_the_scope():
    """Coroutines of one thread leave their blocks in the order in which they end."""
    fired = []

    async def compute(n_steps):
        with invariant_kernels() as scope:
            for _ in range(n_steps):
                before = scope.fires["silu"]
                F.silu(torch.rand(3))
                fired.append(scope.fires["silu"] - before)
                await asyncio.sleep(0)

    async def both():
        await asyncio.gather(compute(1), compute(3))

    asyncio.run(both())
    assert fired == [1] * 4
    assert active_scope() is None
    assert torch._C._len_torch_dispatch_stack() == 0


def test_an_exception_ends_the_scope():
    with pytest.raises(ZeroDivisionError), invariant_kernels(), invariant_kernels():
        1 / 0  # noqa: B018
    assert active_scope() is None
    assert F.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 2)).shape == (1, 1, 3)


def test_a_refusal_inside_a_decomposition_ends_the_scope():
    with pytest.raises(UncoveredOpError), invariant_kernels():
        F.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 2))
    with invariant_kernels() as scope:
        F.silu(torch.rand(3))
    assert scope.fires == {"silu": 1}


def test_stock_kernels_are_back_after_the_scope():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 256), torch.randn(64, 256)
    before = F.linear(x[:1], weight), x.sum(-1)
    with invariant_kernels():
        F.linear(x, weight)
    assert torch.equal(F.linear(x[:1], weight), before[0])
    assert torch.equal(x.sum(-1), before[1])


def test_other_threads_are_not_affected_and_may_have_their_own_scope():
    seen = {}

    def stock():
        seen["scope"] = active_scope()
        seen["conv"] = F.conv1d(torch.ones(1, 1, 4), torch.ones(1, 1, 2)).shape

    def own():
        with invariant_kernels() as scope:
            F.silu(torch.rand(3))
        seen["own"] = scope.fires["silu"]

    with invariant_kernels() as scope:
        for target in (stock, own):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert seen == {"scope": None, "conv": (1, 1, 3), "own": 1}
    assert not scope.fires


def test_a_refusal_names_the_op_dtype_and_module():
    with invariant_kernels() as scope, pytest.raises(UncoveredOpError) as caught:
        Outer()(torch.ones(1, 1, 4, dtype=torch.bfloat16))
    error = caught.value
    assert error.op == "aten.convolution.default"
    assert error.dtype == torch.bfloat16
    assert error.device == "cpu"
    assert error.module == "layers.1 (Inner)"
    assert str(error).startswith(
        "no batch-invariant aten.convolution.default (torch.bfloat16 on cpu) in layers.1 (Inner): "
        "nothing is registered for it."
    )
    assert scope.refused == {"aten.convolution.default": 1}


def test_sums_in_scatters_are_refused_and_overwriting_passes():
    x, index = torch.zeros(4), torch.tensor([0, 2])
    with invariant_kernels():
        assert x.scatter(0, index, torch.ones(2)).tolist() == [1, 0, 1, 0]
        assert x.index_put((index,), torch.ones(2)).tolist() == [1, 0, 1, 0]
        assert x.index_copy(0, index, torch.ones(2)).tolist() == [1, 0, 1, 0]
        for refused in (
            lambda: x.scatter_add(0, index, torch.ones(2)),
            lambda: x.scatter(0, index, torch.ones(2), reduce="add"),
            lambda: x.index_add(0, torch.tensor([1, 1]), torch.ones(2)),
            lambda: x.index_put((index,), torch.ones(2), accumulate=True),
        ):
            with pytest.raises(UncoveredOpError):
                refused()


MOVES = {
    "views in place": lambda x: x.squeeze_().unsqueeze_(0).transpose_(1, 2).as_strided_((3,), (2,)),
    "another view in place": lambda x: x[0].clone().t_(),
    "another size in place": lambda x: x.resize_as_(x[0].clone()),
    "copies of views": lambda x: torch.permute_copy(torch.squeeze_copy(x), (1, 0)),
    "diagonals": lambda x: torch.block_diag(*torch.diag_embed(x[0])).fill_diagonal_(7),
    "places": lambda x: torch.take(torch.rot90(x, 1, (1, 2)), torch.tensor([5, 0])),
    "draws": lambda x: torch.randn_like(x) + torch.normal(x, 1.0) + torch.bernoulli(x.clamp(0, 1)),
    "counts": lambda x: x.count_nonzero(-1),
    "parts": lambda x: torch.unsafe_chunk(x, 2, -1)[1],
}


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_and_draws_passes(name):
    def make():
        torch.manual_seed(0)
        return MOVES[name](torch.randn(1, 3, 4))

    with invariant_kernels() as scope:
        found = make()
    assert torch.equal(found, make())
    assert not scope.refused


COUNTS = {
    "sum": lambda x, dtype: x.sum(-1, dtype=dtype),
    "sum of all": lambda x, dtype: x.sum(dtype=dtype),
    "cumsum": lambda x, dtype: x.cumsum(-1, dtype=dtype),
    "prod": lambda x, dtype: x.prod(-1, dtype=dtype),
    "cumprod": lambda x, dtype: x.cumprod(-1, dtype=dtype),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
@pytest.mark.parametrize("name", COUNTS)
def test_integers_are_counted_in_the_dtype_that_is_named(name, dtype):
    """Exact in any order, as where none is named."""
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])
    for x in (mask, mask.int() * 3):
        expected = COUNTS[name](x, dtype)
        with invariant_kernels():
            result = COUNTS[name](x, dtype)
        assert result.dtype == expected.dtype == dtype
        assert torch.equal(result, expected)


def test_what_sampling_needs_runs():
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    with invariant_kernels() as scope:
        logprobs = F.log_softmax(logits.float(), -1)
        top = logprobs.topk(2, -1)
        chosen = logprobs.gather(-1, top.indices)
        noise = torch.rand(1000, generator=torch.Generator().manual_seed(1))
        gumbel = logprobs - torch.log(-torch.log(noise))
        token = gumbel.argmax(-1)
        assert torch.equal(chosen, top.values)
        assert token.shape == (5,)
    assert not scope.refused


def test_no_gradient_flows():
    weight = torch.rand(4, 8, requires_grad=True)
    with invariant_kernels():
        assert not F.linear(torch.rand(3, 8), weight).requires_grad


@pytest.mark.parametrize("name", ["vjp", "jvp", "jacobian", "hessian", "vhp", "hvp"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_autograd_functional_is_refused_where_it_would_give_zeros(name, create_graph):
    x = torch.rand(8, requires_grad=create_graph)
    given = {"v": torch.ones(8)} if name in ("jvp", "vhp", "hvp") else {}
    call = getattr(torch.autograd.functional, name)

    def compute():
        return call(lambda x: F.silu(x).square().sum(), x, create_graph=create_graph, **given)

    with invariant_kernels() as scope:
        with pytest.raises(UncoveredOpError, match=r"torch\.autograd\.functional"):
            compute()
        assert scope.refused["torch.autograd.functional"] == 1
    results = compute()
    assert (results[1] if isinstance(results, tuple) else results).abs().sum() > 0


def test_a_device_without_implementations_is_refused(monkeypatch):
    monkeypatch.setattr(registry, "DEVICE_MODULES", {})
    x = torch.ones(2, 3, device="meta")
    with invariant_kernels():
        assert (x + 1).shape == (2, 3)
        with pytest.raises(UncoveredOpError, match=r"aten\.mm\.default \(torch.float32 on meta\)"):
            torch.mm(x, x.t())


def test_an_implementation_can_be_registered_for_a_device(monkeypatch):
    monkeypatch.setattr(registry, "_implementations", {})
    monkeypatch.setattr(registry, "resolved", {})

    @implements(torch.ops.aten.mm.default, device="meta")
    def mm(a, b):
        if a.dtype != torch.float32:
            raise UnsupportedCallError("float32 only")
        return a.new_empty(a.shape[0], b.shape[1])

    x = torch.ones(2, 3, device="meta")
    with invariant_kernels() as scope:
        assert torch.mm(x, x.t()).shape == (2, 2)
        assert torch.mm(x, x.t(), out=torch.empty(2, 2, device="meta")).shape == (2, 2)
        with pytest.raises(UncoveredOpError, match="float32 only"):
            torch.mm(x.half(), x.half().t())
    assert scope.fires == {"mm": 3}
    assert covered_ops("meta") == ("mm",)


def test_covered_ops_lists_what_a_decoder_needs():
    assert {
        *("linear", "mm", "addmm", "bmm", "baddbmm", "matmul", "mean", "sum", "softmax"),
        *("log_softmax", "logsumexp", "layer_norm", "rms_norm", "argmax", "cumsum", "topk"),
        *("attention", "scaled_dot_product_attention"),
    } <= set(covered_ops())


def test_importing_is_light():
    code = (
        "import sys, ndcheck_kernels\n"
        "from ndcheck_kernels.measure import reference\n"
        "with ndcheck_kernels.invariant_kernels(): pass\n"
        "print([m for m in ('transformers', 'triton', 'ndcheck') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    assert all(hasattr(ndcheck_kernels, name) for name in ndcheck_kernels.__all__)


OUT_FORMS = {
    "mm": lambda x, out: torch.mm(x, x, out=out(4, 4)),
    "addmm": lambda x, out: torch.addmm(x, x, x, out=out(4, 4)),
    "matmul": lambda x, out: torch.matmul(x, x, out=out(4, 4)),
    "bmm": lambda x, out: torch.bmm(x[None], x[None], out=out(1, 4, 4)),
    "sum": lambda x, out: torch.sum(x, 1, out=out(4)),
    "mean": lambda x, out: torch.mean(x, 1, out=out(4)),
    "softmax": lambda x, out: torch.softmax(x, 1, out=out(4, 4)),
    "cumsum": lambda x, out: torch.cumsum(x, 1, out=out(4, 4)),
    "norm": lambda x, out: torch.linalg.vector_norm(x, dim=1, out=out(4)),
    "std": lambda x, out: torch.std(x, 1, out=out(4)),
    "logsumexp": lambda x, out: torch.logsumexp(x, 1, out=out(4)),
    "amax": lambda x, out: torch.amax(x, 1, out=out(4)),
    "sigmoid": lambda x, out: torch.sigmoid(x, out=out(4, 4)),
    "gelu": lambda x, out: torch._C._nn.gelu(x, out=out(4, 4)),
    "exp_": lambda x, out: out(4, 4).copy_(x).exp_(),
    "addmm_": lambda x, out: out(4, 4).copy_(x).addmm_(x, x),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", [torch.float16, torch.float32, torch.float64, torch.int64])
@pytest.mark.parametrize("name", OUT_FORMS)
def test_a_target_of_another_dtype_is_what_torch_makes_of_it(name, target, dtype):
    """An error of torch's, or its result without a rounding on the way; or refused by name."""
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)

    def call():
        return OUT_FORMS[name](x, lambda *shape: torch.zeros(shape, dtype=target))

    try:
        expected = call()
    except RuntimeError as refusal:
        expected = str(refusal)
    if isinstance(expected, str):
        with invariant_kernels(), pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == expected
        return
    try:
        with invariant_kernels():
            result = call()
    except UncoveredOpError:
        assert name in ("std", "logsumexp") or (name, target) == ("sum", torch.int64)
        return
    assert result.dtype == expected.dtype == target
    unrounded = name in ("sum", "cumsum") and target != torch.float16
    eps = torch.finfo(torch.float32 if unrounded else dtype).eps
    torch.testing.assert_close(result.double(), expected.double(), rtol=8 * eps, atol=8 * eps)
