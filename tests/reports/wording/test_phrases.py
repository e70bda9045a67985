from __future__ import annotations

from dataclasses import replace

import pytest

from ndcheck.records import Decoding, Endpoint
from ndcheck.reports.figures import gather
from ndcheck.reports.html.page import html_report
from ndcheck.reports.markdown import markdown_report
from ndcheck.reports.plots import plot_files
from ndcheck.reports.wording import phrases
from ndcheck.reports.wording.remedies import remedies
from ndcheck.request import DEFAULTS


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


SERVER = {
    "endpoint": "http://host/v1",
    "server": "vLLM",
    "version": "1.2",
    "witness": "client-side overlap",
}


def served(example, compared, arrival="together"):
    """The same run, of a server."""
    environment = replace(example.run.environment, model={**SERVER, "compared": compared})
    endpoint = Endpoint("http://host/v1", arrival=arrival)
    spec = replace(example.run.spec, model="big", endpoint=endpoint)
    return replace(example.run, spec=spec, environment=environment)


def test_a_server_is_named_with_what_it_shows(passing) -> None:
    assert phrases.environment(served(passing, "token ids")) == (
        "big at http://host/v1, vLLM 1.2, comparing token ids, batch size from client-side overlap"
    )


@pytest.mark.parametrize(("compared", "unit"), [("token ids", "token"), ("text", "character")])
def test_the_page_and_the_plots_count_them_too(failing, compared, unit) -> None:
    run = served(failing, compared)
    figures = gather(failing)
    page = html_report(replace(failing, run=run), figures, DEFAULTS)
    assert f'<th class="number">First at {unit} (from 1)</th>' in page
    assert f'"unit":"{unit}"' in page
    assert ("character by character" in page) == (unit == "character")
    strip = plot_files(figures, phrases.unit(run))["heat-strip.svg"].decode()
    assert f"samples by {unit}, coloured" in strip


def test_positions_of_text_count_characters(passing, failing) -> None:
    for compared, unit in (("token ids", "token"), ("text", "character")):
        run = served(failing, compared)
        report = markdown_report(replace(failing, run=run), DEFAULTS)
        assert f"First at {unit} (from 1) |" in report
        assert f"at {unit} " in report
        assert ("character" in report) == (unit == "character")
    claims_of = markdown_report(replace(passing, run=served(passing, "text")), DEFAULTS)
    assert "answers were seen to arrive interleaved" in " ".join(claims_of.split())


@pytest.mark.parametrize(
    ("arrival", "shown"),
    [
        ("together", "batch sizes"),
        ("closed", "in flight"),
        ("poisson:2", "requests by poisson:2/s"),
    ],
)
def test_the_workload_says_how_requests_arrive(passing, arrival, shown) -> None:
    assert shown in phrases.workload(served(passing, "text", arrival))


@pytest.mark.parametrize(
    ("server", "remedy"),
    [("vLLM", "VLLM_BATCH_INVARIANT=1"), ("other", "Ask the server for batch-invariant kernels")],
)
def test_a_server_that_fails_gets_its_own_remedy(failing, server, remedy) -> None:
    run = served(failing, "token ids")
    run = replace(run, environment=replace(run.environment, model={**SERVER, "server": server}))
    found = remedies(replace(failing, run=run), DEFAULTS, "", 100)
    assert any(remedy in each.reason for each in found)
    assert not any("--kernels" in " ".join(each.command) for each in found)


def test_completions_fed_again_are_none_of_the_samples_asked_for(measured) -> None:
    """A short prompt alone has few loads: that they are used up is said, however much is fed."""
    spec = replace(
        DEFAULTS,
        decoding=Decoding(8),
        batch_sizes=(1,),
        axes=("cache", "width", "scoring"),
        n_samples=40,
        arms=("stock",),
    )
    found = measured(spec=spec)
    (probe,) = found.summary.probes
    generated = [x for x in probe.loads if x.axis not in ("width", "scoring") and x.width == 1]
    n_generated = sum(load.n_samples for load in generated)
    n_fed = sum(load.n_samples for load in probe.loads) - n_generated
    assert 0 < n_generated < 40
    assert n_fed > 0
    said = phrases.shortfall(replace(found.run, stop_reason=None), found.summary)
    assert said is not None
    assert said.startswith(f"{n_generated} of 40 samples taken: ")
    only_fed = replace(spec, axes=("width", "scoring"), n_samples=4)
    enough = measured(spec=only_fed)
    assert phrases.shortfall(enough.run, enough.summary) is None
