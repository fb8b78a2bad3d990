"""The report in a real browser: Debian's chromium, without a window, opened from disk."""

import os
import shutil
from importlib.util import find_spec

import pytest

from tests.report_pieces import HOSTILE, drawn, study

MISSING = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
MISSING += ["the Python package selenium"] if find_spec("selenium") is None else []
if MISSING and os.environ.get("CAPO_REQUIRE_CHROMIUM"):  # CI skips nothing
    raise RuntimeError(f"CAPO_REQUIRE_CHROMIUM is set, but there is no {', no '.join(MISSING)}")
if MISSING:
    pytest.skip(f"no {', no '.join(MISSING)}", allow_module_level=True)

from selenium.webdriver import ActionChains, Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

from capo_exp.figures.report.page import write_report  # noqa: E402
from tests.report_browser import CONTRAST, CUT, Page, open_chromium  # noqa: E402

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def chromium(folder):
    browser = open_chromium(folder)
    yield browser
    browser.quit()


@pytest.fixture(scope="module")
def report(folder):
    curves = study(folder / "runs")
    runs = [run for curve in curves for run in curve.runs]
    return write_report(runs, curves, [drawn(folder)], folder / "report.html", "COMMAND")


@pytest.fixture
def page(chromium, report):
    for kind in ("browser", "performance"):
        chromium.get_log(kind)  # what another test left
    return Page(chromium, report).emulate(1300, "light").load()


def test_opens_from_disk_without_an_error_or_a_request(page):
    for run in range(3):
        Select(page.one("#run")).select_by_index(run)
    assert page.one("#viewer").is_displayed()
    assert page.browser.get_log("browser") == []
    # chrome: is a picture of the browser's own, in the search field
    asked = [url for url in page.requests() if not url.startswith(("data:", "chrome:"))]
    assert asked == [page.path.as_uri()]


def test_a_request_would_be_seen_and_is_forbidden(page):
    page.run("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    (entry,) = page.browser.get_log("browser")
    assert "Content Security Policy" in entry["message"]


def test_the_table_sorts_up_and_down_with_missing_numbers_last(page):
    def column(number):
        return page.texts(f"#summary tbody tr > :nth-child({number})")

    page.all("#summary thead button")[5].click()
    assert column(6) == ["40.0%", "50.0%", "60.0%", "70.0%"]
    assert page.all("#summary thead th")[5].get_attribute("aria-sort") == "ascending"
    page.all("#summary thead button")[5].click()
    assert column(6) == ["70.0%", "60.0%", "50.0%", "40.0%"]
    page.all("#summary thead button")[0].click()
    assert [name[:4] for name in column(1)] == ["CAPO", "CAPO", "DAPO", "GRPO"]
    assert len(page.all("[aria-sort]")) == 1
    page.run("document.querySelectorAll('#summary tbody tr')[1].cells[5].dataset.value = ''")
    for _ in range(2):
        page.all("#summary thead button")[5].click()
        assert column(6)[-1] == "70.0%"


def test_run_and_step_change_what_is_shown(page):
    assert page.texts("#prompts h3") == ["Count.", "Else?"]
    assert page.texts("#step option") == ["10", "20", "30"]
    assert page.texts(".token")[1] == "10"  # the legend has the first
    assert not page.one("#previous").is_enabled()
    page.one("#next").click()
    assert page.texts(".token")[1] == "20"
    page.choose("#step", "30")
    assert page.texts(".token")[1] == "30"
    assert not page.one("#next").is_enabled()
    assert page.texts(".completion .facts")[1] == "✗ wrongreward 0advantage -11 tokens, 0 rejected"
    page.choose("#run", "GRPO (A) · seed 0")
    assert page.texts("#prompts .token") == ["100", "101", "102", "103", "104", "105"]
    assert len(page.all("#prompts del[data-by='x']")) == 4
    assert "logged no token texts" in page.one("#count").text
    assert page.texts(".completion .whole") == ["One two\n three.<eos>"]
    page.choose("#run", "CAPO (A) · seed 0")
    assert page.one("#step").get_attribute("value") == "0"  # the same step as the run before, 10
    page.choose("#run", "CAPO (A) · seed 1")
    page.choose("#run", "CAPO (A) · seed 0")
    assert page.one("#step").get_attribute("value") == "1"


def test_the_tint_changes_colours_and_the_legend(page):
    seen = {}
    for kind in ("policy", "objective", "probability", "none"):
        page.one(f"[name=tint][value={kind}]").click()
        seen[kind] = page.colours()[:6]
    clear = "rgba(0, 0, 0, 0)"
    assert [colour != clear for colour in seen["policy"]] == [True, True, False, True, False, False]
    assert seen["policy"][1] == seen["policy"][3] != seen["policy"][0]
    assert [colour != clear for colour in seen["objective"]] == [False, False, True, True, False, True]
    assert len(set(seen["objective"])) == 4
    assert len(set(seen["probability"])) == 4
    assert set(seen["none"]) == {clear}
    legend = {}
    for kind in ("policy", "objective"):
        page.one(f"[value={kind}]").click()
        legend[kind] = {
            node.text: page.style(node, "backgroundColor") for node in page.all("#legend .swatch")
        }
    assert list(legend["policy"]) == [
        "below 3e-7", "≥ 3e-7", "≥ 1e-6", "≥ 3e-6", "≥ 1e-5", "≥ 3e-5", "≥ 1e-4",
    ]  # fmt: skip
    assert list(legend["objective"]) == [
        "≤ -0.03", "≤ -0.01", "≤ -0.003", "≤ -0.001", "between", "≥ 0.001", "≥ 0.003", "≥ 0.01", "≥ 0.03",
    ]  # fmt: skip
    assert [legend["policy"][edge] for edge in ("≥ 1e-5", "≥ 1e-4")] == seen["policy"][:2]
    signed = [legend["objective"][edge] for edge in ("≥ 0.001", "≤ -0.01", "≥ 0.03")]
    assert signed == [seen["objective"][place] for place in (2, 3, 5)]
    assert "bounds of this run: m_F < 1e-4, -0.01 < m_H < 0.01" in page.texts("#legend")[0]


def test_rejected_tokens_are_struck_through_and_framed_whatever_the_colour(page):
    page.one("[value=none]").click()
    tokens = page.all("#prompts .completion:first-child .token")
    struck = ["line-through" in page.style(token, "textDecorationLine") for token in tokens[:6]]
    assert struck == [False, True, False, True, True, True]
    framed = [page.style(token, "outlineStyle") == "dashed" for token in tokens[:6]]
    assert framed == struck
    signs = [
        page.run("return getComputedStyle(arguments[0], '::after').content", token) for token in tokens[:6]
    ]
    assert signs == ["none", '"F"', "none", '"F H"', '"F"', '"H"']


def test_a_token_tells_its_numbers_to_pointer_and_keyboard(page):
    tip, tokens = page.one("#tip"), page.all("#prompts .token")
    ActionChains(page.browser).move_to_element(tokens[1]).perform()
    assert tip.text.split("\n") == [
        "·two", "id 101", "m_F 2e-4 nats", "m_H 0 reward units", "probability when sampled 0.607",
        "rejected: m_F beyond its bound",
    ]  # fmt: skip
    ActionChains(page.browser).move_to_element(page.one("#completions-title")).perform()
    assert not tip.is_displayed()
    page.run("arguments[0].focus()", tokens[0])
    assert tip.text.split("\n")[0] == "10"
    assert tip.text.endswith("kept")
    ActionChains(page.browser).send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT).perform()
    assert tip.text.split("\n")[1:3] == ["id 103", "m_F 2e-4 nats"]
    assert tip.text.endswith("m_F and m_H beyond their bounds")
    assert page.run("return document.activeElement.getAttribute('aria-describedby')") == "tip"
    ActionChains(page.browser).send_keys(Keys.END).perform()
    assert "m_H +0.05" in tip.text
    ActionChains(page.browser).send_keys(Keys.ESCAPE).perform()
    assert not tip.is_displayed()
    assert len(page.all("#prompts .token[tabindex='0']")) == 3  # a stop a completion


def test_filters(page):
    def shown():
        return len(page.all(".completion")), page.one("#count").text.partition(".")[0]

    assert shown() == (3, "3 of 3 completions shown; 4 of 8 tokens in them rejected (50")
    page.one("#only-rejected").click()
    assert shown() == (1, "1 of 3 completions shown; 4 of 6 tokens in them rejected (66")
    page.one("#only-wrong").click()
    assert shown()[0] == 0
    page.one("#only-rejected").click()
    assert shown()[0] == 1
    page.one("#only-wrong").click()
    page.choose("#family", "other")
    assert page.texts("#prompts h3") == ["Else?"]
    page.choose("#family", "all")
    page.one("#search").send_keys("nO")
    assert shown()[0] == 1
    page.one("#search").send_keys(" nowhere")
    assert shown()[0] == 0


def test_what_a_model_wrote_is_text(page):
    page.choose("#run", "CAPO (A) · seed 1")
    tokens = page.texts("#prompts .token")
    assert tokens[0] == HOSTILE[0].replace(" ", "·")
    assert tokens[1] == HOSTILE[1].replace(" ", "·")
    assert tokens[3] == "tab⇥here⏎new·line␀null␛[31mred⟨U+007F⟩"
    assert "⟨U+202E⟩right·to·left⟨U+202C⟩·שלום" in tokens[4]
    assert "zero⟨U+200B⟩width,·line⟨U+2028⟩end" in tokens[4] and "🦊" in tokens[4]
    assert page.texts("#prompts h3")[1] == HOSTILE[1]
    ActionChains(page.browser).move_to_element(page.all("#prompts .token")[1]).perform()
    assert page.one("#tip").text.startswith("<img·src=x·onerror=")
    inside = "#prompts img, #prompts svg, #prompts script, #tip img, #summary img, #differences img"
    assert page.all(inside) == []
    assert len(page.all("script")) == 3
    assert page.run("return window.pwned === undefined") is True
    assert page.browser.get_log("browser") == []


def test_the_numbers_behind_a_figure_can_be_saved(page, folder):
    (folder / "one.csv").unlink()
    page.one("a[download='one.csv']").click()
    saved = folder / "one.csv"  # Chromium makes it empty at first
    WebDriverWait(page.browser, 20).until(lambda _: saved.exists() and saved.stat().st_size > 0)
    assert saved.read_text() == "x,y\n1,2\n"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(page, scheme):
    page.emulate(1300, scheme)
    for kind in ("policy", "objective", "probability"):
        page.one(f"[name=tint][value={kind}]").click()
        low = page.run(CONTRAST)
        assert low == [], f"{kind} in {scheme}"
    assert len(page.run(CONTRAST.replace("4.5", "100"))) > 60  # all of the page was looked at
    inverted = page.style(page.one("#figures img"), "filter") != "none"
    assert inverted == (scheme == "dark")  # else a white slab


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_and_every_number_has_its_column(page, width):
    page.emulate(width, "dark")
    page.run("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    page.choose("#run", "CAPO (A) · seed 1")
    assert page.run(CUT) == []
    first = page.one("#summary tbody tr")
    assert first.text.count("50.0%") == 2 and "0:01:15" in first.text and "2,880" in first.text
    column = page.run(
        "return getComputedStyle(arguments[0], '::before').content", first.find_elements("tag name", "td")[1]
    )
    assert column == ('"steps"' if width == 390 else "none")
    assert page.one("#summary thead button").is_displayed()
    assert page.one("figcaption").size["width"] > 300 or width == 1280
