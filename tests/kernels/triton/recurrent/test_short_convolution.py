"""The short convolution: one arithmetic in whole prompts, chunks and steps."""

import pytest
import torch
from torch.nn import functional as F

from ndcheck_kernels.cuda.recurrent import short_convolution
from ndcheck_kernels.cuda.recurrent.short_convolution import short_convolution_step

CHANNELS, LENGTH, TAPS = 20, 11, 4


@pytest.fixture
def operands(dtype, device):
    x = torch.randn(3, LENGTH, CHANNELS, device=device).to(dtype).transpose(1, 2)
    weight = torch.randn(CHANNELS, TAPS, device=device).to(dtype)
    return x, weight, torch.randn(CHANNELS, device=device).to(dtype)


def stepped(x, weight, bias, width=TAPS):
    state = x.new_zeros(*x.shape[:2], width)
    steps = [
        short_convolution_step(part, state, weight, bias, "silu") for part in x.split(1, dim=-1)
    ]
    return torch.cat(steps, -1), state


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_as_accurate_as_torch(operands, activation, has_bias, assert_accurate):
    x, weight, bias = operands
    bias = bias if has_bias else None

    def stock(x, weight, bias):
        padded = F.pad(x, (TAPS - 1, 0))
        out = F.conv1d(padded, weight[:, None], bias, groups=CHANNELS)
        return out if activation is None else F.silu(out)

    exact = stock(x.double(), weight.double(), None if bias is None else bias.double())
    ours = short_convolution.short_convolution(x, weight, bias, activation)
    assert_accurate(ours, exact, stock(x, weight, bias))


@pytest.mark.parametrize("width", [TAPS - 1, TAPS, TAPS + 2])
def test_steps_have_the_bits_of_the_whole(operands, width):
    x, weight, bias = operands
    whole = short_convolution.short_convolution(x, weight, bias, "silu")
    got, state = stepped(x, weight, bias, width)
    assert torch.equal(got, whole)
    assert torch.equal(state, x[..., -width:])


def test_layout_padding_and_neighbours_change_no_bit(operands):
    x, weight, _ = operands
    whole = short_convolution.short_convolution(x, weight, None, "silu")
    for n_pads in range(1, 6):
        padded = F.pad(x[1:2], (n_pads, 0))
        batch = torch.cat([torch.full_like(padded, torch.nan), padded.contiguous()])
        got = short_convolution.short_convolution(batch, weight, None, "silu")
        assert torch.equal(got[1:, :, n_pads:], whole[1:2])


def test_a_state_that_lags_is_caught(operands):
    x, weight, bias = operands
    _, state = stepped(x[..., :6], weight, bias)
    last = short_convolution_step(x[..., 6:7], state.roll(1, -1), weight, bias, "silu")
    whole = short_convolution.short_convolution(x, weight, bias, "silu")
    assert not torch.equal(last, whole[..., 6:7])


def test_another_activation_is_refused(operands):
    x, weight, _ = operands
    with pytest.raises(Exception, match="no activation 'gelu'"):
        short_convolution.short_convolution(x, weight, None, "gelu")
