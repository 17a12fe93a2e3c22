"""report.html in a browser: Debian's chromium, driven by Playwright."""

import shutil

import pytest
from front_records import noisy, three_rewards

from rsoups import Front, write_report

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="NO BROWSER: apt-get install chromium to test the page as it is seen"
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for name, rows in (("two", noisy(n=14)), ("three", three_rewards())):
        rows = [row | {"response": f"{row['lambdas'] or row['name']}"} for row in rows]
        made[name] = tmp_path_factory.mktemp(name)
        write_report(Front.from_records(rows), rows, made[name])
    return made


@pytest.fixture
def opened(browser, folders):
    """Opens a report; whatever goes wrong in the page or is asked from elsewhere fails the test."""
    contexts, wrong = [], []

    def open_page(name, width=1280, **settings):
        contexts.append(browser.new_context(viewport={"width": width, "height": 800}, **settings))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda request: request.url.startswith("file:") or wrong.append(request.url))
        page.goto((folders[name] / "report.html").as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def texts(page):
    return page.locator("article").first.locator(".text:visible p").all_inner_texts()


@pytest.mark.parametrize("name", ["two", "three"])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(opened, name, width, scheme):
    page = opened(name, width, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 20, 23)"
    assert dark == (scheme == "dark")
    sizes = page.evaluate("""[...document.querySelectorAll('.chart .tick, .chart .name')]
        .filter(text => getComputedStyle(text).display != 'none')
        .map(text => parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)""")
    assert sizes and min(sizes) >= 9.5


def test_the_slider_and_the_menu_choose_whose_text_is_shown(opened):
    page = opened("two")
    assert texts(page) == ["base", "{'A': 0.5, 'B': 0.5}", "{'A': 1.0, 'B': 0.0}", "{'A': 0.0, 'B': 1.0}"]
    page.locator("#slide").focus()
    page.keyboard.press("ArrowRight")
    assert (
        texts(page)[1] == "{'A': 0.25, 'B': 0.75}"
        and page.locator("#model option:checked").inner_text() == "λ 0.25 / 0.75"
    )
    assert page.locator("#slide").get_attribute("aria-valuetext") == "λ 0.25 / 0.75"
    assert page.locator("#front .mark.on").get_attribute("aria-label").startswith("λ 0.25 / 0.75")
    page.locator("#model").select_option(label="MORL 0.5/0.5")
    assert texts(page)[:2] == ["base", "MORL 0.5/0.5"]


def test_marks_tell_their_figures_to_the_mouse_and_to_the_keyboard(opened):
    page = opened("two")
    first = page.locator("#front .mark").first
    first.hover(force=True)
    assert page.locator("#tip").inner_text() == first.get_attribute("aria-label")
    page.mouse.move(0, 0)
    assert page.locator("#tip").is_hidden()
    assert page.locator("#front .mark[tabindex='0']").count() == 1  # one stop of the tab key for each chart
    first.focus()
    page.keyboard.press("ArrowRight")
    second = page.locator("#front .mark").nth(1)
    assert page.locator("#tip").inner_text() == second.get_attribute("aria-label") != first.get_attribute("aria-label")
    page.keyboard.press("Enter")
    assert texts(page)[1] == "{'A': 0.75, 'B': 0.25}"
    page.keyboard.press("Escape")
    assert page.locator("#tip").is_hidden()


def test_without_a_script_the_texts_and_the_figures_can_be_read(opened):
    page = opened("two", java_script_enabled=False)
    assert page.locator(".chooser").is_hidden()
    assert texts(page) == ["base", *(str({"A": 1 - x, "B": x}) for x in (0.0, 0.25, 0.5, 0.75, 1.0))]
    assert page.locator("article").first.locator("summary").inner_text() == "2 other models"
    assert "λ 1 / 0" in page.locator("#front .mark title").first.text_content()
