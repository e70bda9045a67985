"""The recurrent kernels on the device: states after n tokens, however these were fed."""

import pytest
import torch

from ndcheck_kernels.cuda.recurrent.gated_delta import gated_delta_rule
from ndcheck_kernels.cuda.recurrent.short_convolution import (
    short_convolution,
    short_convolution_step,
)

KEY_HEADS, HEADS, D = 2, 4, 128
CHANNELS, TAPS = (2 * KEY_HEADS + HEADS) * D, 4
POWERS = [p + d for p in (512, 1024, 2048, 4096) for d in (-1, 0, 1)]


def draw(n_rows, length):
    """A projection [B, C, T], the convolution's weight, decay and beta."""
    x = torch.randn(n_rows, length, CHANNELS, device="cuda").bfloat16().transpose(1, 2)
    weight = torch.randn(CHANNELS, TAPS, device="cuda").bfloat16()
    gates = torch.rand(2, n_rows, length, HEADS, device="cuda")
    return x, weight, -gates[0] / 64, gates[1].bfloat16()


def rule(mixed, decay, beta, state):
    """Of what the convolution gave, [B, C, T]."""
    parts = mixed.transpose(1, 2).split([KEY_HEADS * D, KEY_HEADS * D, HEADS * D], -1)
    return gated_delta_rule(*(p.unflatten(-1, (-1, D)) for p in parts), decay, beta, state, True)


def zeros(n_rows):
    state = torch.zeros(n_rows, HEADS, D, D, device="cuda")
    return state, torch.zeros(n_rows, CHANNELS, TAPS, device="cuda", dtype=torch.bfloat16)


def prompt(x, weight, decay, beta):
    state, _ = zeros(len(x))
    return rule(short_convolution(x, weight, None, "silu"), decay, beta, state), state


@pytest.fixture
def stepped():
    """The operands; and after each of their tokens, fed alone: output and state on the host."""
    operands = x, weight, decay, beta = draw(1, max(POWERS))
    state, window = zeros(1)
    outputs, states = [], {}
    for t in range(x.shape[-1]):
        at = slice(t, t + 1)
        mixed = short_convolution_step(x[..., at], window, weight, None, "silu")
        outputs.append(rule(mixed, decay[:, at], beta[:, at], state))
        if t + 1 <= 300 or t + 1 in POWERS:
            states[t + 1] = state.cpu()
    return operands, torch.cat(outputs, 1), states


def test_the_state_after_a_prompt_is_that_after_its_steps(stepped):
    (x, weight, decay, beta), outputs, states = stepped
    assert len(states) == 300 + len(POWERS)
    for n, expected in states.items():
        got, state = prompt(x[..., :n], weight, decay[:, :n], beta[:, :n])
        assert torch.equal(state.cpu(), expected), n
        assert torch.equal(got, outputs[:, :n]), n


def test_padding_and_neighbours_change_no_bit():
    x, weight, decay, beta = draw(1, 70)
    expected, expected_state = prompt(x, weight, decay, beta)
    for n_pads in range(1, 131):
        for n_rows in (2, 5):
            others = draw(n_rows, 70 + n_pads)
            batch = [others[0].clone(), weight, others[2].clone(), others[3].clone()]
            batch[0][-1], batch[2][-1], batch[3][-1] = 0, 0, 0.5
            batch[0][-1, :, n_pads:] = x[0]
            batch[2][-1, n_pads:], batch[3][-1, n_pads:] = decay[0], beta[0]
            got, state = prompt(*batch)
            assert torch.equal(got[-1, n_pads:], expected[0]), (n_pads, n_rows)
            assert torch.equal(state[-1], expected_state[0]), (n_pads, n_rows)


def test_a_captured_step_has_the_bits_of_the_uncaptured():
    x, weight, decay, beta = draw(8, 20)
    state, window = zeros(8)
    token = [part.clone() for part in (x[..., :1], decay[:, :1], beta[:, :1])]

    def step():
        mixed = short_convolution_step(token[0], window, weight, None, "silu")
        return rule(mixed, token[1], token[2], state)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    state.zero_()
    window.zero_()
    outputs = []
    for t in range(20):
        at = slice(t, t + 1)
        for part, new in zip(token, (x[..., at], decay[:, at], beta[:, at]), strict=True):
            part.copy_(new)
        graph.replay()
        outputs.append(out.clone())
    expected, expected_state = prompt(x, weight, decay, beta)
    assert torch.equal(torch.cat(outputs, 1), expected)
    assert torch.equal(state, expected_state)


def test_a_state_that_was_rounded_is_caught():
    """The planted fault."""
    x, weight, decay, beta = draw(1, 64)
    mixed = short_convolution(x, weight, None, "silu")
    expected, _ = prompt(x, weight, decay, beta)
    state, _ = zeros(1)
    rule(mixed[..., :32], decay[:, :32], beta[:, :32], state)
    got = rule(mixed[..., 32:], decay[:, 32:], beta[:, 32:], state.bfloat16().float())
    assert not torch.equal(got, expected[:, 32:])
