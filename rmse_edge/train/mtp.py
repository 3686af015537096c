"""Heads for multi-token prediction of a trained model, all of which stays as it is (rmse_edge/layers/mtp.py).

    1. the model reads windows of the text, some at its own dials and some at full depth: the state that each position stops with
    2. a chain of heads goes on from the state of every position, given the tokens that the text really has behind it. Head k learns to say
       what the model itself says k positions later, by cross-entropy; or, with `teacher` off, the text's token
    3. on held-out windows: how often each head's likeliest token is the model's, and how much of its distribution

Weights of the chain's losses are equal, as in DeepSeek-V3 (arXiv 2412.19437, equation 25). That heads learn the model's own distribution is what
acceptance asks for: a draft is kept with probability sum min(p, q), of the model's p and the draft's q (Leviathan et al. 2023,
arXiv 2211.17192, theorem 3.5; distilled drafts: Zhou et al. 2024, DistillSpec, arXiv 2310.08461).
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from time import process_time
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from rmse_edge.arch.common.identity import fingerprint
from rmse_edge.arch.registry import arch_of_model
from rmse_edge.chat import chat_files
from rmse_edge.checkpoint import CONFIG_FILE, load_checkpoint
from rmse_edge.errors import CheckpointError, ConfigError, TextError, UserError
from rmse_edge.files import new_folder, write_text
from rmse_edge.heads import check_fits, embedding_of, load_heads, save_heads
from rmse_edge.layers.mtp import MOST_HEADS, HeadsConfig, MtpHeads
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import Count, Share
from rmse_edge.schema import check_fields
from rmse_edge.shards import INDEX_FILE, is_sharded, weight_files
from rmse_edge.text import Tokenizer, consecutive_blocks, random_blocks, read_text, split
from rmse_edge.vocabulary import GENERATION_FILE, TOKENIZER_FILE

from .recipe import Above, AtLeastZero
from .recipe_file import RecipeFile

Some = Annotated[int, Field(ge=1, le=10**6)]

LARGEST_LOGITS = 4 << 30  # bytes of a model's logits that are kept
RECIPE_FILE, EVALUATION_FILE = "mtp-recipe.json", "mtp-evaluation.json"


@dataclass(frozen=True)
class HeadsRecipe(RecipeFile):
    """Everything that decides what `train_heads` makes of a checkpoint."""

    named: ClassVar[str] = "heads"

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    heads: Annotated[int, Field(ge=1, le=MOST_HEADS)] = 3
    intermediate_size: Count = 512
    windows: Some = 768  # that are read
    window: Annotated[int, Field(ge=8, le=2**20)] = 256  # positions of each
    full_depth: Annotated[float, Field(ge=0, le=1)] = 0.5  # share of them that is read at full depth
    held_out: Some = 32  # windows on which the heads are measured, at the model's own dials and at full depth
    teacher: bool = True  # learn the model's own distribution; false: the text's tokens
    steps: Some = 2000
    batch_size: Some = 1024  # positions of a step
    lr: Above = 2e-3
    warmup: Annotated[int, Field(ge=0, le=10**6)] = 100
    final_lr_share: Share = 0.05
    weight_decay: AtLeastZero = 0.1
    clip: Above = 1.0

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if self.window <= self.heads + 1:
            raise ConfigError(f"window: got {self.window}, expected more than the heads look ahead, {self.heads + 1}")


class Course(NamedTuple):
    """What a model says of windows."""

    tokens: Tensor  # (N, T) int64
    states: Tensor  # (N, T, d) that its positions stopped with
    # (N, T, V) float16, of a model with layers behind its loop: what its head reads are not these states. None: it reads them.
    logits: Tensor | None
    depth: float  # iterations, in the mean

    def says(self, model: Any, window: Any, places: Any) -> Tensor:
        """The model's own logits (..., V) at places of windows."""
        if self.logits is not None:
            return self.logits[window, places].float()
        found = self.states[window, places]
        return model.head(found.view(1, -1, found.shape[-1]))["logits"].view(*found.shape[:-1], -1)


def train_heads(
    text_file: Path, out: Path, recipe: HeadsRecipe, start: Path, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Train heads for the checkpoint `start` on a text, and write a new folder `out` with both.

    Args:
        tokenizer: a tokenizer.json; None: that of the checkpoint.
    Returns:
        What mtp-evaluation.json holds.
    Raises:
        UserError: the text, the recipe or a folder cannot be used; one line says why. Nothing is left behind.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: already exists; choose another folder, in which the model is copied beside its heads")
    source = tokenizer or start / TOKENIZER_FILE
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file; give a tokenizer")
    model = load_checkpoint(start).float().eval().requires_grad_(False)
    check_fits(model)
    room = model.spec(1).capacity
    if room is not None and recipe.window > room:
        raise ConfigError(f"window: got {recipe.window}, expected at most {room}, the positions of the model")
    ids = np.array(Tokenizer(source).fitting(model.config.vocab_size).encode(read_text(text_file)))
    train, other = (split(ids, name) for name in ("train", "validation"))
    if len(train) <= recipe.window or len(other) <= recipe.window:
        raise TextError(f"{text_file}: has {len(ids)} tokens, too few for windows of {recipe.window}")
    config = HeadsConfig(
        recipe.heads,
        model.spec(1).h.shape[-1],
        recipe.intermediate_size,
        getattr(model.config, "norm_eps", getattr(model.config, "rms_norm_eps", 1e-6)),
        embedding_of(model),
        fingerprint(model),
    )
    heads = MtpHeads(config)
    heads.reset_parameters(recipe.seed)
    own, deep = dials_of(model)
    begun = process_time()
    windows = torch.from_numpy(random_blocks(train, recipe.windows, recipe.window - 1, (recipe.seed, 0)))
    cut = round(recipe.windows * recipe.full_depth)
    courses = [read(model, part, dials) for part, dials in ((windows[:cut], deep), (windows[cut:], own)) if len(part)]
    seconds = {"reading_s": process_time() - begun}
    begun = process_time()
    losses = learn(model, heads, courses, recipe)
    seconds["training_s"] = process_time() - begun
    held_out = torch.from_numpy(consecutive_blocks(other, recipe.window - 1)[: recipe.held_out])
    with new_folder(out, CheckpointError, replace=False) as folder:
        copy_checkpoint(start, folder, source)
        save_heads(heads, folder)
        stored = load_heads(folder, model)  # as they were rounded
        assert stored is not None
        evaluation = {
            "parameters": sum(p.numel() for p in heads.parameters()),
            **seconds,
            "losses": losses,
            "held_out": {name: measure(model, stored, read(model, held_out, dials)) for name, dials in (("own dials", own), ("full depth", deep))},
        }  # fmt: skip
        write_text(folder / RECIPE_FILE, recipe.to_json())
        write_text(folder / EVALUATION_FILE, json.dumps(evaluation, indent=2) + "\n")
    return evaluation


def dials_of(model: Any) -> tuple[Dials, Dials]:
    """The checkpoint's own dials, and those of full depth."""
    full = model.spec(1).max_loops - getattr(model.config, "untrained_loops", 0)
    return arch_of_model(model).parts(model)["dials"], Dials(full)


def copy_checkpoint(start: Path, folder: Path, tokenizer: Path) -> None:
    """The model's own files as they are, to the byte."""
    names = {CONFIG_FILE, GENERATION_FILE, "tokenizer_config.json", "sample.txt", *chat_files(start)}
    names |= {path.name for path in weight_files(start)} | ({INDEX_FILE} if is_sharded(start) else set())
    for name in sorted(names):
        if (start / name).is_file():
            shutil.copyfile(start / name, folder / name)
    shutil.copyfile(tokenizer, folder / TOKENIZER_FILE)


@torch.no_grad()
def read(model: Any, windows: Tensor, dials: Dials) -> Course:
    """Every window (N, T) by itself, from an empty past."""
    scalars = {name: torch.from_numpy(value) for name, value in dials.arrays().items() if name in model.spec(1).dials}
    states, logits, depth = [], [], 0.0
    behind = bool(model.spec(1).coda)
    if behind and (size := 2 * windows.numel() * model.config.vocab_size) > LARGEST_LOGITS:
        raise ConfigError(
            f"windows: got {len(windows)}, whose logits take {size} bytes, expected at most {LARGEST_LOGITS}: the model has layers "
            "behind its loop"
        )
    for window in tqdm(windows, desc="reading", unit="window", disable=None):
        said = model.whole_text(window, scalars)
        states.append(said.h)
        if behind:
            logits.append(said.logits.half())
        depth += float(said.depth.double().mean()) / len(windows)
    return Course(windows, torch.stack(states), torch.stack(logits) if behind else None, depth)


def chain(heads: MtpHeads, embed: Any, states: Tensor, tokens: Tensor) -> list[Tensor]:
    """What the heads make of states (B, d) and the tokens behind them (B, n): n states (B, d), one by each head."""
    found = []
    for k, layer in enumerate(heads.layers):
        states = layer(embed(tokens[:, k]), states)
        found.append(states)
    return found


def learn(model: Any, heads: MtpHeads, courses: list[Course], recipe: HeadsRecipe) -> list[list[float]]:
    """Train the heads; the losses of each, nats a token, averaged over every tenth of the steps."""
    embed, count = model.get_submodule(heads.config.embedding), recipe.heads
    tokens = torch.cat([c.tokens for c in courses])  # (N, T)
    states = torch.cat([c.states for c in courses])
    known = [c.logits for c in courses if c.logits is not None]
    course = Course(tokens, states, torch.cat(known) if known else None, 0.0)
    length = recipe.window - count  # positions behind which a window has all that the heads look at
    ahead = torch.arange(1, count + 1)
    decay = [p for p in heads.parameters() if p.dim() > 1]
    rest = [p for p in heads.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": recipe.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.98))
    draw = torch.Generator().manual_seed(recipe.seed)
    logged, sums = [], torch.zeros(count)
    every = max(1, recipe.steps // 10)
    for step in (bar := tqdm(range(recipe.steps), desc="training", unit="step", disable=None)):
        done = step / recipe.steps
        share = recipe.final_lr_share + (1 - recipe.final_lr_share) * 0.5 * (1 + cos(pi * done))
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (step + 1) / max(1, recipe.warmup)) * share
        window = torch.randint(len(tokens), (recipe.batch_size,), generator=draw)
        position = torch.randint(length, (recipe.batch_size,), generator=draw)
        places = position[:, None] + ahead  # (B, n)
        behind = tokens[window[:, None], places]
        with torch.no_grad():
            if recipe.teacher:
                targets: Tensor = F.softmax(course.says(model, window[:, None], places), -1)
            else:
                targets = tokens[window[:, None], (places + 1).clamp(max=recipe.window - 1)]
        said = chain(heads, embed, states[window, position], behind)
        losses = torch.stack(
            [F.cross_entropy(model.head(s[None])["logits"][0], targets[:, k]) for k, s in enumerate(said)]
        )
        optimizer.zero_grad()
        losses.mean().backward()
        torch.nn.utils.clip_grad_norm_(heads.parameters(), recipe.clip)
        optimizer.step()
        sums += losses.detach()
        if (step + 1) % every == 0:
            logged.append((sums / every).tolist())
            sums.zero_()
            bar.set_postfix_str(" ".join(f"{x:.3f}" for x in logged[-1]))
    return logged


@torch.no_grad()
def measure(model: Any, heads: MtpHeads, course: Course) -> dict[str, Any]:
    """Of each head, given the text's tokens: how often its likeliest token is the model's own, and the share of a
    distribution that it has in common with the model's, by which drafts are accepted at temperature 1. And how many tokens a chain
    of likeliest ones would gain before the first that is refused.
    """
    embed, count = model.get_submodule(heads.config.embedding), len(heads.layers)
    length = course.tokens.shape[1] - count
    same, overlap, all_same = torch.zeros(count), torch.zeros(count), torch.zeros(count)
    for window, (tokens, states) in enumerate(zip(course.tokens, course.states)):
        places = torch.arange(length)[:, None] + torch.arange(1, count + 1)
        wanted = course.says(model, window, torch.arange(length + count))
        so_far = torch.ones(length, dtype=torch.bool)
        for k, said in enumerate(chain(heads, embed, states[:length], tokens[places])):
            logits, own = model.head(said[None])["logits"][0], wanted[places[:, k]]
            agrees = logits.argmax(-1) == own.argmax(-1)
            so_far &= agrees
            same[k] += agrees.float().mean()
            all_same[k] += so_far.float().mean()
            overlap[k] += torch.minimum(F.softmax(logits, -1), F.softmax(own, -1)).sum(-1).mean()
    windows = len(course.tokens)
    return {
        "loops": course.depth,
        "same_token": (same / windows).tolist(),
        "same_distribution": (overlap / windows).tolist(),
        "gained": float(all_same.sum() / windows),
    }


def as_markdown(evaluation: dict[str, Any]) -> str:
    """What the heads agree with the model on, held-out text."""
    lines = [
        "| held-out text at | loops | head | same likeliest token | shared distribution |",
        "|---|---|---|---|---|",
    ]
    for name, found in evaluation["held_out"].items():
        for k, (same, overlap) in enumerate(zip(found["same_token"], found["same_distribution"]), 1):
            lines.append(f"| {name} | {found['loops']:.2f} | {k} | {same:.1%} | {overlap:.1%} |")
    seconds = evaluation["reading_s"] + evaluation["training_s"]
    return "\n".join([*lines, f"{evaluation['parameters']:,} parameters, {seconds:.0f} s of processor time"])
