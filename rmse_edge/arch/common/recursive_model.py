"""Solvers of boards that refine an answer z_H and a latent z_L with small networks: TRM and HRM.

    x = sqrt(D) [puzzle vectors; embed(cells)];  z_H = H_init;  z_L = L_init      the latter alike at every position
    one iteration:
        for h = 1..H_cycles:
            for l = 1..L_cycles:  z_L = L(z_L + (z_H + x))
            z_H = H(z_H + z_L)
        stop the board by its halting score
    symbols = W z_H                       of the cells; the puzzle's vectors are left out

Both networks are layers of `z = rms(z + mix(z)); z = rms(z + mlp(z))` with norms without weights. `mix` is attention of every
position to every other, or an MLP over positions; the norm behind that one is over positions too, as published.

Sources: TRM, arXiv 2510.04871, as trm.py of SamsungSAILMontreal/TinyRecursiveModels e7b6871 computes it, where H is L; HRM,
arXiv 2506.21734, as hrm_act_v1.py of sapientinc/HRM 42410da does.

**One iteration is one supervision step** of the published training, whose evaluation always runs all of them. Here a board
stops when its halting score reaches `exit_threshold`. The head reads position 0 of z_H, the first of the puzzle's vectors:

- "solved" (TRM): sigmoid(q_halt), which was trained to be the chance that all cells are right;
- "q" (HRM): sigmoid(q_halt - q_continue), above 1/2 where the value of halting is the larger.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.errors import ConfigError
from rmse_edge.layers.dense import FullAttention, GatedMLP
from rmse_edge.layers.norm import rms
from rmse_edge.layers.rope import rotary_angles
from rmse_edge.loop.contract import LoopSpec, Tensors, TensorSpec
from rmse_edge.puzzles.known import example_board

from .recursive import RecursiveConfig, mlp_width


class Layer(nn.Module):
    """Mixes positions, then channels."""

    def __init__(self, c: RecursiveConfig) -> None:
        super().__init__()
        self.eps = c.rms_norm_eps
        if c.mlp_t:
            self.mlp_t = GatedMLP(c.positions, mlp_width(c, c.positions))
        else:
            self.self_attn = FullAttention(c.hidden_size, c.num_heads, c.num_heads, c.head_width)
        self.mlp = GatedMLP(c.hidden_size, mlp_width(c, c.hidden_size))

    def forward(self, z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, S, D), with angles (B, S, hd/2), which attention reads."""
        if hasattr(self, "mlp_t"):
            across = z.transpose(1, 2)
            z = rms(across + self.mlp_t(across), self.eps).transpose(1, 2)
        else:
            attention = self.self_attn
            own = attention.keys_values(z, cos, sin)
            size = z.shape[1] if attention.attention_operator else 1  # which broadcasts no mask; all else stores less
            unmasked = z.new_zeros(1, 1, size, size)
            z = rms(z + attention(z, cos, sin, own, None, (unmasked, unmasked)), self.eps)
        return rms(z + self.mlp(z), self.eps)


class Level(nn.Module):
    """A network: layers, one after the other."""

    def __init__(self, c: RecursiveConfig, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(c) for _ in range(count))

    def forward(self, z: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        for layer in self.layers:
            z = layer(z, cos, sin)
        return z


class RecursiveSolver(nn.Module):
    """The solver, as a `LoopModel` and for training."""

    H_init: Tensor  # (D,), of every position
    L_init: Tensor
    cos: Tensor  # (1, S, hd/2)
    sin: Tensor

    def __init__(self, config: RecursiveConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        if c.pos_encodings == "learned":
            self.embed_pos = nn.Embedding(c.positions, c.hidden_size)
        if c.puzzle_emb_ndim:
            self.puzzle_emb = nn.Embedding(c.num_puzzle_identifiers, c.puzzle_emb_ndim)
        for level, count in c.levels.items():
            self.add_module(level, Level(c, count))
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.q_head = nn.Linear(c.hidden_size, 2)
        for name in ("H_init", "L_init"):
            self.register_buffer(name, torch.empty(c.hidden_size))
        turned = np.arange(c.positions if c.pos_encodings == "rope" else 1)  # the angle of position 0 turns nothing
        for name, angles in zip(("cos", "sin"), rotary_angles(turned, c.head_width, c.rope_theta)):
            self.register_buffer(name, torch.from_numpy(angles)[None], persistent=False)
        if not self.q_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As published: truncated normal weights scaled by fan-in, no preference to halt, puzzles alike."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _truncated(module.weight, module.in_features**-0.5)
        for name in ("embed_tokens", "embed_pos"):
            if hasattr(self, name):
                _truncated(getattr(self, name).weight, self.config.hidden_size**-0.5)
        if self.config.puzzle_emb_ndim:
            self.puzzle_emb.weight.zero_()
        self.q_head.weight.zero_()
        self.q_head.bias.fill_(-5.0)
        _truncated(self.H_init, 1.0)
        _truncated(self.L_init, 1.0)

    # --------------------------------------------------------------------------------------------------- what it computes

    def embed(self, board: Tensor, puzzle: Tensor | None = None) -> Tensor:
        """x (B, S, D) of boards (B, cells), with the puzzles that they are of, (B,); None: the only one, 0."""
        c = self.config
        x = self.embed_tokens(board)
        if c.prefix:
            ids = torch.zeros_like(board[:, 0]) if puzzle is None else puzzle
            own = F.pad(self.puzzle_emb(ids), (0, c.prefix * c.hidden_size - c.puzzle_emb_ndim))
            x = torch.cat([own.unflatten(-1, (c.prefix, c.hidden_size)), x], 1)
        if c.pos_encodings == "learned":
            x = 0.707106781 * (x + self.embed_pos.weight)
        return x * c.hidden_size**0.5

    def refine(self, x: Tensor, z_h: Tensor, z_l: Tensor) -> tuple[Tensor, Tensor]:
        """One supervision step: (z_H, z_L), (B, S, D) each. In training gradients go through the calls that `gradient` says."""
        c = self.config
        low = self.get_submodule("L_level")
        high = self.get_submodule("H_level") if c.two_networks else low
        train = self.training and torch.is_grad_enabled()
        # Of every board, and of every position where none is turned: an engine's operator may not broadcast them.
        cos, sin = (angles.expand(*x.shape[:2], -1) for angles in (self.cos, self.sin))
        for h in range(c.H_cycles):
            last_cycle = h + 1 == c.H_cycles
            for i in range(c.L_cycles):
                last_call = last_cycle and (c.gradient != "step" or i + 1 == c.L_cycles)
                with _grad_only_if(train, last_call or c.gradient == "full"):
                    z_l = low(z_l + (z_h + x), cos, sin)
            with _grad_only_if(train, last_cycle or c.gradient == "full"):
                z_h = high(z_h + z_l, cos, sin)
        return z_h, z_l

    def halting(self, z_h: Tensor) -> tuple[Tensor, Tensor]:
        """q_halt and q_continue (B,), logits."""
        q = self.q_head(z_h[:, 0])
        return q[:, 0], q[:, 1]

    def halting_score(self, z_h: Tensor) -> Tensor:
        """What `exit_threshold` is compared with, (B,) in 0..1."""
        halt, go_on = self.halting(z_h)
        return torch.sigmoid(halt - go_on if self.config.halting == "q" else halt)

    def first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z_H and z_L before the first step. Sums: a target would store what is only repeated."""
        return x * 0 + self.H_init, x * 0 + self.L_init

    # ----------------------------------------------------------------------------------------------------- LoopModel

    def call_sizes(self) -> tuple[int, ...]:
        return (self.config.seq_len,)

    def spec(self, chunk: int) -> LoopSpec:
        c = self.config
        if chunk != c.seq_len:
            raise ConfigError(f"chunk: got {chunk}, expected the whole board ({c.seq_len} cells)")
        latent = (1, c.positions, c.hidden_size)
        several = c.num_puzzle_identifiers > 1
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(
                TensorSpec("board", (1, chunk), torch.int64),
                *((TensorSpec("puzzle", (1,), torch.int64),) if several else ()),
            ),
            prelude=(TensorSpec("x", latent),),
            h=TensorSpec("h", latent),
            active=TensorSpec("active", (1,), torch.bool),
            carry=(TensorSpec("z_l", latent),),
            head=(TensorSpec("symbols", (1, chunk, c.vocab_size)),),
            dials=("max_loops", "min_loops", "exit_threshold"),
            ids={"board": c.vocab_size, "puzzle": c.num_puzzle_identifiers},
            # Of a board without an answer a trained solver makes something else with every rounding.
            examples={} if c.puzzle is None else {"board": example_board(c.puzzle, c.seq_len)},
        )

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x": self.embed(tensors["board"], tensors.get("puzzle"))}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        z_h, z_l = self.first(tensors["x"])
        return {"h": z_h, "z_l": z_l, "active": torch.ones_like(z_h[:, 0, 0], dtype=torch.bool)}, {}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        z_h, z_l, active = carry["h"], carry["z_l"], carry["active"]
        answer, latent = self.refine(fixed["x"], z_h, z_l)
        threshold = dials["exit_threshold"]
        stop = (threshold < 1) & (self.halting_score(answer) >= threshold) & (k + 1 >= dials["min_loops"])
        keep = active[:, None, None]
        new = {"h": torch.where(keep, answer, z_h), "z_l": torch.where(keep, latent, z_l), "active": active & ~stop}
        return new, {}

    def head(self, h: Tensor) -> Tensors:
        return {"symbols": self.lm_head(h[:, self.config.prefix :])}

    def commit(self, tensors: Tensors) -> Tensors:
        raise NotImplementedError("a board leaves nothing behind")

    @torch.no_grad()
    def scores(self, board: Tensor, dials: Tensors) -> Tensor:
        """The halting score after every iteration, (K,), of a board (1, cells) that never stops."""
        x = self.embed(board)
        z_h, z_l = self.first(x)
        found = []
        for _ in range(self.config.max_loops):
            z_h, z_l = self.refine(x, z_h, z_l)
            found.append(self.halting_score(z_h)[0])
        return torch.stack(found)


def _grad_only_if(training: bool, wanted: bool) -> torch.no_grad | nullcontext[None]:
    return torch.no_grad() if training and not wanted else nullcontext()


def _truncated(tensor: Tensor, std: float) -> None:
    """Normal numbers of which none is farther than two standard deviations, by the inverse of their distribution.

    Not `nn.init.trunc_normal_`, which draws until all are near enough: never, where drawing is switched off (checkpoint.py).
    """
    most = math.erf(2 / math.sqrt(2))
    tensor.uniform_(-most, most).erfinv_().mul_(std * math.sqrt(2))
