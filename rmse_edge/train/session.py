"""One training session: a recipe and its text, or its task, in; a checkpoint folder out.

    recipe.json          the whole recipe, every default written out
    tokenizer.json       made from the text's characters where none is given
    log.csv, curve.png   every step, and the picture of it
    training-state.pt    what --resume goes on from
    config.json, model.safetensors   the averaged weights in bfloat16
    evaluation.json      validation loss at every depth, of the float32 average and of the rounded weights

The last three, and the picture, are written when the recipe is done. A task writes what it measures into evaluation.json and draws it,
as recall.png or facts.png.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmse_edge.arch.bd3lm.config import Bd3lmConfig
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.chat import TEMPLATE_FILE, template_source
from rmse_edge.errors import CheckpointError, ConfigError, TextError, UserError
from rmse_edge.files import check_changes, check_file, write_text
from rmse_edge.shards import INDEX_FILE, WEIGHTS_FILE
from rmse_edge.text import Tokenizer, consecutive_blocks, read_text, split, train_character_tokenizer, word_tokenizer

from .boards import Solving
from .diffusion import DiffusionSource, evaluate_bound
from .gpt import GPT, load_gpt, save_gpt
from .journal import best_validation, draw, read_rows
from .recipe import Recipe
from .sources import TextSource
from .tasks import make_task
from .trainer import LOG_FILE, STATE_FILE, Trainer, build_model, evaluate

RECIPE_FILE, TOKENIZER_FILE, EVALUATION_FILE = "recipe.json", "tokenizer.json", "evaluation.json"
PRIOR = 16  # segments that what training knows of the surprise counts for
# Any of these is the work of a run, never to be written over unasked.
TRACES = (STATE_FILE, WEIGHTS_FILE, INDEX_FILE, EVALUATION_FILE)


def train(
    text_file: Path,
    out: Path,
    recipe: Recipe,
    tokenizer: Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    mode: str = "ddp",
    stop_at: int | None = None,
    save_every: int = 200,
    start: Path | None = None,
) -> dict[str, Any] | None:
    """Train `recipe` on a text file and write the checkpoint folder.

    Args:
        out: made if missing; must hold no other run.
        tokenizer: a tokenizer.json; None makes one of the text's characters. A resumed run keeps its own.
        resume: go on from the state in `out`.
        stop_at: leave after this many steps in all, with the state saved and no checkpoint written.
        start: a checkpoint folder to begin with the weights of, instead of random ones; its tokenizer and chat template
            are kept.
    Returns:
        What evaluation.json holds; None if the recipe is not done yet, and in every process but the first.
    Raises:
        UserError: the text, recipe, tokenizer or folder cannot be used; one line says why.
    """
    need_matplotlib()
    text = read_text(text_file)
    claim(out, recipe, resume)
    if start is not None and tokenizer is None and (start / TOKENIZER_FILE).is_file():
        tokenizer = start / TOKENIZER_FILE
    with tempfile.TemporaryDirectory() as scratch:
        # Every process makes the same tokenizer for itself; the first one files it.
        source = Path(scratch) / TOKENIZER_FILE
        given = out / TOKENIZER_FILE if resume else tokenizer
        if given is None:
            train_character_tokenizer(text, source)
        else:
            Tokenizer(given)  # says what is wrong with it, if anything is
            shutil.copyfile(given, source)
        known = Tokenizer(source)
        size = known.vocab_size + getattr(type(recipe.model_config()), "added_tokens", 0)
        recipe = with_vocabulary(recipe, size, padded=start is not None or resume)
        ids = np.array(known.encode(text))
        train_ids, validation_ids = (check_length(split(ids, s), s, recipe, text_file) for s in ("train", "validation"))
        source_of = DiffusionSource if denoises(recipe) else TextSource
        examples = source_of(train_ids, validation_ids, recipe.block)
        trainer = Trainer(recipe, examples, out, device, mode, None if resume else start)
        out.mkdir(parents=True, exist_ok=True)  # nothing is refused from here on
        words = source.read_text(encoding="utf-8")
        files = {TOKENIZER_FILE: words}
        if start is not None and (template := template_source(start)) is not None:
            files[TEMPLATE_FILE] = template
        weights = carry_out(trainer, recipe, resume, files, stop_at, save_every)
    if weights is None:
        return None
    return publish(recipe, weights, validation_ids, out)


def train_task(
    out: Path,
    recipe: Recipe,
    resume: bool = False,
    device: str = "cpu",
    mode: str = "ddp",
    stop_at: int | None = None,
    save_every: int = 200,
    start: Path | None = None,
) -> dict[str, Any] | None:
    """As `train`, on the made-up examples of the recipe's task: no text.

    Returns:
        What evaluation.json holds: what the task measures on the trained model. None as in `train`.
    """
    assert recipe.task is not None
    need_matplotlib()
    claim(out, recipe, resume)
    source = make_task(recipe.task, recipe.model_config())
    trainer = Trainer(recipe, source, out, device, mode, None if resume else start)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = {TOKENIZER_FILE: word_tokenizer(words)} if (words := source.vocabulary()) else {}
    weights = carry_out(trainer, recipe, resume, tokenizer, stop_at, save_every)
    if weights is None:
        return None
    model = build_model(recipe)
    model.load_state_dict(weights)
    if (ordinary := source.calibration()) is not None:
        calibrate_surprise(model, ordinary)
    rounded = save(model, out, recipe.dtype)
    if isinstance(source, Solving):
        draw(out / LOG_FILE, out / "curve.png", "loss per cell (nats)", "mean steps to halt")
    else:
        draw(out / LOG_FILE, out / "curve.png")
    evaluation = {"task": recipe.task, **source.evaluate(rounded)}
    source.draw_plot(evaluation, out / f"{recipe.task['name']}.png", getattr(model.config, "window", 0))
    write_text(out / EVALUATION_FILE, json.dumps(evaluation, indent=2) + "\n")
    return evaluation


def denoises(recipe: Recipe) -> bool:
    """Whether its model learns by block diffusion."""
    return isinstance(recipe.model_config(), Bd3lmConfig)


def need_matplotlib() -> None:
    """It is wanted at the end only: better said now."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("training needs matplotlib: pip install 'rmse-edge[train]'")


def carry_out(
    trainer: Trainer, recipe: Recipe, resume: bool, files: dict[str, str], stop_at: int | None, save_every: int
) -> dict[str, torch.Tensor] | None:
    """Train, from the start or from the saved state.

    Args:
        files: texts to put into the folder of a run that starts, beside the recipe.
    Returns:
        The final weights, of all processes together; None if the recipe is not done yet, and in every process but the
        first.
    """
    try:
        if resume:
            trainer.resume()
        elif trainer.parallel.first:
            for name, text in ({RECIPE_FILE: recipe.to_json()} | files).items():
                write_text(trainer.out / name, text)
        trainer.run(stop_at, save_every)
        weights = trainer.final_weights()
    except KeyboardInterrupt:
        saved = (trainer.out / STATE_FILE).exists()
        raise KeyboardInterrupt("go on with resume=True" if saved else "before the first saved state") from None
    finally:
        trainer.parallel.close()
    return weights if trainer.step >= recipe.total_steps and trainer.parallel.first else None


def claim(out: Path, recipe: Recipe, resume: bool) -> None:
    """Refuse a folder that holds another run; a lone recipe.json that says the same thing is welcome.

    And, before the training, one where something stands in the way of what it writes.
    """
    if out.exists():
        check_changes(out)
        for name in (RECIPE_FILE, TOKENIZER_FILE, LOG_FILE, "curve.png", *TRACES):
            check_file(out / name)
    if resume:
        if not (out / STATE_FILE).exists():
            raise CheckpointError(f"{out / STATE_FILE}: no such file; nothing to resume (start without resume=True)")
        return
    found = [name for name in TRACES if (out / name).exists()]
    if found:
        raise UserError(f"{out}: holds another run ({found[0]}); go on with resume=True, or choose another folder")
    present = out / RECIPE_FILE
    if present.exists() and vocabulary_aside(Recipe.from_file(present)) != vocabulary_aside(recipe):
        raise UserError(f"{present}: is another recipe; pass it with recipe={present.name}, or choose another folder")


def vocabulary_aside(recipe: Recipe) -> dict[str, Any]:
    """The vocabulary is filled in from the text, so recipes are compared without it. No recipe: one of boards needs it."""
    return dataclasses.asdict(recipe) | {"model": {k: v for k, v in recipe.model.items() if k != "vocab_size"}}


def with_vocabulary(recipe: Recipe, size: int, padded: bool = False) -> Recipe:
    """The recipe with the tokenizer's vocabulary size filled in, where it states none.

    Args:
        padded: the model may have more tokens than the tokenizer, as published ones do.
    Raises:
        ConfigError: the recipe states another one.
    """
    stated = recipe.model.get("vocab_size", size)
    if not (stated == size or (padded and stated > size)):
        raise ConfigError(
            f"recipe: model.vocab_size is {stated}, but the tokenizer has {size} tokens; "
            "leave vocab_size out of the recipe, or train on the text it was written for"
        )
    return dataclasses.replace(recipe, model=recipe.model | {"vocab_size": stated})


def check_length(ids: np.ndarray, name: str, recipe: Recipe, text_file: Path) -> np.ndarray:
    """The split itself, if it holds at least one block."""
    block = recipe.block
    if len(ids) <= block:
        raise TextError(
            f"{text_file}: its {name} split has {len(ids)} tokens, too few for one block of {block} and its target; "
            "use a longer text or a smaller block (block_size of the recipe or its model)"
        )
    return ids


def publish(recipe: Recipe, weights: dict[str, torch.Tensor], validation: np.ndarray, out: Path) -> dict[str, Any]:
    """Write the checkpoint, its curve and its evaluation over the whole validation split; returns the evaluation."""
    model = build_model(recipe)
    model.load_state_dict(weights)
    if isinstance(model, RMSE) and model.memory is not None:
        calibrate_surprise(model, torch.from_numpy(consecutive_blocks(validation, recipe.block))[:, :-1])
    rounded = save(model, out, recipe.dtype)
    draw(out / LOG_FILE, out / "curve.png")
    blocks = torch.from_numpy(consecutive_blocks(validation, recipe.block))
    best = best_validation(read_rows(out / LOG_FILE))
    evaluation = {
        "architecture": recipe.architecture,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_tokens": blocks[:, 1:].numel(),
        "best": {"step": best[0], "loss": best[1]} if best else None,  # over eval_blocks blocks, at full depth
        "loss_by_depth": {
            dtype: (evaluate_bound if denoises(recipe) else evaluate)(of_it, blocks, progress=f"validating {dtype}")
            for dtype, of_it in {"float32": model, recipe.dtype: rounded}.items()
        },
    }
    write_text(out / EVALUATION_FILE, json.dumps(evaluation, indent=2) + "\n")
    return evaluation


@torch.no_grad()
def calibrate_surprise(model: RMSE, tokens: torch.Tensor, batch: int = 16) -> None:
    """Let every new sequence expect the surprise of this text, (n, T): its mean and variance count as `PRIOR` segments."""
    model.eval()
    memory = model.memory
    assert memory is not None
    found: list[torch.Tensor] = []
    for part in tokens.split(batch):
        model.trajectory(part, surprises=found)
    surprises = torch.cat(found)
    memory.surprise_prior.copy_(torch.tensor([surprises.mean(), surprises.var(correction=0), float(PRIOR)]))


def save(model: Any, out: Path, dtype: str) -> Any:
    """Write the weights, a GPT's in bfloat16, and return the model as it reads back."""
    if isinstance(model, GPT):
        save_gpt(model, out)
        return load_gpt(out)
    from rmse_edge.checkpoint import load_checkpoint, save_checkpoint

    save_checkpoint(model, out, dtype=getattr(torch, dtype))
    return load_checkpoint(out)
