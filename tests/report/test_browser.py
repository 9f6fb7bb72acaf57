"""The page in a browser without a network, driven by the keyboard. Runs where Chromium is installed."""

import json
import shutil

import pytest
from pages import HOSTILE, hostile_run

from memloc_lens.report import ReportSettings, write_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def written(small_del, whole_inj, audited, tmp_path_factory):
    """The page of a DEL run with hostile names, an INJ run and an erasure, and the summary of the first."""
    folder = tmp_path_factory.mktemp("browser")
    run = hostile_run(small_del, folder)
    write_report(ReportSettings((run, whole_inj.out, audited), folder / "page.html", device="cpu"))
    return folder / "page.html", json.loads((run / "summary.json").read_text())


@pytest.fixture
def page(browser, written):
    """The opened page; at the end, nothing may have gone wrong in it and nothing may have been asked for."""
    context = browser.new_context(offline=True)
    opened = context.new_page()
    wrong: list[str] = []
    opened.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "request", lambda request: wrong.append(request.url) if request.url[:5] not in ("file:", "data:") else None
    )
    opened.goto(written[0].as_uri())
    yield opened
    assert opened.evaluate("window.broken") is None
    assert wrong == []
    context.close()


def test_every_section_is_found_by_its_heading(page):
    headings = page.get_by_role("heading", level=3).all_text_contents()
    runs = ["What was run", "Summary", "Pictures", "Sequences", "Neurons", *headings[:3]]
    assert headings[: len(runs) + 1] == [*runs, "What was erased"]
    assert headings[-2:] == ["Pictures", "What was not tried"]
    assert "<b>run" in page.get_by_role("heading", level=2).first.text_content()


def test_a_heading_sorts_by_keyboard(page, written):
    cells = written[1]["methods"]
    table = page.get_by_role("table").first
    button = table.get_by_role("button", name="Self-Acc")
    names = lambda: table.locator("tr.method th").all_text_contents()  # noqa: E731
    before = names()
    assert before == list(cells)
    for key, direction in (("Enter", "descending"), ("Space", "ascending")):
        button.focus()
        page.keyboard.press(key)
        assert table.locator("th[aria-sort]").get_attribute("aria-sort") == direction
        means = [cells[name]["0.1"]["self_acc"]["mean"] for name in names()]
        assert means == sorted(means, reverse=direction == "descending")
    assert table.locator("tbody tr").first.locator("th").text_content() == "before"


def test_search_and_switch_by_keyboard(page, written):
    search = page.get_by_label("Find a sequence")
    search.focus()
    page.keyboard.type("onerror")
    shown = page.locator(".sequence:visible")
    assert shown.count() == 1
    assert shown.locator(".name").text_content() == HOSTILE[1]
    assert page.get_by_text("1 of 6 shown").is_visible()

    shown.locator("summary").focus()
    page.keyboard.press("Enter")
    tokens = shown.locator(".tokens")
    tokens.nth(1).wait_for()  # a browser tells that a part was opened when it has time
    assert tokens.count() == 2
    tokens.first.locator("span").first.wait_for()
    first = shown.locator(".changes").text_content()
    page.get_by_role("combobox", name="Method").first.focus()
    page.keyboard.press("ArrowDown")  # activations -> gradient
    assert page.get_by_role("combobox", name="Method").first.input_value() == "gradient"
    page.get_by_role("combobox", name="Share dropped").focus()
    page.keyboard.press("ArrowUp")  # 50% -> 10%
    assert page.get_by_role("combobox", name="Share dropped").input_value() == "0.1"
    data = json.loads(page.locator("#data").text_content())[0]["cards"][1]
    state = data["after"]["gradient"]["0.1"]
    second = shown.locator(".changes").text_content()
    assert f"{state['self']:+.1f}".replace("+0.0", "0.0") in second
    assert first != second
    assert shown.locator(".written").nth(1).text_content() == state["written"]
    marked = "".join(shown.locator(".written").nth(1).locator("mark").all_text_contents())
    assert marked == "".join(state["written"][start:stop] for start, stop in state["wrong"])

    shown.get_by_text("The numbers").click()
    rows = shown.locator("tbody tr").all_text_contents()
    assert len(rows) == len(data["suffix"])
    assert rows[0].endswith(f"{data['before']['percent'][0]}{state['percent'][0]}")


def test_neurons_are_found(page):
    cards = page.locator(".neuron:visible")
    count = cards.count()
    assert count == 24
    name = cards.nth(3).get_by_role("heading").text_content().strip()
    page.get_by_label("Find a neuron").fill(name)
    assert 1 <= page.locator(".neuron:visible").count() < count
    page.get_by_label("Find a neuron").fill("")
    page.get_by_role("combobox", name="Method").last.select_option("gradient")
    assert all("gradient" in card for card in page.locator(".neuron:visible").all_text_contents())
    page.get_by_role("combobox", name="Method").last.select_option("random")  # a baseline, which is not counted
    assert page.locator(".neuron:visible").count() == 0


def test_pictures_are_drawn_and_have_their_numbers(page):
    places = page.locator(".plot")
    for place in places.all():
        place.scroll_into_view_if_needed()
        place.locator("svg.main-svg").first.wait_for()
        assert len(place.get_attribute("aria-label")) > 40
    assert places.count() == 7 + 3  # without a text there is no perplexity; three lessons
    box = page.locator("figure details").first
    box.locator("summary").focus()
    page.keyboard.press("Enter")
    assert box.locator("tbody tr").count() > 3


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_window_holds_the_page(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    for summary in page.locator(".sequence > summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    paper, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
    lightness = [sum(map(int, colour[4:-1].split(","))) for colour in (paper, ink)]
    assert abs(lightness[0] - lightness[1]) > 450
    assert (lightness[0] > lightness[1]) == (scheme == "light")


def test_it_prints_whole(page):
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    page.locator(".plot svg.main-svg").last.wait_for()
    assert not page.get_by_label("Find a sequence").is_visible()
    assert len(page.pdf()) > 10_000
