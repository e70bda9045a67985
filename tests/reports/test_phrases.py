from __future__ import annotations

from dataclasses import replace

import pytest

from ndcheck.reports import phrases


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (0.0, "0"),
        (0.008, "0.8"),
        (0.321428, "32.1"),
        (0.95, "95"),
        (0.9999, "99.99"),
        (1.0, "100"),
        (1.234e-5, "0.00123"),
    ],
)
def test_percent(share: float, shown: str) -> None:
    assert phrases.percent(share) == shown


def test_bounds_are_rounded_outwards() -> None:
    assert phrases.upper_bound(0.0029912) == "< 0.3 %"
    assert phrases.upper_bound(0.100001) == "< 10.1 %"
    assert phrases.interval(0.0034699, 0.0157001) == "0.346-1.58 %"
    assert phrases.interval(0.99999, 1.0) == "99.9-100 %"


def test_an_unfinished_run_says_so(passing) -> None:
    assert phrases.workload(passing.run).endswith("16 (copies)")
    run = replace(passing.run, status="interrupted", stop_reason="disk\x1b full")
    assert phrases.workload(run).endswith("16 (copies); interrupted; disk\\x1b full")


@pytest.mark.parametrize(
    ("tokens_per_s", "shown"), [(None, ""), (1.25, "1.2"), (99_999.4, "99999"), (1e5, "100k")]
)
def test_speed_fits_five_cells(tokens_per_s, shown) -> None:
    assert phrases.speed(tokens_per_s) == shown


def test_the_environment_names_the_device_that_ran(passing) -> None:
    assert phrases.environment(passing.run) == (
        "builtin, bfloat16, cpu, torch 2.13.0, AMD EPYC 7763 64-Core Processor"
    )
    where = replace(
        passing.run.environment,
        hardware={"cpu": "some CPU", "gpu": "NVIDIA H100"},
        model={"device": "cuda:0"},
        software={},
    )
    run = replace(passing.run, environment=where)
    assert phrases.environment(run) == "builtin, cuda:0, NVIDIA H100"
    with_engine = replace(where, model={**where.model, "engine": "vllm 0.26.0"})
    run = replace(run, environment=with_engine)
    assert phrases.environment(run) == "builtin, cuda:0, vllm 0.26.0, NVIDIA H100"
