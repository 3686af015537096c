"""The page of rmse-serve in Chromium: typed into, steered by the keyboard, while the model writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from later import later

pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'rmse-edge[serve]'")
served = later("serve.served")
chromium = later("serve.browser")

pytestmark = [pytest.mark.slow, pytest.mark.nightly]


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return served.write_talker(tmp_path_factory.mktemp("page") / "talker")


def written(page: Any, count: int) -> None:
    page.until(f"document.body.dataset.written === '{count}'")


def focus(page: Any, name: str) -> None:
    """Reach an element by the Tab key alone."""
    for _ in range(40):
        if page.value("document.activeElement.id") == name:
            return
        page.press("Tab")
    raise AssertionError(f"{name} is not reached")


def test_a_text_is_written_and_steered_by_the_keyboard(talker: Path, page: Any):
    with served.serving(talker) as server:
        page.open(server.url)
        page.until(chromium.READY)
        for name, value in (("max_tokens", "40"), ("seed", "5")):
            focus(page, name)
            page.value("document.activeElement.select()")
            page.type(value)
        focus(page, "prompt")
        page.value("document.activeElement.select()")
        page.type("to be")
        page.press("Enter", control=True)
        written(page, 1)
        client = server.client()
        asked = {"model": served.NAME, "prompt": "to be", "max_tokens": 40, "seed": 5, "temperature": 0.8}
        expected = client.completions.create(**asked).choices[0].spans
        assert page.value(chromium.TOKENS) == [[span["text"], span["depth"]] for span in expected]
        assert len({span["depth"] for span in expected}) > 2
        # The deeper, the stronger and the thicker; what each means stands in the legend.
        look = "[...document.querySelectorAll('%s')].map(t => [parseInt(t.title || t.textContent), getComputedStyle(t).backgroundColor, getComputedStyle(t).borderBottomWidth])"
        legend = page.value(look % "#legend .sample")
        assert [depth for depth, _, _ in legend] == [1, 2, 3, 4]
        assert len({colour for _, colour, _ in legend}) == 4 == len({bar for _, _, bar in legend})
        assert {tuple(token) for token in page.value(look % "#text .token")} <= {tuple(sample) for sample in legend}
        assert page.value("document.getElementById('figures').textContent").startswith("40 tokens, ")
        drawn = "(c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v))(document.getElementById('chart'))"
        assert page.value(drawn)
        assert not page.value("performance.getEntriesByType('resource').some(e => !e.name.startsWith(location.origin))")

        # A slider acts on the text that is being written; Escape ends it, for the server too.
        focus(page, "max_tokens")
        page.value("document.activeElement.select()")
        page.type("4000")
        focus(page, "exit_threshold")
        for _ in range(60):
            page.press("ArrowRight")  # to 1: every loop
        page.value("document.getElementById('write').click()")
        page.until("document.querySelectorAll('#text .token').length > 5")
        assert {depth for _, depth in page.value(chromium.TOKENS)} == {4}
        focus(page, "max_loops")
        page.press("ArrowLeft")
        page.press("ArrowLeft")
        page.until("parseInt([...document.querySelectorAll('#text .token')].at(-1).title) === 2")
        page.press("Escape")
        written(page, 2)
        served.soon(lambda: not server.engine.jobs)
        assert page.value("document.querySelectorAll('#text .token').length") < 4000
        assert page.value("document.getElementById('problem').textContent") == ""


def test_themes_and_narrow_windows(talker: Path, page: Any, tmp_path: Path):
    with served.serving(talker) as server:
        page.open(server.url)
        page.until(chromium.READY)
        light, dark = "", ""
        for theme in (False, True):
            page.dark(theme)
            colour = page.value("getComputedStyle(document.getElementById('prompt')).color")
            light, dark = (light, colour) if theme else (colour, dark)
        assert light != dark
        page.call("Emulation.setDeviceMetricsOverride", width=360, height=700, deviceScaleFactor=1, mobile=True)
        assert page.value("document.documentElement.scrollWidth") <= 360


def test_a_talk_behind_a_key(talker: Path, page: Any):
    with served.serving(talker, keys=["a-key-of-this-test"]) as server:
        page.open(server.url)
        page.until("document.getElementById('keyed')?.hidden === false")
        assert "API key is missing" in page.value("document.getElementById('problem').textContent")
        focus(page, "key")
        page.type("a-key-of-this-test")
        page.press("Tab")
        page.press(" ")
        page.until(chromium.READY)
        assert page.value("document.getElementById('keyed').hidden")
        focus(page, "chat")
        page.press(" ")
        page.value("document.getElementById('max_tokens').value = 8")
        for turn in (1, 2):
            page.value("document.getElementById('prompt').value = 'he'")
            page.value("document.getElementById('write').click()")
            written(page, turn)
        assert page.value("document.querySelectorAll('#text .said').length") == 2
        sessions = server.engine.sessions
        assert len(sessions) == 2 and {kept.position > 20 for _, kept in sessions._kept.values()} == {True}
        page.logged.clear()  # Chromium says of itself that an answer was 401
