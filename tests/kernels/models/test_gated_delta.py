"""The gated delta rule and its convolution on CPU: one arithmetic, wherever a chunk begins."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers.models.qwen3_5 import modeling_qwen3_5 as source

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.measure.reference import gated_delta_reference
from ndcheck_kernels.models import gated_delta

LENGTH, HEADS, WIDTH = 90, 4, 16
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True)
def replaced():
    config = transformers.AutoConfig.for_model(
        "qwen3_5_text", hidden_size=32, num_hidden_layers=1, intermediate_size=32, vocab_size=8
    )
    gated_delta.replace_recurrences(transformers.AutoModelForCausalLM.from_config(config))


def make_row(dtype):
    generator = torch.Generator().manual_seed(0)
    shape = (1, LENGTH, HEADS, WIDTH)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    decay = -torch.rand(shape[:3], generator=generator)
    return query, key, value, decay, torch.rand(shape[:3], generator=generator)


def run(query, key, value, decay, beta, state=None, rule="torch_chunk_gated_delta_rule"):
    return getattr(source, rule)(
        query,
        key,
        value,
        g=decay,
        beta=beta,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def in_chunks(row, starts):
    outputs, state = [], None
    for start, stop in zip(starts, [*starts[1:], LENGTH], strict=True):
        one = stop - start == 1
        rule = "torch_recurrent_gated_delta_rule" if one else "torch_chunk_gated_delta_rule"
        out, state = run(*(t[:, start:stop] for t in row), state, rule)
        outputs.append(out)
    return torch.cat(outputs, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_padding_and_neighbours_change_no_bit(dtype):
    row = make_row(dtype)
    left = [F.pad(t, (0, 0) * (t.dim() - 2) + (23, 0)) for t in row]
    batch = [torch.cat([t.flip(1), t, t / 2]) for t in left]
    with invariant_kernels():
        whole = in_chunks(row, [0])
        for starts in ([0, 1], [0, 40], [0, 64, 89], list(range(LENGTH))):
            assert torch.equal(in_chunks(row, starts), whole), starts
        assert torch.equal(run(*batch)[0][1:2, 23:], whole)
    expected = gated_delta_reference(*row)
    assert (whole.double() - expected).abs().max() <= 4 * torch.finfo(dtype).eps * expected.max()


def test_stock_fails_the_same_check():
    row = make_row(torch.float32)
    assert not torch.equal(in_chunks(row, [0, 40]), in_chunks(row, [0]))
    assert torch.allclose(in_chunks(row, [0, 40]), in_chunks(row, [0]), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 6)])
def test_the_convolution_is_the_same_in_chunks(bias, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 30, generator=generator).to(dtype)
    weight = torch.randn(6, 4, generator=generator).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    with invariant_kernels():
        whole = gated_delta.causal_conv1d(x, weight, bias, "silu")
        state = torch.zeros(2, 6, 4, dtype=dtype)
        parts = [
            gated_delta.causal_conv1d_update(x[..., i : i + 1], state, weight, bias, "silu")
            for i in range(30)
        ]
    assert torch.equal(torch.cat(parts, -1), whole)
    args = [None if t is None else t.double() for t in (x, weight[:, None], bias)]
    expected = F.silu(F.conv1d(F.pad(args[0], (3, 0)), args[1], args[2], groups=6))
    assert (whole.double() - expected).abs().max() <= 2 * torch.finfo(dtype).eps * expected.max()
