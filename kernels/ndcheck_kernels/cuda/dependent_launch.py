# mypy: allow-untyped-defs, allow-incomplete-defs
# ruff: noqa: ANN201
# (both: Triton types the arguments of jit functions)
"""How kernels are launched: overlapping the one before, and what to say if one does not compile.

Programmatic dependent launch: a kernel's start overlaps the end of the one before it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl
from triton.errors import TritonError
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ndcheck_kernels.cuda import device


@triton.jit
def follow(PDL: tl.constexpr):
    """Let the next kernel start, and wait until what earlier kernels wrote can be read."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def pdl(where: torch.device) -> dict[str, bool]:
    """Launch options; every kernel launched with them must call `follow` or wait itself."""
    if device.on_gpu(where) and device.capability(where) >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


def compile_failure(error: Exception) -> str | None:
    """One line on a kernel that Triton or ptxas gave up on; None for an error of another kind."""
    # The passes raise no class of their own.
    if not isinstance(error, TritonError) and "PassManager::run failed" not in str(error):
        return None
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"its kernel does not compile under Triton {triton.__version__}: {first[:200]}"


@contextmanager
def quiet_compiler() -> Iterator[None]:
    """Keep back what compilers print, thousands of lines of intermediate code, if one fails."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as printed:
        own = os.dup(2)
        os.dup2(printed.fileno(), 2)
        failed = False
        try:
            yield
        except Exception as error:
            failed = compile_failure(error) is not None
            raise
        finally:
            os.dup2(own, 2)
            os.close(own)
            printed.seek(0)
            if not failed:
                os.write(2, printed.read())
