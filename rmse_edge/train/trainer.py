"""The training loop: three stages, averaged weights, exact resume, one process or many.

Everything random in a step (its blocks, its number of loops, dropout, sampled exits) is seeded by (seed, step, process),
so a run that stops at step n and goes on later is bit for bit the run that never stopped.
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm
from typing_extensions import TypedDict

from rmse_edge.arch.registry import arch_of
from rmse_edge.checkpoint import start_from
from rmse_edge.errors import ArgumentError, CheckpointError, UserError, first_line
from rmse_edge.files import new_file
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.schema import check_value, parse_json

from .gpt import GPT, GPTConfig
from .journal import Journal
from .looped import gate_name
from .losses import losses_by_depth
from .objective import Objective, draw_thresholds
from .optimizer import OPTIMIZERS
from .parallel import Parallel
from .recipe import Recipe
from .sources import Batch, Source, Supervises

STATE_FILE = "training-state.pt"
LOG_FILE = "log.csv"


def build_model(recipe: Recipe) -> Any:
    torch.manual_seed(recipe.seed)
    config = recipe.model_config()
    return GPT(config) if isinstance(config, GPTConfig) else arch_of(config.model_type).build(config)


def bf16_is_native(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware; emulated they are some 30 times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # avx512_bf16, amx_bf16 and their like on other processors
    return device.type == "cpu" and any(
        has for name, has in torch.cpu.get_capabilities().items() if name.endswith("bf16")
    )


class StateHead(TypedDict):
    """What the training state says about itself, beside tensors."""

    step: Annotated[int, Field(ge=0)]
    best: float  # infinite before the first evaluation
    recipe: str


class Trainer:
    """Runs a recipe over the examples of a source and leaves its state in `out`.

    Args:
        out: an existing folder; log.csv and training-state.pt are written there, by the first process alone.
        device: "cpu", "cuda" or "cuda:N"; under torchrun each process takes its own GPU.
        mode: "ddp" or "fsdp", how processes share the work; one process needs neither.
        start: a checkpoint folder whose weights to begin with; a memory or retrieval that it lacks begins at random.
    """

    def __init__(
        self,
        recipe: Recipe,
        source: Source,
        out: Path,
        device: str = "cpu",
        mode: str = "ddp",
        start: Path | None = None,
    ) -> None:
        self.recipe, self.source, self.out = recipe, source, out
        self.data = source.fingerprint
        self.parallel = Parallel(device, mode)
        self.device = self.parallel.device
        self.model = build_model(recipe)
        if start is not None:
            if isinstance(self.model, GPT):
                raise ArgumentError("start", "a plain GPT is trained from random weights")
            start_from(self.model, start)
        self.model.to(self.device)
        own = source.objective(self.model, recipe) if isinstance(source, Supervises) else Objective(self.model, recipe)
        if isinstance(source, Supervises) and self.parallel.world > 1:
            raise UserError("the recipe's task keeps its boards from step to step and trains in one process")
        self.objective = self.parallel.wrap(own.to(self.device))
        self.validation = source.validation(recipe.eval_blocks)
        bf16 = recipe.precision == "bf16" or (recipe.precision == "auto" and bf16_is_native(self.device))
        self.autocast = lambda: torch.autocast(self.device.type, torch.bfloat16) if bf16 else nullcontext()
        if recipe.batch_size // recipe.accumulate % self.parallel.world:
            raise UserError(
                f"batch_size / accumulate ({recipe.batch_size}/{recipe.accumulate}) is not divisible by the "
                f"{self.parallel.world} processes"
            )
        self.step = 0
        self.best = math.inf
        self.best_weights: dict[str, Tensor] | None = None
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizer = self.new_optimizer()

    # ---------------------------------------------------------------------------------------------- optimiser

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of the current stage: all, the gate, or all but the gate."""
        stage = self.recipe.stage(min(self.step, self.recipe.total_steps - 1))
        path = None if isinstance(self.model, GPT) else gate_name(self.model.config)
        gate = "\0" if path is None else f"{path}."
        by_gate = self.recipe.objective == "expected"  # otherwise stage 1 does not ask it
        keep = {
            "loops": lambda n: by_gate or not n.startswith(gate),
            "gate": lambda n: n.startswith(gate),
            "exits": lambda n: not n.startswith(gate),
        }
        chosen = {}
        for name, p in self.model.named_parameters():
            p.requires_grad_(keep[stage](name))
            if p.requires_grad:
                chosen[name] = p
        return chosen

    def new_optimizer(self) -> torch.optim.Optimizer:
        recipe = self.recipe
        scales = self.source.lr_scales() if isinstance(self.source, Supervises) else {}
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, p in self.trained().items():
            matrix = p.dim() > 1 and "step_" not in name and "embed" not in name
            scale = next((value for start, value in scales.items() if name.startswith(start)), 1.0)
            groups.setdefault((recipe.weight_decay if matrix else 0.0, scale), []).append(p)
        return OPTIMIZERS[recipe.optimizer](
            [{"params": ps, "weight_decay": decay, "lr_scale": scale} for (decay, scale), ps in groups.items()],
            lr=recipe.lr,
            betas=(recipe.beta_1, recipe.beta_2),
        )

    def lr(self) -> float:
        """Warm-up then cosine in stage 1; the short stages decay linearly to zero."""
        recipe, stage = self.recipe, self.recipe.stage(self.step)
        if stage == "loops":
            if self.step < recipe.warmup:
                return recipe.lr * (self.step + 1) / recipe.warmup
            done = (self.step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
            floor = recipe.final_lr_share
            return recipe.lr * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
        first = recipe.steps + (recipe.gate_steps if stage == "exits" else 0)
        length = recipe.gate_steps if stage == "gate" else recipe.exit_steps
        return (recipe.gate_lr if stage == "gate" else recipe.exit_lr) * (1 - (self.step - first) / length)

    # ---------------------------------------------------------------------------------------------- one step

    def micro_batches(self) -> list[Batch]:
        """This process's share of the step's examples; the whole batch depends on (seed, step) alone."""
        recipe = self.recipe
        batch = self.source.batch(recipe.batch_size, (recipe.seed, self.step))
        shares = {name: self.share(tensor) for name, tensor in batch.items()}
        return [{name: parts[i] for name, parts in shares.items()} for i in range(recipe.accumulate)]

    def share(self, batch: Tensor) -> list[Tensor]:
        """This process's rows of a whole batch (batch_size, ...), one tensor per accumulation round."""
        rounds = batch.to(self.device).view(self.recipe.accumulate, self.parallel.world, -1, *batch.shape[1:])
        return list(rounds[:, self.parallel.rank])

    def train_step(self) -> dict[str, Any]:
        recipe, stage = self.recipe, self.recipe.stage(self.step)
        draw = np.random.default_rng((recipe.seed, self.step, 1))
        loops = int(draw.choice(recipe.depths)) if stage == "loops" else 0
        if not loops and not isinstance(self.model, GPT):
            loops = self.model.config.dials.max_loops  # the trained depth: more may be asked for, and is not trained
        # Sampled exits are drawn for the whole batch alike in every process, dropout by each process for itself.
        torch.manual_seed(hash((recipe.seed, self.step, 0)) % 2**31)
        thresholds = self.share(draw_thresholds(recipe.batch_size)) if stage == "exits" else [None] * recipe.accumulate
        if not self.parallel.first:
            torch.manual_seed(hash((recipe.seed, self.step, self.parallel.rank)) % 2**31)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr() * group["lr_scale"]
        self.objective.train(stage != "gate")
        done = min(1.0, self.step / max(1, recipe.steps))
        beta = recipe.entropy_weight + done * (recipe.final_entropy_weight - recipe.entropy_weight)
        totals = torch.zeros(3)
        batches = self.micro_batches()
        for i, (batch, brakes) in enumerate(zip(batches, thresholds)):
            with self.parallel.sync_only_if(self.objective, i == len(batches) - 1), self.autocast():
                loss, last, depth = self.objective(batch, stage, loops, beta, brakes)
                (loss / len(batches)).backward()
            totals += torch.tensor([loss.item(), last.item(), depth.item()]) / len(batches)
        totals = self.parallel.mean(totals)
        norm = float(self.parallel.full(nn.utils.clip_grad_norm_(list(self.trained_now()), recipe.clip)))
        if not math.isfinite(norm) or not torch.isfinite(totals).all():
            raise UserError(
                f"training diverged at step {self.step}: loss {totals[0]:.3g}, gradient norm {norm:.3g}; "
                "lower lr or clip, and start again in another folder"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        idle = self.balance(stage)
        self.update_average()
        return dict(
            stage=stage, loops=loops, loss=totals[0].item(), last_loss=totals[1].item(), depth=totals[2].item(),
            lr=self.lr(), grad_norm=norm, idle_experts=idle, solved=getattr(self.objective, "solved", None),
            tokens=recipe.batch_size * batches[0]["tokens"].shape[1],
        )  # fmt: skip

    def trained_now(self):
        return (p for group in self.optimizer.param_groups for p in group["params"])

    def balance(self, stage: str) -> float | None:
        """Balance the experts of every layer by the loads of all processes, which have added up over the loops of the step.

        Returns:
            The share of experts that stayed idle, mean of the layers; None where none was counted.
        """
        layers = [module for module in self.model.modules() if isinstance(module, SparseExperts)]
        if not layers or stage == "gate":  # the gate is trained with the model in eval mode
            return None
        for experts in layers:
            self.parallel.sum_(experts.load)
        rate = self.recipe.balance_rate if stage == "loops" else 0.0
        return sum(experts.balance(rate) for experts in layers) / len(layers)

    @torch.no_grad()
    def update_average(self) -> None:
        """Exponential moving average, corrected for its start: early on it is the mean of what there was."""
        since = self.step - (0 if self.step < self.recipe.steps else self.recipe.steps)
        decay = min(self.recipe.ema, (1 + since) / (10 + since))
        for name, value in self.model.state_dict().items():
            average = self.average[name]
            if value.is_floating_point():
                average.lerp_(value.to(average.dtype), 1 - decay)
            else:
                average.copy_(value)

    # ---------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Validation loss of the averaged weights at every depth, in nats (one value for a GPT)."""
        kept = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.objective.eval()
        try:
            # Through the wrapped objective: under FSDP only its forward has whole parameters.
            total, count = torch.zeros(1), 0
            size = len(self.validation["tokens"])
            for first in range(0, size, 16):
                part = {name: t[first : first + 16].to(self.device) for name, t in self.validation.items()}
                with self.autocast():
                    losses = self.objective(part, "validate")[0]
                total = total + losses.double().cpu() * len(part["tokens"])
                count += len(part["tokens"])
            return self.parallel.mean(total / count).tolist()  # one number everywhere: it decides what is kept
        finally:
            self.model.load_state_dict(kept)

    # ---------------------------------------------------------------------------------------------- the run

    def run(self, stop_at: int | None = None, save_every: int = 200) -> None:
        """Train to the end of the recipe, or to step `stop_at`, saving the state every `save_every` steps."""
        recipe = self.recipe
        end = min(recipe.total_steps, stop_at or recipe.total_steps)
        journal = Journal(self.out / LOG_FILE, self.step) if self.parallel.first else None
        bar = tqdm(total=recipe.total_steps, initial=self.step, unit="step", disable=not self.parallel.first or None)
        try:
            while self.step < end:
                began = time.perf_counter()
                row = self.train_step()
                speed = row.pop("tokens") / (time.perf_counter() - began)
                last_of_stage = self.step + 1 == recipe.total_steps or recipe.stage(self.step + 1) != row["stage"]
                value = None
                if (self.step + 1) % recipe.eval_every == 0 or last_of_stage:
                    value = self.evaluate()[-1]
                    if row["stage"] == "loops" and value < self.best:
                        self.best = value
                        self.best_weights = {k: v.clone() for k, v in self.average.items()}
                if journal:
                    journal.add(step=self.step, **row, tokens_per_s=speed, val_loss="" if value is None else value)
                bar.update()
                shown = {"loss": f"{row['last_loss']:.3f}", "depth": f"{row['depth']:.2f}", "tok/s": f"{speed:.0f}"}
                bar.set_postfix(stage=row["stage"], **shown, best=f"{self.best:.4f}")
                self.step += 1
                if last_of_stage:
                    self.next_stage()
                if self.step % save_every == 0 or self.step == end:
                    self.save()
        finally:
            bar.close()
            if journal:
                journal.close()

    def next_stage(self) -> None:
        """Go on from the averaged weights: the best of stage 1, the last of the later ones."""
        if self.best_weights is not None and self.step == self.recipe.steps:
            self.average = {k: v.clone() for k, v in self.best_weights.items()}
        self.model.load_state_dict(self.average)
        self.optimizer = self.new_optimizer()

    def final_weights(self) -> dict[str, Tensor]:
        """The averaged weights as plain tensors on the CPU, as saved in the checkpoint."""
        return {k: self.parallel.full(v).detach().cpu() for k, v in self.average.items()}

    def save(self) -> None:
        """Write the state to resume from, atomically: a run killed while writing keeps its last one."""
        state = {
            "step": self.step,
            "best": self.best,
            "recipe": self.recipe.to_json(),
            "data": self.data,
            "model": self.parallel.gather(self.model.state_dict()),
            "average": self.parallel.gather(self.average),
            "best_weights": self.parallel.gather(self.best_weights),
            "optimizer": self.parallel.optimizer_state(self.model, self.optimizer),
            "carried": self.carried(),
        }
        if self.parallel.first:
            write_state(state, self.out / STATE_FILE)
        self.parallel.barrier()

    def carried(self) -> dict[str, Tensor]:
        """What the objective keeps from step to step, by name."""
        return {name: t for name, t in self.objective.named_buffers() if "model." not in name}

    def resume(self) -> None:
        """Continue from `out`.

        Raises:
            CheckpointError: there is no readable state, or it belongs to another recipe or text.
        """
        path = self.out / STATE_FILE
        if not path.exists():
            raise CheckpointError(f"{path}: no such file; nothing to resume (start without resume=True)")
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError(f"{path}: damaged training state ({type(error).__name__}); start again") from None
        fix = "start again"
        head = {name: state.get(name) for name in ("step", "best", "recipe")} if isinstance(state, dict) else state
        known = check_value(StateHead, head, "state", CheckpointError, where=str(path), fix=fix)
        values = parse_json(known["recipe"], f"{path}: recipe", CheckpointError, fix)
        if not isinstance(values, dict) or Recipe.from_dict(values, where=str(path)) != self.recipe:
            raise CheckpointError(f"{path}: was written by another recipe; resume with the recipe.json beside it")
        if known["step"] > self.recipe.total_steps:
            raise CheckpointError(
                f"{path}: step: got {known['step']}, expected at most {self.recipe.total_steps}; {fix}"
            )
        if state.get("data", self.data) != self.data:
            raise CheckpointError(f"{path}: was trained on another text or tokenizer; resume with the same text")
        self.step, self.best = known["step"], known["best"]
        self.optimizer = self.new_optimizer()
        try:
            self.parallel.load_model(self.model, state["model"])
            self.average = self.parallel.like(self.model, state["average"]) or {}
            self.best_weights = self.parallel.like(self.model, state["best_weights"])
            self.parallel.load_optimizer(self.model, self.optimizer, state["optimizer"])
            for name, tensor in self.carried().items():
                tensor.copy_(state["carried"][name])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # whatever PyTorch makes of it
            raise CheckpointError(f"{path}: not the state of this model ({first_line(error)}); {fix}") from None


def write_state(state: dict[str, Any], path: Path) -> None:
    """Write the state, all or nothing.

    Raises:
        CheckpointError: it cannot be written; the state that was there still is.
    """
    with new_file(path, CheckpointError) as part, part.open("wb") as file:
        torch.save(state, file)


@torch.no_grad()
def evaluate(model: Any, blocks: Tensor, batch: int = 16, progress: str | None = None) -> list[float]:
    """Mean next-token loss of (n, T + 1) blocks at every fixed depth, in nats; a GPT has one value.

    Args:
        progress: label of a progress bar (on a terminal), None for no bar.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    total, count = torch.zeros(1), 0
    for part in tqdm(blocks.split(batch), desc=progress, unit="batch", disable=progress is None or None, leave=False):
        losses = losses_by_depth(model, part[:, :-1].to(device), part[:, 1:].to(device))
        total = total + losses.double().sum((1, 2)).cpu()
        count += losses[0].numel()
    model.train(training)
    return (total / count).tolist()
