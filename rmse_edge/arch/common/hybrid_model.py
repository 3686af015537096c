"""Hybrids: layers of any mixers, of which some are applied up to K times.

    x0 = the layers before the loop, of embed(tokens)
    h = x0
    for k = 1..K:
        h = the looped layers(h)
        stop a position by one of its exit rules
    logits = head(norm(the layers behind the loop(h)))

Nothing is injected and no loop has a code of its own: the looped layers are those of a plain stack, and with K = 1 the numbers
are, bit for bit, those of the plain stack (Koishekenov et al. 2025, Encode, Think, Decode, arXiv 2510.07358). What deeper loops
find of a position that stopped is in rmse_edge/layers/mixers/stack.py. An architecture gives the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.errors import ConfigError
from rmse_edge.layers import policy
from rmse_edge.layers.dense import GatedMLP
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.layers.held import shape_of
from rmse_edge.layers.mixers.atlas import AtlasLayer
from rmse_edge.layers.mixers.base import Call, Mixer
from rmse_edge.layers.mixers.gated_attention import GatedAttention
from rmse_edge.layers.mixers.gated_deltanet import GatedDeltaNet
from rmse_edge.layers.mixers.mamba3 import Mamba3
from rmse_edge.layers.mixers.rodimus import Rodimus
from rmse_edge.layers.mixers.shared_key_attention import SharedKeyAttention
from rmse_edge.layers.mixers.stack import MixerLayer, MixerStack, call_specs, of_call, of_rows
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.layers.rope import given_angles
from rmse_edge.layers.router_margins import RouterMargins
from rmse_edge.layers.trajectory import of_one_text, trajectory_of
from rmse_edge.loop.contract import InjectedHits, LoopSpec, Tensors, TensorSpec, WholeText
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.whole import in_one_call
from rmse_edge.numbers import SEGMENT, SLOTS

from .exits import ExitRules
from .hybrid import HybridBase, LayerPlan

MIXERS: Mapping[str, type[Mixer]] = {
    "gated_deltanet": GatedDeltaNet,
    "mamba3": Mamba3,
    "rodimus": Rodimus,
    "atlas": AtlasLayer,
    "gated_attention": GatedAttention,
    "shared_key_attention": SharedKeyAttention,
}
NEW, HELD = "new_", "held_"  # begin the names of rows: emitted, held by what stopped


def make_layer(width: int, plan: LayerPlan, eps: float) -> MixerLayer:
    """The layer of a plan."""
    mlp: nn.Module | None = None
    if plan.experts:
        mlp = SparseExperts(width, **plan.experts)
    elif plan.dense:
        mlp = GatedMLP(width, plan.dense)
    mixers = [MIXERS[mixer.kind](width, **mixer.sizes) for mixer in plan.mixers]
    return MixerLayer(width, mixers, mlp, eps, plan.two_hop)


class HybridModel(ExitRules):
    """The model, as a `TextModel` for runtimes and exporters."""

    def __init__(self, config: HybridBase) -> None:
        super().__init__(config, config.width)
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.width)
        layers = [make_layer(config.width, plan, config.eps) for plan in config.plan]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.width, config.eps)
        self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.encoder, self.core, self.decoder = (
            MixerStack(
                layers[part],
                part.start,
                config.max_loops if i == 1 else None,
                config.kv_policy if i == 1 else "all",
                config.kv_dtype,
            )
            for i, part in enumerate(config.sections)
        )
        if not self.embed_tokens.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / inputs; branches that add up to about the size of the embedding (Radford et al. 2019,
        GPT-2, section 2.3).
        """
        self.normal_weights()
        self.embed_tokens.weight.normal_()
        for module in self.modules():
            if isinstance(module, SparseExperts):
                for weight in (module.gate_up_proj, module.down_proj):
                    weight.normal_(std=weight.shape[-1] ** -0.5)
            elif isinstance(module, Mixer):
                module.reset_parameters()
        branch = (2 * len(self.layers)) ** -0.5
        for name, weight in self.layers.named_parameters():
            if name.endswith((".out_proj.weight", ".o_proj.weight", "mlp.down_proj", ".mlp.down_proj.weight")):
                weight.mul_(branch)
        if not self.config.tie_word_embeddings:
            self.lm_head.weight.normal_(std=self.config.width**-0.5)

    @property
    def stacks(self) -> tuple[MixerStack, MixerStack, MixerStack]:
        return self.encoder, self.core, self.decoder

    # ------------------------------------------------------------------------------------------------ LoopModel

    def call_sizes(self) -> tuple[int, ...]:
        most = min(SEGMENT, self.config.max_position_embeddings, self.config.segment or SEGMENT)
        return tuple(dict.fromkeys((1, most)))

    def spec(self, chunk: int) -> LoopSpec:
        c, capacity = self.config, self.config.max_position_embeddings
        if chunk < 1 or (c.attends_to_all and chunk > capacity):  # otherwise a text has no end
            most = f"1..{capacity}" if c.attends_to_all else "at least 1"
            raise ConfigError(f"chunk: got {chunk}, expected {most}, the positions of a call")
        vector, (dims, _) = TensorSpec("h", (1, chunk, c.width)), c.turning
        angles = (TensorSpec(name, (1, chunk, dims // 2)) for name in ("cos", "sin"))
        context = (*angles, *(TensorSpec(name, (1,), torch.int64) for name in ("position", "n_valid")))
        if not dims:
            context = context[2:]
        if c.attends_to_all:
            context += (TensorSpec(SLOTS, (capacity,), torch.int64, None, slots_axis=0),)
        decodes = bool(self.decoder.layers)
        valid, far = max(1, chunk - 3), min(40, capacity - chunk) if c.attends_to_all else 40
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("tokens", (1, chunk), torch.int64), *context),
            prelude=(replace(vector, name="x0"), *self.encoder.given(chunk)),
            context=context,
            state=(
                *self.encoder.state(capacity, "prelude"),
                *self.core.state(capacity, "loop"),
                *self.decoder.state(capacity, "coda"),
            ),
            h=vector,
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(
                *((TensorSpec("log_survival", (1, chunk)),) if c.gated else ()),
                *policy.carried(c.kv_policy, chunk, c.width, self.core.rows.specs(HELD, chunk)),
            ),
            invariants=call_specs(self.stacks[1:2], chunk, capacity),
            emits=self.core.rows.specs(NEW, chunk),
            coda=(replace(vector, name="y"), *self.decoder.given(chunk)) if decodes else (),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=self.core.given(chunk),
            dials=("max_loops", "min_loops", *c.rules),
            segment=c.segment,
            ids={"tokens": c.vocab_size},
            # Where a segment is learned by it, a call that completes one.
            examples={"position": [c.segment - valid if c.segment else far], "n_valid": [valid]},
        )

    def prelude(self, tensors: Tensors) -> Tensors:
        x = self.embed_tokens(tensors["tokens"])
        x, rows, states = self._once(self.encoder, x, tensors)
        return {"x0": x} | self.encoder.rows.kept(rows, "", "") | states

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0 = tensors["x0"]
        count = x0.shape[1]
        valid = torch.arange(count, device=x0.device) < tensors["n_valid"][:, None]  # (B, C)
        held = self.core.rows.nothing(HELD, x0)
        carry = policy.first_carry(self.config.kv_policy, x0, valid, held)
        carry |= self.first_of_rules(x0, self.config.vocab_size)
        found = of_call((self.core,), tensors, count)
        return carry, {name: t for name, t in found.items() if name not in ("cos", "sin")}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        c, core = self.config, self.core
        before, runs = policy.entering(c.kv_policy, carry)
        # With "all" every position is computed to the end, but for padding.
        active, held = (carry["active"], None) if c.kv_policy == "all" else (runs, self._named(carry, HELD, ""))
        call = Call(fixed["position"], fixed["n_valid"], fixed)
        after, rows, _ = core(before, k, past, call, active, held)
        h = torch.where(runs.unsqueeze(-1), after, carry["h"])
        stop, new = self.judged(k, carry, before, after, runs, dials, None)
        holding = self._named(rows, "", HELD)
        return new | policy.next_carry(c.kv_policy, carry, h, after, runs, stop, holding), self._named(rows, "", NEW)

    def coda(self, tensors: Tensors) -> Tensors:
        h = tensors["h"]
        y, rows, states = self._once(self.decoder, h, tensors)
        return {"y": y} | self.decoder.rows.kept(rows, "", "") | states

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.lm_head(self.norm(h))}

    def commit(self, tensors: Tensors) -> Tensors:
        """Loops that did not run find what the last one gave; with "all", every loop has run."""
        loops, core = self.config.max_loops, self.core
        given = self._named(tensors, NEW, "")
        rows = {name: policy.of_all_loops(t, tensors["iterations"], loops) for name, t in given.items()}
        count = tensors["h"].shape[1]
        return core.rows.kept(rows, "", "", loops=True) | core.absorbed(rows, tensors, self._call(core, tensors, count))

    # ------------------------------------------------------------------------------------------------ its own parts

    def _once(self, stack: MixerStack, x: Tensor, tensors: Tensors) -> tuple[Tensor, Tensors, Tensors]:
        """Layers that are not looped: what `MixerStack.forward` gives. Padding is not computed where that saves something."""
        call = self._call(stack, tensors, x.shape[1])
        return stack(x, 0, tensors, call, call.valid(x.shape[1]))

    def _call(self, stack: MixerStack, tensors: Tensors, count: int) -> Call:
        return Call(tensors["position"], tensors["n_valid"], of_call((stack,), tensors, count))

    def _named(self, rows: Tensors, old: str, new: str) -> Tensors:
        """The rows of the looped layers, OLDNAME, as NEWNAME."""
        return {f"{new}{kind.name}": rows[f"{old}{kind.name}"] for kind in self.core.rows.kinds}

    def weights_of(self, section: int) -> int:
        """Weights of products that a position reads of the layers before (0), in (1) or behind (2) the loop."""
        first = self.config.sections[section].start
        found = 0
        for i, layer in enumerate(self.stacks[section].layers, first):
            for path, module in layer.named_modules():
                if isinstance(module, nn.Linear):
                    rows, columns = shape_of(self, f"layers.{i}.{path}.weight")
                    found += rows * columns
                elif isinstance(module, SparseExperts):
                    for name in ("gate_up_proj", "down_proj"):
                        _, rows, columns = shape_of(self, f"layers.{i}.{path}.{name}")
                        found += module.top_k * rows * columns
        return found

    # ------------------------------------------------------------------------------------------------ TextModel

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        with RouterMargins(self) as margins:
            found = in_one_call(
                self, tokens, self.angles_of(len(tokens)), dials, hits, lambda *_: margins.take(len(tokens))
            )
            return replace(found, margin=torch.minimum(found.margin, margins.take(len(tokens))))  # of the decoder

    def angles_of(self, count: int) -> Tensors:
        """What a host tells a call of the first `count` positions of a text, (1, count, n/2) each."""
        dims, theta = self.config.turning
        return of_one_text(given_angles(np.arange(count), dims, theta))

    # ------------------------------------------------------------------------------------------------ training

    def trajectory(
        self,
        tokens: Tensor,
        loops: int | None = None,
        stop: Stop | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """All states (B, T, d) of whole sequences (B, T) from an empty past; arguments and result as of `HasTrajectory`."""
        call = self._of_sequences(tokens)
        x0 = self.encoder(self.embed_tokens(tokens), 0, None, call)[0]

        def iterate(h: Tensor, k: int, active: Tensor | None, held: Tensors | None) -> tuple[Tensor, Tensors]:
            after, rows, _ = self.core(h, k, None, call, active, None if held is None else self._named(held, HELD, ""))
            return after, self._named(rows, "", HELD)

        return trajectory_of(
            iterate,
            self.config.kv_policy,
            x0,
            self.core.rows.nothing(HELD, x0),
            self.config.trained_loops if loops is None else loops,
            gate=self.gate if self.config.gated else None,
            stop=stop,
            every=every,
            watcher=watcher,
        )

    def read_out(self, state: Tensor) -> Tensor:
        """Logits (B, T, V) of states (B, T, d) of a trajectory."""
        return self.lm_head(self.norm(self.decoder(state, 0, None, self._of_sequences(state))[0]))

    def _of_sequences(self, rows: Tensor) -> Call:
        """A call of whole sequences, whose positions are those of `rows` (B, T, ...)."""
        batch, count = rows.shape[:2]
        told = {name: t.to(rows.device) for name, t in self.angles_of(count).items()}
        told["n_valid"] = torch.full((batch,), count, device=rows.device)
        fixed = of_rows(self.stacks, told, count)
        return Call(torch.zeros_like(told["n_valid"]), told["n_valid"], fixed)
