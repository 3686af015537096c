"""Fetching the texts that recipes name, checked against their known SHA-256."""

from __future__ import annotations

import hashlib
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError, URLError

from tqdm import tqdm

from rmse_edge.errors import TextError, UserError
from rmse_edge.files import check_file, new_file

TIMEOUT = 30  # seconds without a byte


@dataclass(frozen=True)
class Text:
    url: str
    sha256: str
    bytes: int


TEXTS = {
    "shakespeare": Text(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        1_115_394,
    )
}


def download(name: str, path: Path, url: str | None = None) -> bool:
    """Fetch the text `name` of TEXTS into `path`, whole and verified or not at all.

    Args:
        url: another place that holds the same file.
    Returns:
        False if the file was already there.
    Raises:
        UserError: the server cannot be reached, or does not have the file.
        TextError: what came is another file, or `path` is.
    """
    text = TEXTS[name]
    url = url or text.url
    if not url.startswith(("https://", "http://")):
        raise UserError(f"{url}: expected an http or https address")
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == text.sha256:
        return False
    check_file(path)
    if path.exists():
        raise TextError(f"{path}: exists and is not the text {name!r}; remove it or choose another file")
    digest, count = hashlib.sha256(), 0
    try:
        with (
            new_file(path) as part,
            urllib.request.urlopen(url, timeout=TIMEOUT) as source,
            part.open("wb") as file,
            tqdm(total=text.bytes, unit="B", unit_scale=True, desc=path.name, disable=None) as bar,
        ):
            # One block more than the file has is enough to know that it is another one.
            while (block := source.read(1 << 16)) and count <= text.bytes:
                file.write(block)
                digest.update(block)
                count += len(block)
                bar.update(len(block))
            if count < text.bytes:
                raise UserError(f"{url}: ended after {count:,} of {text.bytes:,} bytes; try again")
            if digest.hexdigest() != text.sha256:
                raise TextError(f"{url}: not the expected file (its SHA-256 differs); nothing was written")
    except HTTPError as error:
        raise UserError(f"{url}: the server answered {error.code} {error.reason}") from None
    except (URLError, TimeoutError, HTTPException, ConnectionError) as error:
        reason = getattr(error, "reason", None) or error or type(error).__name__
        raise UserError(f"{url}: cannot be fetched ({reason}); check the network, or copy the file by hand") from None
    return True
