"""One process or many: DDP and FSDP2 behind the few calls the trainer needs."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from rmse_edge.errors import ArgumentError

MODES = ("ddp", "fsdp")


class Parallel:
    """Set up from torchrun's environment; without it, a world of one in which every call is the identity."""

    def __init__(self, device: str, mode: str) -> None:
        if mode not in MODES:
            raise ArgumentError("mode", f"got {mode!r}, expected one of {', '.join(MODES)}")
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ArgumentError("device", "PyTorch sees no CUDA device here; use device=cpu", "cuda")
        self.mode = mode
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        local = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" and self.world > 1 else device
        self.device = torch.device(local)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.world > 1 and self.mode == "fsdp"

    def wrap(self, objective: nn.Module) -> nn.Module:
        if self.world == 1:
            return objective
        if self.mode == "ddp":
            # The stages train different parameters. Buffers are left alone: every process applies the same update to the
            # balancing bias, and counts expert loads of its own until they are summed.
            return nn.parallel.DistributedDataParallel(
                objective, find_unused_parameters=True, forward_sync_buffers=False
            )
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # One group: the block runs K times per pass, and gathering it anew each time would cost more than it saves.
        # Resharding after the forward keeps `parameters()` the sharded ones at any moment outside of it.
        mesh = init_device_mesh(self.device.type, (self.world,))
        fully_shard(objective, mesh=mesh, reshard_after_forward=True)  # in place
        return objective

    def sync_only_if(self, objective: nn.Module, last: bool) -> AbstractContextManager:
        """Exchange gradients in the last accumulation round only."""
        if self.world == 1:
            return nullcontext()
        if self.mode == "ddp":
            return nullcontext() if last else objective.no_sync()  # type: ignore[operator]
        objective.set_requires_gradient_sync(last)  # type: ignore[operator]
        return nullcontext()

    def mean(self, values: Tensor) -> Tensor:
        """Over all processes, the same numbers on each; on the CPU."""
        return self.sum_(values.clone().to(self.device)).cpu() / self.world

    def sum_(self, values: Tensor) -> Tensor:
        """In place over all processes; buffers are whole on every process, also under FSDP."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def full(self, value: Tensor) -> Tensor:
        """A sharded tensor in one piece."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def gather(self, weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        return None if weights is None else {k: self.full(v).detach().cpu() for k, v in weights.items()}

    def like(self, model: nn.Module, weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Whole tensors laid out as the model's own: sharded where it is sharded."""
        if weights is None:
            return None
        placed = {}
        for name, own in model.state_dict().items():
            value = weights[name].to(own.device)
            placed[name] = (
                distribute_tensor(value, own.device_mesh, own.placements) if isinstance(own, DTensor) else value
            )
        return placed

    def load_model(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        model.load_state_dict(self.like(model, weights) or {})

    def optimizer_state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
        if not self.sharded:
            return optimizer.state_dict()
        state = optimizer.state_dict()
        per = {
            i: {k: self.full(v) if isinstance(v, Tensor) else v for k, v in s.items()}
            for i, s in state["state"].items()
        }
        return {"state": per, "param_groups": state["param_groups"]}

    def load_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: Any) -> None:
        optimizer.load_state_dict(state)
        if not self.sharded:
            return
        for group in optimizer.param_groups:
            for p in group["params"]:
                for key, value in optimizer.state.get(p, {}).items():
                    if isinstance(p, DTensor) and value.shape == p.shape and not isinstance(value, DTensor):
                        optimizer.state[p][key] = distribute_tensor(value, p.device_mesh, p.placements)
