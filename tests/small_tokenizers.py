"""Tokenizers of the kinds that models come with, made by the tokenizers library itself."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

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
