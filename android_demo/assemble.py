"""Puts dex files, assets and native libraries into an APK that aapt2 made; a step of build_apk.sh.

    python android_demo/assemble.py base.apk out.apk --dex FOLDER --assets FOLDER --libraries FOLDER ABI...

Assets are stored: a package hardly compresses, and is read in one pass. Libraries are compressed: the system unpacks them when the app is installed (`extractNativeLibs`), and the download is half as
large. Entries have no times, so the same parts give the same bytes.
"""

from __future__ import annotations

import argparse
import shutil
import zipfile
from pathlib import Path

LONG_AGO = (1980, 1, 1, 0, 0, 0)


def add(apk: zipfile.ZipFile, name: str, data: bytes, how: int) -> None:
    entry = zipfile.ZipInfo(name, LONG_AGO)
    entry.external_attr = 0o644 << 16
    apk.writestr(entry, data, how)


def main() -> None:
    parser = argparse.ArgumentParser(description="Put dex files, assets and native libraries into an APK.")
    parser.add_argument("base", type=Path, help="made by aapt2")
    parser.add_argument("output", type=Path)
    parser.add_argument("--dex", type=Path, required=True, help="folder of dex files")
    parser.add_argument("--assets", type=Path, required=True, help="folder of files")
    parser.add_argument("--libraries", type=Path, required=True, help="folder with a folder for each ABI")
    parser.add_argument("abis", nargs="+", metavar="ABI")
    args = parser.parse_args()
    shutil.copyfile(args.base, args.output)
    with zipfile.ZipFile(args.output, "a") as apk:
        for file in sorted(args.dex.glob("classes*.dex")):
            add(apk, file.name, file.read_bytes(), zipfile.ZIP_DEFLATED)
        for file in sorted(args.assets.iterdir()):
            add(apk, f"assets/{file.name}", file.read_bytes(), zipfile.ZIP_STORED)
        for abi in args.abis:
            for file in sorted((args.libraries / abi).glob("*.so")):
                add(apk, f"lib/{abi}/{file.name}", file.read_bytes(), zipfile.ZIP_DEFLATED)


if __name__ == "__main__":
    main()
