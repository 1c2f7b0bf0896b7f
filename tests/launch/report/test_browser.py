"""The report as a browser shows it: nothing missing, nothing too wide, no complaint, no request, no foreign script."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from launch.report.write import write_report
from tests.helpers.browser import Page, chromium_page
from tests.helpers.reported_run import reported_run, stand_in_for_images

pytestmark = pytest.mark.browser

SIZES = {"desktop": (1280, 900, False), "phone": (390, 844, False), "dark": (1280, 900, True)}
LIGHT, DARK = "#f6f7f9", "#12161c"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reports of one run and of two, with texts that would like to be scripts."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [reported_run(folder / "first", 60, 40), reported_run(folder / "second", 60, 45, "lora.r=4")]
    with pytest.MonkeyPatch.context() as monkeypatch:
        stand_in_for_images(monkeypatch)
        return {"one": write_report(runs[:1]), "two": write_report(runs)}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with chromium_page(tmp_path_factory.mktemp("browser") / "profile") as opened:
        yield opened


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("runs", ["one", "two"])
def test_every_size_shows_everything_and_nothing_is_too_wide(
    page: Page, files: dict[str, Path], runs: str, size: str
) -> None:
    width, height, dark = SIZES[size]
    page.complaints.clear()
    page.requests.clear()
    page.open(files[runs], width, height, dark)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    curves = page.evaluate(
        "[...document.querySelectorAll('#curve-charts h3')].map(e => e.firstChild.data.trim())"
    )
    assert curves == ["Training loss", "Validation loss", "Learning rate", "Gradient norm", "Speed", "Memory"]
    drawn = page.evaluate(
        "[...document.querySelectorAll('.plot')].map(e => e.querySelectorAll('.scatterlayer .trace').length)"
    )
    assert drawn == [count * (1 if runs == "one" else 2) for count in (2, 1, 1, 1, 1, 2)]
    too_wide = "[...document.querySelectorAll('.plot svg')].filter(e => e.getBoundingClientRect().right > innerWidth)"
    assert page.evaluate(f"{too_wide}.length") == 0
    assert page.evaluate("[...document.images].every(e => e.complete && e.naturalWidth > 0)") is True
    assert page.evaluate("window.broken") is None
    assert page.complaints == []
    assert {url.partition(":")[0] for url in page.requests} <= {"file", "data", "blob"}


def test_the_filters_show_the_questions_that_they_name(page: Page, files: dict[str, Path]) -> None:
    page.open(files["one"], 1280, 900)
    shown = "[...document.querySelectorAll('article')].filter(e => !e.hidden).map(e => e.dataset.right)"

    def press(button: str) -> list[str]:
        page.evaluate(f'document.querySelector("#gallery button{button}").click()')
        right: list[str] = page.evaluate(shown)
        return right

    assert len(page.evaluate(shown)) == 12
    assert len(press("#more")) == 48
    assert set(press("[data-outcome=gained]")) == {"01"}
    assert set(press("[data-outcome=lost]")) == {"10"}
    assert set(press("[data-outcome=wrong]")) == {"10", "00"}
    both = press("[data-kind=human]")
    assert 0 < len(both) < len(press("[data-kind='']"))
    page.evaluate("before.value = '1'; before.dispatchEvent(new Event('change'))")
    assert press("[data-outcome=gained]") == []
    assert page.evaluate("nothing.hidden") is False


def test_dark_and_light_follow_the_system_with_all_curves(page: Page, files: dict[str, Path]) -> None:
    """Looked at as pixels: the ground, and whether the curves have another colour than it."""
    for dark, ground in ((False, LIGHT), (True, DARK)):
        page.open(files["one"], 1280, 900, dark)
        image = Image.open(io.BytesIO(page.screenshot((0, 0, 1280, 900)))).convert("RGB")
        assert image.getpixel((5, 5)) == tuple(bytes.fromhex(ground[1:]))
        box = page.evaluate(
            "(r => [r.x, r.y + scrollY, r.width, r.height].map(Math.round))"
            "(document.getElementById('curve-0').getBoundingClientRect())"
        )
        colours = Image.open(io.BytesIO(page.screenshot(tuple(box)))).convert("RGB").getcolors(2**16)
        assert colours is not None
        line = (134, 174, 255) if dark else (36, 87, 197)
        assert sum(count for count, colour in colours if colour == line) > 200


def test_a_chart_is_enlarged_by_a_click_and_made_small_by_another(page: Page, files: dict[str, Path]) -> None:
    page.open(files["one"], 390, 844)
    height = "document.querySelector('.zoom img').getBoundingClientRect().height"
    assert page.evaluate(height) == 210
    page.evaluate("document.querySelector('.zoom').click()")
    assert page.evaluate(height) == 844
    page.evaluate("document.querySelector('.zoom').click()")
    assert page.evaluate(height) == 210
