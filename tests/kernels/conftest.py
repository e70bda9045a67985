"""One check for every row-wise op on CPU: a row's bits may depend on that row alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

ROW_COUNTS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65]
ROW_COUNTS += [100, 127, 128, 129, 191, 255, 256, 257, 300]
MOST_ROWS = max(ROW_COUNTS)


def cancelling_terms(generator: torch.Generator, count: int, width: int) -> torch.Tensor:
    """Rows that sum to exactly 0, of wide range: what a sum of them leaves is its order's noise."""
    half = torch.randn(count, width // 2, generator=generator)
    half *= torch.exp2(torch.randint(-5, 6, half.shape, generator=generator))
    return torch.cat([half, -half, torch.zeros(count, width % 2)], -1)


@pytest.fixture
def noise_rows() -> Callable[..., torch.Tensor]:
    """`make(width, dtype)`: MOST_ROWS rows that cancel, shuffled."""

    def make(width: int, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        rows = cancelling_terms(generator, MOST_ROWS, width).to(dtype)
        return rows[:, torch.randperm(width, generator=generator)]

    return make


@pytest.fixture
def noise_operands() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """`make(k, n, dtype)`: MOST_ROWS rows [., k] and a weight [n, k] with product 0."""

    def make(k: int, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(2)
        rows = cancelling_terms(generator, MOST_ROWS, k).to(dtype)
        half = torch.randn(n, k // 2, generator=generator)
        weight = torch.cat([half, half, torch.zeros(n, k % 2)], -1).to(dtype)
        order = torch.randperm(k, generator=generator)
        return rows[:, order], weight[:, order].contiguous()

    return make


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.fixture
def find_violations() -> Callable[..., list[str]]:
    """`find(op, rows)`: every way in which a row of `op(rows)` was seen to depend on its batch."""

    def find(op: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> list[str]:
        together = op(rows)
        violations = []

        def compare(name: str, result: torch.Tensor, places: list[int]) -> None:
            if not torch.equal(bits(result), bits(together[places])):
                violations.append(name)

        for place in range(0, MOST_ROWS, 13):
            compare(f"row {place} alone", op(rows[place : place + 1].clone()), [place])
        for count in ROW_COUNTS:
            compare(f"{count} rows", op(rows[:count]), list(range(count)))
        order = torch.randperm(MOST_ROWS, generator=torch.Generator().manual_seed(3)).tolist()
        compare("another order", op(rows[order]), order)
        for place in (0, 1, 7, 16, 19):
            for poison in (torch.nan, torch.inf):
                neighbours = torch.full_like(rows[:20], poison)
                neighbours[place] = rows[5]
                result = op(neighbours)[place : place + 1]
                compare(f"place {place} among {poison}", result, [5])
        strided = torch.empty(MOST_ROWS, 2 * rows.shape[1], dtype=rows.dtype)[:, ::2]
        compare("strided", op(strided.copy_(rows)), list(range(MOST_ROWS)))
        transposed = rows.t().contiguous().t()
        compare("transposed", op(transposed[:33]), list(range(33)))
        unaligned = torch.empty(rows.numel() + 1, dtype=rows.dtype)[1:].view_as(rows).copy_(rows)
        compare("unaligned", op(unaligned), list(range(MOST_ROWS)))
        return violations

    return find


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest):
    """Results must not depend on threads, and waiting for them on a busy machine takes long."""
    before = torch.get_num_threads()
    if request.path.parent.name not in ("triton", "gpu"):
        torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2], ids=lambda n: f"threads{n}")
def threads(request: pytest.FixtureRequest, one_thread: None) -> int:
    torch.set_num_threads(request.param)
    return request.param


@pytest.fixture(scope="session")
def with_fp8_weights():
    """`with_fp8_weights(model)`: transformers' model with all layers but the head in FP8."""
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear
    from transformers.utils.quantization_config import FineGrainedFP8Config

    from ndcheck_kernels.ops import block_fp8, row_fp8

    def quantised(weight, scales, *, by_block):
        if by_block:
            return block_fp8.quantise_weight(weight)
        n_scales = scales.numel() if weight.dim() == 2 else scales[0].numel()
        codes, found = row_fp8.quantise_weight(weight, n_scales)
        return codes, found.view(scales.shape)

    def quantise(model, **options):
        plain = {name: p.detach() for name, p in model.named_parameters()}
        options = FineGrainedFP8Config(**options)
        replace_with_fp8_linear(model, ["lm_head"], options, pre_quantized=True)
        made = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.device.type != "meta":
                    continue
                if name.endswith("activation_scale"):
                    value = torch.full(parameter.shape, 2.0**-5)
                elif name == "bias":
                    value = plain[f"{path}.bias"]
                else:
                    weight = name.removesuffix("_scale_inv")
                    codes, scales = quantised(
                        plain[f"{path}.{weight}"],
                        getattr(module, f"{weight}_scale_inv"),
                        by_block=module.block_size is not None,
                    )
                    value = codes if name == weight else scales
                made[path, name] = value
        for (path, name), value in made.items():
            setattr(model.get_submodule(path), name, torch.nn.Parameter(value, requires_grad=False))
        return model

    return quantise
