"""The picture at the head of README.md: a recorded run's page, its verdict cards and fork trees.

Renders the page of the run's directory in a headless Chromium and takes away all but these two;
seconds on any machine. Needs playwright, and a Chromium on the PATH. Where nothing forked there is
no tree to show: exit code 1, and no picture.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from ndcheck.findings import Findings, read_findings
from ndcheck.reports.figures import gather
from ndcheck.reports.html.page import html_report
from ndcheck.request import DEFAULTS

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH_PX, SCALE = 1100, 1.5
KEPT = """() => {
  const section = document.querySelector(".cards").parentElement;
  const isTree = (node) => node?.matches(".tree");
  for (const node of [...section.children]) {
    if (!node.matches(".cards") && !isTree(node) && !isTree(node.nextElementSibling)) node.remove();
  }
  const details = section.querySelectorAll(".card > :not(h3, p:first-of-type, .tiles)");
  details.forEach((node) => node.remove());
  section.style.padding = "16px";
  section.dataset.picture = "";
}"""
"""What a reader who knows nothing yet can take in: verdict, counts, and where completions part."""


def take_picture(findings: Findings, file: Path) -> None:
    """Write a PNG, WIDTH_PX times SCALE pixels wide. Raises OSError where there is no browser."""
    from playwright.sync_api import sync_playwright

    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise OSError(f"no Chromium on the PATH ({', '.join(BROWSERS)})")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page_file = Path(folder) / "report.html"
        page_file.write_text(html_report(findings, gather(findings), DEFAULTS), encoding="utf-8")
        chromium = driver.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu"]
        )
        page = chromium.new_page(
            viewport={"width": WIDTH_PX, "height": 800},
            device_scale_factor=SCALE,
            color_scheme="light",
        )
        page.goto(page_file.as_uri())
        page.evaluate(KEPT)
        page.locator("[data-picture]").screenshot(path=file)
        chromium.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a run's directory")
    parser.add_argument("out", type=Path, help="the PNG file")
    given = parser.parse_args()
    findings = read_findings(given.run)
    if not any(probe.n_unique > 1 for probe in findings.summary.probes):
        print(f"{given.run}: nothing forked, so there is no tree to show", file=sys.stderr)
        return 1
    take_picture(findings, given.out)
    print(given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
