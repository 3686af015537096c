"""Routers for the layers of a trained model: labels by search, training, and what their plans are worth.

    1. prompts of the text, and of each the plan that is best for what follows      rmse_edge/train/plans.py
    2. routers learn to say how often their layer is run, of what it is given along that plan
    3. on held-out prompts: the routers at several settings of the dial `route`, against skipping at random, against the best
       one plan for all prompts, and against stopping behind a layer

The loss is the focal one with gamma 2 (Lin et al. 2017, Focal Loss, arXiv 1708.02002, eq. 5), each class weighed by its effective number
(Cui et al. 2019, Class-Balanced Loss, arXiv 1901.05555, eq. 7, beta 0.999), of all layers together. AdamW; all but the routers stays as it
is. Source: Dr.LLM, arXiv 2510.12773, section 3.3.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from rmse_edge.checkpoint import load_checkpoint, read_config, save_checkpoint
from rmse_edge.errors import CheckpointError, ConfigError, TextError, UserError
from rmse_edge.files import check_changes, write_text
from rmse_edge.loop.plan import EACH_ONCE, ROUTERS
from rmse_edge.numbers import Share
from rmse_edge.schema import check_fields
from rmse_edge.text import Tokenizer, consecutive_blocks, random_blocks, read_text, split

from .plans import CHOICES, Found, best_plans, loss_of_plans, read_by_routers, routed
from .recipe import Above, AtLeastZero
from .recipe_file import RecipeFile

Some = Annotated[int, Field(ge=1, le=10**6)]

RECIPE_FILE, TOKENIZER_FILE, EVALUATION_FILE = "recipe.json", "tokenizer.json", "evaluation.json"
SETTINGS = (-0.7, -0.65, -0.6, -0.55, ROUTERS, -0.4, -0.2, EACH_ONCE)  # of the dial that are measured
BATCH = 16  # prompts that are searched together
POOL = 48  # of which the one plan for all is found
PRICES = (0.5, 1.0, 2.0, 4.0)  # of its executions, in those of the recipe


@dataclass(frozen=True)
class RouterRecipe(RecipeFile):
    """Everything that decides what `train_routers` makes of a checkpoint."""

    named: ClassVar[str] = "routers"

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 1337
    prompts: Some = 512  # that are labelled
    held_out: Some = 128  # on which the routers are measured
    prompt: Some = 48  # tokens of each
    answer: Some = 32  # tokens that follow, by whose loss plans are judged
    price: AtLeastZero = 0.02  # of an execution, nats a token
    width: Some | None = 3  # plans that the search goes on with; null: all
    steps: Some = 600
    batch_size: Some = 64
    lr: Above = 1e-3
    warmup: Annotated[int, Field(ge=0, le=10**6)] = 50
    weight_decay: AtLeastZero = 0.01
    gamma: AtLeastZero = 2.0
    beta: Share = 0.999
    dropout: Share = 0.0  # of what a router reads; prompts are few

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)


def train_routers(
    text_file: Path, out: Path, recipe: RouterRecipe, start: Path, tokenizer: Path | None = None
) -> dict[str, Any]:
    """Train the routers of the checkpoint `start` on a text, and write it with them to the folder `out`.

    Args:
        tokenizer: a tokenizer.json; None: that of the checkpoint.
    Returns:
        What evaluation.json holds.
    Raises:
        UserError: the text, the recipe or a folder cannot be used; one line says why.
    """
    config = read_config(start)
    if not hasattr(config, "router_hidden"):
        raise ConfigError(f"{start}: model_type: {config.model_type} has no routers, expected dr_llm")
    if out.exists():
        check_changes(out)
        if (out / EVALUATION_FILE).exists():
            raise UserError(f"{out}: holds another run ({EVALUATION_FILE}); choose another folder")
    length = recipe.prompt + recipe.answer
    if length > config.max_position_embeddings or recipe.prompt > config.prompt:
        raise ConfigError(
            f"prompt: got {recipe.prompt} and answer {recipe.answer}, expected at most {config.prompt}, the model's "
            f"routed_positions, and {config.max_position_embeddings} together"
        )
    if recipe.width is None and CHOICES**config.num_hidden_layers > 4096:
        raise ConfigError(f"width: got null, expected a number: {config.num_hidden_layers} layers have too many plans")
    source = tokenizer or start / TOKENIZER_FILE
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file; give a tokenizer")
    ids = np.array(Tokenizer(source).encode(read_text(text_file)))
    train, held_out = (split(ids, name) for name in ("train", "validation"))
    if len(train) <= length or (len(held_out) - 1) // (length - 1) < recipe.held_out:
        raise TextError(
            f"{text_file}: has {len(ids)} tokens, too few for {recipe.held_out} held-out prompts of {length}"
        )
    model = load_checkpoint(start).float().eval().requires_grad_(False)
    torch.manual_seed(recipe.seed)
    model.reset_routers()
    tokens = torch.from_numpy(random_blocks(train, recipe.prompts, length - 1, (recipe.seed, 0)))
    other = torch.from_numpy(consecutive_blocks(held_out, length - 1)[: recipe.held_out])
    found = searched(model, tokens, recipe)
    learnt = learn(model, tokens, found.counts, recipe)
    out.mkdir(parents=True, exist_ok=True)
    evaluation = {
        "labels": of_labels(found, recipe),
        "training": learnt,
        "held_out": measure(model, other, tokens, recipe),
    }
    save_checkpoint(model, out, dtype=None, tokenizer=source)
    if (sample := start / "sample.txt").is_file():
        shutil.copyfile(sample, out / "sample.txt")
    write_text(out / RECIPE_FILE, recipe.to_json())
    write_text(out / EVALUATION_FILE, json.dumps(evaluation, indent=2) + "\n")
    return evaluation


def searched(model: Any, tokens: Tensor, recipe: RouterRecipe) -> Found:
    """The best plan of every prompt (n, T)."""
    parts = tokens.split(BATCH)
    found = [
        best_plans(model, part, recipe.prompt, recipe.price, recipe.width)
        for part in tqdm(parts, desc="searching plans", unit="batch", disable=None)
    ]
    return Found(*(torch.cat(t) for t in zip(*found)))


def of_labels(found: Found, recipe: RouterRecipe) -> dict[str, Any]:
    """What the search found: how often layers are skipped, run and repeated, and what the plans are worth."""
    shares = [(found.counts == n).double().mean(0).tolist() for n in range(CHOICES)]
    return {
        "prompts": len(found.counts),
        "executions": float(found.counts.sum(1).double().mean()),
        "loss": float(found.loss.double().mean()),
        "loss_once": float(found.once.double().mean()),
        "shares_of_layers": dict(zip(("skip", "once", "twice"), shares)),
        "plans": len({tuple(row) for row in found.counts.tolist()}),
    }


def class_weights(counts: Tensor, beta: float) -> Tensor:
    """(3,) weights of classes by their effective numbers, 1 in the mean over the classes that there are; of labels (n, L)."""
    number = torch.bincount(counts.flatten(), minlength=CHOICES).double()
    weights = (1 - beta) / (1 - beta**number)
    weights[number == 0] = 0.0
    return (weights / weights.sum() * (number > 0).sum()).float()


def focal_loss(logits: Tensor, labels: Tensor, weights: Tensor, gamma: float) -> Tensor:
    """Weighted mean of (1 - p)^gamma * -log p over labels: logits (..., 3), labels (...) -> scalar."""
    log_p = F.log_softmax(logits, -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    weight = weights[labels]
    return (weight * (1 - log_p.exp()) ** gamma * -log_p).sum() / weight.sum()


def router_logits(model: Any, read: Tensor) -> Tensor:
    """What routers say of what each reads (n, L, W, d): (n, L, 3)."""
    return torch.stack([router(read[:, i]).mean(1) for i, router in enumerate(model.model.routers)], 1)


def learn(model: Any, tokens: Tensor, counts: Tensor, recipe: RouterRecipe) -> dict[str, Any]:
    """Train the routers to say `counts` (n, L) of prompts, an eighth of which is kept apart; the best of them on these stay."""
    read = torch.cat(
        [read_by_routers(model, t, recipe.prompt, c) for t, c in zip(tokens.split(BATCH), counts.split(BATCH))]
    )
    apart = max(1, len(read) // 8)
    own, weights = len(read) - apart, class_weights(counts, recipe.beta)
    routers = model.model.routers.requires_grad_(True)
    with torch.no_grad():
        for router in routers:
            router.linear2.bias.zero_()  # undecided, so that few steps are enough
    optimizer = torch.optim.AdamW(routers.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    draw = torch.Generator().manual_seed(recipe.seed)
    best: tuple[float, int, dict[str, Tensor]] | None = None
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / max(1, recipe.warmup))
            group["lr"] = recipe.lr * warm * (1 - step / recipe.steps)
        rows = torch.randint(own, (min(recipe.batch_size, own),), generator=draw)
        given = F.dropout(read[rows], recipe.dropout) if recipe.dropout else read[rows]
        loss = focal_loss(router_logits(model, given), counts[rows], weights, recipe.gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 25 == 0 or step + 1 == recipe.steps:
            with torch.no_grad():
                value = float(focal_loss(router_logits(model, read[own:]), counts[own:], weights, recipe.gamma))
            if best is None or value < best[0]:
                best = value, step + 1, {name: t.clone() for name, t in routers.state_dict().items()}
    assert best is not None
    routers.load_state_dict(best[2])
    routers.requires_grad_(False)
    said = router_logits(model, read[own:]).argmax(-1)
    commonest = counts[:own].mode(0).values
    return {
        "class_weights": weights.tolist(),
        "best_step": best[1],
        "loss": best[0],
        "accuracy": (said == counts[own:]).double().mean(0).tolist(),  # of each layer, on the prompts kept apart
        "accuracy_of_commonest": (commonest == counts[own:]).double().mean(0).tolist(),
    }


def measure(model: Any, tokens: Tensor, labelled: Tensor, recipe: RouterRecipe) -> dict[str, Any]:
    """Executions and loss of what follows held-out prompts (n, T), by the routers and by what they must beat.

    Args:
        labelled: the prompts of the search, on which the one plan for all is found.
    """
    layers = model.config.num_hidden_layers
    once = torch.ones(layers, dtype=torch.int64)
    draw = torch.Generator().manual_seed(recipe.seed)

    def point(counts: Tensor, **more: Any) -> dict[str, Any]:
        parts = zip(tokens.split(BATCH), counts.split(BATCH))
        loss = torch.cat([loss_of_plans(model, t, recipe.prompt, n) for t, n in parts]).double()
        plans = len({tuple(row) for row in counts.tolist()})
        return more | {
            "executions": float(counts.sum(1).double().mean()),
            "loss": float(loss.mean()),
            "difference": float((loss - base).mean()),
            "standard_error": float((loss - base).std() / len(loss) ** 0.5),
            "plans": plans,
        }

    def same(plan: Tensor) -> Tensor:
        return plan.expand(len(tokens), -1)

    base = torch.zeros(len(tokens), dtype=torch.float64)
    base = torch.cat(
        [loss_of_plans(model, t, recipe.prompt, once.expand(len(t), -1)) for t in tokens.split(BATCH)]
    ).double()
    best = searched(model, tokens, recipe)
    found: dict[str, Any] = {"every layer once": point(same(once)), "best plan of each prompt": point(best.counts)}
    found["routers"] = [
        point(torch.cat([routed(model, t, recipe.prompt, route) for t in tokens.split(BATCH)]), route=route)
        for route in SETTINGS
    ]
    pool = labelled[:POOL]
    one: dict[tuple[int, ...], float] = {}
    for price in PRICES:
        plan = best_plans(model, pool, recipe.prompt, price * recipe.price, recipe.width, pooled=True).counts[0]
        one.setdefault(tuple(plan.tolist()), price * recipe.price)
    found["one plan for all"] = [
        point(same(torch.tensor(plan)), price=price, plan=list(plan)) for plan, price in one.items()
    ]
    found["random skipping"] = [
        point(torch.stack([_skip(layers, n, draw) for _ in range(len(tokens))]), skipped=n)
        for n in range(1, layers // 2 + 1)
    ]
    found["first layers"] = [
        point(same((torch.arange(layers) < n).long()), layers=n) for n in range(layers // 2, layers)
    ]
    return found


def _skip(layers: int, count: int, draw: torch.Generator) -> Tensor:
    """A plan (L,) that runs all layers but so many, drawn at random."""
    plan = torch.ones(layers, dtype=torch.int64)
    plan[torch.randperm(layers, generator=draw)[:count]] = 0
    return plan


def as_markdown(evaluation: dict[str, Any]) -> str:
    """Executions and loss of everything that was measured on held-out prompts, as a table."""
    lines = ["| plans | executions | loss | difference (standard error) | different plans |", "|---|---|---|---|---|"]
    for name, points in evaluation["held_out"].items():
        for p in points if isinstance(points, list) else [points]:
            said = next((f"{key} {p[key]:g}" for key in ("route", "price", "skipped", "layers") if key in p), "")
            label = f"{name}, {said}" if said else name
            lines.append(
                f"| {label} | {p['executions']:.2f} | {p['loss']:.4f} | {p['difference']:+.4f} ({p['standard_error']:.4f}) | "
                f"{p['plans']} |"
            )
    return "\n".join(lines)
