"""The measurement of bits and accuracy: what it must catch, and that it can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ndcheck_kernels import accepted_ops, active_scope, covered_ops, invariant_kernels
from ndcheck_kernels.cpu import reductions
from ndcheck_kernels.measure import check as check_module
from ndcheck_kernels.measure.cases import Form, Source, checked_cases
from ndcheck_kernels.measure.cases.products import products
from ndcheck_kernels.measure.cases.rows import row_ops
from ndcheck_kernels.measure.check import (
    CONTROL_ROWS,
    PROBES,
    bit_classes,
    check,
    default_row_counts,
)
from ndcheck_kernels.scope import registry

CPU = torch.device("cpu")
ROWS = (1, 2, 3, 17, 40)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LINEAR = products(48, 96)[0]

# Routing is of integers; what mixes experts, parts of sums over ranks, products of FP8 and of
# integers, recurrences and extremes have their own proofs: test_experts.py,
# test_partial_products.py, samplers/test_tensor_parallel.py, test_block_fp8.py,
# test_weight_only.py, test_gated_delta.py, test_selective_scan.py, cpu/test_reductions.py.
OWN_PROOFS = {
    *("route_experts", "combine_experts", "index_add", "topk"),
    *("partial_linear", "partial_grouped", "rank_sum", "rank_gather"),
    *("block_fp8_linear", "block_fp8_grouped", "row_fp8_linear", "row_fp8_grouped"),
    *("weight_only_linear", "mxfp4_grouped", "amax", "amin"),
    *("partial_block_fp8_linear", "partial_block_fp8_grouped"),
    *("gated_delta_rule", "selective_scan", "short_convolution", "short_convolution_step"),
}


def outcome_of(**changes):
    return check(replace(LINEAR, **changes), torch.float32, CPU, ROWS)


def test_every_covered_op_has_a_case():
    computed = set(covered_ops("cpu")) - set(accepted_ops("cpu"))
    cases = checked_cases("cpu")
    named = {case.fires for case in cases} | {f.fires for case in cases for f in case.forms}
    assert computed - OWN_PROOFS == named - {""} - set(accepted_ops("cpu"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sound_op_passes_with_stock_beside_it(dtype):
    finding = check(LINEAR, dtype, CPU, ROWS)
    assert (finding.outcome, finding.failure, finding.doubt) == ("PASS", None, None)
    assert (finding.classes, finding.kernel) == (1, "invariant")
    assert finding.control_classes > 1
    assert [count.m for count in finding.row_counts] == list(ROWS)
    assert all(count.same_bits for count in finding.row_counts)
    assert 0 < finding.error <= finding.budget
    if dtype == torch.float32:
        assert finding.stock_classes > 1
        assert not all(count.stock_same_bits for count in finding.row_counts)


def test_a_grouping_that_follows_the_rows_fails():
    def call(x, w, bias):
        return LINEAR.grouped(3 if len(x) > 16 else 1, x, w, bias)

    finding = outcome_of(call=call)
    assert finding.outcome == "FAIL"
    assert finding.classes == 2
    assert [count.m for count in finding.row_counts if not count.same_bits] == [17, 40]
    assert "a batch of 17" in finding.failure


def test_bits_that_follow_the_place_fail():
    def call(x, w, bias):
        return torch.cat([F.linear(x[:7], w), LINEAR.grouped(3, x[7:], w, bias)])

    finding = outcome_of(call=call)
    assert finding.outcome == "FAIL"
    assert [count.m for count in finding.row_counts if not count.same_bits] == [17, 40]


def test_neighbours_that_leak_fail():
    def call(x, w, bias):
        return F.linear(x, w) + 0 * x[-1:].sum()

    finding = outcome_of(call=call)
    assert finding.outcome == "FAIL"
    assert "beside NaN and infinity" in finding.failure


@pytest.mark.parametrize("wrong", [lambda y: y * (1 + 1e-4), lambda y: y * torch.nan])
def test_an_inaccurate_op_fails(wrong):
    # In the scope alone, or the budget would follow.
    def call(x, w, bias):
        y = F.linear(x, w)
        return wrong(y) if active_scope() else y

    finding = outcome_of(call=call)
    assert finding.outcome == "FAIL"
    assert "budget" in finding.failure


def test_an_override_that_did_not_fire_fails():
    finding = outcome_of(fires="bmm")
    assert finding.outcome == "FAIL"
    assert "did not fire" in finding.failure


def test_an_uncaught_fault_is_inconclusive():
    finding = outcome_of(grouped=lambda groups, *operands: LINEAR.call(*operands))
    assert finding.outcome == "INCONCLUSIVE"
    assert "planted fault" in finding.doubt


def test_a_refused_op_is_inconclusive():
    finding = outcome_of(call=lambda x, w, bias: torch.prod(x, -1))
    assert finding.outcome == "INCONCLUSIVE"
    assert "prod" in finding.refusal


def test_single_rows_are_inconclusive():
    assert check(LINEAR, torch.float32, CPU, (1,)).outcome == "INCONCLUSIVE"


def test_rows_beyond_the_limit_are_left_out():
    finding = check(replace(LINEAR, max_rows=5), torch.float32, CPU, ROWS)
    assert [count.m for count in finding.row_counts] == [1, 2, 3]


def test_a_wrong_index_is_an_error():
    (argmax,) = (case for case in row_ops(64) if case.op == "argmax")
    assert check(argmax, torch.float32, CPU, ROWS).outcome == "PASS"
    last = replace(argmax, call=lambda x, w, b: 63 - x.flip(-1).argmax(-1))
    finding = check(last, torch.float32, CPU, ROWS)
    assert finding.outcome == "FAIL"
    assert finding.error > 0


@pytest.mark.parametrize("case", checked_cases("cpu"), ids=lambda case: f"{case.op}-{case.shape}")
def test_operands_tell_orders_apart_in_bfloat16(case):
    """Where rounding hides most; the twin with one group only must stay one class."""
    operands = case.operands(Source.seeded(torch.bfloat16, CPU), PROBES, True)
    rows = CONTROL_ROWS[:4]
    with invariant_kernels():
        assert bit_classes(lambda *o: case.grouped(1, *o), operands, rows[:2]).classes == 1
        assert bit_classes(check_module._planted(case), operands, rows).classes > 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_of_a_product_cancels(dtype):
    operands = LINEAR.operands(Source.seeded(dtype, CPU), 5, True)
    exact = LINEAR.reference(*operands.first(5))
    assert exact.abs().max() < 1e-12  # float64 rounds too
    assert LINEAR.call(*operands.first(5)).abs().max() > 1e-8


def test_row_counts_surround_the_powers_of_two():
    counts = default_row_counts("cpu")
    assert {1, 2, 3, 4, 5, 15, 16, 17, 127, 128, 129, 300} <= set(counts)
    assert max(default_row_counts("cuda")) == 2049


def row_op(name, k=4096):
    (found,) = (case for case in row_ops(k) if case.op == name)
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_epsilon_of_the_narrow_dtype_is_caught(dtype, monkeypatch):
    """torch takes float32's, whatever the input's."""
    assert check(row_op("rms_norm"), dtype, CPU, ROWS).outcome == "PASS"

    def faulty(x, shape, weight=None, eps=None):
        eps = torch.finfo(x.dtype).eps if eps is None else eps
        return reductions.fused_rms_norm(x, shape, weight, eps)[0]

    replace_op(monkeypatch, torch.ops.aten.rms_norm.default, faulty)
    finding = check(row_op("rms_norm"), dtype, CPU, ROWS)
    assert finding.outcome == "FAIL"
    assert "without weight and eps" in finding.failure


def test_a_variance_that_leaves_the_range_before_its_root_is_caught(monkeypatch):
    assert check(row_op("std"), torch.float16, CPU, ROWS).outcome == "PASS"

    def faulty(x, dim=None, *, correction=None, keepdim=False):
        return reductions.var(x, dim, correction=correction, keepdim=keepdim).sqrt()

    replace_op(monkeypatch, torch.ops.aten.std.correction, faulty)
    finding = check(row_op("std"), torch.float16, CPU, ROWS)
    assert finding.outcome == "FAIL"
    assert "error inf" in finding.failure
    assert "largest operands" in finding.failure


def test_a_form_with_other_bits_is_caught():
    def call(x, w, bias):
        return LINEAR.grouped(3 if len(x) > 16 else 1, x, w, bias)

    finding = outcome_of(forms=(Form("another way", call, LINEAR.reference),))
    assert finding.outcome == "FAIL"
    assert "a batch of 17" in finding.failure
    assert "another way" in finding.failure


def replace_op(monkeypatch, op, implementation):
    covered_ops("cpu")
    monkeypatch.setitem(registry._implementations["cpu"], op, implementation)
    monkeypatch.setattr(registry, "resolved", {})
