"""A launch whose kernel is kept does what Triton's own look-up would do. No GPU needed.

Triton's driver and compiler are stand-ins that note what they are given, in a process of its own:
this one may have set up the interpreter, which compiles nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

KERNELS = Path(__file__).parents[3] / "kernels"

SETUP = '''
import itertools, json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit

class Driver:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

class Kernel:
    """Named by all that Triton compiles it for."""
    function = packed_metadata = None
    __getitem__ = CompiledKernel.__getitem__
    def _init_handles(self): pass
    def launch_metadata(self, *rest): return None
    def run(self, *launch): seen.append((self.name, *map(plain, launch)))

def compile_(self, key, *rest):
    kernel = self.device_caches[0][0][key] = Kernel()
    kernel.name = f"{self.__name__} {key}"
    return kernel

def plain(x):
    if isinstance(x, torch.Tensor):
        return x.dtype, tuple(x.shape), x.stride(), x.data_ptr() if id(x) in given else "new"
    if hasattr(x, "block_shape"):
        return plain(x.base), tuple(x.shape), tuple(x.strides), tuple(x.block_shape), x.padding
    return x

driver.set_active(Driver())
jit.JITFunction._do_compile = compile_
from ndcheck_kernels.cuda import device
device.on_gpu = lambda _: True
device.capability = lambda _: 90
device.sm_count = lambda _: 132
'''

KEPT = """
from ndcheck_kernels.cuda.products import matmul
find = lambda *_: None

def draw(rows, columns, dtype, extra=0, first=0):
    return torch.zeros(rows * (columns + extra) + 8, dtype=dtype)[first:].as_strided(
        (rows, columns), (columns + extra, 1))

kinds, kept, seen, given = set(), 0, [], set()
for dtype, m, (n, k), extra, first, added in itertools.product(
    (torch.bfloat16, torch.float16), (1, 7, 16, 100, 600, 1024), ((6144, 64), (48, 512), (40, 24)),
    (0, 8, 1), (0, 1), (None, "row", "odd row", "rows"),
):
    x, w = draw(m, k, dtype, extra, first), draw(n, k, dtype)
    c = {None: None, "row": draw(1, n, dtype)[0], "odd row": draw(1, n, dtype, first=1)[0],
         "rows": draw(m, n, dtype)}[added]
    for _ in range(2):
        seen.clear()
        before = dict(matmul._compiled)
        matmul.matmul(x, w.t(), c)
        kept += len(matmul._compiled) == len(before) and len(seen)
        own = dict(matmul._compiled)
        matmul._compiled.clear()
        matmul.matmul(x, w.t(), c)
        assert seen[0] == seen[1], (seen[0], seen[1])
        matmul._compiled.update(own)
        kinds.add(seen[0][0].split()[0])
print(len(kinds), len(matmul._compiled) > 50, kept > 100)
"""

VARIANTS = """
from ndcheck_kernels.cuda.attention import causal
from ndcheck_kernels.cuda.rows import logits
device.has_hopper_kernels = lambda _: True

def columns(n_rows, n_columns, heads):
    return torch.zeros(n_rows, n_columns, heads, 64, dtype=torch.bfloat16).transpose(1, 2)

seen, given, kernels = [], set(), {}
for n_rows, length, cache in itertools.product(
    (1, 2, 5, 16, 70), (1, 2, 3, 4, 5, 8, 16, 17, 100, 112), (120, 133, 368)
):
    bounds = torch.zeros(2, n_rows, dtype=torch.int64).to(torch.int32)
    q, k, v = columns(n_rows, length, 4), columns(n_rows, cache, 2), columns(n_rows, cache, 2)
    for lengths in (bounds[1], bounds.clone()[0]):
        causal.attention(q, k, v, starts=bounds[0], lengths=lengths)
    logits.read_logits(torch.zeros(n_rows * length, 8192))
for kernel, *_ in seen:
    kernels.setdefault(kernel.split()[0], set()).add(kernel)
print(json.dumps({name: len(each) for name, each in kernels.items()}))
"""


def run_alone(script):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", SETUP + script], cwd=KERNELS,
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def test_a_kept_kernel_is_the_one_that_triton_would_find():
    assert run_alone(KEPT).split() == ["3", "True", "True"]


def test_no_number_of_rows_or_tokens_is_compiled_for():
    """What a load may differ in; a kernel takes up to seconds to compile."""
    kernels = json.loads(run_alone(VARIANTS))
    # Whole: one query or several in a tile of 16 rows, for few programs and for many, several in
    # 32 or 64. In parts: 2 to 64 rows. By hand, for many programs: up to 4, 8 or 16 rows.
    assert kernels.pop("_decode_kernel") == 6 + 6
    assert kernels.pop("_decode_hopper_kernel") == 3
    names = {"_prefill_hopper_kernel", "_read_block_kernel", "_combine_kernel"}
    assert kernels == dict.fromkeys(names, 1)
