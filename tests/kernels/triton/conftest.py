"""These tests run on the GPU where there is one, and under Triton's interpreter elsewhere."""

import functools
import inspect
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ndcheck_kernels.scope import registry

if not torch.cuda.is_available():
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    def dot_in_order(self, a, b, d, input_precision, max_num_imprecise_acc):
        """As the hardware does: k ascending, whatever the tile. NumPy's order follows the shape.

        Sums of e4m3 products are exact in float64, and rounded once, as on the CPU.
        """
        if a.dtype.scalar == tl.float8e4nv:
            exact = from_e4m3(a.data).double() @ from_e4m3(b.data).double()
            return interpreter.TensorHandle((exact.float().numpy() + d.data), d.dtype.scalar)
        acc = d.data.astype(d.data.dtype)
        left, right = (t.data.astype(acc.dtype) for t in (a, b))
        for k in range(left.shape[-1]):
            acc += left[:, k : k + 1] * right[k : k + 1, :]
        return interpreter.TensorHandle(acc, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = dot_in_order

    def from_e4m3(codes):
        return torch.from_numpy(np.ascontiguousarray(codes)).view(torch.float8_e4m3fn)

    def fp_to_fp(
        self, source, target, rounding, own=interpreter.InterpreterBuilder.create_fp_to_fp
    ):
        """To e4m3 by torch: the interpreter rounds some of the subnormals and ties otherwise."""
        if target.scalar != tl.float8e4nv:
            return own(self, source, target, rounding)
        wide = torch.from_numpy(np.ascontiguousarray(source.data, dtype=np.float32))
        codes = wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return interpreter.TensorHandle(codes, target.scalar)

    interpreter.InterpreterBuilder.create_fp_to_fp = fp_to_fp

    def inline_asm(self, asm, constraints, operands, types, is_pure, pack):
        """As the hardware runs PTX on registers of 32 bits, by the few instructions that are used.

        Elements that lie side by side in the last dimension are packed, as they are on a GPU.
        """
        n_results = constraints.count("=")
        registers = {
            f"${n_results + pack * i + j}": operand.data.reshape(-1, pack)[:, j].astype(np.int32)
            for i, operand in enumerate(operands)
            for j in range(pack)
        }
        lines = asm.strip("{} ").removeprefix(".reg .b32 t; ").strip("; ").split(";")
        for opcode, line in (line.split(maxsplit=1) for line in lines):
            target, *sources = (part.strip() for part in line.split(","))
            values = [registers[s] if s in registers else int(s, 0) for s in sources]
            registers[target] = INSTRUCTIONS[opcode](*values)
        shape = operands[0].data.shape
        results = [registers[f"${i}"].view(np.int16).reshape(shape) for i in range(n_results)]
        handles = [
            interpreter.TensorHandle(result, each.scalar)
            for result, each in zip(results, types, strict=True)
        ]
        return SimpleNamespace(get_result=handles.__getitem__)

    def by_halves(op, dtype):
        def run(*registers):
            halves = (torch.from_numpy(r.copy()).view(dtype) for r in registers)
            return op(*halves).view(torch.int32).numpy()

        return run

    def and_or(a, mask, base, table):
        assert table == 0xEA
        return a & np.int32(mask) | np.int32(base)

    INSTRUCTIONS = {
        "shr.u32": lambda a, by: (a.view(np.uint32) >> np.uint32(by)).view(np.int32),
        "lop3.b32": and_or,
        "sub.rn.bf16x2": by_halves(torch.sub, torch.bfloat16),
        "mul.rn.bf16x2": by_halves(torch.mul, torch.bfloat16),
        "sub.rn.f16x2": by_halves(torch.sub, torch.float16),
        "mul.rn.f16x2": by_halves(torch.mul, torch.float16),
    }
    interpreter.InterpreterBuilder.create_inline_asm = inline_asm

    BUILTINS: dict[object, list[str]] = {}

    def patch_builtins(package, *builder):
        """As the interpreter's own, which looks through all of Triton at each call in a kernel."""
        if package not in BUILTINS:
            members = inspect.getmembers(package)
            BUILTINS[package] = [n for n, member in members if tl.core.is_builtin(member)]
        for name in BUILTINS[package]:
            member = getattr(package, name)
            if not tl.core.is_builtin(member):
                return  # A kernel that called this one has patched them all.
            interpreter._patch_attr(package, name, member, *builder)

    interpreter._patch_builtin = patch_builtins

    # What follows changes no number, and saves more than half of the time.

    # Whether integers overflow is computed after each operation, and asserted by `debug` only.
    interpreter.interpreter_builder.options = replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )

    def call_in_a_kernel(self, *args, **kwargs):
        """As the interpreter's own, which patches Triton at each call although the kernel's launch
        has; but for `tl.core`, which stays patched.
        """
        if tl.core.is_builtin(tl.core.load):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_in_a_kernel

    @functools.cache
    def tensor_shape(*shape):
        return tl.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))

    def init_tensor(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensor_shape(*(type.shape if type.is_block() else ()))

    tl.tensor.__init__ = init_tensor

    @functools.cache
    def block_shape(*shape, own=tl.block_type.__init__):
        checked = object.__new__(tl.block_type)
        own(checked, tl.int1, list(shape))
        return checked.shape, checked.numel, str(checked.shape)

    def init_block_type(self, element_ty, shape):
        self.shape, self.numel, shown = block_shape(*map(tl.core._unwrap_if_constexpr, shape))
        self.element_ty, self.name = element_ty, f"<{shown}, {element_ty}>"

    tl.block_type.__init__ = init_block_type

    def numpy_dtype(dtype, own=interpreter._get_np_dtype, known={}):  # noqa: B006
        name = dtype.scalar.name
        if name not in known:
            known[name] = own(dtype)
        return known[name]

    interpreter._get_np_dtype = numpy_dtype

    def unwrapped(value, own=tl.core._unwrap_if_constexpr):
        return own(value) if isinstance(value, (tl.constexpr, tl.tuple, tuple, list)) else value

    tl.core._unwrap_if_constexpr = unwrapped

    def with_element_type(self, element):
        return self if element is self.element_ty else tl.block_type(element, self.shape)

    tl.block_type.with_element_ty = with_element_type

    def same_or_equal(self, other, own=tl.dtype.__eq__):
        return self is other or own(self, other)

    tl.dtype.__eq__ = same_or_equal

    def cast(self, source, target, *rounding, own=TritonSemantic.cast):
        return source if source.dtype is target.scalar else own(self, source, target, *rounding)

    TritonSemantic.cast = cast

    def broadcast(self, left, right, own=TritonSemantic.broadcast_impl_value):
        # Equal shapes are one object, and of scalars both are ().
        same = left.shape is right.shape
        return (left, right) if same else own(self, left, right)

    TritonSemantic.broadcast_impl_value = broadcast

    # Of the interpreter's builder each type is its own, and was a copy of itself.
    tl.block_type.to_ir = lambda self, builder: self

# The interpreter computes bf16 dots and sums wrongly and silently, so bf16 needs the GPU.
DTYPES = [torch.float16, torch.float32]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/kernels/triton" in item.path.as_posix():
            # NumPy, under the interpreter, warns of the infinities and NaN that tests plant.
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning"))


def pytest_generate_tests(metafunc):
    named = {name for mark in metafunc.definition.iter_markers("parametrize")
             for name in mark.args[0]}  # fmt: skip
    if "dtype" in metafunc.fixturenames and "dtype" not in named:
        metafunc.parametrize("dtype", DTYPES, ids=[str(d).removeprefix("torch.") for d in DTYPES])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def sizes():
    """Of a decoder that the interpreter runs in seconds."""
    return {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }


@pytest.fixture
def batch_sizes():
    """M to compare: all of them on a GPU, a few where each takes the interpreter seconds."""
    if torch.cuda.is_available():
        powers = [p + d for p in (512, 1024, 2048) for d in (-1, 0, 1)]
        return [*range(1, 301), *powers]
    return [1, 2, 3, 16, 17, 33]


@pytest.fixture
def wide():
    """Random operands of wide range with cancellation: no two summation orders agree on them."""

    def draw(*shape, dtype, device):
        values = (
            torch.randn(shape, device=device) * torch.randint(-5, 6, shape, device=device).exp2()
        )
        return values.to(dtype)

    return draw


@pytest.fixture
def cancelling():
    """x [M, K] and w [N, K] whose exact product is zero: what remains is rounding, so every bit of
    the result tells the order of summation."""

    def draw(m, n, k, *, dtype, device):
        a, b = (torch.randn(rows, k // 2, device=device).to(dtype) for rows in (m, n))
        order = torch.randperm(k, device=device)
        return torch.cat([a, a], 1)[:, order].contiguous(), torch.cat([b, -b], 1)[
            :, order
        ].contiguous()

    return draw


@pytest.fixture
def assert_accurate():
    def check(result, exact, stock):
        """At most twice the error of torch in the same dtype, or a few roundings of the result."""
        scale = exact.abs().max().item()
        # fp32 products are one long chain of fused multiply-adds, where torch adds in blocks.
        roundings = 16 if result.dtype == torch.float32 else 1
        floor = roundings * torch.finfo(result.dtype).eps * scale
        error = (result.double() - exact).abs().max().item()
        stock_error = (stock.double() - exact).abs().max().item()
        assert error <= max(2 * stock_error, floor), f"{error:.3g}, torch {stock_error:.3g}"

    return check


@pytest.fixture
def assert_batch_invariant():
    """The property itself: op(rows)[i] has the same bits as op(rows[i:i+1]) in any company."""

    def check(op, rows, sizes):
        alone = op(rows[:1])
        assert not alone.isnan().any()
        for m in sizes:
            for position in {0, m // 2, m - 1}:
                batch = rows[1 : m + 1].clone()
                batch[position] = rows[0]
                if position:
                    batch[0] = float("nan")
                if position < m - 1:
                    batch[m - 1] = float("inf")
                got = op(batch)[position]
                assert torch.equal(got, alone[0]), f"M={m}, row {position}"

    return check


@pytest.fixture
def cuda_registrations(device, monkeypatch):
    """What `cuda` registers is what the scope runs: without a GPU, for CPU tensors."""
    registry.covered_ops("cpu")
    registry.covered_ops("cuda")
    if device == "cpu":
        monkeypatch.setitem(registry._implementations, "cpu", registry._implementations["cuda"])
    registry.resolved.clear()
    yield
    registry.resolved.clear()
