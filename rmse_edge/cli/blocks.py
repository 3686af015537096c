"""`rmse-run` with a model that writes by blocks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rmse_edge.errors import UserError

from .common import Parser
from .flags import chosen_dials

if TYPE_CHECKING:
    from rmse_edge.runtimes import BlockRuntime
    from rmse_edge.runtimes.text.blocks import BlockGeneration

# What does not go with it, and why.
DRAWN = "a model that writes by blocks takes the likeliest tokens"
REFUSED = {
    **dict.fromkeys(("temperature", "top_k", "top_p", "seed"), DRAWN),
    **dict.fromkeys(("session", "save_session"), "a model that writes by blocks keeps no sessions"),
    **dict.fromkeys(("chat", "system", "prefix", "no_memory"), "is for models that write token by token"),
    **dict.fromkeys(("kb", "gamma", "kb_hits", "kb_timeout", "kb_storage", "kb_optional"), "needs a memory, and this has none"),
}  # fmt: skip


def refuse_flags(args: argparse.Namespace, parser: Parser) -> None:
    """Fail where a flag was given that would change nothing.

    Raises:
        UserError: names the flag.
    """
    for flag, why in REFUSED.items():
        given = getattr(args, flag)
        if given != parser.get_default(flag) and not (flag == "temperature" and given == 0):
            raise UserError(f"--{flag.replace('_', '-')}: {why}; leave it out")


def generation_of(args: argparse.Namespace, runtime: BlockRuntime, text: str) -> BlockGeneration:
    """What follows the prompt, still to be made.

    Raises:
        UserError: the prompt is empty and the model has no token to begin with, or a dial is not the model's.
        TextError: there is no tokenizer, or it has no token for a character.
    """
    from rmse_edge.runtimes.text.blocks import BlockGeneration
    from rmse_edge.runtimes.text.sampling import Sampler, Sampling
    from rmse_edge.runtimes.text.writer import begin_of_text, open_tokenizer
    from rmse_edge.text import Tokenizer, check_ids

    info = runtime.info
    dials = chosen_dials(args, info)
    check_ids(args.prompt_tokens, info.vocab_size)
    tokenizer = open_tokenizer(args.model, info.vocab_size, needed=not args.prompt_tokens)
    prompt = args.prompt_tokens
    if not prompt:
        assert isinstance(tokenizer, Tokenizer)
        prompt = tokenizer.encode(text) or begin_of_text(info.config)
    told = len(prompt) if not isinstance(tokenizer, Tokenizer) and not args.show_prompt else 0
    eos = () if args.ignore_eos else info.language.eos_token_ids
    return BlockGeneration(
        runtime, tokenizer, prompt, dials, Sampler(Sampling(0.0)), args.max_new_tokens, eos, args.stop or (), told=told
    )


def statistics_lines(s: dict[str, Any], ended: str) -> list[str]:
    """The statistics in two readable lines, or one when no token was made.

    Args:
        ended: why the text ended.
    """
    if not s["blocks"]:
        return [f"prompt {s['prompt_tokens']} tokens; stopped before the first block"]
    speed = f" at {s['tokens_per_s']:.1f} tokens/s" if s["tokens_per_s"] else ""
    return [
        f"prompt {s['prompt_tokens']} tokens; first block after {1000 * s['time_to_first_token_s']:.0f} ms",
        f"generated {s['generated_tokens']} tokens in {s['blocks']} blocks{speed}, {s['denoising_steps']} denoising steps: "
        f"{s['tokens_per_step']:.2f} tokens a step, {s['tokens_per_forward']:.2f} a forward pass{ended}",
    ]
