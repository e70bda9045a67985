import itertools
from dataclasses import replace

import pytest
import torch

from ndcheck_kernels.cuda import device as device_facts
from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.configs import AttentionConfig, DecodeTile, PrefillTile, attention_config

TILE, DECODE = PrefillTile(32, 4, 1), DecodeTile(4, 1)
SMALL = AttentionConfig(
    32, 32, TILE, TILE, DECODE, DECODE, 16, short_splits=2
)  # many in a short context
ON_GPU = torch.cuda.is_available()
PLAIN = causal.Kind()
SINKS = torch.tensor([-1.0, 2.0, 0.5, 6.0])
SLOPES = torch.tensor([0.5, 0.0625, 0.03125, 2**-1.5])
KINDS = {
    "window": causal.Kind(window=37),
    "sinks": causal.Kind(sinks=SINKS),
    "all": causal.Kind(scale=0.3, window=50, softcap=3.0, sinks=SINKS),
    "chunks": causal.Kind(window=37, chunked=True),
    "alibi": causal.Kind(slopes=SLOPES),
    "rounded alibi": causal.Kind(slopes=SLOPES, bias_dtype=torch.float16),
    "all, in chunks": causal.Kind(window=50, chunked=True, softcap=3.0, sinks=SINKS, slopes=SLOPES),
}


def exact(q, k, v, starts, lengths, kind=PLAIN):
    """float64, one query at a time, straight from the definition."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64, device=q.device)
    scale = q.shape[3] ** -0.5 if kind.scale is None else kind.scale
    group = q.shape[1] // k.shape[1]
    for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        position = int(lengths[b]) - q.shape[2] + i
        if position >= int(starts[b]):
            start, window = int(starts[b]), kind.window or position + 1
            first = max(start, position + 1 - window, 0)
            if kind.chunked:
                first = start + (position - start) // window * window
            keys, values = (t[b, h // group, first : position + 1].double() for t in (k, v))
            scores = keys @ q[b, h, i].double() * scale
            if kind.softcap:
                scores = kind.softcap * torch.tanh(scores / kind.softcap)
            if kind.slopes is not None:
                places = torch.arange(first - start, position + 1 - start, device=q.device)
                bias = kind.slopes[h].to(q.device) * places
                scores = scores + bias.to(kind.bias_dtype or torch.float32).double()
            sink = -torch.inf if kind.sinks is None else float(kind.sinks[h])
            scores = torch.cat([scores, torch.full_like(scores[:1], sink)])
            out[b, h, i] = torch.softmax(scores, 0)[:-1] @ values
    return out


@pytest.fixture
def operands(dtype, device):
    """Two rows over a cache of 150: one full, one padded on the left and unused at the end."""
    q = torch.randn(2, 4, 20, 32, device=device).to(dtype)
    k, v = (torch.randn(2, 2, 150, 32, device=device).to(dtype) for _ in range(2))
    starts, lengths = (torch.tensor(t, device=device) for t in ([0, 81], [150, 140]))
    for t in (k, v):
        t[1, :, :81] = float("nan")
        t[1, :, 140:] = float("nan")
    return q, k, v, starts, lengths


def launch(q, k, v, starts=None, lengths=None, *, kind=PLAIN, config=SMALL, parallel=False):
    for name in ("sinks", "slopes"):
        if getattr(kind, name) is not None:
            kind = replace(kind, **{name: getattr(kind, name).to(q.device)})
    return causal._launch(q, k, v, starts, lengths, kind, config, parallel=parallel)


@pytest.mark.parametrize("parallel", [False, True])
def test_accuracy(operands, parallel, dtype):
    want = exact(*operands)
    got = launch(*operands, parallel=parallel).double()
    assert (got - want).norm() / want.norm() < 4 * torch.finfo(dtype).eps
    shipped = attention_config(32, operands[0].element_size(), 90)
    got = launch(*operands, config=shipped, parallel=parallel).double()
    assert (got - want).norm() / want.norm() < 4 * torch.finfo(dtype).eps


def test_prefill_chunks_and_decode_agree(operands):
    q, k, v, starts, lengths = operands
    whole = launch(q, k, v, starts, lengths)
    assert torch.equal(launch(q, k, v, starts, lengths, parallel=True), whole)
    for first, last in ((0, 7), (7, 19), (19, 20)):
        for parallel in (False, True):
            ends = lengths - q.shape[2] + last
            got = launch(q[:, :, first:last], k, v, starts, ends, parallel=parallel)
            assert torch.equal(got, whole[:, :, first:last])


@pytest.mark.parametrize("name", [None, "window", "sinks"])
def test_however_many_splits_a_program_takes_bits_are_the_same(operands, name, monkeypatch):
    q, k, v, starts, lengths = operands
    kind = PLAIN if name is None else KINDS[name]
    last = q[:, :, -1:], k, v, starts, lengths
    short = replace(SMALL, short_splits=8)  # Of long ones a program takes half as many.
    want = launch(q, k, v, starts, lengths, kind=kind, config=short)[:, :, -1:]
    sms, splits = 4, short.splits(k.shape[2])
    monkeypatch.setattr(device_facts, "sm_count", lambda device: sms)
    runs = set()
    for programs in (1, 2, splits):
        tile = replace(DECODE, per_sm=programs * 4 // sms)
        config = replace(short, few=tile, many=tile)
        runs.add(config.decode(2, splits, 4, sms)[1])
        assert torch.equal(launch(*last, kind=kind, config=config, parallel=True), want), programs
    assert runs == {1, 3, splits}


def test_a_row_without_tokens_gives_zeros_and_counters_end_at_zero(operands, monkeypatch):
    q, k, v, starts, lengths = operands
    taken = []
    own = device_facts.counters
    monkeypatch.setattr(device_facts, "counters", lambda *a: taken.append(own(*a)) or taken[-1])
    want = launch(q[:1, :, -1:], k[:1], v[:1], parallel=True)
    starts, lengths = starts.clone(), lengths.clone()
    starts[1] = lengths[1] = 60
    got = launch(q[:, :, -1:], k, v, starts, lengths, parallel=True)
    assert torch.equal(got[:1], want)
    assert torch.equal(got[1], torch.zeros_like(got[1]))
    assert len(taken) == 2
    assert not any(t[: 2 * k.shape[1]].any() for t in taken)


def test_padding_and_neighbours_change_nothing(operands):
    q, k, v, starts, lengths = operands
    together = launch(q, k, v, starts, lengths)
    own = slice(int(starts[1]), int(lengths[1]))
    for parallel in (False, True):
        alone = launch(q[1:], k[1:, :, own], v[1:, :, own], parallel=parallel)
        assert torch.equal(alone, together[1:])


def test_splits_counted_from_the_cache_are_caught(operands):
    """The fault: splits aligned to the cache instead of to the row's first token."""
    q, k, v, starts, lengths = operands
    k, v = (t[1:].nan_to_num(0.0) for t in (k, v))
    own = slice(int(starts[1]), int(lengths[1]))
    right = launch(q[1:], k[:, :, own], v[:, :, own])
    hidden = k.clone()
    q_wide = torch.cat([q[1:], torch.ones_like(q[1:, :, :, :1])], -1)
    hidden = torch.cat([hidden, torch.zeros_like(hidden[..., :1])], -1)
    hidden[:, :, : own.start, -1] = -3e4  # padding masked by a large negative score
    pad = (0, 31)
    q_wide, hidden, v_wide = (torch.nn.functional.pad(t, pad) for t in (q_wide, hidden, v))
    v_wide = torch.nn.functional.pad(v, (0, 32))
    faulty = causal._launch(
        q_wide, hidden, v_wide, None, lengths[1:], causal.Kind(32**-0.5), SMALL, parallel=False
    )[..., :32]
    torch.testing.assert_close(faulty, right, atol=1e-2, rtol=1e-2)
    assert not torch.equal(faulty, right)


def test_a_query_before_the_first_token_gives_zeros(device):
    q = torch.randn(1, 2, 8, 32, device=device)
    k = torch.randn(1, 2, 8, 32, device=device)
    starts = torch.tensor([5], device=device)
    for parallel in (False, True):
        out = launch(q, k, k, starts, parallel=parallel)
        assert torch.equal(out[:, :, :5], torch.zeros_like(out[:, :, :5]))
        assert out[:, :, 5:].abs().min() > 0


def test_strides_change_nothing(operands):
    q, k, v, starts, lengths = operands
    want = launch(q, k, v, starts, lengths)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    assert torch.equal(launch(q, k, v, starts, lengths), want)


def test_what_it_cannot_do_is_refused(device):
    q = torch.ones(1, 3, 4, 32, device=device)
    with pytest.raises(ValueError, match="over"):
        causal.attention(q, q[:, :2], q[:, :2])
    with pytest.raises(ValueError, match="head_dim 512"):
        causal.attention(*(q.repeat(1, 1, 1, 16),) * 3)
    with pytest.raises(TypeError, match="float32"):
        causal.attention(q, q.half(), q.half())
    assert causal.attention(q[:0], q[:0], q[:0]).shape == (0, 3, 4, 32)


KINDS_OF_DTYPES = [
    *((name, torch.float16) for name in KINDS),
    ("all", torch.float32),
    ("alibi", torch.float32),
    *(
        pytest.param(name, torch.float32, marks=[] if ON_GPU else pytest.mark.slow)
        for name in ("window", "sinks")
    ),
    *((name, torch.bfloat16) for name in KINDS if ON_GPU),
]


@pytest.mark.parametrize(("name", "dtype"), KINDS_OF_DTYPES, ids=str)
def test_kinds_are_accurate_and_the_same_in_any_slice(operands, name, dtype):
    kind = KINDS[name]
    q, k, v, starts, lengths = operands
    want = exact(*operands, kind)
    whole = launch(*operands, kind=kind)
    # A score of s has an error of s * eps(float32), which the exponential passes on.
    budget = 4 * torch.finfo(dtype).eps
    if kind.slopes is not None:
        budget += float(kind.slopes.max()) * k.shape[2] * torch.finfo(torch.float32).eps
    assert (whole.double() - want).norm() / want.norm() < budget
    for first, last in ((0, 20), (19, 20)):
        part = q[:, :, first:last], k, v, starts, lengths - 20 + last
        for parallel in (False, True):
            got = launch(*part, kind=kind, parallel=parallel)
            assert torch.equal(got, whole[:, :, first:last]), (first, last, parallel)
    own = slice(int(starts[1]), int(lengths[1]))
    for parallel in (False, True):
        alone = launch(q[1:], k[1:, :, own], v[1:, :, own], kind=kind, parallel=parallel)
        assert torch.equal(alone, whole[1:]), parallel


def test_a_sliding_cache_that_dropped_tokens_changes_nothing(operands):
    """Column 0 of the cache is token 70, so the row's first one stands at column -70."""
    q, k, v, _, _ = (t[:1] for t in operands)
    for kind in (KINDS["window"], KINDS["all"]):
        whole = launch(q, k, v, kind=kind)
        starts = torch.tensor([-70], device=q.device)
        for queries in (slice(0, 20), slice(19, 20)):
            for parallel in (False, True):
                got = launch(
                    q[:, :, queries],
                    k[:, :, 70:],
                    v[:, :, 70:],
                    starts,
                    kind=kind,
                    parallel=parallel,
                )
                assert torch.equal(got, whole[:, :, queries]), (queries, parallel)


def test_a_window_counted_from_the_cache_is_caught(operands):
    """The planted fault: a cache that dropped tokens, whose row is taken to begin at column 0."""
    q, k, v, _, _ = (t[:1] for t in operands)
    whole = launch(q, k, v, kind=KINDS["window"])
    faulty = launch(q, k[:, :, 70:], v[:, :, 70:], kind=KINDS["window"])
    torch.testing.assert_close(faulty, whole, atol=1e-2, rtol=1e-2)
    assert not torch.equal(faulty, whole)


@pytest.mark.parametrize("dims", [(80, 80), (24, 40), (192, 128)], ids=str)
def test_head_dims(dims, dtype, device):
    q, k = (torch.randn(1, h, n, dims[0], device=device).to(dtype) for h, n in ((2, 6), (1, 70)))
    v = torch.randn(1, 1, 70, dims[1], device=device).to(dtype)
    want = exact(q, k, v, torch.tensor([0]), torch.tensor([70]))
    whole = launch(q, k, v)
    assert (whole.double() - want).norm() / want.norm() < 4 * torch.finfo(dtype).eps
    assert torch.equal(launch(q, k, v, parallel=True), whole)
    assert torch.equal(launch(q[:, :, 5:], k, v, parallel=True), whole[:, :, 5:])


def test_the_host_counts_the_splits_that_the_kernels_walk():
    config = AttentionConfig(32, 32, TILE, TILE, DECODE, DECODE, 16, short_splits=2)
    starts = [0, 32, 64, 192, 320]
    for tokens in range(1, 320):
        assert config.splits(tokens) == sum(start < tokens for start in starts)


def test_the_programs_of_a_decode_step_have_every_split_once():
    for per_sm, splits, pairs in itertools.product((1, 3, 16), (1, 2, 5, 44), (1, 8, 132, 4096)):
        tile = DecodeTile(4, 2, per_sm)
        config = replace(SMALL, many=tile, short_splits=16)
        used, run = config.decode(4, splits, pairs, 132)
        assert used == (tile if splits * pairs > 132 else config.few)
        programs = -(-splits // run)
        assert 1 <= run <= splits
        assert programs * pairs >= min(splits * pairs, per_sm * 132) / 2
