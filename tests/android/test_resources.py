"""The app's layouts, which no tool here can draw: what Android's lint would say of them, as far as it can be read."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

MAIN = ROOT / "android_demo" / "app" / "src" / "main"
LAYOUTS = sorted(MAIN.glob("res/layout*/*.xml"))
SOURCES = "".join(p.read_text() for p in (*MAIN.rglob("*.kt"), *MAIN.rglob("*.xml")))
ANDROID = "{http://schemas.android.com/apk/res/android}"
INPUTS = ("EditText", "SeekBar", "Spinner")
TOUCHED = (*INPUTS, "Button")


def views(layout: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(class, attributes) of every view, without the prefix of Android's."""
    for view in ET.parse(layout).iter():
        yield view.tag, {name.removeprefix(ANDROID): value for name, value in view.attrib.items()}


EVERY = [(layout.name, tag, attributes) for layout in LAYOUTS for tag, attributes in views(layout)]
STYLES = {
    style.get("name"): {item.get("name", "").removeprefix("android:"): item.text for item in style}
    for style in ET.parse(MAIN / "res/values/styles.xml").getroot()
}


def value(attributes: dict[str, str], name: str) -> str | None:
    """An attribute, of the view or of its style."""
    style = STYLES.get(attributes.get("style", "").removeprefix("@style/"), {})
    return attributes.get(name) or style.get(name)


def test_layouts_are_read() -> None:
    assert len(LAYOUTS) >= 8 and sum(tag in TOUCHED for _, tag, _ in EVERY) > 15


def test_every_input_has_a_label_that_is_read_aloud() -> None:
    labels = {a["labelFor"].removeprefix("@id/") for _, _, a in EVERY if "labelFor" in a}
    for layout, tag, attributes in EVERY:
        if tag in INPUTS:
            name = attributes["id"].removeprefix("@+id/")
            assert name in labels or "hint" in attributes, f"{layout}: {name}"


def test_everything_that_is_touched_is_large_enough() -> None:
    for layout, tag, attributes in EVERY:
        if tag in TOUCHED:
            assert value(attributes, "minHeight") == "48dp", f"{layout}: {attributes['id']}"


def test_texts_are_resources_and_grow_with_the_letters() -> None:
    for layout, _, attributes in EVERY:
        for name in ("text", "hint", "contentDescription"):
            text = attributes.get(name, "@string/")
            assert text.startswith("@string/") or text.isdigit(), f"{layout}: {text}"
        assert attributes.get("textSize", "1sp").endswith("sp"), layout


def test_what_comes_by_itself_is_read_aloud() -> None:
    """Sentences for the user, what is being done, and what a package needs."""
    for name in ("notice", "preparing_text", "forecast", "time_progress"):
        found = [a for _, _, a in EVERY if a.get("id") == f"@+id/{name}"]
        assert found and all(a.get("accessibilityLiveRegion") == "polite" for a in found), name


def test_what_the_model_writes_can_be_selected() -> None:
    for name in ("output", "time_result", "notice"):
        assert [a for _, _, a in EVERY if a.get("id") == f"@+id/{name}" and a.get("textIsSelectable") == "true"], name


@pytest.mark.parametrize("kind", ["string", "dimen", "bool", "string-array"])
def test_every_resource_is_used(kind: str) -> None:
    short = kind.removeprefix("string-")
    for file in MAIN.glob("res/values/*.xml"):
        for resource in ET.parse(file).getroot().iter(kind):
            name = resource.get("name")
            assert re.search(rf"(@{short}/|R\.{short}\.){name}\b", SOURCES), name


def test_night_changes_what_day_has() -> None:
    for file in MAIN.glob("res/values-night/*.xml"):
        day = {e.get("name") for e in ET.parse(MAIN / "res/values" / file.name).getroot()}
        assert {e.get("name") for e in ET.parse(file).getroot()} <= day


def test_the_manifest_asks_for_nothing() -> None:
    root = ET.parse(MAIN / "AndroidManifest.xml").getroot()
    assert not [e.tag for e in root.iter() if "permission" in e.tag or "feature" in e.tag]
    exported = [e for e in root.iter() if e.get(f"{ANDROID}exported") == "true"]
    assert [e.get(f"{ANDROID}name") for e in exported] == [".MainActivity"]
    assert root.find("application").get(f"{ANDROID}allowBackup") == "false"  # type: ignore[union-attr]
