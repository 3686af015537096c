"""Text in, token ids out: reading files, the character tokenizer, splits, and random training blocks."""

from __future__ import annotations

import copy
import json
import re
from codecs import BOM_UTF8
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import TextError
from .files import write_text

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Fast

SPLITS = ("train", "validation", "all")
TRAIN_SHARE = 0.9  # nanoGPT's split: the first 90 % trains, the last 10 % validates


def read_text(path: str | Path, empty: bool = False) -> str:
    """The whole file as text.

    Args:
        empty: whether there may be nothing in it.
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
    if not empty and not raw.removeprefix(BOM_UTF8):
        raise TextError(f"{path}: the file is empty")
    return decode_utf8(raw, path)


def decode_utf8(raw: bytes, where: object) -> str:
    """The text that bytes stand for, without the mark that some editors and shells put before it.

    Raises:
        TextError: not UTF-8; the message names `where` and the byte.
    """
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise TextError(f"{where}: not UTF-8 at byte {error.start}; convert it first (iconv -t UTF-8)") from None


class Tokenizer:
    """A `tokenizer.json` of the Hugging Face `tokenizers` library, with errors in one line.

    Truncation and padding that are stored in the file are left out: they belong to the call that some program made last
    before it saved the tokenizer, and would cut texts short or fill them up unseen.
    """

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer as Fast

        self.path = Path(path)
        try:
            self._fast = Fast.from_str(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise TextError(f"{path}: no such file; expected the model's tokenizer.json") from None
        except Exception as error:  # tokenizers raises bare Exception on malformed files
            raise TextError(f"{path}: not a tokenizer.json ({error})") from None
        self._fast.no_truncation()
        self._fast.no_padding()

    @property
    def vocab_size(self) -> int:
        return self._fast.get_vocab_size()

    def ids(self) -> set[int]:
        """All ids that stand for a token, added ones included."""
        return set(self._fast.get_vocab(with_added_tokens=True).values())

    def same(self, other: Tokenizer) -> bool:
        """Whether the other one makes the same tokens of every text."""
        return self._fast.to_str() == other._fast.to_str()

    def fitting(self, vocab_size: int) -> Tokenizer:
        """Itself, if a model of so many tokens knows all of its own.

        Raises:
            TextError: it is another model's.
        """
        largest = max(self.ids(), default=0)
        if largest >= vocab_size:
            raise TextError(
                f"{self.path}: {self.vocab_size} tokens up to id {largest}, but the model has vocab_size {vocab_size}; use "
                "the tokenizer the model was trained with"
            )
        return self

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            special: add the tokens that the tokenizer puts around a text, such as the one it begins with. Names of such
                tokens that stand in `text` are tokens in any case, and one that `text` begins with itself is not
                added again.
        Raises:
            TextError: a character is outside the vocabulary; the message names the first one.
        """
        ids = self._encode(self._fast, text, special)
        named = self.leading_token(text) if special and ids[:1] == ids[1:2] else None
        if named is None or self._fast.token_to_id(named) != ids[0]:
            return ids
        added = self._fast.encode("").ids[:1] == ids[:1]  # otherwise the text itself has it twice
        return ids[1:] if added else ids

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a text, (N,) int64, and behind which character each ends, (N,), 0 for one that stands for none.

        Raises:
            TextError: as `encode`.
        """
        found = self._encoded(self._fast, text, special=True)
        return np.array(found.ids, np.int64), np.array([end for _, end in found.offsets], np.int64)

    def encode_more(self, text: str) -> list[int]:
        """Token ids of `text` where it goes on from an earlier text: without what belongs to a text's beginning.

        That is the tokens which the tokenizer puts around a text, and the space that many put before its first word.

        Raises:
            TextError: as `encode`.
        """
        if self._inner is None:
            return self._encode(self._fast, text, special=False)
        # After a token of the tokenizer's own (`</s>`) a piece of text begins as everywhere else.
        first = self._added.search(text) if self._added else None
        cut = first.start() if first else len(text)
        rest = self._encode(self._fast, text[cut:], special=False) if cut < len(text) else []
        return self._encode(self._inner, text[:cut], special=False) + rest

    def decode(self, ids: list[int]) -> str:
        return self._fast.decode(ids, skip_special_tokens=False)

    def leading_token(self, text: str) -> str | None:
        """The token of the tokenizer's own, such as `</s>`, that `text` begins with."""
        found = self._added.match(text) if self._added else None
        return found[0] if found else None

    def _encode(self, fast: Fast, text: str, special: bool) -> list[int]:
        return self._encoded(fast, text, special).ids

    def _encoded(self, fast: Fast, text: str, special: bool) -> Encoding:
        try:
            return fast.encode(text, add_special_tokens=special)
        except Exception:  # tokenizers raises bare Exception for a word without an [UNK]
            lone = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if lone is not None:  # how Python holds bytes of the command line that are not UTF-8
                raise TextError(
                    f"the text is not UTF-8 at character {lone}; convert it first (iconv -t UTF-8)"
                ) from None
            vocab = fast.get_vocab()
            characters = [word for word in vocab if len(word) == 1 and word.isprintable()]
            if 2 * len(characters) > len(vocab):
                bad, known = next((c for c in text if c not in vocab), "?"), "".join(sorted(characters))
            else:
                bad, known = next((w for w in text.split() if w not in vocab), "?"), f"{len(vocab)} words"
            raise TextError(f"the tokenizer has no token for {bad!r}; it knows {known}") from None

    @cached_property
    def _added(self) -> re.Pattern[str] | None:
        """Finds the tokens that are looked for before anything else is done to a text, the longest first."""
        names = sorted((t.content for t in self._fast.get_added_tokens_decoder().values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    @cached_property
    def _inner(self) -> Fast | None:
        """The tokenizer for text that stands in the middle of another, None where that is the same one."""
        from tokenizers import Tokenizer as Fast

        spec = json.loads(self._fast.to_str())
        changed = copy.deepcopy(spec)
        for part in _parts(changed["pre_tokenizer"], "pretokenizers"):
            if part["type"] == "Metaspace":
                part["prepend_scheme"] = "never"
            elif part["type"] == "ByteLevel":
                part["add_prefix_space"] = False
        kept = [part for part in _parts(changed["normalizer"], "normalizers") if part["type"] != "Prepend"]
        if len(kept) < len(_parts(changed["normalizer"], "normalizers")):
            changed["normalizer"] = {"type": "Sequence", "normalizers": kept}
        return None if changed == spec else Fast.from_str(json.dumps(changed))


class TokenNumbers:
    """Stands in for the tokenizer of a model that has none: a token's text is its id, with spaces between them."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def check_ids(ids: list[int] | np.ndarray, vocab_size: int) -> None:
    """
    Raises:
        TextError: an id is outside the vocabulary; the message names the first one.
    """
    outside = next((i for i in ids if not 0 <= i < vocab_size), None)
    if outside is not None:
        raise TextError(f"token {outside} is outside the vocabulary (0..{vocab_size - 1})")


def read_ids(path: str | Path, vocab_size: int) -> np.ndarray:
    """Token ids from a file: an array of NumPy's (.npy), or numbers in a text, with spaces, commas or lines between them.

    Returns:
        (n,) int64.
    Raises:
        TextError: it holds something else, nothing, or an id outside the vocabulary.
    """
    path = Path(path)
    if path.suffix == ".npy":
        try:
            ids = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise TextError(f"{path}: not an array of NumPy's ({error})") from None
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            raise TextError(f"{path}: got {ids.dtype} {ids.shape}, expected whole numbers in one dimension")
    else:
        words = read_text(path).replace(",", " ").split()
        unfit = next((word for word in words if not re.fullmatch(r"[0-9]{1,18}", word)), None)
        if unfit is not None:
            raise TextError(f"{path}: got {unfit[:40]!r}, expected token ids")
        ids = np.array(words, np.int64)
    if not len(ids):
        raise TextError(f"{path}: holds no token ids")
    check_ids(ids, vocab_size)
    return ids.astype(np.int64)


def _parts(component: dict[str, Any] | None, members: str) -> list[dict[str, Any]]:
    """The members of a tokenizer's component, which may be a sequence of them, or itself, or nothing."""
    if component is None:
        return []
    return component[members] if component["type"] == "Sequence" else [component]


def train_character_tokenizer(text: str, path: str | Path) -> None:
    """Write a tokenizer.json with one token per distinct character of `text`, in code-point order."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    vocab = {c: i for i, c in enumerate(sorted(set(text)))}
    fast = Fast(models.WordLevel(vocab))
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast.decoder = decoders.Fuse()
    write_text(path, json.dumps(json.loads(fast.to_str()), indent=1) + "\n")


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


def spread(total: int, count: int) -> np.ndarray:
    """Of `total` things the places of `count`, or of all if there are fewer, as evenly as may be; the first and the last among
    them.
    """
    return np.linspace(0, total - 1, min(count, total)).astype(int)


def consecutive_blocks(ids: np.ndarray, length: int) -> np.ndarray:
    """All whole windows of `length` + 1 tokens in order, (n, length + 1) int64; targets do not overlap."""
    count = (len(ids) - 1) // length
    if count < 1:
        raise TextError(f"the text has {len(ids)} tokens, too few for one block of {length}")
    return ids[np.arange(count)[:, None] * length + np.arange(length + 1)].astype(np.int64)
