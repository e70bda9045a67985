"""The assertions: each passes, fails, and refuses to pass where it could not have failed."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch
import transformers

from ndcheck.testing import assert_batch_invariant, assert_deterministic

SMALL = {"loads": [1, 4], "samples": 40, "max_tokens": 8}
Pair = collections.namedtuple("Pair", "rows one")
ROWS = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))


def test_models():
    assert_deterministic("scripted:clean", **SMALL)
    with pytest.raises(AssertionError) as caught:
        assert_deterministic("scripted:batch-dependent", **SMALL)
    command, verdict, reason = str(caught.value).splitlines()
    assert command.startswith(
        "ndcheck run --model scripted:batch-dependent --loads 1,4 -n 40 --max-tokens 8"
    )
    seen = "tokens diverged in 4 of 4 loads; 4 of them repeated, alike each time"
    assert (verdict, reason) == ("FAIL", f"batch-size: {seen}")
    with pytest.raises(AssertionError, match="INCONCLUSIVE"):
        assert_deterministic("scripted:never-batches", **SMALL)


@pytest.mark.parametrize(
    "result",
    ["text", 1, 1.5, float("nan"), b"x", ROWS, ROWS.bfloat16().t(), np.arange(3), np.float32(2)],
)
def test_equal_calls_pass(result):
    assert_deterministic(lambda: {"a": [result, result], "b": (None, "c")})


@pytest.mark.parametrize("number", [ROWS[:1, 0], ROWS.t()[:1, :1], ROWS[:1, 1:2]])
def test_a_single_number_has_any_stride(number):
    assert_deterministic(lambda: number)
    calls = iter([number, number + 1])
    with pytest.raises(AssertionError, match="call 2"):
        assert_deterministic(lambda: next(calls), n=2)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("a", "b"),
        (1.0, 1),
        (0.0, -0.0),
        ([1], [1, 2]),
        ([1], (1,)),
        ({"a": 1}, {"b": 1}),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float16)),
        (torch.zeros(2), torch.zeros(1, 2)),
        ({"a": 1, "b": None}, {"a": 1, "b": {}}),
        ({"a": 1, "b": None}, {"a": 1}),
        (np.array(["x" * 50], dtype=object), np.array(["y" * 50], dtype=object)),
        (np.float32(1), np.nextafter(np.float32(1), np.float32(2))),
    ],
)
def test_one_call_that_differs_fails(first, second):
    results = itertools.chain([first] * 9, [second])
    with pytest.raises(AssertionError, match="call 10"):
        assert_deterministic(lambda: next(results))


def test_a_buffer_that_is_written_again_is_no_excuse():
    buffer = torch.zeros(3)
    with pytest.raises(AssertionError, match="call 2"):
        assert_deterministic(lambda: buffer.add_(1))


def test_inputs_and_options_reach_the_function():
    assert_deterministic(lambda a, b: a + b, 1, b=2)
    rng = random.Random(0)
    with pytest.raises(AssertionError):
        assert_deterministic(lambda low, high: rng.randint(low, high), 0, 2**60)


def gradient(x):
    x.square().sum().backward()
    return x.grad


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (torch.Tensor.add_, ROWS),
        (lambda x, one: x + 10**5000 * one, 7),
        (lambda x, one: x["rows"].add_(one), {"rows": ROWS}),
        (lambda x, one: x["rows"].add_(one), collections.OrderedDict(rows=ROWS)),
        (lambda x, one: x.rows.add_(x.one), Pair(ROWS, 1)),
        (lambda x, one: x.sort() or list(x), [3, 2]),
        (lambda x, one: x.__iadd__(one), np.arange(3)),
        (lambda x, one: gradient(x), ROWS.clone().requires_grad_()),
        # New texts, equal ones: at other places in memory.
        (lambda x, one: np.array([str(x) * 50], dtype=object), 7),
        (lambda x, one: torch.fft.fft(x).conj(), ROWS),
        # What draws moves on with each draw.
        (lambda x, one: torch.rand(one + 1, generator=x), torch.Generator().manual_seed(3)),
        (lambda x, one: x["rng"].normal(size=2), {"rng": np.random.default_rng(3)}),
        (lambda x, one: x.rand(2), np.random.RandomState(3)),
        (lambda x, one: [x[0].random()], [random.Random(3)]),
        (lambda x, one: x + one * 1j, 0.5),
    ],
)
def test_a_function_that_writes_into_its_input_may_be_deterministic(function, value):
    assert_deterministic(function, value, 1)


def test_what_a_function_is_given_to_draw_by_stays_as_it_was():
    ours, theirs = (torch.Generator().manual_seed(3) for _ in range(2))
    assert_deterministic(lambda x: torch.rand(2, generator=x), ours)
    assert torch.equal(torch.rand(2, generator=ours), torch.rand(2, generator=theirs))
    with pytest.raises(AssertionError, match="differs"):  # A draw by another seed is another.
        assert_deterministic(lambda x: torch.rand(2, generator=x.manual_seed(x.seed())), ours)


def test_an_input_that_the_first_call_uses_up_is_no_nondeterminism():
    with pytest.raises(TypeError, match=r"list_iterator.*give a list"):
        assert_deterministic(list, iter([1, 2]))
    with pytest.raises(TypeError, match=r"generator.*give a list"):
        assert_deterministic(lambda x: list(x["rows"]), {"rows": (x for x in ROWS)})
    assert_deterministic(list, [1, 2])


def test_an_op_may_write_into_its_batch():
    rows = ROWS.clone()
    assert_batch_invariant(lambda x: x.mul_(2), rows)
    assert torch.equal(rows, ROWS)
    with pytest.raises(AssertionError, match="batch of 2 differs"):
        assert_batch_invariant(lambda x: x.clamp_(max=x.mean()), rows)


@pytest.mark.parametrize("odd_calls", [{0}, {3}, range(1, 10**6, 3)])
def test_what_changes_from_call_to_call_is_not_laid_to_the_batch(odd_calls):
    calls = itertools.count()
    with pytest.raises(AssertionError, match=r"row \d alone is another when the call is repeated"):
        assert_batch_invariant(lambda x: x + 1e-3 * (next(calls) in odd_calls), ROWS)


@pytest.mark.parametrize("result", [None, [], {}, "", torch.zeros(0)])
def test_nothing_to_compare_is_no_pass(result):
    with pytest.raises(AssertionError, match="vacuous"):
        assert_deterministic(lambda: result)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(TypeError, match="a object"):
        assert_deterministic(object)
    with pytest.raises(ValueError, match="n = 1"):
        assert_deterministic(lambda: 1, n=1)


def test_ops_that_are_invariant():
    assert_batch_invariant(torch.relu, ROWS)
    assert_batch_invariant(lambda x, y: x * y, ROWS.bfloat16(), torch.tensor(2))
    assert_batch_invariant(lambda x: x.argmax(dim=-1), ROWS)


def test_the_invariant_kernels_pass_where_a_split_sum_fails():
    from ndcheck_kernels import invariant_kernels

    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1))

    def invariant(batch, weight):
        with invariant_kernels():
            return batch @ weight

    def split(batch, weight):
        half = 32 if len(batch) > 1 else 64
        return batch[:, :half] @ weight[:half] + batch[:, half:] @ weight[half:]

    assert_batch_invariant(invariant, ROWS, weight)
    with pytest.raises(AssertionError, match="batch of 2 differs"):
        assert_batch_invariant(split, ROWS, weight, batch_sizes=(1, 2))


@pytest.mark.parametrize(
    ("op", "message"),
    [
        (lambda x: x + 1e-3 * (len(x) == 17), r"batch of 17 differs .*: \d+ of 256 bytes"),
        (lambda x: x + torch.arange(len(x))[:, None], "row 1 in slot 1 of a batch of 2"),
        (lambda x: x - x.mean(dim=0), "row 0 in slot 0 of a batch of 2"),
    ],
)
def test_batch_slot_and_neighbours_are_seen(op, message):
    if "row 0" in message:  # alone it is zero for every row, which is no evidence
        with pytest.raises(AssertionError, match="vacuous"):
            assert_batch_invariant(op, ROWS)
        op = lambda x: 2 * x - x.mean(dim=0)  # noqa: E731
    with pytest.raises(AssertionError, match=message):
        assert_batch_invariant(op, ROWS)


def test_ops_that_cannot_fail_are_vacuous():
    with pytest.raises(AssertionError, match="vacuous"):
        assert_batch_invariant(torch.zeros_like, ROWS)
    with pytest.raises(ValueError, match="at least 2"):
        assert_batch_invariant(torch.relu, ROWS[:1])
    with pytest.raises(ValueError, match="above 1"):
        assert_batch_invariant(torch.relu, ROWS, batch_sizes=(1,))
    with pytest.raises(ValueError, match=r"shape \[64\]"):
        assert_batch_invariant(lambda x: x[0], ROWS)


@pytest.mark.parametrize("result", [(1,), {"a": 1}, None, ROWS.numpy()])
def test_an_op_that_returns_no_tensor_is_told_what_to_return(result):
    kind = type(result).__name__
    with pytest.raises(TypeError, match=rf"the op has to return a tensor \[B, ...\], not a {kind}"):
        assert_batch_invariant(lambda x: result, ROWS)
    with pytest.raises(TypeError, match="rows: give a tensor"):
        assert_batch_invariant(torch.relu, [1, 2])


def test_batch_sizes_may_be_any_numbers_of_rows_and_no_others():
    assert_batch_invariant(torch.relu, ROWS, batch_sizes=iter([2, 3]))
    with pytest.raises(ValueError, match="1 or more"):
        assert_batch_invariant(torch.relu, ROWS, batch_sizes=(-3, 2))


@dataclasses.dataclass
class Result:
    logits: torch.Tensor


class Kept(torch.Tensor):
    """A subclass of somebody's own."""


def cache_of(value):
    cache = transformers.DynamicCache()
    cache.update(torch.full((1, 1, 2, 2), value), torch.zeros(1, 1, 2, 2), 0)
    return cache


@pytest.mark.parametrize(
    "make",
    [
        cache_of,
        lambda value: Result(torch.tensor([value])),
        lambda value: transformers.BatchEncoding({"a": [value]}),
        lambda value: collections.deque([value]),
        lambda value: torch.tensor([value]).as_subclass(Kept),
        lambda value: transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=torch.zeros(1), past_key_values=cache_of(value)
        ),
    ],
)
def test_what_models_return_is_compared(make):
    assert_deterministic(lambda: make(1.0))
    values = itertools.chain([1.0] * 9, [1.0000001])
    with pytest.raises(AssertionError, match="call 10"):
        assert_deterministic(lambda: make(next(values)))


def test_a_cache_among_the_inputs_is_copied():
    """Each call appends to it."""

    def attend(cache):
        return cache.update(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2), 0)

    assert_deterministic(attend, cache_of(1.0))
    assert_deterministic(lambda given: given.pop("a"), transformers.BatchEncoding({"a": 1}))


@pytest.mark.parametrize(
    "tensor",
    [torch.eye(3).to_sparse(), torch.empty(3, device="meta")],
)
def test_tensors_that_are_not_dense_numbers_are_refused(tensor):
    with pytest.raises(TypeError, match="sparse, nested, quantised or meta"):
        assert_deterministic(lambda: tensor)
