"""The architectures that go through every verb, from PyTorch to packages: tests/arch/test_every.py runs them all.

An architecture joins with one line of `CASES`:

    Case("mine", my_model, MINE)

where `my_model()` makes a tiny model with random weights under which positions stop at several depths. Everything else has
a default; the fields say what may differ. A model of texts implements `whole_text`, a board solver `scores`: that is what
the suite and the parity gate hold everything else against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import decided_text, mixed_model, random_tokens
from ouro_models import decided_ouro, lively_ouro
from puzzle import ARCH as PUZZLE
from puzzle import Puzzle, PuzzleConfig
from torch import nn
from toy import ARCH as TOY
from toy import toy
from toy_recurrent import ARCH as RECURRENT
from toy_recurrent import CountsPadding as RecurrentCountsPadding
from toy_recurrent import ToyRecurrent
from toy_tower import ARCH as TOWER
from toy_tower import CountsPadding, ForgetsDeepLoops, LastKeysForAll, lively_tower

from rmse_edge.arch.common.hybrid_model import HybridModel
from rmse_edge.arch.common.identity import fingerprint, model_info
from rmse_edge.arch.common.recurrent import UNTRAINED
from rmse_edge.arch.common.recursive_model import RecursiveSolver
from rmse_edge.arch.dory.config import DoryConfig
from rmse_edge.arch.dory.model import Dory
from rmse_edge.arch.hrm import HrmConfig
from rmse_edge.arch.hrm_text.config import HrmTextConfig
from rmse_edge.arch.hrm_text.model import HrmText
from rmse_edge.arch.huginn_raven.config import HuginnConfig
from rmse_edge.arch.huginn_raven.model import Huginn
from rmse_edge.arch.hybrid.config import HybridConfig
from rmse_edge.arch.inkling2_loop_text.config import InklingConfig
from rmse_edge.arch.inkling2_loop_text.model import Inkling
from rmse_edge.arch.registry import Arch, register
from rmse_edge.arch.trm import TrmConfig
from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.loop.dials import DIALS, Dials
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize, save_quantized
from rmse_edge.runtimes.text.generate import Generation
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.runtimes.text.speculation import Speculation
from rmse_edge.text import TokenNumbers

TARGETS = ("onnx", "executorch", "coreml")
QUANTS = ("fp32", "int4")
# Packages by target and precision, for `Case.always`.
FLOATS = tuple((target, "fp32") for target in TARGETS)
MOST = (*FLOATS, ("onnx", "int4"))
NO_COREML = tuple(p for p in FLOATS if p[0] != "coreml")
ONE = (("onnx", "fp32"),)


@dataclass(frozen=True)
class Case:
    """An architecture of the suite, and what is special about it."""

    name: str  # its model_type
    # A tiny model, the same each time.
    build: Callable[[], Any]
    arch: Arch | None = None  # to register; None: the project knows it
    # The model that int4 packages are made of. Engines round activations there, which random weights make much of: one
    # whose logits are as decided as a trained model's. None: the same.
    calm: Callable[[], Any] | None = None
    # A setting at which positions stop at several depths, and the dial that it is of.
    threshold: float = 0.6
    rule: str = "exit_threshold"
    # (n,) token ids at which no decision of the model is closer than what machines round differently. None: at random.
    text: Callable[[int], np.ndarray] | None = None
    # Of its packages. That of RMS-E in integers are tests/export/test_export_quantized.py and its neighbours.
    quants: tuple[str, ...] = QUANTS
    # Of its packages those that every change makes, by target and precision; the nightly run makes the others. None: all. A
    # target's lowering and how it stores a weight hang little on the architecture: the smallest ones have all of it.
    always: tuple[tuple[str, str], ...] | None = None
    # Session fixtures of tests/conftest.py that have made a package already, by target and precision.
    made: Mapping[tuple[str, str], str] = field(default_factory=dict)
    # Models with a wrong rule, by what is wrong: the gate must catch each.
    wrong: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    trains: bool = False  # rmse-train knows it
    slow: bool = False  # make quick leaves its tests out: it has many layers, and others do the same with fewer
    # All of it is left to the nightly run: many layers with state of many kinds. What is its own has a file of its own.
    nightly: bool = False
    # For rmse-run and rmse-runner, so that they read a prompt as `whole_text` reads a text.
    run_flags: tuple[str, ...] = ()

    def is_nightly(self, target: str, quant: str) -> bool:
        """Whether the nightly run makes this package, and not every change."""
        return self.nightly or (self.always is not None and (target, quant) not in self.always)

    def ids(self, count: int) -> np.ndarray:
        """Tokens of the model's vocabulary, (count,) int64."""
        if self.text is not None and count <= 150:
            return self.text(count)
        return random_tokens(count, vocab=model_info(self.model(), self.name, 0).vocab_size)

    def checkpoint(self, folder: Path) -> Path:
        """The model as a checkpoint folder; without a tokenizer."""
        save_checkpoint(self.model(), folder, dtype=torch.float32)
        return folder

    def stored(self, folder: Path, quant: str) -> Path:
        """The model as a checkpoint folder of this precision, by rmse-quantize's own steps: integers that all targets take."""
        if quant == "fp32":
            return self.checkpoint(folder)
        request = QuantizeRequest(Scheme(quant, dense_group_size=32 if quant == "int4" else None), method="rtn")
        save_quantized(quantize(self.quantizable(), request, None, fingerprint(self.quantizable())), folder)
        return folder

    def model(self) -> Any:
        """The model, made once: do not change it."""
        return _built(self.build)

    def quantizable(self) -> Any:
        """The model that int4 packages are made of; as `model`."""
        return _built(self.calm or self.build)


@cache
def _built(build: Callable[[], Any]) -> Any:
    return build().eval()


def solver() -> Puzzle:
    """A solver of boards of 81 cells, which stop by themselves."""
    torch.manual_seed(3)
    model = Puzzle(PuzzleConfig(cells=81, symbols=10))
    nn.init.normal_(model.halt.weight, std=0.3)
    return model


def tower() -> Any:
    return lively_tower(max_loops=3)


def decided_recurrent() -> ToyRecurrent:
    model = ToyRecurrent()
    nn.init.normal_(model.answer.bias, std=1.0)
    return model


def wrong_tower(kind: type) -> Callable[[], Any]:
    return lambda: lively_tower(kind=kind)


def with_lively_gate(model: Any) -> Any:
    """The model, its exit gate, if it has one, of random weights at which positions stop at several depths."""
    if model.config.gated:
        nn.init.normal_(model.exit_gate.weight, std=0.5)
    return model


def small_huginn(rules: tuple[str, ...] = ("gate", *UNTRAINED)) -> Huginn:
    """With all of its exit rules, or some, and a loop more than it is trained to."""
    torch.manual_seed(5)
    sizes = {
        "n_embd": 32,
        "n_heads": 2,
        "intermediate_size": 64,
        "n_layers_in_prelude": 1,
        "n_layers_in_recurrent_block": 2,
        "n_layers_in_coda": 1,
    }
    config = HuginnConfig(
        vocab_size=65, block_size=512, mean_recurrence=3, untrained_loops=1, exit_rules=rules, **sizes
    )
    return with_lively_gate(Huginn(config))


def decided_huginn() -> Huginn:
    """A model whose states hold on to the token they are of, so that its predictions are as decided as a trained model's."""
    model = small_huginn(("kl",))  # each rule is one more text for the gate
    m = model.transformer
    with torch.no_grad():
        m.ln_f.weight.fill_(2.0)
        m.adapter.weight[:, 32:] = torch.eye(32)
        for layer in (*m.prelude.layers, *m.core_block.layers, *m.coda.layers):
            layer.attn.o_proj.weight *= 0.2
            layer.mlp.down_proj.weight *= 0.2
    return model


def small_dory() -> Dory:
    """A layer of each kind in the loop, a window that texts are longer than, and a loop more than it is trained to."""
    torch.manual_seed(6)
    model = Dory(
        DoryConfig(
            vocab_size=65, hidden_size=32, intermediate_size=64, num_hidden_layers=4, n_input_layers=1,
            n_output_layers=1, n_recurrent_loops=2, untrained_loops=1, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, layer_types=("sliding_attention", "sliding_attention", "full_attention", "full_attention"),
            sliding_window=24, max_position_embeddings=512, exit_rules=("gate", "delta", "kl"),
        )
    )  # fmt: skip
    with_lively_gate(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_alpha"):  # rates of about a fifth
                p.uniform_(2.0, 6.0).mul_(model.config.initializer_range)
        model.lm_head.logit_scale *= 6.0
    return model


def decided_dory() -> Dory:
    """A model whose states hold on to the token they are of, as `decided_huginn`."""
    model = small_dory()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_alpha"):
                p *= 0.6
        model.lm_head.weight.copy_(model.backbone.embeddings.weight)
        model.lm_head.logit_scale *= 2.0
    return model


def small_hrm_text() -> HrmText:
    """Two calls of L and one of H in each of two cycles, and a cycle more than it is trained to; texts may have a prefix."""
    torch.manual_seed(7)
    model = HrmText(
        HrmTextConfig(
            vocab_size=65, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
            H_cycles=2, L_cycles=2, untrained_loops=1, max_position_embeddings=512, exit_rules=("gate", "delta", "kl"),
        )
    )  # fmt: skip
    nn.init.normal_(model.model.z_L_init, std=0.5)
    return with_lively_gate(model)


def decided_hrm_text() -> HrmText:
    """A model whose states hold on to the token they are of, as `decided_huginn`."""
    model = small_hrm_text()
    with torch.no_grad():
        for stack in (model.model.L_module, model.model.H_module):
            for layer in stack.layers:
                layer.self_attn.o_proj.weight *= 0.3
                layer.mlp.down_proj.weight *= 0.3
        model.lm_head.weight.copy_(model.model.embed_tokens.weight * model.config.embedding_scale * 0.3)
    return model


def small_inkling() -> Inkling:
    """Layers of both kinds in the loop, two blocks in a pass, a window that texts are longer than, and one untrained pass."""
    sliding, full = "hybrid_sliding", "hybrid"
    config = InklingConfig(
        vocab_size=68, unpadded_vocab_size=65, hidden_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=1, head_dim=16, swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8,
        sliding_window_size=24, d_rel=4, rel_extent=40, log_scaling_n_floor=32,
        layer_types=(sliding, sliding, full, full), max_position_embeddings=512, moe_intermediate_size=32,
        n_routed_experts=6, num_experts_per_tok=2, route_scale=2.0, n_layers_per_attn_res_block=1,
        loop_layer_index_start=1, loop_layer_index_end=3, loop_num_passes=2,
        untrained_loops=1, loop_gate_rank=8, exit_rules=("gate", "delta", "kl"), eos_token_id=None,
    )  # fmt: skip
    model = Inkling(config)
    torch.manual_seed(7)  # weights with which every fault of a host is felt: a gate, which would draw first, comes last
    model.load_state_dict(Inkling(replace(config, exit_rules=("delta", "kl"))).state_dict(), strict=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("_input.query"):  # layers read the token most of all, as in a trained model
                p.normal_(std=0.3)
                if "message" not in name:
                    p[..., 0] += 4.0
            elif name.endswith("static_weight"):  # what lies further back is felt
                p.normal_(std=2.0)
        model.model.embed_tokens.weight[:, 0] += 0.4
    return with_lively_gate(model)


def decided_inkling() -> Inkling:
    """A model as decided as a trained one: of the blocks, the token's own is read most, and few experts are close to another."""
    model = small_inkling()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("balance_bias"):
                buffer.copy_(torch.arange(6.0))
        for name, p in model.named_parameters():
            if name.endswith(("attention_input.query", "mlp_input.query", "final_input.query")):
                p[..., 0] += 4.0
            elif name.endswith(("static_weight", "message_gate_proj.weight")):
                p *= 0.25
        model.model.embed_tokens.weight[:, 0] += 0.6
        model.lm_head.weight.copy_(model.model.embed_tokens.weight[:65])
        model.lm_head.weight *= 4.0
        model.lm_head.weight[:, 0] = 0.0  # what embeddings share would take all logits to their cap
    return model


def small_hybrid() -> HybridModel:
    """Every mixer in the loop, layers before and behind it, windows that texts are longer than, and an untrained loop."""
    torch.manual_seed(9)
    config = HybridConfig(
        vocab_size=65, d_model=32, think=(1, 6), think_loops=2, untrained_loops=1, max_position_embeddings=512,
        layers=(
            "shared_key_attention", "atlas", "gated_deltanet", "mamba3", "rodimus_plus", "gated_attention", "gated_deltanet",
        ),
        n_heads=4, n_kv_heads=2, head_dim=8, rotary_dims=4, window=24, shared_key_window=20, taps=3,
        deltanet_key_heads=2, deltanet_value_heads=4, deltanet_key_dim=8, deltanet_value_dim=8,
        mamba_heads=4, mamba_head_dim=8, mamba_state_dim=8, mamba_angles=2, mamba_rank=2,
        rodimus_channels=32, rodimus_state_dim=8, rodimus_gate_rank=8,
        atlas_heads=4, atlas_head_dim=8, atlas_hidden=8, atlas_steps=2, atlas_segment=16,
        n_experts=6, top_k=2, expert_width=32, shared_width=32, exit_rules=("gate", "delta", "cosine"),
    )  # fmt: skip
    model = HybridModel(config)
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    torch.nn.init.normal_(model.exit_gate.weight, std=0.5)
    return model


def looped_hybrid() -> HybridModel:
    """Every mixer in the loop, and nothing else: what packages are made of. Graphs of recurrences have thousands of operators."""
    config = replace(
        small_hybrid().config, layers=("atlas", "gated_deltanet", "mamba3", "rodimus_plus", "gated_attention"),
        think=(0, 5), untrained_loops=0, n_experts=0, intermediate_size=32, atlas_steps=1, exit_rules=("gate",),
    )  # fmt: skip
    torch.manual_seed(9)
    model = HybridModel(config)
    nn.init.normal_(model.lm_head.weight, std=0.1)
    return with_lively_gate(model)


def decided_hybrid() -> HybridModel:
    """A model whose states hold on to the token they are of, as `decided_huginn`."""
    model = looped_hybrid()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight")):
                p *= 0.3
        model.lm_head.weight.copy_(model.embed_tokens.weight * 0.5)
    return model


def small_trm() -> RecursiveSolver:
    """An MLP over positions, and boards that stop at several depths."""
    return lively_solver(
        TrmConfig(
            seq_len=16, vocab_size=6, hidden_size=32, num_heads=2, mlp_t=True, mlp_multiple=32, pos_encodings="none",
            H_cycles=1, L_cycles=2, puzzle_emb_ndim=32, puzzle_emb_len=1, halt_max_steps=4, untrained_loops=1, puzzle="sudoku",
        )
    )  # fmt: skip


def small_hrm() -> RecursiveSolver:
    """Attention, two networks, and boards that stop at several depths."""
    return lively_solver(
        HrmConfig(
            seq_len=16, vocab_size=6, hidden_size=32, num_heads=2, mlp_multiple=32, H_layers=1, L_layers=1,
            puzzle_emb_ndim=32, halt_max_steps=4, puzzle="sudoku",
        )
    )  # fmt: skip


def lively_solver(config: Any) -> RecursiveSolver:
    torch.manual_seed(8)
    model = RecursiveSolver(config)
    with torch.no_grad():
        model.q_head.bias.zero_()
        model.q_head.weight.normal_(std=0.5)
        model.lm_head.weight *= 3.0
    return model


def decided_solver(build: Callable[[], RecursiveSolver]) -> Callable[[], RecursiveSolver]:
    """A model whose answer holds on to the cells it is given, as decided as a trained one."""

    def made() -> RecursiveSolver:
        model = build()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    p *= 0.2
            model.lm_head.weight.copy_(model.embed_tokens.weight * 20.0)
        return model

    return made


CASES = (
    Case(
        "rmse",
        mixed_model,
        text=decided_text,
        quants=("fp32",),
        made={
            ("onnx", "fp32"): "package",
            ("executorch", "fp32"): "executorch_package",
            ("coreml", "fp32"): "coreml_package",
        },
        trains=True,
    ),
    Case(
        "ouro",
        lively_ouro,
        calm=decided_ouro,
        trains=True,
        always=(*ONE, ("onnx", "int4"), ("executorch", "int4")),
    ),
    Case(
        "tower",
        tower,
        TOWER,
        always=ONE,
        wrong={kind.__name__: wrong_tower(kind) for kind in (CountsPadding, ForgetsDeepLoops, LastKeysForAll)},
    ),
    Case(
        "toy_recurrent",
        ToyRecurrent,
        RECURRENT,
        calm=decided_recurrent,
        always=NO_COREML,
        made={("executorch", "fp32"): "toy_package"},
        wrong={"CountsPadding": RecurrentCountsPadding},
    ),
    Case("toy", toy, TOY, threshold=0.5, always=ONE),
    Case("puzzle", solver, PUZZLE, always=MOST),
    Case("trm", small_trm, calm=decided_solver(small_trm), threshold=0.5, trains=True, always=ONE),
    Case("hrm", small_hrm, calm=decided_solver(small_hrm), threshold=0.5, trains=True, always=()),
    Case(
        "huginn_raven",
        small_huginn,
        calm=decided_huginn,
        rule="exit_kl",
        threshold=0.5,
        trains=True,
        always=(),
        slow=True,
    ),
    Case(
        "hrm_text",
        small_hrm_text,
        calm=decided_hrm_text,
        rule="exit_kl",
        threshold=0.05,
        trains=True,
        run_flags=("--prefix", "none"),
        always=ONE,
        slow=True,
    ),
    Case("dory", small_dory, calm=decided_dory, rule="exit_kl", threshold=0.05, trains=True, always=(), slow=True),
    Case(
        "inkling2_loop_text",
        small_inkling,
        calm=decided_inkling,
        rule="exit_kl",
        threshold=0.05,
        trains=True,
        always=(),
        slow=True,
    ),
    Case("hybrid", looped_hybrid, calm=decided_hybrid, trains=True, slow=True, nightly=True),
)

for _case in CASES:
    if _case.arch is not None:
        register(_case.name, _case.arch)

# ----------------------------------------------------------------------------------------------- what every test asks of one

TEXTS = tuple(case for case in CASES if hasattr(case.model(), "whole_text"))


def settings_of(case: Case) -> dict[str, Dials]:
    loops = case.model().spec(case.model().call_sizes()[0]).max_loops
    return {
        "full depth": Dials(loops),
        "adaptive": Dials(loops, **{case.rule: case.threshold}),
        "shallow": Dials(2, **{case.rule: case.threshold}),
    }


def flags_of(dials: Dials) -> list[str]:
    """These dials as flags of a verb."""
    exits = {name: getattr(dials, name) for name, dial in DIALS.items() if dial.rule}
    flags = [part for name, value in exits.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return ["--max-loops", str(dials.max_loops), *flags]


def text_of(case: Case) -> np.ndarray:
    """150 tokens, or as many as the model has room for: (n,) int64."""
    info = model_info(case.model(), case.name, 0)
    return case.ids(min(150, info.capacity or 150))


def whole(model: Any, text: np.ndarray, dials: Dials) -> tuple[np.ndarray, np.ndarray]:
    """Logits and depth of a text at once."""
    scalars = {name: torch.from_numpy(value) for name, value in dials.arrays().items()}
    found = model.whole_text(torch.from_numpy(text), scalars)
    return found.logits.numpy(), found.depth.numpy()


def greedy(
    runtime: Any, prompt: np.ndarray, dials: Dials, count: int = 12, speculation: Speculation | None = None
) -> list[int]:
    """The likeliest tokens behind a prompt, one after the other."""
    generation = Generation(
        runtime, TokenNumbers(), [*map(int, prompt)], dials, Sampler(Sampling(0.0)), count, speculation=speculation
    )
    for _ in generation.spans():
        pass
    return generation.tokens


def argmax_of_whole_text(model: Any, prompt: np.ndarray, tokens: list[int], dials: Dials) -> list[int]:
    """What `greedy` must give, if it has given `tokens`: the likeliest token at each of their places."""
    text = np.array([*prompt, *tokens])
    logits, _ = whole(model, text, dials)
    return logits[len(prompt) - 1 : -1].argmax(-1).tolist()
