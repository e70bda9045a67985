"""The page in a real browser: what it runs, loads, shows and answers to."""

from __future__ import annotations

import re
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest

from ndcheck.findings import find
from ndcheck.records import Probe
from ndcheck.reports.figures import gather
from ndcheck.reports.html.page import html_report
from ndcheck.request import DEFAULTS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
OPEN_ALL = "document.querySelectorAll('details').forEach((node) => { node.open = true })"
ATTACK = (
    "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"
    '<svg onload=\'window.pwned=1\'>" onfocus="window.pwned=1" autofocus " {{ 7 * 7 }} ${7*7}<!--'
)


@pytest.fixture(scope="module")
def browser():
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no Chromium on PATH ({', '.join(BROWSERS)})")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, tmp_path):
    """Opens an example's page in a fresh context, and fails on any complaint or request of it."""

    @contextmanager
    def open_page(example, **options):
        file = tmp_path / "report.html"
        file.write_text(html_report(example, gather(example), DEFAULTS), encoding="utf-8")
        context = browser.new_context(viewport={"width": 1280, "height": 900}, **options)
        page = context.new_page()
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.as_uri())
        yield page
        assert complaints == []
        assert [url for url in requests if not url.startswith("data:")] == [file.as_uri()]
        context.close()

    return open_page


@pytest.fixture
def attack(two_arms):
    """Two completions, a prompt, a model name and an environment that are attacks."""
    samples = [
        replace(
            sample,
            token_ids=(1, 2 + (sample.sample_id > 4)),
            token_texts=(ATTACK, ATTACK if sample.sample_id <= 4 else ATTACK[::-1]),
            purpose="neighbours" if sample.sample_id else "reference",
            baseline=0 if sample.sample_id else None,
        )
        for sample in two_arms.samples[:9]
    ]
    spec = replace(two_arms.run.spec, model=ATTACK, probes=(Probe("p1", ATTACK),), arms=("stock",))
    environment = replace(two_arms.run.environment, software={ATTACK: ATTACK})
    run = replace(two_arms.run, spec=spec, environment=environment, stop_reason=ATTACK)
    return find(run, samples)


@pytest.mark.parametrize("name", ["two_arms", "many", "hostile", "inconclusive", "all_errors"])
def test_it_opens_without_a_complaint_and_fits_the_screen(opened, name, request) -> None:
    with opened(request.getfixturevalue(name)) as page:
        page.evaluate(OPEN_ALL)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(50)
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_branch_opens_by_keyboard_and_shows_its_whole_text(opened, many) -> None:
    long = many.summary.probes[0].completions[0]
    with opened(many) as page:
        summary = page.locator(".tree .root > summary").first
        text = page.locator(".tree .root pre.text").first
        assert not text.is_visible()
        summary.focus()
        page.keyboard.press("Enter")
        playwright.expect(text).to_be_visible()
        assert text.text_content() == "".join(long.token_texts[:20])
        last = page.locator("details.branch", has_text="reference").last
        last.evaluate("node => { for (let n = node; n; n = n.parentElement) n.open = true }")
        playwright.expect(last.locator("pre").first).to_have_text(
            re.compile(re.escape("1918.")), use_inner_text=True
        )


def test_compare_puts_a_branch_beside_the_reference(opened, two_arms) -> None:
    stock = two_arms.summary.probes[0]
    with opened(two_arms) as page:
        branch = page.locator("details.branch", has_text="New York City").first
        branch.locator("> summary").click()
        branch.locator("button.compare").first.click()
        diff = page.locator(".diff")
        playwright.expect(diff.locator(".status")).to_contain_text(
            "102 tokens in common; they part at token 103."
        )
        assert diff.locator("select.left").input_value() == "0/1"
        assert diff.locator("select.right").input_value() == "0/2"
        assert page.evaluate("document.activeElement.className") == "right"
        shown = [diff.locator(f"pre.{side}").text_content() for side in ("left", "right")]
        for text, completion in zip(shown, stock.completions, strict=False):
            cut, _, rest = text.partition("\n")
            assert cut == "⋯ 42 tokens"
            assert completion.text.endswith(rest)
        removed = "".join(diff.locator("pre.left del").all_text_contents())
        assert "Queens" in removed
        assert "City" in "".join(diff.locator("pre.right ins").all_text_contents())
        assert diff.locator("pre.left ins, pre.right del").count() == 0
        diff.locator("select.right").select_option("1/1")
        playwright.expect(diff.locator(".status")).to_have_text("The same 113 tokens.")


def test_completions_full_of_markup_stay_text(opened, attack) -> None:
    with opened(attack) as page:
        page.evaluate(OPEN_ALL)
        page.locator(".strip canvas").first.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(100)
        assert page.evaluate("window.pwned") is None
        assert page.locator("script").count() == 6
        assert page.locator("img, iframe, main script").count() == 0
        assert page.locator(".diff pre.left").text_content() == ATTACK * 2
        assert ATTACK in page.locator(".tree pre.text").first.text_content()
        assert "{{ 7 * 7 }}" in page.locator("main").inner_text()


def test_charts_are_drawn_and_their_numbers_told(opened, two_arms) -> None:
    with opened(two_arms) as page:
        assert page.locator(".plot .uplot canvas").count() == 4
        painted = """canvas => new Set(new Uint32Array(canvas.getContext("2d").getImageData(
            0, 0, canvas.width, canvas.height).data.buffer)).size"""
        for canvas in page.query_selector_all(".plot canvas, .strip canvas"):
            assert canvas.evaluate(painted) > 2
        page.locator(".numbers summary").first.click()
        rows = page.locator(".numbers").first.locator("tr")
        playwright.expect(rows).to_have_count(2)
        assert [row.split() for row in rows.all_inner_texts()] == [
            ["batch", "size", "stock", "invariant"],
            list("331"),
        ]


def test_the_heat_strip_answers_to_keys_and_pointer(opened, two_arms) -> None:
    with opened(two_arms) as page:
        strip = page.locator(".strip").first
        status = strip.locator(".status")
        strip.locator("canvas").focus()
        page.keyboard.press("End")
        playwright.expect(status).to_contain_text("token 113: …")
        page.keyboard.press("Home")
        page.keyboard.press("Shift+ArrowRight")
        playwright.expect(status).to_contain_text("batch 3, slot 1")
        playwright.expect(status).to_contain_text("token 11: … word6 word7 word8 word9 word10")
        box = strip.locator("canvas").bounding_box()
        strip.locator("canvas").hover(position={"x": box["width"] - 2, "y": box["height"] - 26})
        playwright.expect(status).to_contain_text("completion 2 (8 of 200)")
        strip.locator(".order").select_option("run")
        strip.locator("canvas").focus()
        page.keyboard.press("Enter")
        playwright.expect(page.locator(".diff .right >> nth=0")).to_have_value(re.compile("0/"))


def test_the_heat_strip_is_coloured_by_continuation_from_the_fork_on(opened, two_arms) -> None:
    read = """(canvas, places) => {
        const [w, h] = [canvas.width, canvas.height - 22 * devicePixelRatio];
        const pixels = canvas.getContext("2d").getImageData(0, 0, w, h).data;
        return places.map(([x, y]) => {
            const at = 4 * (Math.floor(y * h) * w + Math.floor(x * w));
            return pixels.slice(at, at + 4).join();
        });
    }"""
    with opened(two_arms) as page:
        canvas = page.locator(".strip canvas").first
        # Rows 1-190 are the reference, then 2 leave at token 111 of 113, and 8 at token 103.
        places = ((0.5, 0.5), (0.99, 0.5), (0.9, 0.955), (0.99, 0.955), (0.9, 0.98), (0.93, 0.98))
        main, *others = canvas.evaluate(read, places)
        assert [other == main for other in others] == [True, True, False, True, False]
        assert others[2] != others[4]


def test_dark_and_light_are_told_apart(opened, failing) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        with opened(failing, color_scheme=scheme) as page:
            grounds.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    light, dark = (sum(map(int, re.findall(r"\d+", ground))) for ground in grounds)
    assert light > 700 > 100 > dark


def test_paper_gets_the_branches_open_and_the_screen_gets_them_back(opened, two_arms) -> None:
    closed = "document.querySelectorAll('.tree details:not([open])').length"
    with opened(two_arms) as page:
        before = page.evaluate(closed)
        assert before > 0
        page.evaluate("dispatchEvent(new Event('beforeprint'))")
        assert page.evaluate(closed) == 0
        page.evaluate("dispatchEvent(new Event('afterprint'))")
        assert page.evaluate(closed) == before
        assert page.pdf().startswith(b"%PDF")


def test_paper_has_nothing_to_point_at_or_to_scroll(opened, two_arms) -> None:
    count = """() => {
        const shown = (name) => [...document.querySelectorAll(name)]
            .filter((each) => each.getClientRects().length).length;
        const scrolls = [...document.querySelectorAll(".scroll, pre")]
            .filter((each) => each.getClientRects().length)
            .filter((each) => /auto|scroll/.test(getComputedStyle(each).overflowX)).length;
        return [shown(".u-value"), shown(".screen"), shown(".u-legend .u-label"), scrolls];
    }"""
    with opened(two_arms) as page:
        on_screen = page.evaluate(count)
        assert min(on_screen) > 0
        page.emulate_media(media="print")
        values, hints, labels, scrolls = page.evaluate(count)
        assert (values, hints, scrolls) == (0, 0, 0)
        assert 0 < labels < on_screen[2]


def test_without_scripts_verdicts_and_tables_can_be_read(opened, two_arms) -> None:
    with opened(two_arms, java_script_enabled=False) as page:
        text = page.locator("body").inner_text()
        for expected in (
            "9 of 28 loads diverged",
            "neighbours",
            "At token 103",
            "Scripts are off",
        ):
            assert expected in text


def test_a_thousand_by_a_thousand_tokens_can_be_compared(opened, big) -> None:
    with opened(big) as page:
        options = page.locator(".diff select.left option")
        assert options.count() == 1000
        for side, value in (("left", "0/7"), ("right", "0/1000")):
            page.locator(f".diff select.{side}").select_option(value)
        for side, number in (("left", 7), ("right", 1000)):
            completion = big.summary.probes[0].completions[number - 1]
            assert page.locator(f".diff pre.{side}").text_content() == completion.text


def test_on_a_phone_no_column_of_the_properties_is_out_of_reach(opened, two_arms) -> None:
    edges = """() => [...document.querySelectorAll(".properties td:not(:empty)")].map(
        (cell) => cell.getBoundingClientRect().right)"""
    with opened(two_arms) as page:
        n_cells = len(page.evaluate(edges))
        page.set_viewport_size({"width": 390, "height": 800})
        assert len(page.evaluate(edges)) == n_cells > 40
        assert max(page.evaluate(edges)) <= 390
        label = "getComputedStyle(document.querySelector('.properties td'), '::before').content"
        assert page.evaluate(label) == '"Kernels"'


def test_equal_tokens_with_other_bits_are_hatched_and_told(opened, failing) -> None:
    columns = failing.summary.samples
    latent = columns.latent_divergence.copy()
    latent[3] = 6
    summary = replace(failing.summary, samples=replace(columns, latent_divergence=latent))
    for example, is_told in ((failing, False), (replace(failing, summary=summary), True)):
        with opened(example) as page:
            assert page.get_by_text("hatched are equal tokens with other bits").count() == is_told
            page.locator(".strip select").select_option("tree")
            page.locator(".strip canvas").focus()
            # The row with other bits comes before the rows of its continuation that have none.
            status = page.locator(".strip .status").inner_text()
            assert ("other bits from token 7 on" in status) == is_told
