"""Our own ops have no kernel: outside a scope each of them fails by name, inside it runs."""

from __future__ import annotations

import pytest
import torch

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.ops import (
    attention,
    block_fp8,
    collectives,
    experts,
    gated_delta,
    mxfp4,
    products,
    row_fp8,
    selective_scan,
    short_convolution,
    weight_only,
)

HEADS = torch.ones(1, 1, 2, 4)
ROWS, WEIGHT = torch.ones(2, 4), torch.ones(3, 4)
INDEX = torch.tensor([[1, 0]])
SPANS = torch.tensor([[[0, 2]]], dtype=torch.int32)
ENDS = torch.tensor([1, 2], dtype=torch.int32)
CODES, SCALES = WEIGHT.to(torch.float8_e4m3fn), torch.ones(1, 1)
BY_EXPERT = (ROWS, CODES.expand(2, 3, 4).contiguous(), SCALES.expand(2, 1, 1), ENDS)
TOKENS, GATES = torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 1)
DELTA = (TOKENS, TOKENS, TOKENS, GATES, GATES, torch.zeros(1, 1, 4, 4), True)
SCAN = (TOKENS, GATES, -torch.ones(1), TOKENS, TOKENS, torch.ones(1), torch.zeros(1, 1, 4, 4))
TOKEN, TAPS = torch.ones(1, 3, 1), torch.ones(3, 2)

CALLS = {
    "attention": (attention.attention_op, (HEADS, HEADS, HEADS, SPANS, 0.5)),
    "route_experts": (experts.route_op, (INDEX, ROWS[:1, :2], 2)),
    "combine_experts": (experts.combine_op, (ROWS, INDEX, ROWS[:1, :2])),
    "partial_linear": (products.partial_linear_op, (ROWS, WEIGHT)),
    "partial_grouped": (products.partial_grouped_op, (ROWS, torch.ones(2, 4, 3), ENDS)),
    "block_fp8_linear": (block_fp8.linear_op, (ROWS, CODES, SCALES)),
    "block_fp8_grouped": (block_fp8.grouped_op, BY_EXPERT),
    "partial_block_fp8_linear": (block_fp8.partial_linear_op, (ROWS, CODES, SCALES)),
    "partial_block_fp8_grouped": (block_fp8.partial_grouped_op, BY_EXPERT),
    "row_fp8_linear": (row_fp8.linear_op, (ROWS, CODES, SCALES[0])),
    "row_fp8_grouped": (row_fp8.grouped_op, (*BY_EXPERT[:2], torch.ones(2, 1), ENDS)),
    "weight_only_linear": (
        weight_only.linear_op,
        (ROWS, weight_only.pack(WEIGHT, 8), torch.ones(1, 3), None, None, 8),
    ),
    "mxfp4_grouped": (
        mxfp4.grouped_op,
        (
            torch.ones(2, 32),
            torch.zeros(2, 3, 1, 16, dtype=torch.uint8),
            torch.zeros(2, 3, 1, dtype=torch.uint8),
            ENDS,
        ),
    ),
    "gated_delta_rule": (gated_delta.gated_delta_op, DELTA),
    "selective_scan": (selective_scan.scan_op, SCAN),
    "short_convolution": (short_convolution.short_convolution_op, (TOKEN, TAPS)),
    "short_convolution_step": (
        short_convolution.short_convolution_step_op,
        (TOKEN, torch.zeros(1, 3, 2), TAPS),
    ),
    # An empty part asks no group of ranks.
    "rank_sum": (collectives.rank_sum_op, (torch.ones(0), "no group")),
}


@pytest.mark.parametrize("name", CALLS)
def test_an_op_of_our_own_runs_inside_a_scope_only(name):
    op, arguments = CALLS[name]
    with pytest.raises(RuntimeError, match=f"{name} only runs inside"):
        op(*arguments)
    with invariant_kernels() as scope:
        op(*arguments)
    assert scope.fires[name] == 1


def test_every_op_of_our_own_is_tried():
    names = torch._C._dispatch_get_all_op_names()
    own = {name.split("::")[1] for name in names if name.startswith("ndcheck_kernels::")}
    assert own == {*CALLS, "rank_gather"}  # Which needs ranks: the tests of samplers start some.


def test_a_gather_outside_a_scope_fails():
    with pytest.raises(RuntimeError, match="rank_gather only runs inside"):
        collectives.rank_gather_op(torch.ones(2), 2, "no group")
