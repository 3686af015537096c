"""Tokenizers of the kinds that models come with, made by the tokenizers library itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, TURN_END = "<s>", "</s>", "<|im_end|>"
SPECIAL = ["<unk>", BOS, EOS, "<|im_start|>", TURN_END]


def byte_fallback(letters: str = "abcdefghijklmnopqrstuvwxyz.,!?\n:é", metaspace: bool = False) -> Tokenizer:
    """As of sentencepiece: pieces of words, a space before the first, and bytes for every character not in `letters`."""
    pieces = [*SPECIAL, *(f"<0x{b:02X}>" for b in range(256)), "▁", *letters, "▁a", "he", "▁he"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("h", "e"), ("▁", "he")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space: decoders.Decoder
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
        space = decoders.Metaspace("▁", "first", split=False)
        tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse()])
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        space = decoders.Replace("▁", " ")
        tokenizer.decoder = decoders.Sequence(
            [space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def byte_level() -> Tokenizer:
    """As of GPT-2: merged bytes, some tokens beginning in one character and ending in the next."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["to be 日本 日木 日月 é è 😀😁", "日本語 to be"] * 9, trainer)
    return tokenizer


# How words are cut before their bytes are merged: as GPT-2 does, with digits by themselves, and as newer models do.
CUTS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "a space before": lambda: pre_tokenizers.ByteLevel(add_prefix_space=True),
    "digits": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "three digits": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "removed": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("-", "merged_with_previous"),
            pre_tokenizers.Split(Regex(r"[\s\d]"), "merged_with_next"),
            pre_tokenizers.Split(Regex(r"\w+|[^\w\s]+|\s+"), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def byte_pairs(cut: str, sentences: Sequence[str], normalized: bool = False, whole_words: bool = False) -> Tokenizer:
    """As of most published models: pairs of bytes within words, merged as often as `sentences` have them.

    Args:
        cut: of `CUTS`.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole_words))
    tokenizer.pre_tokenizer = CUTS[cut]()
    tokenizer.decoder = decoders.ByteLevel()
    if normalized:
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.NFC()])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<tool> now", normalized=False)])
    return tokenizer


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """The same, putting <s> before every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def cut_short(path: Path, length: int = 16) -> Path:
    """Store in a tokenizer.json what a call with `truncation=True, padding="max_length"` leaves in it."""
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length)
    tokenizer.save(str(path))
    return path
