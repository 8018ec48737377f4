"""The study's page in a real browser, as a file that somebody was sent."""

import pytest

from tests.benchmarks.paint import page_of, painted

TRIALS = 30


@pytest.fixture(scope="module")
def page(window, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    errors = []
    window.on("pageerror", lambda error: errors.append(str(error)))
    window.set_viewport_size({"width": 1400, "height": 1000})
    painted(window, page_of(TRIALS, folder))
    yield window
    assert errors == []


@pytest.fixture(autouse=True)
def reloaded(page):
    page.reload()
    page.locator("#candidates th button").first.wait_for()


def column(page, number):
    return page.locator(f"#candidates td:nth-child({number})").all_inner_texts()


def test_every_picture_is_drawn_and_fits_at_any_width(page, picture):
    assert page.locator("#insights .barlayer .point").count() == 10
    # Of each trial that completed a mark on 7 axes at least: not all have a sigma.
    assert page.locator("#insights .scatterlayer .point").count() > 7 * 0.8 * TRIALS
    assert page.locator("#growth .scatterlayer path.js-line").count() == 2
    for width in (1400, 800):
        page.set_viewport_size({"width": width, "height": 1000})
        page.wait_for_timeout(500)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for plot in page.locator(".picture .main-svg").all():
            assert plot.bounding_box()["width"] <= width
        page.screenshot(path=picture(str(width)), full_page=True)
    page.set_viewport_size({"width": 1400, "height": 1000})


def test_the_table_is_sorted_by_mouse_and_by_keyboard(page):
    before = column(page, 1)
    assert page.locator("tr.chosen").count() > 2 and before != sorted(before)
    head = page.locator("#candidates th").nth(3)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    shown = [float(text) for text in column(page, 4) if text]
    assert shown == sorted(shown, reverse=True) and len(shown) > TRIALS
    assert column(page, 4)[-1] == ""  # the failed trial's, either way
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in column(page, 4) if text] == shown[::-1]
    assert column(page, 4)[-1] == ""
    page.locator("#candidates th button").first.focus()
    page.keyboard.press("Space")
    ids = [text.partition("x") for text in column(page, 1)]
    assert ids == sorted(ids, key=lambda each: (int(each[0]), float(each[2] or 0)))
    assert head.get_attribute("aria-sort") is None
    assert sorted(column(page, 1)) == sorted(before)


def test_the_corner_is_one_click_away_and_so_is_the_whole(page):
    low = "document.getElementById('front')._fullLayout.xaxis.range[0]"
    whole = page.evaluate(low)
    page.get_by_role("button", name="Near the front").click()
    page.wait_for_function(f"{low} > 0.3")
    page.get_by_role("button", name="Whole study").click()
    page.wait_for_function(f"Math.abs({low} - {whole}) < 1e-9")


def test_a_click_keeps_the_trial_and_links_to_its_run(page):
    link = page.locator("#candidates td a").first
    assert link.get_attribute("href").startswith("http://127.0.0.1:5000/#/experiments/1/runs/")
    page.evaluate(
        """() => {
          const plot = document.getElementById("front");
          const trace = plot.data.findIndex((each) => each.name === "front");
          const { x, y, customdata } = plot.data[trace];
          const point = { x: x[0], y: y[0], customdata: customdata[0] };
          plot.emit("plotly_click", { points: [point] });
        }"""
    )
    trial = page.locator("tr.picked td").first.inner_text()
    assert page.locator("#run").inner_text().startswith(f"{trial} · ")
    assert "front · forget reduction 0." in page.locator("#chosen").inner_text()
    run = page.locator("#chosen a").get_attribute("href")
    assert run == page.locator("tr.picked a").get_attribute("href")
