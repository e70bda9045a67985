"""One line instead of thousands where Triton cannot compile a kernel."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import triton
from triton.errors import TritonError


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
