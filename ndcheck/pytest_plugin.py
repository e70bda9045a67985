"""The pytest plugin: ndcheck's assertions as fixtures. It imports nothing until one is used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def assert_deterministic() -> Callable[..., None]:
    """`ndcheck.testing.assert_deterministic`: equal inputs give equal bits."""
    from ndcheck import testing

    return testing.assert_deterministic


@pytest.fixture(scope="session")
def assert_batch_invariant() -> Callable[..., Any]:
    """`ndcheck.testing.assert_batch_invariant`: a row's bits do not depend on its batch."""
    from ndcheck import testing

    return testing.assert_batch_invariant
