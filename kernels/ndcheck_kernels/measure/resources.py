"""What a launch compiles to, without a GPU: registers, spills, shared memory, instructions.

Inside `compiling(90)`, or `compiling("gfx942")` for an AMD GPU, the launchers take CPU tensors
(allocated, never read) and compile for that architecture instead of running; the yielded list
receives each compiled kernel once.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from ndcheck_kernels.cuda import device

SHARED_LIMIT: dict[int | str, int] = {
    80: 166912,
    89: 101376,
    90: 232448,
    100: 232448,
    120: 101376,
    "gfx942": 65536,
    "gfx950": 163840,
}
"""Dynamic shared memory a block may use, by compute capability, or by AMD's architecture."""


@dataclass(frozen=True, slots=True)
class Resources:
    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    instructions: frozenset[str]
    """Opcodes of the machine code, without their modifiers; none where it was not disassembled."""


class _NoDriver:
    """As much of a driver as compiling asks for."""

    def __init__(self, architecture: int | str) -> None:
        is_amd = isinstance(architecture, str)
        self.target = GPUTarget("hip" if is_amd else "cuda", architecture, 64 if is_amd else 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return -int(str(self.target.arch).removeprefix("gfx"))  # a key that no real device has

    def get_current_stream(self, _device: int) -> int:
        return 0


@contextmanager
def compiling(architecture: int | str, sm_count: int = 132) -> Iterator[list[Any]]:
    compiled: dict[str, Any] = {}

    def compile_only(self: JITFunction, *args: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *args, warmup=True, **options)
        if kernel is not None:  # What is kept from compiling gives none.
            compiled.setdefault(kernel.hash, kernel)
        kernels[:] = compiled.values()

    run = JITFunction.run
    kernels: list[Any] = []
    here: Any = {
        "capability": lambda _: architecture if isinstance(architecture, int) else 0,
        "sm_count": lambda _: sm_count,
        "on_gpu": lambda _: True,
    }
    # `active` is a property of the driver configuration, so it is replaced by what it would return.
    with (
        patch.multiple(device, **here),
        patch.object(JITFunction, "run", compile_only),
        patch.object(triton.runtime.driver, "_active", _NoDriver(architecture)),
    ):
        yield kernels


def resources(kernel: Any, with_instructions: bool = False) -> Resources:
    """Read a compiled kernel's machine code with the disassembler that Triton ships.

    Instructions take it a third of a second. Of an AMD GPU's, what the assembler says of itself.
    """
    if kernel.metadata.target.backend == "hip":
        return _amd_resources(kernel)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _cuobjdump("-res-usage", cubin)
        code = _cuobjdump("-sass", cubin) if with_instructions else ""
    registers, stack, local = (
        int(_one(rf"{key}:(\d+)", usage)) for key in ("REG", "STACK", "LOCAL")
    )
    opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+ )?([A-Z0-9_]+)", code)
    return Resources(
        name=kernel.metadata.name,
        registers=registers,
        spilled_bytes=stack + local,
        shared_bytes=kernel.metadata.shared,
        instructions=frozenset(opcodes),
    )


def multiplies_matrices(kernel: Any) -> bool:
    """Whether a compiled kernel's own intermediate code does."""
    dots = r"tt\.dot|ttng\.(warp_group_dot|tc_gen5_mma)"
    return re.search(dots, kernel.asm["ttgir"]) is not None


def matrix_instructions(kernel: Any) -> frozenset[str]:
    """Those of the tensor cores and of TMA that its PTX asks for, with modifiers; none of AMD's."""
    names = r"\b(?:mma|wgmma\.mma_async|tcgen05\.mma|cp\.async\.bulk)[\w.:]+"
    return frozenset(re.findall(names, kernel.asm.get("ptx", "")))


def _amd_resources(kernel: Any) -> Resources:
    text = kernel.asm["amdgcn"]
    vectors, spilled = (
        int(_one(rf"\.{key}:\s+(\d+)", text))
        for key in ("vgpr_count", "private_segment_fixed_size")
    )
    opcodes = re.findall(r"^\s+([vs]_\w+)", text, re.MULTILINE)
    return Resources(
        kernel.metadata.name, vectors, spilled, kernel.metadata.shared, frozenset(opcodes)
    )


def _one(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cuobjdump printed no {pattern}:\n{text[:500]}")
    return match[1]


def _cuobjdump(flag: str, cubin: Path) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, flag, cubin], check=True, capture_output=True, text=True).stdout


__all__ = [
    "SHARED_LIMIT",
    "Resources",
    "compiling",
    "matrix_instructions",
    "multiplies_matrices",
    "resources",
]
