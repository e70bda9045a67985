"""The selective scan: one arithmetic in whole prompts, chunks and steps, on a GPU and on a CPU."""

import pytest
import torch

from ndcheck_kernels.cpu import selective_scan as cpu
from ndcheck_kernels.cuda.recurrent import selective_scan as cuda
from ndcheck_kernels.measure.reference import selective_scan_reference
from ndcheck_kernels.scope.mode import invariant_kernels

BATCH = 3
# Heads, features, states, groups; a decay for each state is Mamba-1's.
SHAPES = {
    "mamba2": (4, 8, 16, 2, False),
    "odd": (6, 5, 12, 2, False),
    "mamba1": (37, 1, 8, 1, True),
}


@pytest.fixture(params=["cuda", "cpu"])
def scan(request):
    if request.param == "cuda":
        return cuda.selective_scan

    def on_cpu(*operands):
        with invariant_kernels():
            return cpu.selective_scan(*operands)

    return on_cpu


@pytest.fixture
def where(scan, device):
    return device if scan is cuda.selective_scan else "cpu"


@pytest.fixture(params=SHAPES)
def shape(request):
    return SHAPES[request.param]


@pytest.fixture
def length(where, scan, shape, dtype):
    is_fast = where == "cuda" or scan is not cuda.selective_scan
    return 300 if is_fast and (shape, dtype) == (SHAPES["mamba2"], torch.float32) else 9


@pytest.fixture
def operands(shape, dtype, where, length):
    heads, features, states, groups, by_state = shape
    draw = torch.Generator().manual_seed(0)

    def normal(*size):
        return torch.randn(size, generator=draw)

    x = normal(BATCH, length, heads, features).to(dtype)
    b, c = (normal(BATCH, length, groups, states).to(dtype) for _ in range(2))
    dt = torch.nn.functional.softplus(normal(BATCH, length, heads) - 1)
    decays = -normal(heads, states).exp() if by_state else -normal(heads).exp()
    return tuple(t.to(where) for t in (x, dt, decays, b, c, normal(heads).to(dtype)))


def empty_state(operands):
    x, _, _, b, *_ = operands
    size = x.shape[0], *x.shape[2:], b.shape[-1]
    return torch.zeros(size, dtype=torch.float32, device=x.device)


def part(operands, tokens):
    x, dt, decays, b, c, d = operands
    return x[:, tokens], dt[:, tokens], decays, b[:, tokens], c[:, tokens], d


def in_passes(scan, operands, starts):
    state, out = empty_state(operands), []
    for begin, end in zip(starts, [*starts[1:], operands[0].shape[1]], strict=True):
        out.append(scan(*part(operands, slice(begin, end)), state))
    return torch.cat(out, 1), state


def test_as_accurate_as_float64_allows(scan, operands, dtype):
    expected = selective_scan_reference(*operands)
    got, _ = in_passes(scan, operands, [0])
    assert got.dtype == dtype
    error = (got.double() - expected).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * expected.abs().max()


def test_steps_and_chunks_have_the_bits_of_the_whole(scan, operands, length):
    whole, state = in_passes(scan, operands, [0])
    for starts in ([0, 1], [0, 5, 6, 8], list(range(length))):
        got, other = in_passes(scan, operands, starts)
        assert torch.equal(got, whole), starts
        assert torch.equal(other, state), starts


def test_the_state_after_any_prefill_is_that_of_as_many_steps(scan, operands, length):
    stepped = empty_state(operands)
    for n in range(1, length + 1):
        scan(*part(operands, slice(n - 1, n)), stepped)
        whole = empty_state(operands)
        scan(*part(operands, slice(0, n)), whole)
        assert torch.equal(whole, stepped), n


def test_padding_neighbours_and_layout_change_no_bit(scan, operands, where):
    whole, state = in_passes(scan, operands, [0])
    x, dt, decays, b, c, d = operands
    for n_pads in range(1, 9, 1 if where == "cuda" else 4):
        # As the mixers have it: no input and no B where a row has not begun.
        padded = [
            torch.cat([torch.full_like(t[:2, :n_pads], filler), t[:2]], 1)
            for t, filler in ((x, 0.0), (dt, 0.3), (b, 0.0), (c, 0.0))
        ]
        padded[0][0] = torch.nan
        # One projection for x, B and C, as Mamba-2 has it.
        joined = torch.cat([padded[0].flatten(2), padded[2].flatten(2), padded[3].flatten(2)], -1)
        sizes = [x[0, 0].numel(), b[0, 0].numel(), b[0, 0].numel()]
        views = [
            t.unflatten(-1, like.shape[2:])
            for t, like in zip(joined.split(sizes, -1), (x, b, c), strict=True)
        ]
        after = empty_state((views[0], None, None, b))
        got = scan(views[0], padded[1], decays, *views[1:], d, after)
        assert torch.equal(got[1, n_pads:], whole[1])
        assert torch.equal(after[1], state[1])


def test_a_chunk_that_begins_anew_is_caught(scan, operands):
    """The control: transformers' scan of Mamba-1 begins every pass with an empty state."""

    def forgetful(*call):
        return scan(*call[:-1], call[-1].zero_())

    assert not torch.equal(
        in_passes(forgetful, operands, [0, 5])[0], in_passes(scan, operands, [0])[0]
    )


def test_what_it_does_not_take_is_refused(operands):
    state = empty_state(operands)
    x, dt, *rest = operands
    with pytest.raises(TypeError, match="float32 time steps"):
        cuda.selective_scan(x, dt.half(), *rest, state)
    with pytest.raises(ValueError, match="contiguous"):
        cuda.selective_scan(x, dt, *rest, state.transpose(1, 3).contiguous().transpose(1, 3))
    with pytest.raises(TypeError, match="takes bfloat16"):
        cuda.selective_scan(x.double(), dt, *rest, state)
