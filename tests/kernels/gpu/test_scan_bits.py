"""The selective scan on the device: states after n tokens, however these were fed."""

import pytest
import torch

from ndcheck_kernels.cuda.recurrent.selective_scan import selective_scan
from ndcheck_kernels.measure.reference import selective_scan_reference

# Heads, features, states, groups of Nemotron-H 8B and Falcon-H1 34B; of Mamba, fewer channels.
SHAPES = [(128, 64, 128, 8), (32, 128, 256, 2), (512, 1, 16, 1)]
POWERS = [p + d for p in (512, 1024, 2048) for d in (-1, 0, 1)]


def draw(shape, n_rows, length):
    heads, features, states, groups = shape
    joined = torch.randn(n_rows, length, heads * features + 2 * groups * states, device="cuda")
    parts = joined.bfloat16().split([heads * features, groups * states, groups * states], -1)
    x, b, c = (
        part.unflatten(-1, size)
        for part, size in zip(
            parts, ((heads, features), (groups, states), (groups, states)), strict=True
        )
    )
    dt = torch.rand(n_rows, length, heads, device="cuda") / 8
    torch.manual_seed(1)
    decays = -torch.rand((heads, states) if features == 1 else (heads,), device="cuda") * 4
    return x, dt, decays, b, c, torch.randn(heads, device="cuda").bfloat16()


def part(operands, tokens):
    x, dt, decays, b, c, d = operands
    return x[:, tokens], dt[:, tokens], decays, b[:, tokens], c[:, tokens], d


def zeros(operands):
    x, b = operands[0], operands[3]
    return torch.zeros(len(x), *x.shape[2:], b.shape[-1], device="cuda")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_state_after_a_prompt_is_that_after_its_steps(shape):
    operands = draw(shape, 1, max(POWERS))
    state, outputs = zeros(operands), []
    for n in range(1, max(POWERS) + 1):
        outputs.append(selective_scan(*part(operands, slice(n - 1, n)), state))
        if n <= 300 or n in POWERS:
            whole = zeros(operands)
            got = selective_scan(*part(operands, slice(0, n)), whole)
            assert torch.equal(whole, state), n
            assert torch.equal(got[:, -1:], outputs[-1]), n
    assert torch.equal(got, torch.cat(outputs, 1)[:, : got.shape[1]])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_padding_and_neighbours_change_no_bit(shape):
    operands = draw(shape, 1, 40)
    expected_state = zeros(operands)
    expected = selective_scan(*operands, expected_state)
    exact = selective_scan_reference(*operands)
    assert (expected.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    for n_pads in range(1, 67):
        for n_rows in (2, 5):
            x, dt, decays, b, c, d = draw(shape, n_rows, 40 + n_pads)
            for t, own in ((x, operands[0]), (b, operands[3]), (c, operands[4])):
                t[-1, :n_pads], t[-1, n_pads:] = 0, own[0]
            dt[-1, n_pads:] = operands[1][0]
            x[0] = torch.nan
            state = zeros((x, dt, decays, b))
            got = selective_scan(x, dt, decays, b, c, d, state)
            assert torch.equal(got[-1, n_pads:], expected[0]), (n_pads, n_rows)
            assert torch.equal(state[-1], expected_state[0]), (n_pads, n_rows)


def test_a_state_that_was_rounded_is_caught():
    """The planted fault."""
    operands = draw(SHAPES[0], 1, 64)
    expected = selective_scan(*operands, zeros(operands))
    state = zeros(operands)
    selective_scan(*part(operands, slice(0, 32)), state)
    rounded = state.bfloat16().float()
    got = selective_scan(*part(operands, slice(32, 64)), rounded)
    assert not torch.equal(got, expected[:, 32:])
