"""See the package's docstring."""

from __future__ import annotations

import sys
from pathlib import Path

from .jar import write_jar

if __name__ == "__main__":
    count = write_jar(Path(sys.argv[1]).read_text(encoding="utf-8"), Path(sys.argv[2]))
    print(f"{sys.argv[2]}: {count} classes", file=sys.stderr)
