"""Rotary embeddings past the mode: what is exact is judged once, all else op by op."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.models.rows.rotary import judged_once
from ndcheck_kernels.scope import mode


@pytest.fixture
def dispatched(monkeypatch):
    """The names of ops that the scope's mode has seen."""
    seen, own = [], mode._InvariantMode.__torch_dispatch__

    def note(self, func, types, args=(), kwargs=None):
        seen.append(func._schema.name)
        return own(self, func, types, args, kwargs)

    monkeypatch.setattr(mode._InvariantMode, "__torch_dispatch__", note)
    return seen


def draw(length, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(length)
    q, k = (torch.randn(2, heads, length, 16, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(2, length, 16, generator=generator) for _ in range(2))
    return [x.to(dtype) for x in (q, k, cos, sin)]


def test_exact_ops_are_judged_once_and_have_their_own_bits(dispatched):
    rotate = judged_once(apply_rotary_pos_emb)
    with torch.inference_mode(), invariant_kernels():
        for length in (1, 7, 33):
            q, k, cos, sin = draw(length)
            expected = apply_rotary_pos_emb(q, k, cos, sin)
            dispatched.clear()
            got = rotate(q, k, cos, sin)
            assert bool(dispatched) == (length == 1)  # Only the first of its kind.
            assert all(map(torch.equal, got, expected))
        q, k, cos, sin = draw(7, torch.float32)
        rotate(q, k, cos, sin)
        assert dispatched


def test_what_rounds_by_itself_stays_in_the_mode(dispatched):
    def decaying(q, k, cos, sin):
        return apply_rotary_pos_emb(q * cos.exp()[:, None], k, cos, sin)

    rotate, (q, k, cos, sin) = judged_once(decaying), draw(7)
    with torch.inference_mode(), invariant_kernels() as scope:
        for n_fired in (1, 2, 3):
            dispatched.clear()
            rotate(q, k, cos, sin)
            assert "aten::exp" in dispatched
            assert scope.fires["exp"] == n_fired


def test_another_mode_sees_every_op(dispatched):
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    rotate, (q, k, cos, sin) = judged_once(apply_rotary_pos_emb), draw(7)
    with torch.inference_mode(), invariant_kernels():
        rotate(q, k, cos, sin)
        for _ in range(2):
            seen = []
            with Recorder():
                rotate(q, k, cos, sin)
            assert torch.ops.aten.cat.default in seen


def test_outside_of_a_scope_nothing_changes(dispatched):
    rotate, (q, k, cos, sin) = judged_once(apply_rotary_pos_emb), draw(7)
    assert all(map(torch.equal, rotate(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin)))
    assert not rotate.judged
