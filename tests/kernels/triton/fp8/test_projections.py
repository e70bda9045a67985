"""Products of fused layers with one scale a row have the bits of the unfused layers' own ops."""

from types import SimpleNamespace

import pytest
import torch

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.cuda.rows.rms_norm import rms_norm
from ndcheck_kernels.cuda.rows.silu_mul import silu_mul
from ndcheck_kernels.models import quantised
from ndcheck_kernels.models.projections import Projection, can_join
from ndcheck_kernels.ops import row_fp8

pytestmark = pytest.mark.usefixtures("cuda_registrations")


class FP8Linear(torch.nn.Module):
    """As much of transformers' layer as is read."""

    def __init__(self, n, k, n_scales, device, given=None):
        super().__init__()
        codes, scales = row_fp8.quantise_weight(torch.randn(n, k) * 0.1, n_scales)
        tensors = {"weight": codes, "weight_scale_inv": scales, "bias": None}
        tensors["activation_scale"] = None if given is None else torch.tensor(given)
        for name, value in tensors.items():
            own = None if value is None else torch.nn.Parameter(value.to(device), False)
            self.register_parameter(name, own)
        self.out_features, self.block_size = n, None


def equal(left, right):
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@pytest.fixture(params=["their own", "bounded", "given"])
def make(request, device):
    def layer(n, k, n_scales):
        made = FP8Linear(n, k, n_scales, device, 0.01 if request.param == "given" else None)
        if request.param == "bounded":
            setattr(made, quantised.ROW_BOUND, 1.0)
        return made

    return layer


@pytest.mark.parametrize("m", [1, 17])
def test_layers_after_a_norm(m, make, dtype, device):
    torch.manual_seed(0)
    # A scale for each output, for the tensor, and for halves of it.
    layers = [make(32, 144, 32), make(16, 144, 1), make(16, 144, 2)]
    norm = SimpleNamespace(
        weight=torch.rand(144, dtype=dtype, device=device), variance_epsilon=1e-6
    )
    # Integers, whose squares every order adds exactly.
    rows = torch.randint(-4, 5, (m, 144), device=device).to(dtype)
    assert can_join(*layers)
    got = Projection.of(*layers).after_norm(rows, norm)
    normed = rms_norm(rows, norm.weight, norm.variance_epsilon)
    with invariant_kernels() as scope:
        apart = torch.cat([quantised._linear(layer, normed) for layer in layers], 1)
    assert scope.fires == {"row_fp8_linear": 3}
    assert equal(got, apart)


@pytest.mark.parametrize("m", [1, 17])
def test_a_layer_after_a_gate(m, make, dtype, device):
    torch.manual_seed(0)
    layer = make(48, 1040, 48)
    gate_up = torch.randn(m, 2080, dtype=dtype, device=device) * 3
    residual = torch.randn(48, dtype=dtype, device=device)
    got = Projection.of(layer).after_gate(gate_up, residual.expand(m, 48))
    rows = silu_mul(*gate_up.chunk(2, -1))
    assert equal(Projection.of(layer)(rows, residual.expand(m, 48)), got)
    # A residual is added where a bias is: of one row they are the same.
    layer.bias = torch.nn.Parameter(residual, False)
    doubled = rows * 2
    with invariant_kernels():
        alone, other = (quantised._linear(layer, each) for each in (rows, doubled))
    assert equal(got, alone)
    assert not equal(got, other)


def test_rows_that_are_quantised_in_two_ways_do_not_meet(device):
    def layer(given, bound=None):
        made = FP8Linear(16, 64, 1, device, given)
        if bound is not None:
            setattr(made, quantised.ROW_BOUND, bound)
        return made

    assert can_join(layer(0.5), layer(0.5))
    assert not can_join(layer(0.5), layer(0.25))
    assert not can_join(layer(0.5), layer(None))
    assert not can_join(layer(None, 2.0), layer(None))
