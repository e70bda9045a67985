"""The Triton kernels behind torch's own ops: what `invariant_kernels()` computes on CUDA.

Without a GPU the CUDA registrations stand in for the CPU's, under the interpreter.
"""

from __future__ import annotations

import pytest
import torch
import transformers
from torch.nn import functional as F

from ndcheck_kernels import UncoveredOpError, invariant_kernels, register_attention
from ndcheck_kernels.measure.reference import attention_reference
from ndcheck_kernels.models.caches.argument import cache_argument
from ndcheck_kernels.ops.attention import attention_op, causal_spans

K, N = 96, 40
ROW_OPS = {
    "mm": (lambda x, w: x @ w.t(), "matmul"),
    "linear": (lambda x, w: F.linear(x, w), "linear"),
    "linear with bias": (lambda x, w: F.linear(x, w, w[:, 0]), "linear"),
    "addmm": (lambda x, w: torch.addmm(w[:, 0], x, w.t(), beta=0.5, alpha=2), "addmm"),
    "mv": (lambda x, w: torch.mv(x, w[0]), "mv"),
    "einsum": (lambda x, w: torch.einsum("mk,nk->mn", x, w), "bmm"),
    "out": (lambda x, w: torch.mm(x, w.t(), out=x.new_empty(len(x), N)), "mm"),
    "softmax": (lambda x, w: x.softmax(-1), "softmax"),
    "log_softmax": (lambda x, w: x.log_softmax(-1, dtype=torch.float32), "log_softmax"),
    "logsumexp": (lambda x, w: x.logsumexp(-1), "logsumexp"),
    "sum": (lambda x, w: x.sum(-1, keepdim=True), "sum"),
    "mean": (lambda x, w: x.mean(-1), "mean"),
    "cumsum": (lambda x, w: x.cumsum(-1), "cumsum"),
    "layer_norm": (lambda x, w: F.layer_norm(x, (K,), w[0], w[1]), "layer_norm"),
    "rms_norm": (lambda x, w: F.rms_norm(x, (K,), w[0], 1e-6), "rms_norm"),
}

pytestmark = pytest.mark.usefixtures("cuda_registrations")


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_layer_norm_takes_no_parameters_of_another_dtype(name, device) -> None:
    """torch on CUDA reads them as the rows' dtype: expected scalar type Half but found Float."""
    x, own = torch.ones(2, K, device=device).half(), torch.ones(K, device=device)
    given = {"weight": own.half(), "bias": own.half()} | {name: own}
    with pytest.raises(UncoveredOpError, match="another dtype"), invariant_kernels():
        F.layer_norm(x, (K,), **given)


@pytest.mark.parametrize("name", ROW_OPS)
def test_a_row_op_is_accurate_counted_and_batch_invariant(
    name, dtype, device, wide, batch_sizes, assert_accurate, assert_batch_invariant
) -> None:
    op, fired = ROW_OPS[name]
    rows = wide(34, K, dtype=dtype, device=device)
    weight = torch.randn(N, K, device=device).to(dtype)
    with invariant_kernels() as scope:
        result = op(rows, weight)
        assert_batch_invariant(
            lambda x: op(x, weight), rows, [m for m in batch_sizes if m < len(rows)]
        )
    assert scope.fires[fired] > 0
    assert_accurate(result, op(rows.double(), weight.double()), op(rows, weight))


def test_a_batch_of_products_has_the_bits_of_each(dtype, device) -> None:
    a = torch.randn(3, 5, K, device=device).to(dtype)
    b = torch.randn(3, K, N, device=device).to(dtype)
    with invariant_kernels():
        together = torch.bmm(a, b)
        shared = torch.matmul(a, b[:1])
        assert all(torch.equal(together[i], a[i] @ b[i]) for i in range(3))
        assert all(torch.equal(shared[i], a[i] @ b[0]) for i in range(3))


def test_topk_breaks_ties_by_the_lowest_index(device) -> None:
    x = torch.zeros(3, 64, device=device)
    x[:, [7, 20, 40]] = 1
    with invariant_kernels():
        values, indices = x.topk(4, dim=-1)
    assert indices.tolist() == [[7, 20, 40, 0]] * 3
    assert values[0].tolist() == [1, 1, 1, 0]


def attention_operands(dtype, device):
    q = torch.randn(2, 4, 9, 32, device=device).to(dtype)
    k, v = (torch.randn(2, 2, 40, 32, device=device).to(dtype) for _ in range(2))
    return q, k, v


def test_attention_takes_causal_spans_and_what_amounts_to_them(dtype, device) -> None:
    q, k, v = attention_operands(dtype, device)
    spans = torch.tensor([[[3, 40]], [[0, 36]]], dtype=torch.int32, device=device)
    position = torch.arange(9, device=device) - 8
    spelt_out = torch.stack([spans[:, :, 0].expand(2, 9)] * 2 + [spans[:, :, 1] + position], -1)
    with invariant_kernels() as scope:
        result = attention_op(q, k, v, spans, 0.2, 0.0)
        assert torch.equal(attention_op(q, k, v, spelt_out.int(), 0.2, 0.0), result)
        mask = torch.arange(40, device=device) <= position[:, None] + 39
        sdpa = F.scaled_dot_product_attention(
            q, k, v, mask.expand(2, 1, 9, 40), scale=0.2, enable_gqa=True
        )
        whole = attention_op(q, k, v, causal_spans(2, 40, device), 0.2, 0.0)
    assert torch.equal(sdpa, whole)
    assert scope.fires["attention"] == 3
    exact = attention_reference(q, k, v, spans, 0.2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda q, k, v, s: attention_op(q, k[:, :, 1:], v, s, 0.2, 0.0), "attention of"),
        (
            lambda q, k, v, s: attention_op(
                q, k, v, torch.tensor([0, 5, 20]).int().expand(2, 9, 3).to(q.device), 0.2, 0.0
            ),
            "causal ones, windows and chunks",
        ),
        (lambda q, k, v, s: q.double() @ k.double().mT[:, :1], "float64"),
        (lambda q, k, v, s: torch.logsumexp(q, (0, 1)), "several dims"),
        (lambda q, k, v, s: q.var(-1), "nothing is registered"),
    ],
    ids=["lengths", "other mask", "float64", "logsumexp", "var"],
)
def test_what_is_not_covered_is_refused(call, reason, device) -> None:
    q, k, v = attention_operands(torch.float32, device)
    with invariant_kernels() as scope, pytest.raises(UncoveredOpError, match=reason):
        call(q, k, v, causal_spans(2, 40, device))
    assert scope.refused.total() == 1


@torch.no_grad()
def last_logits(model, prompts, device, chunk=None):
    length = max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache = transformers.DynamicCache(config=model.config)
    for begin in range(0, length, chunk or length):
        end = min(begin + (chunk or length), length)
        out = model(
            input_ids=ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, begin:end],
            logits_to_keep=1,
            **{cache_argument(model.forward): cache},
        )
    return out.logits[:, -1]


def test_a_model_gives_a_row_the_same_bits_in_any_company(dtype, device, sizes) -> None:
    register_attention()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**sizes, attn_implementation="ndcheck_invariant")
    model = transformers.Qwen3ForCausalLM(config).to(device=device, dtype=dtype).eval()
    probe = [5, 17, 90, 33, 21, 8, 64, 2, 11]
    others = [[3] * 14, [9, 4]]
    with invariant_kernels() as scope:
        alone = last_logits(model, [probe], device)[0]
        for batch in (
            [probe, others[0], probe, others[1]],
            [others[0], probe, others[1], probe],
        ):
            together = last_logits(model, batch, device)
            for slot, prompt in enumerate(batch):
                assert torch.equal(together[slot], alone) == (prompt == probe), f"slot {slot}"
        assert torch.equal(last_logits(model, [probe, others[0]], device, chunk=5)[0], alone)
        changed = last_logits(model, [[*probe[:-1], 12]], device)[0]
    assert not torch.equal(alone, changed)
    assert scope.missing() == ()


EPSILON = {
    "rms_norm": lambda x, w: F.rms_norm(x, (K,)),
    "rms_norm with weight": lambda x, w: F.rms_norm(x, (K,), w[0]),
    "layer_norm": lambda x, w: F.layer_norm(x, (K,)),
    "sum to float16": lambda x, w: x.sum(-1, dtype=torch.float16),
    "softmax to float16": lambda x, w: x.softmax(-1, dtype=torch.float16),
    "log_softmax to float16": lambda x, w: x.log_softmax(-1, dtype=torch.float16),
    "mean of integers": lambda x, w: x.sign().long().sum(-1, dtype=torch.float32),
}


@pytest.mark.parametrize("name", EPSILON)
def test_arguments_left_out_and_dtypes_given_mean_what_torch_means(name, dtype, device) -> None:
    weight = torch.randn(N, K, device=device).to(dtype)
    for scale in (2.0**-13, 0.01, 1.0, 300.0):
        x = (torch.randn(5, K, device=device) * scale).to(dtype)
        want = EPSILON[name](x, weight)
        with invariant_kernels():
            got = EPSILON[name](x, weight)
        assert got.dtype == want.dtype
        unit = want.double().abs().max().item()
        torch.testing.assert_close(
            got.double(), want.double(), rtol=0, atol=8 * torch.finfo(got.dtype).eps * unit
        )


@pytest.mark.parametrize("length", [40, 20000])
def test_a_row_with_infinity_has_no_shares(length, device) -> None:
    x = torch.randn(3, length, device=device)
    x[1, 7] = float("inf")
    with invariant_kernels():
        for op in (lambda t: t.softmax(-1), lambda t: t.log_softmax(-1)):
            got = op(x)
            assert got[1].isnan().all()
            assert got[[0, 2]].isfinite().all()
        assert x.logsumexp(-1)[1] == float("inf")


def test_a_single_number_is_a_row_of_one(device) -> None:
    x = torch.tensor(2.0, device=device)
    with invariant_kernels():
        assert x.softmax(0).item() == 1
        assert x.log_softmax(0).item() == 0
        assert x.logsumexp(0).item() == 2
        assert [t.item() for t in x.topk(1)] == [2, 0]


def test_rotary_embeddings_of_complex_numbers_run(device) -> None:
    """DeepSeek-V2's and Llama 4's: polar coordinates, and a product with each pair of a head."""
    angles = torch.randn(5, 8, device=device) * 100
    x = torch.randn(2, 3, 5, 16, device=device)

    def rotate(x, angles):
        turn = torch.polar(torch.ones_like(angles), angles) * 0.5
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(3)

    with invariant_kernels() as scope:
        got = rotate(x, angles)
        assert torch.equal(rotate(x[1:], angles), got[1:])
        with pytest.raises(UncoveredOpError):
            torch.view_as_complex(x.unflatten(-1, (-1, 2))).abs()
    assert scope.fires["polar"] == 2
    torch.testing.assert_close(got.double(), rotate(x.double(), angles.double()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", [1, 100])
def test_the_largest_scores_leave_the_right_shares(queries, dtype, device) -> None:
    """Scores near 2**20, in whole numbers: a row attends to its highest keys alone, evenly."""
    q, k = (torch.randint(-2, 3, (1, 2, n, 32), device=device) * 2.0**10 for n in (queries, 150))
    v = torch.randn(1, 2, 150, 32, device=device).to(dtype)
    with invariant_kernels():
        got = attention_op(q.to(dtype), k.to(dtype), v, causal_spans(1, 150, device), 32**-0.5)
    want = attention_reference(q, k, v, causal_spans(1, 150, device), 32**-0.5)
    tolerance = 4 * torch.finfo(dtype).eps * v.abs().max().item()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
