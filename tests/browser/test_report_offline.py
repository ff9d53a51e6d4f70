"""The result page as a reviewer has it: one file and a browser that reaches nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(900)  # the first test may wait for the sweep, eight jobs in kernels of their own
ANSWER = (
    r"With 7 of 8 jobs finished: seen: b better than a; validation_bpb differs by -0\.1\d*, -0\.\d+ to -0\.\d+ \(95 % interval, n = 3\)\."
)
LOSS = 'svg[data-figure="curve-loss"]'
# Where a point of the first arm's curve is on the screen, and what the page says it is.
POINT = """([name, i]) => {
  const svg = document.querySelector(`svg[data-figure="${name}"]`), screen = svg.getScreenCTM();
  const path = [...svg.querySelector(`[id="lab-${name}-0"]`).children].find((child) => child.tagName === "path");
  const [, x, y] = [...path.getAttribute("d").matchAll(/[ML] (\\S+) (\\S+)/g)][i];
  const series = JSON.parse(document.getElementById("lab-facts").textContent).figures[name].series[0];
  return { x: screen.a * x + screen.e, y: screen.d * y + screen.f, value: series.y[i], arm: series.arm };
}"""

# Notes of each folded part whether it is open, before and after printing.
FOLDED = """() => {
  window.found = [];
  const note = () => window.found.push([...document.querySelectorAll("details")].map((each) => each.open));
  window.addEventListener("beforeprint", note);
  window.addEventListener("afterprint", note);
}"""


class Reader:
    """A page without network; `asked` has the addresses that it wanted all the same, `said` its complaints."""

    def __init__(self, browser: Any, file: Path) -> None:
        self.asked: list[str] = []
        self.said: list[str] = []
        self.context = browser.new_context(offline=True, viewport={"width": 1200, "height": 900}, color_scheme="light")
        self.context.route("**/*", self._route)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text) if message.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.goto(file.as_uri())

    def _route(self, route: Any) -> None:
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            self.asked.append(route.request.url)
            route.abort()

    def shown(self, place: str) -> bool:
        return self.page.locator(place).evaluate("(node) => getComputedStyle(node).display !== 'none'")


@pytest.fixture
def reader(rendered_sweep: Path, chromium: Any) -> Iterator[Reader]:
    reader = Reader(chromium, rendered_sweep / "report.html")
    yield reader
    assert reader.asked == [] and reader.said == []
    reader.context.close()


def test_it_opens_with_its_answer_and_leads_to_the_notebooks(reader: Reader) -> None:
    page = reader.page
    assert re.fullmatch(ANSWER, page.locator('[data-part="answer"]').inner_text().strip())
    assert page.locator(f"{LOSS} path").count() > 4
    links = page.locator('[data-part="jobs-table"] a[href$="notebook.html"]')
    assert links.count() == 8
    links.first.click()
    page.wait_for_url("**/notebook.html")
    assert "validation_bpb" in page.inner_text("main")
    page.get_by_role("link", name="Back to the page of the sweep").click()
    page.wait_for_url("**/report.html")
    assert page.locator('[data-part="answer"]').count() == 1


def test_a_point_under_the_pointer_tells_its_value(reader: Reader) -> None:
    page, tip = reader.page, reader.page.locator("#lab-tip")
    assert not tip.is_visible()
    page.locator(LOSS).scroll_into_view_if_needed()
    at = page.evaluate(POINT, ["curve-loss", 60])
    page.mouse.move(at["x"], at["y"])
    tip.wait_for()
    arm, value = re.match(r"(\w+): (\S+)", tip.inner_text()).groups()
    assert arm == at["arm"] and float(value) == pytest.approx(at["value"], rel=1e-4)
    page.mouse.move(2, 2)
    tip.wait_for(state="hidden")


def test_a_click_on_the_legend_hides_an_arm(reader: Reader) -> None:
    page = reader.page
    key, line, band, other = (f'[id="lab-curve-loss-{part}"]' for part in ("legend-0", "0", "0-band", "1"))
    assert reader.shown(line) and reader.shown(band)
    page.locator(key).click()
    assert page.locator(key).get_attribute("aria-pressed") == "false"
    assert not reader.shown(line) and not reader.shown(band) and reader.shown(other)
    page.locator(key).click()
    assert reader.shown(line) and reader.shown(band)


def test_a_click_on_a_head_sorts(reader: Reader) -> None:
    table = reader.page.locator('table[data-part="jobs-table"]')
    head, first = table.locator("thead th").first, table.locator("tbody tr td:first-child")
    as_planned = first.all_inner_texts()
    assert len(as_planned) == 8
    head.click()
    assert first.all_inner_texts() == sorted(as_planned) and head.get_attribute("aria-sort") == "ascending"
    head.click()
    assert first.all_inner_texts() == sorted(as_planned, reverse=True) and head.get_attribute("aria-sort") == "descending"


def test_printed_it_holds_the_answer_and_everything_that_was_folded(reader: Reader) -> None:
    page = reader.page
    # What is folded on the screen is laid out when the browser prints; afterwards it is folded again.
    page.evaluate(FOLDED)
    printed = page.pdf(format="A4")
    assert printed.startswith(b"%PDF") and len(re.findall(rb"/Type\s*/Page\b", printed)) >= 2
    before, after = page.evaluate("window.found")
    assert before and all(before) and not any(after)
    page.emulate_media(media="print")
    said = page.inner_text("main")
    assert re.search(ANSWER, said) and "Hypothesis" in said and "8 planned jobs: 7 done, 1 failed, 0 skipped." in said
