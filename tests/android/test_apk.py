"""The app as build_apk.sh makes it: signed, aligned, small, for the phones it names, and with no permission."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from app import DEMO, built
from paths import ROOT

from android_demo.parts import PARTS, read_lock

pytestmark = [pytest.mark.android, pytest.mark.slow]

ABIS = ("arm64-v8a", "x86_64")
PAGE = 16 << 10  # of new phones; libraries laid out for smaller ones cannot be mapped there
LARGEST = 45_000_000  # bytes of the app with the int4 package of the shipped model
SHIPPED = 10_000_000  # bytes that that package may take of it


def tool(part: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run one of Debian's tools where it was unpacked."""
    folders = ("usr/lib", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/android", "usr/lib/p7zip")
    libraries = ":".join(str(PARTS / name / folder) for name in read_lock() for folder in folders)
    program = PARTS / part / "usr" / "bin" / command[0]
    environment = os.environ | {"LD_LIBRARY_PATH": libraries}
    return subprocess.run([str(program), *command[1:]], capture_output=True, text=True, env=environment)


def signer(*arguments: str) -> subprocess.CompletedProcess[str]:
    jars = (PARTS / "apksigner/usr/share/java/apksigner.jar", PARTS / "apksig/usr/share/java/apksig.jar")
    command = ["java", "-cp", ":".join(map(str, jars)), "com.android.apksigner.ApkSignerTool", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_app_is_signed(apk: Path, tmp_path: Path) -> None:
    """And a byte that is changed afterwards is noticed."""
    done = signer("verify", "--verbose", "--min-sdk-version", "29", str(apk))
    assert done.returncode == 0 and "v3 scheme (APK Signature Scheme v3): true" in done.stdout
    content = bytearray(apk.read_bytes())
    content[5000] ^= 1
    (tmp_path / "changed.apk").write_bytes(content)
    assert signer("verify", "--min-sdk-version", "29", str(tmp_path / "changed.apk")).returncode != 0


def test_the_app_asks_for_no_permission(apk: Path) -> None:
    done = tool("aapt", "aapt", "dump", "permissions", str(apk))
    assert done.returncode == 0 and done.stdout.splitlines() == ["package: dev.rmseedge.demo"]


def test_the_app_says_what_it_runs_on(apk: Path) -> None:
    said = tool("aapt", "aapt", "dump", "badging", str(apk)).stdout
    assert "package: name='dev.rmseedge.demo' versionCode='1' versionName='0.1.0'" in said
    assert "sdkVersion:'29'" in said and "targetSdkVersion:'34'" in said
    assert "launchable-activity: name='dev.rmseedge.demo.MainActivity'" in said
    assert re.search(r"native-code: 'arm64-v8a' 'x86_64'$", said, re.MULTILINE)


def test_the_app_holds_what_it_needs_and_nothing_else(apk: Path, archive: Path) -> None:
    with zipfile.ZipFile(apk) as found:
        names = [name for name in found.namelist() if not name.startswith("res/")]
        libraries = [f"lib/{a}/{lib}.so" for a in ABIS for lib in ("libonnxruntime", "libonnxruntime4j_jni")]
        package = f"assets/{archive.name}"
        expected = [
            "AndroidManifest.xml",
            "assets/reference.json",
            "classes.dex",
            package,
            "resources.arsc",
            *libraries,
        ]
        assert sorted(names) == sorted(expected)
        assert found.read(package) == archive.read_bytes()
        assert found.getinfo(package).compress_type == zipfile.ZIP_STORED  # it is read from there in one pass
        assert len(json.loads(found.read("assets/reference.json"))["tokens"]) == 320


def test_the_app_is_small(apk: Path, archive: Path) -> None:
    """With room for the shipped model; the nightly run builds that app."""
    assert apk.stat().st_size - archive.stat().st_size + SHIPPED <= LARGEST


def test_the_app_is_aligned(apk: Path) -> None:
    """Android refuses a table of resources that is compressed or does not lie on a multiple of four."""
    assert tool("zipalign", "zipalign", "-c", "-p", "4", str(apk)).returncode == 0
    with zipfile.ZipFile(apk) as found:
        assert found.getinfo("resources.arsc").compress_type == zipfile.ZIP_STORED


def test_the_engine_is_of_the_version_that_gradle_is_told(apk: Path) -> None:
    version = re.search(r"^ONNXRUNTIME=(.*)$", (DEMO / "versions.sh").read_text(), re.MULTILINE)
    assert version
    with zipfile.ZipFile(apk) as found:
        for abi in ABIS:
            assert version[1].encode() in found.read(f"lib/{abi}/libonnxruntime.so")


def segments(library: bytes) -> Iterator[tuple[int, int, int, int]]:
    """(type, offset, address, alignment) of each segment of a 64-bit ELF file."""
    table, size, count = *struct.unpack_from("<Q", library, 32), *struct.unpack_from("<HH", library, 54)
    for start in range(table, table + size * count, size):
        kind, _, offset, address, _, _, _, align = struct.unpack_from("<IIQQQQQQ", library, start)
        yield kind, offset, address, align


def test_libraries_can_be_mapped_in_pages_of_16_kib(apk: Path) -> None:
    with zipfile.ZipFile(apk) as found:
        libraries = [name for name in found.namelist() if name.endswith(".so")]
        assert len(libraries) == 4
        for name in libraries:
            loaded = [s for s in segments(found.read(name)) if s[0] == 1]
            assert loaded and all(align % PAGE == 0 for _, _, _, align in loaded), name
            assert all((offset - address) % PAGE == 0 for _, offset, address, _ in loaded), name


def test_a_key_of_the_user_signs(apk: Path, archive: Path, tmp_path: Path) -> None:
    """Of what is there already, as build_apk.sh ends."""
    password = tmp_path / "password"
    password.write_text("secret words\n")
    store = ("-keystore", str(tmp_path / "own.keystore"), "-storepass:file", str(password), "-alias", "own")
    make = ("keytool", "-genkeypair", *store, "-keyalg", "RSA", "-validity", "99", "-dname", "CN=somebody")
    subprocess.run(make, check=True, capture_output=True)
    own = {"KEYSTORE_PASSWORD_FILE": str(password), "KEYSTORE_ALIAS": "own", "PYTHON": sys.executable}
    command = [str(DEMO / "sign.sh"), "-k", str(tmp_path / "own.keystore"), str(apk), str(tmp_path / "own.apk")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own)
    assert done.returncode == 0, done.stderr
    assert (
        "CN=somebody" in signer("verify", "--print-certs", "--min-sdk-version", "29", str(tmp_path / "own.apk")).stdout
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-m", "none.rmse.zip"], "none.rmse.zip: expected a package"),
        (["-m", str(ROOT / "README.md")], "README.md: expected a package"),
        (["-k", "none.keystore"], "none.keystore: no such file"),
        (["-x"], "see the head of"),
    ],
)
def test_bad_input_is_one_line(flags: list[str], said: str) -> None:
    done = built(*flags, code=2)
    assert done.stdout == "" and said in done.stderr.splitlines()[-1]


@pytest.mark.nightly
def test_make_apk_has_the_shipped_model(apk: Path) -> None:
    """`apk` skips where there are no parts."""
    subprocess.run(["make", "-C", str(ROOT), "apk"], check=True, capture_output=True)
    made = ROOT / "build" / "android" / "rmse-edge.apk"
    assert made.stat().st_size <= LARGEST
    with zipfile.ZipFile(made) as found:
        assert "assets/rmse-shakespeare.rmse.zip" in found.namelist()
