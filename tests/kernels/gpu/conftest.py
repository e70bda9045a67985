"""These tests need a GPU: real tensor cores, bf16, and shapes too large for the interpreter."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/kernels/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
