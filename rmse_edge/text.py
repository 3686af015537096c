"""Text in, token ids out: reading files, the character tokenizer, splits, and random training blocks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from .errors import TextError

SPLITS = ("train", "validation", "all")
TRAIN_SHARE = 0.9  # nanoGPT's split: the first 90 % trains, the last 10 % validates


def read_text(path: str | Path) -> str:
    """The whole file as text.

    Raises:
        TextError: missing, not a file, empty, or not UTF-8; the message names the file and the byte.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise TextError(f"{path}: no such file") from None
    except OSError as error:
        raise TextError(f"{path}: cannot be read ({error.strerror})") from None
    if not raw:
        raise TextError(f"{path}: the file is empty")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TextError(f"{path}: not UTF-8 at byte {error.start}; convert it first (iconv -t UTF-8)") from None


class Tokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library, with errors in one line."""

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.path = Path(path)
        try:
            self._fast = Fast.from_str(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TextError(f"{path}: no such file; expected the model's tokenizer.json") from None
        except Exception as error:  # tokenizers raises bare Exception on malformed files
            raise TextError(f"{path}: not a tokenizer.json ({error})") from None

    @property
    def vocab_size(self) -> int:
        return self._fast.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`.

        Raises:
            TextError: a character is outside the vocabulary; the message names the first one.
        """
        try:
            return self._fast.encode(text).ids
        except Exception:  # tokenizers raises bare Exception for a word without an [UNK]
            vocab = self._fast.get_vocab()
            characters = [word for word in vocab if len(word) == 1 and word.isprintable()]
            if 2 * len(characters) > len(vocab):
                bad, known = next((c for c in text if c not in vocab), "?"), "".join(sorted(characters))
            else:
                bad, known = next((w for w in text.split() if w not in vocab), "?"), f"{len(vocab)} words"
            raise TextError(f"the tokenizer has no token for {bad!r}; it knows {known}") from None

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)


def train_character_tokenizer(text: str, path: str | Path) -> None:
    """Write a tokenizer.json with one token per distinct character of `text`, in code-point order."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    vocab = {c: i for i, c in enumerate(sorted(set(text)))}
    fast = Fast(models.WordLevel(vocab))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    Path(path).write_text(json.dumps(json.loads(fast.to_str()), indent=1) + "\n", encoding="utf-8")


def word_tokenizer(words: list[str]) -> str:
    """A tokenizer.json of whole words between spaces: token i is `words[i]`."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, pre_tokenizers

    fast = Fast(models.WordLevel({word: i for i, word in enumerate(words)}))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return json.dumps(json.loads(fast.to_str()), indent=1) + "\n"


def split(ids: np.ndarray, name: str) -> np.ndarray:
    """The first 90 % ("train"), the last 10 % ("validation") or everything ("all") of a token array."""
    if name not in SPLITS:
        raise TextError(f"split: got {name!r}, expected one of {', '.join(SPLITS)}")
    cut = int(len(ids) * TRAIN_SHARE)
    return {"train": ids[:cut], "validation": ids[cut:], "all": ids}[name]


def random_blocks(ids: np.ndarray, count: int, length: int, seed: tuple[int, ...]) -> np.ndarray:
    """`count` random windows of `length` + 1 tokens, (count, length + 1) int64; a function of `seed` alone.

    Because a step's batch depends only on (seed, step, process), a resumed run sees exactly the data it would have seen.
    """
    if len(ids) <= length:
        raise TextError(f"the text has {len(ids)} tokens, too few for blocks of {length}")
    starts = np.random.default_rng(seed).integers(0, len(ids) - length, count)
    return ids[starts[:, None] + np.arange(length + 1)].astype(np.int64)


def consecutive_blocks(ids: np.ndarray, length: int) -> np.ndarray:
    """All whole windows of `length` + 1 tokens in order, (n, length + 1) int64; targets do not overlap."""
    count = (len(ids) - 1) // length
    if count < 1:
        raise TextError(f"the text has {len(ids)} tokens, too few for one block of {length}")
    return ids[np.arange(count)[:, None] * length + np.arange(length + 1)].astype(np.int64)
