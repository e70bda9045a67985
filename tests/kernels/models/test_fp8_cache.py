"""The FP8 key-value cache: what it stores, and attention over it in the order of any other."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers import StaticCache

import ndcheck_kernels
from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.models.caches.argument import cache_argument
from ndcheck_kernels.models.caches.fp8 import as_codes, keep_fp8
from ndcheck_kernels.ops.attention import attention_op

GRID = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
GRID = GRID[GRID.isfinite()]
CONFIG = transformers.Qwen3Config(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
)  # fmt: skip


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=50))
def test_codes_are_the_nearest_numbers(values):
    codes = as_codes(torch.tensor(values, dtype=torch.float32)).double()
    wanted = torch.tensor(values, dtype=torch.float64).clamp(-448, 448)
    assert torch.equal((codes - wanted).abs(), (GRID[:, None] - wanted).abs().amin(0))


def test_numbers_at_the_ends_of_the_range():
    found = as_codes(torch.tensor([0.0, -0.0, 1e-45, 2.0**-9, 2.0**-10, 448, 1e38, -torch.inf]))
    assert found.float().tolist() == [0, 0, 0, 2.0**-9, 0, 448, 448, -448]
    assert as_codes(torch.tensor([torch.nan])).float().isnan().all()


def cache_of(n_columns, dtype=torch.bfloat16):
    cache = StaticCache(config=CONFIG, max_cache_len=n_columns)
    keep_fp8(cache, dtype)
    return cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_it_stores_a_byte_a_number_wherever_the_row_lies(dtype):
    keys, values = (torch.randn(3, 2, 7, 16).to(dtype) * 3 for _ in range(2))
    whole, apart = cache_of(9, dtype), cache_of(9, dtype)
    whole.update(keys, values, 0)
    for i in range(7):
        apart.update(keys[:, :, i : i + 1], values[:, :, i : i + 1], 0)
    held = whole.layers[0]
    assert held.keys.dtype == torch.float8_e4m3fn
    assert held.keys.nbytes == 3 * 2 * 9 * 16
    expected = torch.zeros(3, 2, 9, 16)
    expected[:, :, :7] = as_codes(keys).float()
    assert torch.equal(held.keys.float(), expected)
    for name in ("keys", "values"):
        one, other = (getattr(cache.layers[0], name).float() for cache in (whole, apart))
        assert torch.equal(one, other)
    # What it gives outside of a scope are the same numbers, in the model's dtype.
    stock = cache_of(9, dtype).update(keys, values, 0)
    assert stock[0].dtype == dtype
    assert torch.equal(stock[0].float(), held.keys.float())
    whole.reset()
    assert not whole.layers[0].keys.float().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_takes_codes_as_the_numbers_that_they_are(dtype):
    query = torch.randn(2, 4, 5, 16).to(dtype)
    keys, values = (as_codes(torch.randn(2, 2, 300, 16)) for _ in range(2))
    spans = torch.tensor([[[0, 300]], [[7, 290]]], dtype=torch.int32)
    with invariant_kernels():
        got = attention_op(query, keys, values, spans, 0.25)
        wide = attention_op(query, keys.to(dtype), values.to(dtype), spans, 0.25)
    assert torch.equal(got, wide)
    other = keys.clone()
    other.view(torch.uint8)[:, :, 20] ^= 0x80  # A sign.
    with invariant_kernels():
        assert not torch.equal(attention_op(query, other, values, spans, 0.25), got)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(CONFIG, dtype=torch.bfloat16).eval()


def logits(model, rows, chunk, keep=keep_fp8):
    """Of each row's last token, the prompt fed ``chunk`` columns at a time."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache = StaticCache(config=CONFIG, max_cache_len=width)
    keep(cache, torch.bfloat16)
    with ndcheck_kernels.invariant_model(model), invariant_kernels(), torch.no_grad():
        for start in range(0, width, chunk):
            part = slice(start, start + chunk)
            out = model(
                ids[:, part], attention_mask=mask, position_ids=positions[:, part],
                **{cache_argument(model.forward): cache},
            )  # fmt: skip
    return out.logits[:, -1]


def test_a_row_has_its_bits_in_any_company_however_it_is_cut(model):
    probe, others = list(range(3, 20)), [[1, 2, 3], list(range(40)), [5] * 17]
    alone = logits(model, [probe], 100)[0]
    for chunk in (100, 7, 1):
        together = logits(model, [others[0], probe, *others[1:], probe], chunk)
        assert torch.equal(together[1], alone)
        assert torch.equal(together[4], alone)
    assert not torch.equal(logits(model, [probe], 100, keep=lambda *_: None)[0], alone)


def test_numbers_are_those_of_rounded_keys_and_values(model):
    """transformers' own model in float64 whose cache rounds what it is given."""

    class Rounding(StaticCache):
        def update(self, key, value, *rest, **named):
            narrow = (x.clamp(-448, 448).float().to(torch.float8_e4m3fn) for x in (key, value))
            return super().update(*(x.double() for x in narrow), *rest, **named)

    ids = torch.tensor([list(range(3, 20))])
    plain = transformers.AutoModelForCausalLM.from_config(CONFIG, dtype=torch.float64)
    plain.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    wide, name = model.float(), cache_argument(model.forward)
    cache = StaticCache(config=CONFIG, max_cache_len=17)
    keep_fp8(cache, torch.float32)
    with torch.no_grad():
        rounded = plain(ids, **{name: Rounding(config=CONFIG, max_cache_len=17)})
        exact = plain(ids, use_cache=False)
        with ndcheck_kernels.invariant_model(wide), invariant_kernels():
            got = wide(ids, **{name: cache})
    error = (got.logits.double() - rounded.logits).norm() / rounded.logits.norm()
    away = (exact.logits - rounded.logits).norm() / rounded.logits.norm()
    # A key next to a tie may round the other way in float32.
    assert error < away / 4
    assert away > 2.0**-10


def test_other_layers_are_refused_by_name():
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    cache = StaticCache(config=config, max_cache_len=20)
    with pytest.raises(ValueError, match="layer 1 keeps a StaticSlidingWindowLayer"):
        keep_fp8(cache, torch.float32)
