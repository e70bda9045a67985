from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from ndcheck.reports import plots
from ndcheck.reports.figures import gather

NAMES = ["unique-completions", "first-divergence", "margin-at-fork", "heat-strip", "cost"]


def draw(example) -> dict[str, bytes]:
    return plots.plot_files(gather(example))


def test_each_figure_is_a_png_and_an_svg_and_the_same_bytes_each_time(two_arms) -> None:
    import matplotlib as mpl

    files = draw(two_arms)
    assert set(files) == {f"{name}.{suffix}" for name in NAMES for suffix in ("png", "svg")}
    for name, content in files.items():
        if name.endswith("png"):
            assert content.startswith(b"\x89PNG\r\n")
        else:
            assert ElementTree.fromstring(content).tag.endswith("svg")
    assert b"invariant" in files["cost.svg"]
    strip = files["heat-strip.svg"].decode()
    assert all(colour in strip for colour in (plots.MAIN, *plots.EXITS[:2]))
    assert plots.EXITS[2] not in strip
    with mpl.rc_context({"lines.linewidth": 9, "axes.facecolor": "red"}):
        assert draw(two_arms) == files


def test_blocks_cover_every_sample_from_its_start_to_its_end(many) -> None:
    (arm,) = gather(many).values()
    blocks = list(plots._blocks(arm))
    area = sum((right - left) * n_rows for left, right, _, n_rows, _ in blocks)
    assert area == sum(c.count * c.n_tokens for c in arm.probe.completions)


@pytest.mark.parametrize("name", ["empty", "all_errors"])
def test_nothing_measured_is_nothing_drawn(name, request) -> None:
    assert draw(request.getfixturevalue(name)) == {}


def test_names_of_files_do_not_come_from_the_prompts(hostile, monkeypatch) -> None:
    monkeypatch.setattr(plots, "PLOTS", {"cost": plots.PLOTS["cost"]})
    monkeypatch.setattr(plots, "FORMATS", ("png",))
    assert set(draw(hostile)) == {"probe-1-cost.png", "probe-2-cost.png"}
