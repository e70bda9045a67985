"""Products borrowed from cuBLASLt: the bits of ours, in every form, or our own kernel."""

import threading

import pytest
import torch

from ndcheck_kernels import invariant_kernels
from ndcheck_kernels.cuda import borrowed_ranges
from ndcheck_kernels.cuda.configs import MatmulConfig
from ndcheck_kernels.cuda.products import borrowed, cublaslt, matmul, proofs

SHAPES = [(4096, 4096), (2048, 2048), (1280, 8192)]
ROWS = 129
EVERY = ((1, 1 << 62),)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    proofs.forget()
    monkeypatch.setattr(borrowed, "_verdicts", {})
    monkeypatch.setattr(borrowed, "_warned", set())
    for shape in SHAPES:  # The frozen tables borrow some of these; each test says when.
        monkeypatch.setitem(borrowed_ranges.RANGES, shape, ())
    try:
        cublaslt.library()
    except cublaslt.UnavailableError as error:
        pytest.skip(str(error))
    yield
    proofs.forget()  # What a test planted here is no proof for the tests after it.


@pytest.fixture(params=SHAPES, ids=lambda s: "x".join(map(str, s)))
def operands(request):
    n, k = request.param
    a, b = (torch.randn(rows, k // 2, device="cuda").bfloat16() for rows in (ROWS, n))
    order = torch.randperm(k, device="cuda")
    x = torch.cat([a, a], 1)[:, order].contiguous()
    w = torch.cat([b, -b], 1)[:, order].contiguous()
    return x, w, torch.randn(ROWS, n, device="cuda").bfloat16() * 2.0**-8


@pytest.fixture
def calls(monkeypatch):
    """How many products were borrowed."""
    seen = []
    own = cublaslt.product

    def product(*args):
        seen.append(args)
        return own(*args)

    monkeypatch.setattr(cublaslt, "product", product)
    return seen


def borrow(monkeypatch, w):
    monkeypatch.setitem(borrowed_ranges.RANGES, tuple(w.shape), EVERY)


def test_every_form_has_our_bits(operands, calls, monkeypatch):
    x, w, c = operands
    bias = torch.randn(len(w), device="cuda").bfloat16()
    forms = {
        "linear": lambda x, c: torch.nn.functional.linear(x, w),
        "residual": lambda x, c: matmul.matmul(x, w.t(), c),
        "addmm": lambda x, c: torch.addmm(c, x, w.t()),
        "bias": lambda x, c: torch.nn.functional.linear(x, w, bias),
        "scaled": lambda x, c: torch.addmm(c, x, w.t(), beta=0.5, alpha=2),
        "out": lambda x, c: torch.mm(x, w.t(), out=torch.empty_like(c)),
        "wide out": lambda x, c: matmul.matmul(x, w.t(), out=c.float()),
        "by column": lambda x, c: x.t().contiguous().t() @ w.t(),
        "unaligned": lambda x, c: torch.cat([x[:1], x]).view(-1)[x.shape[1] :].view_as(x) @ w.t(),
    }
    with invariant_kernels():
        want = {(name, m): f(x[:m], c[:m]) for name, f in forms.items() for m in (1, 17, ROWS)}
        assert not calls
        borrow(monkeypatch, w)
        for (name, m), result in want.items():
            assert torch.equal(forms[name](x[:m], c[:m]), result), (name, m)
    assert calls


def test_positions_and_numbers_of_rows(operands, calls, monkeypatch):
    x, w, _ = operands
    alone = torch.cat([matmul.linear(row, w) for row in x.split(1)])
    borrow(monkeypatch, w)
    for m in range(1, ROWS + 1, 8):
        first = ROWS - m
        assert torch.equal(matmul.linear(x[first:], w), alone[first:]), m
        filled = torch.cat([x[:1], torch.full_like(x[:m], float("nan"))])
        assert torch.equal(matmul.linear(filled, w)[0], alone[0]), m
    assert calls


def test_another_order_is_refused(operands, monkeypatch):
    """The planted fault: our kernel with one group more."""
    x, w, _ = operands
    groups = 2 if w.shape[0] == 1280 else 1
    config = MatmulConfig("pointer", 64, 64, 64)

    def other(x, w, addend):
        return matmul._launch(x, w.t(), addend, 1.0, 1.0, None, config, groups + 1)

    shape = proofs.Shape(*w.shape, "bfloat16", groups, False)
    assert "other bits" in borrowed.prove(shape, 64, x.device, other)


def test_what_is_not_proven_runs_our_kernel_and_says_so(operands, calls, monkeypatch):
    x, w, _ = operands
    want = matmul.linear(x, w)
    borrow(monkeypatch, w)
    monkeypatch.setattr(borrowed, "prove", lambda *args: "cuBLASLt has other bits at 129 rows")
    with pytest.warns(UserWarning, match="is not borrowed from cuBLASLt"):
        assert torch.equal(matmul.linear(x, w), want)
    assert not calls


def test_graphs_keep_what_was_proven_before_them(operands, calls, monkeypatch):
    x, w, _ = operands
    want = matmul.linear(x, w)
    borrow(monkeypatch, w)
    matmul.linear(x, w)
    calls.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = matmul.linear(x, w)
        n_calls = len(calls)
        matmul.linear(x[:3], w)  # Not proven: nothing can be tried here.
    assert len(calls) == n_calls > 0
    for _ in range(2):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, want)


def test_threads_borrow_together_and_stock_keeps_its_settings(operands, monkeypatch):
    x, w, _ = operands
    want = matmul.linear(x, w)
    flags = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    borrow(monkeypatch, w)
    seen, start = {}, threading.Barrier(3, timeout=60)

    def ours(name):
        with torch.cuda.stream(torch.cuda.Stream()), invariant_kernels():
            start.wait()
            seen[name] = [x @ w.t() for _ in range(50)]
            torch.cuda.current_stream().synchronize()

    def stock():
        torch.cuda.set_device(x.device)  # Else cuBLAS warns that the thread has no context.
        alone = x @ w.t()  # In this thread: cuBLAS has a handle for each.
        start.wait()
        seen["stock"] = [x @ w.t() for _ in range(50)]
        seen["alone"] = [alone]
        torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    jobs = ((ours, ("first",)), (ours, ("second",)), (stock, ()))
    threads = [threading.Thread(target=job, args=args, daemon=True) for job, args in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    torch.cuda.synchronize()
    for name in ("first", "second"):
        assert [i for i, y in enumerate(seen[name]) if not torch.equal(y, want)] == [], name
    different = [i for i, y in enumerate(seen["stock"]) if not torch.equal(y, seen["alone"][0])]
    assert different == [], "stock"
    assert torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction == flags


def test_proofs_are_kept_on_disk(operands, monkeypatch):
    x, w, _ = operands
    borrow(monkeypatch, w)
    matmul.linear(x, w)
    proofs.forget()
    monkeypatch.setattr(borrowed, "_verdicts", {})
    monkeypatch.setattr(borrowed, "prove", lambda *args: pytest.fail("proven twice"))
    matmul.linear(x, w)
    assert "1 shapes" in proofs.summary(x.device)
