"""Gradle, which cannot run here, is told what build_apk.sh builds with."""

from __future__ import annotations

import re
import tomllib

from paths import ROOT

from android_demo.parts import read_lock

DEMO = ROOT / "android_demo"
CATALOG = tomllib.loads((DEMO / "gradle" / "libs.versions.toml").read_text())
SCRIPT = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', (DEMO / "versions.sh").read_text(), re.MULTILINE))
APP = (DEMO / "app" / "build.gradle.kts").read_text()


def test_versions_are_those_of_the_script() -> None:
    versions = CATALOG["versions"]
    names = {
        "APPLICATION_ID": "applicationId",
        "VERSION_CODE": "versionCode",
        "VERSION_NAME": "versionName",
        "MIN_SDK": "minSdk",
        "TARGET_SDK": "targetSdk",
        "ONNXRUNTIME": "onnxruntime",
    }
    assert {name: versions[key] for name, key in names.items()} == {name: SCRIPT[name] for name in names}
    assert re.search(r"abiFilters \+= listOf\((.*)\)", APP)[1] == ", ".join(f'"{a}"' for a in SCRIPT["ABIS"].split())


def test_compilers_and_libraries_are_those_of_the_script() -> None:
    parts, versions = read_lock(), CATALOG["versions"]
    assert versions["kotlin"] == parts["kotlin"].version
    assert versions["gson"] == parts["gson"].version.partition("-")[0]
    assert f"-jvm-target {versions['jvm']} " in (DEMO / "compile.sh").read_text()


def test_every_alias_is_in_the_catalog() -> None:
    for file in DEMO.rglob("*.gradle.kts"):
        for kind, alias in re.findall(r"libs\.(plugins|versions)?\.?([\w.]+?)(?:\.get\(\)|\))", file.read_text()):
            assert alias.replace(".", "-") in CATALOG[kind or "libraries"], f"{file.name}: {alias}"
