"""What solvers of boards that refine two latents have in common: TRM and HRM, by the names of their published settings.

The published code has no config.json: its settings are a YAML file, whose section `arch` and whose sizes of the data set
(seq_len, vocab_size, num_puzzle_identifiers) are the keys here. Without PyTorch: hosts of packages ask too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rmse_edge.arch.registry import Stored
from rmse_edge.errors import ConfigError, UserError
from rmse_edge.info import BoardInfo, BoardKind
from rmse_edge.loop.dials import Dials
from rmse_edge.numbers import MAX_LOOPS, Count, Loops, Positive, Share, Some
from rmse_edge.puzzles.known import game_of_model
from rmse_edge.schema import check_fields

from .published import PublishedConfig
from .quantization import QuantTable

if TYPE_CHECKING:
    from torch import Tensor

    from .recursive_model import RecursiveSolver

# Sizes of the published data sets: cells and symbols -> what they are boards of.
PUBLISHED_BOARDS: Mapping[tuple[int, int], BoardKind] = {(81, 11): "sudoku", (900, 6): "maze"}


@dataclass(frozen=True)
class RecursiveConfig(PublishedConfig):
    """Shape and behaviour of one solver. The defaults are those of the published Sudoku runs."""

    architectures: ClassVar[tuple[str, ...]] = ()
    # Of training and of the data alone.
    passed_over: ClassVar[frozenset[str]] = frozenset(
        {"arch", "name", "loss", "batch_size", "forward_dtype", "causal", "no_ACT_continue"}
    )
    # Fields whose names begin like this change no weight's meaning (`Arch.settings`).
    settings: ClassVar[tuple[str, ...]] = ("exit_threshold", "min_loops", "halt_exploration_prob", "gradient")
    halting: ClassVar[Literal["solved", "q"]]  # what the halting head says: see recursive_model.py

    seq_len: Count = 81  # cells
    vocab_size: Count = 11  # symbols that a cell may hold, the padding 0 among them
    hidden_size: Count = 512
    num_heads: Count = 8
    expansion: Positive = 4.0  # of an MLP: 2/3 of it times what it reads, up to a multiple of `mlp_multiple`
    mlp_multiple: Count = 256  # no published key: for small models, of which 256 channels would be most of the work
    H_cycles: Loops = 3
    L_cycles: Loops = 6
    L_layers: Count = 2
    H_layers: Some = 0
    pos_encodings: Literal["rope", "learned", "none"] = "rope"
    rms_norm_eps: Positive = 1e-5
    rope_theta: Positive = 10_000.0
    mlp_t: bool = False  # an MLP mixes the positions, instead of attention
    puzzle_emb_ndim: Some = 512  # numbers of a puzzle's own vectors; what is missing of `prefix` vectors is zeros
    puzzle_emb_len: Some = 0  # how many vectors stand before the cells; 0: as many as the numbers need
    num_puzzle_identifiers: Count = 1
    halt_max_steps: Loops = 16  # the trained depth: iterations, of H_cycles cycles each
    halt_exploration_prob: Share = 0.1
    # Through which calls of a step training goes back: its last cycle, the last call of L and of H, or all.
    gradient: Literal["cycle", "step", "full"] = "cycle"
    untrained_loops: Some = 0  # iterations beyond the trained depth that may be asked for
    min_loops: Loops = 1
    exit_threshold: Positive = 0.5  # a board stops when the halting score reaches this; 1 disables
    puzzle: BoardKind | None = None  # what the boards are; None: as published sizes say, if they do

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        width, heads = self.hidden_size, self.num_heads
        self.require(width % heads == 0, "num_heads", f"a divisor of hidden_size ({width})")
        self.require(self.mlp_t or width // heads % 2 == 0, "num_heads", "one that leaves each head an even width")
        room = self.prefix * width
        self.require(self.puzzle_emb_ndim <= room, "puzzle_emb_ndim", f"at most puzzle_emb_len * hidden_size ({room})")
        self.require(bool(self.puzzle_emb_ndim) or not self.puzzle_emb_len, "puzzle_emb_len", "0, as puzzle_emb_ndim")
        self.require(self.min_loops <= self.halt_max_steps, "min_loops", f"at most {self.halt_max_steps}")
        most = MAX_LOOPS - self.halt_max_steps
        self.require(self.untrained_loops <= most, "untrained_loops", f"at most {most}, {MAX_LOOPS} loops in all")
        if self.puzzle is None:
            object.__setattr__(self, "puzzle", PUBLISHED_BOARDS.get((self.seq_len, self.vocab_size)))
        else:
            self._check_game()

    def _check_game(self) -> None:
        """Fail where boards of this kind have other cells or symbols."""
        try:
            game_of_model(board_info(self))
        except UserError as error:
            raise ConfigError(f"puzzle: {error}") from None

    @property
    def prefix(self) -> int:
        """Vectors before the cells."""
        return self.puzzle_emb_len or -(-self.puzzle_emb_ndim // self.hidden_size)

    @property
    def positions(self) -> int:
        """Of a latent: the prefix and the cells."""
        return self.prefix + self.seq_len

    @property
    def two_networks(self) -> bool:
        """Whether H is another network than L."""
        raise NotImplementedError

    @property
    def head_width(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def max_loops(self) -> int:
        """Loops that may be asked for."""
        return self.halt_max_steps + self.untrained_loops

    @property
    def dials(self) -> Dials:
        return Dials(self.halt_max_steps, self.min_loops, self.exit_threshold)

    @property
    def levels(self) -> dict[str, int]:
        """The networks, by name, and their layers."""
        return {"L_level": self.L_layers} | ({"H_level": self.H_layers} if self.two_networks else {})


def mlp_width(c: RecursiveConfig, width: int) -> int:
    """Hidden channels of a gated MLP that reads `width` numbers: 2/3 of expansion * width, up to a multiple."""
    return -(-round(c.expansion * width * 2 / 3) // c.mlp_multiple) * c.mlp_multiple


def layer_weights(c: RecursiveConfig) -> int:
    """Weights of one layer."""
    width, positions = c.hidden_size, c.positions
    mixing = 3 * positions * mlp_width(c, positions) if c.mlp_t else 4 * width**2
    return mixing + 3 * width * mlp_width(c, width)


def loop_weights(c: RecursiveConfig) -> int:
    """Weights of products in one iteration: those of a network once for each of its calls."""
    high = c.levels.get("H_level", c.L_layers)
    return c.H_cycles * (c.L_cycles * c.L_layers + high) * layer_weights(c) + 2 * c.hidden_size


def parameters(c: RecursiveConfig) -> int:
    """Trained numbers, the puzzles' own vectors among them."""
    tables = 2 * c.vocab_size + (c.positions if c.pos_encodings == "learned" else 0)
    puzzles = c.num_puzzle_identifiers * c.puzzle_emb_ndim
    return sum(c.levels.values()) * layer_weights(c) + (tables + 2) * c.hidden_size + 2 + puzzles


def board_info(c: RecursiveConfig) -> BoardInfo:
    return BoardInfo(c.seq_len, c.vocab_size, c.prefix, c.num_puzzle_identifiers, c.puzzle)


def parts(model: RecursiveSolver) -> dict[str, Any]:
    """`Arch.parts`."""
    c = model.config
    once = c.vocab_size * c.hidden_size
    return {"dials": c.dials, "board": board_info(c), "loop_weights": loop_weights(c), "once_weights": once}


def stated(c: RecursiveConfig) -> dict[str, Any]:
    """`Arch.stated`."""
    board = {f"board.{name}": value for name, value in vars(board_info(c)).items()}
    return {"max_loops": c.max_loops, "width": c.hidden_size, "parameters": parameters(c), **board}


def layers(c: RecursiveConfig) -> list[str]:
    """The paths of all layers, in the order of the data flow."""
    return [f"{level}.layers.{i}" for level, count in c.levels.items() for i in range(count)]


def table(c: RecursiveConfig) -> QuantTable:
    """`Arch.quantization`: the matrices of the layers, which are nearly all of a model.

    What mixes positions reads as many numbers as there are positions, 97 of a published Sudoku: no whole groups. So what it
    begins with stays float, as do the few rows of embeddings and heads.
    """
    stages: list[tuple[str, ...]] = []
    for layer in layers(c):
        if c.mlp_t:
            stages.append((f"{layer}.mlp_t.down_proj.weight",))
        else:
            stages.append(tuple(f"{layer}.self_attn.{name}_proj.weight" for name in "qkv"))
            stages.append((f"{layer}.self_attn.o_proj.weight",))
        stages.append((f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"))
        stages.append((f"{layer}.mlp.down_proj.weight",))
    small = ("embed_tokens.weight", "embed_pos.weight", "puzzle_emb.weight", "?_init", "q_head.*", "lm_head.weight")
    return QuantTable(stages=tuple(stages), float=(*small, "*.mlp_t.gate_proj.weight", "*.mlp_t.up_proj.weight"))


def stored(c: RecursiveConfig) -> list[Mapping[str, Stored]]:
    """`Arch.stored`: the published names, which begin in as many ways as there are wrappers that a model was saved in.

    Published are queries, keys and values as one tensor, and gate and up of an MLP.
    """
    return [_published(c, start) for start in ("", "inner.", "model.inner.", "_orig_mod.model.inner.")]


def _published(c: RecursiveConfig, start: str) -> dict[str, Stored]:
    found = {name: Stored((f"{start}{name}",)) for name in ("H_init", "L_init", "q_head.weight", "q_head.bias")}
    found["lm_head.weight"] = Stored((f"{start}lm_head.weight",))
    found["embed_tokens.weight"] = Stored((f"{start}embed_tokens.embedding_weight",))
    if c.pos_encodings == "learned":
        found["embed_pos.weight"] = Stored((f"{start}embed_pos.embedding_weight",))
    if c.puzzle_emb_ndim:
        found["puzzle_emb.weight"] = Stored((f"{start}puzzle_emb.weights",))
    for layer in layers(c):
        mlps = ["mlp", "mlp_t"] if c.mlp_t else ["mlp"]
        for mlp in mlps:
            both = (f"{start}{layer}.{mlp}.gate_up_proj.weight",)
            for i, name in enumerate(("gate", "up")):
                found[f"{layer}.{mlp}.{name}_proj.weight"] = Stored(both, _part(i, 2))
            down = f"{layer}.{mlp}.down_proj.weight"
            found[down] = Stored((f"{start}{down}",))
        if not c.mlp_t:
            for i, name in enumerate("qkv"):
                all_three = (f"{start}{layer}.self_attn.qkv_proj.weight",)
                found[f"{layer}.self_attn.{name}_proj.weight"] = Stored(all_three, _part(i, 3))
            out = f"{layer}.self_attn.o_proj.weight"
            found[out] = Stored((f"{start}{out}",))
    return found


def _part(i: int, count: int) -> Callable[[Tensor], Tensor]:
    """Of `count` equal parts of the rows, part i; all rows where they have no such parts, for the reader to refuse."""
    return lambda w: w if len(w) % count else w[i * len(w) // count : (i + 1) * len(w) // count]
