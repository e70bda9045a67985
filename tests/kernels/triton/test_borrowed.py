"""When a product is borrowed: proofs, what they catch, and where they are kept. No GPU needed.

A fake library takes cuBLASLt's place: our own kernel, which has our bits, or another order.
"""

from __future__ import annotations

import json
import os

import pytest
import torch

from ndcheck_kernels.cuda import borrowed_ranges, configs
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import borrowed, cublaslt, matmul, proofs
from ndcheck_kernels.cuda.products.proofs import Proofs

N, K = 48, 512
CONFIG = MatmulConfig("pointer", 16, 16, 64)


def product_in(groups):
    def product(x, w, y, addend=None):
        out = None if y.dtype == x.dtype else y
        result = matmul._launch(x, w.t(), addend, 1.0, 1.0, out, CONFIG, groups)
        return y.copy_(result)

    return product


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path, device):
    """Borrow everywhere, from a library with the bits of one group."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(borrowed, "_verdicts", {})
    monkeypatch.setattr(borrowed, "_warned", set())
    monkeypatch.setattr(borrowed, "ALIGNMENT", 64)  # The CPU's allocator's.
    for name in ("_proofs", "_in_force"):
        monkeypatch.setattr(proofs, name, {})
    monkeypatch.setattr(proofs, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(proofs, "environment", lambda _: {"gpu": "fake", "cublaslt": "1"})
    monkeypatch.setattr(cublaslt, "product", product_in(1))
    monkeypatch.setitem(borrowed_ranges.RANGES, (N, K), ((1, 8), (17, 1 << 62)))
    return tmp_path / "ndcheck"


@pytest.fixture
def operands(device):
    def draw(m, dtype=torch.float16):
        return (torch.randn(rows, K, device=device).to(dtype) for rows in (m, N))

    return draw


def test_ranges_choose_by_shape_and_rows(monkeypatch):
    chosen = [configs.borrows(m, N, K, 2, 90) for m in (1, 8, 9, 16, 17, 4096)]
    assert chosen == [True, True, False, False, True, True]
    assert not configs.borrows(1, N, K, 4, 90)  # float32
    assert not configs.borrows(1, N, K, 2, 80)  # not proven
    monkeypatch.setitem(borrowed_ranges.RANGES, (N, K + 8), ())
    assert not configs.borrows(1, N, K + 8, 2, 90)
    assert not configs.borrows(20, N, 8192, 2, 90)  # Narrow, and not measured.


def test_a_library_with_our_bits_is_borrowed_once_it_is_proven(operands, fake, monkeypatch):
    x, w = operands(3)
    tried = []
    own = borrowed.prove
    monkeypatch.setattr(borrowed, "prove", lambda *args: tried.append(args[1]) or own(*args))
    calls = []
    library = cublaslt.product
    monkeypatch.setattr(cublaslt, "product", lambda *args: calls.append(1) or library(*args))
    want = matmul._launch(x, w.t(), None, 1.0, 1.0, None, CONFIG, 1)
    for _ in range(2):
        calls.clear()
        assert torch.equal(matmul.linear(x, w), want)
        assert calls
    assert tried == [3]
    (kept,) = fake.iterdir()
    document = json.loads(kept.read_text())
    assert document["proven"] == {f"float16 {N}x{K} in 1": [3]}
    # Another process, or this one an hour later.
    proofs.forget()
    monkeypatch.setattr(borrowed, "_verdicts", {})
    matmul.linear(x, w)
    matmul.linear(x[:2], w)
    assert tried == [3, 2]
    assert "1 shapes have our bits, seen at 2 numbers of rows" in proofs.summary(x.device)


def test_once_it_is_settled_what_is_unknown_is_computed_by_our_kernel(operands, monkeypatch):
    x, w = operands(3)
    matmul.linear(x, w)
    calls = []
    library = cublaslt.product
    monkeypatch.setattr(cublaslt, "product", lambda *args: calls.append(1) or library(*args))
    monkeypatch.setattr(borrowed, "_settled", False)
    borrowed.settle()
    want = matmul.linear(x, w)
    assert calls == [1]
    assert torch.equal(matmul.linear(x[:2], w), want[:2])
    assert calls == [1]


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (product_in(2), "other bits at 3 rows"),
        (lambda x, w, y, addend=None: y.zero_(), "other bits at 3 rows"),
    ],
    ids=["another order", "nothing computed"],
)
def test_a_library_with_other_bits_is_not(library, reason, operands, monkeypatch):
    x, w = operands(3)
    want = matmul._launch(x, w.t(), None, 1.0, 1.0, None, CONFIG, 1)
    monkeypatch.setattr(cublaslt, "product", library)
    with pytest.warns(UserWarning, match=f"not borrowed from cuBLASLt.*{reason}"):
        assert torch.equal(matmul.linear(x, w), want)
    assert torch.equal(matmul.linear(x[:2], w), want[:2])  # The shape as a whole is out.
    assert reason in proofs.summary(x.device)


def test_operands_that_tell_nothing_prove_nothing(operands, monkeypatch):
    """The proof's own control: an order that shows nowhere would pass for any other."""
    x, _ = operands(3)

    def blind(x, w, y, addend=None):
        return y.zero_()

    shape = proofs.Shape(N, K, "float16", 1, False)
    monkeypatch.setattr(cublaslt, "product", blind)
    ours = lambda x, w, addend: x.new_zeros(len(x), len(w))  # noqa: E731
    assert "another order of K" in borrowed.prove(shape, 3, x.device, ours)


def test_no_library_means_our_kernel(operands, monkeypatch):
    def unavailable(*args):
        raise cublaslt.UnavailableError("libcublasLt.so.13: cannot open")

    x, w = operands(3)
    monkeypatch.setattr(proofs, "environment", unavailable)
    with pytest.warns(UserWarning, match=r"no products are borrowed.*cannot open"):
        y = matmul.linear(x, w)
    assert torch.equal(y, matmul._launch(x, w.t(), None, 1.0, 1.0, None, CONFIG, 1))
    assert "cannot open" in proofs.summary(x.device)


def test_nothing_is_tried_during_a_capture(operands, monkeypatch):
    x, w = operands(3)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(borrowed, "prove", lambda *args: pytest.fail("tried"))
    assert not borrowed.is_proven(x, w, None, 1, lambda *_: None)
    assert borrowed._verdicts == {}


def test_what_cublaslt_cannot_take_as_it_lies_is_ours(operands):
    x, w = operands(20)
    y = x.new_empty(20, N)
    assert borrowed.fits(x, w, y, None)
    assert borrowed.fits(x, w, y, y)
    for a, b, c in (
        (x.float(), w.float(), None),
        (x.t().contiguous().t(), w, None),
        (x.new_empty(20, K + 8)[:, 8:], w, None),
        (x.new_empty(20, K + 4)[:, :K], w, None),
        (x, w, y.float()),
        (x, w, y[:1].expand(20, N)),
    ):
        assert not borrowed.fits(a, b, y.to(a.dtype), c)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"environment": {}}', '{"environment": {"gpu": "other"}, "proven": {}}'],
)
def test_a_damaged_file_is_proven_again(text, operands, fake):
    x, w = operands(3)
    matmul.linear(x, w)
    (kept,) = fake.iterdir()
    kept.write_text(text)
    read = Proofs.read(proofs.environment(x.device))
    assert (read.proven, read.failed) == ({}, {})
    read.proven["a"] = {1}
    read.write()
    assert json.loads(kept.read_text())["proven"] == {"a": [1]}


def test_a_lack_of_memory_is_not_kept(operands, fake, monkeypatch):
    def lacking(*args):
        raise torch.OutOfMemoryError

    x, w = operands(3)
    monkeypatch.setattr(borrowed, "prove", lacking)
    matmul.linear(x, w)
    assert not fake.exists()


def test_on_a_cpu_nothing_is_borrowed(operands, monkeypatch):
    x, w = operands(3)
    monkeypatch.undo()
    assert x.is_cuda or not borrowed.fits(x, w, x.new_empty(3, N), None)


def test_two_processes_keep_each_others_proofs(fake):
    first, second = (Proofs.read({"gpu": "fake"}) for _ in range(2))
    first.proven["a"] = {1}
    first.write()
    second.proven["a"] = {2}
    second.failed["b"] = "no"
    second.write()
    both = Proofs.read({"gpu": "fake"})
    assert (both.proven, both.failed) == ({"a": {1, 2}}, {"b": "no"})
    assert [p.suffix for p in fake.iterdir()] == [".json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_to_costs_nothing_but_time(fake):
    fake.mkdir()
    fake.chmod(0o500)
    read = Proofs.read({"gpu": "fake"})
    read.proven["a"] = {1}
    read.write()
    assert list(fake.iterdir()) == []


def test_two_groups_are_two_products_and_one_rounded_addition(operands, monkeypatch):
    x, w = operands(3)
    parts = []
    library = cublaslt.product

    def product(*args):
        parts.append(args[2].dtype)
        return library(*args)

    monkeypatch.setattr(cublaslt, "product", product)
    y = borrowed.product(x, w, x.new_empty(3, N), None, 2)
    assert parts == [torch.float32] * 2
    assert torch.equal(y, matmul._launch(x, w.t(), None, 1.0, 1.0, None, CONFIG, 2))
    with pytest.raises(cublaslt.UnavailableError):
        borrowed.product(x, w, y, y, 2)
