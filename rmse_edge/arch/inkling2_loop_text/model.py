"""Inkling 2: layers before the loop, layers that run up to K times, layers behind it, and a head.

    x0 = the blocks before the loop                      its layers of norm(embed(tokens)); each block normed
    h = nothing
    for k = 1..K:
        h = the blocks that the looped layers give from x0, with messages of h in each of them from the second pass on
        stop a position by one of its exit rules
    logits = cap(head(norm(mix(the layers behind the loop, of x0 and h))))

So a pass does not go on from the state of the one before, it begins anew from x0, and h reaches it as messages alone: h has
one normed block for each that a pass adds up, side by side. Layers of a position read its own h and no other's; of other
positions they read keys, values and the inputs of short convolutions, of the same pass. Source: Inkling 2 (Thinking Machines),
as `modeling_inkling2_loop.py` of transformers 5.24.0 computes it, where all passes run always. What stops a position here
needs no training, and none has shown what it costs.

**kv_policy** is "repeat" by itself: passes that a position did not run find of it the keys, values and convolution inputs of
its last. Its messages need no rule, since only the position itself reads them. "all" runs every pass. "propagate" is not
there: what a layer keeps is made of what the layers before it in the same pass have made, not of a state that positions
stop with.

Exit rules that read predictions evaluate the layers behind the loop and the head in every pass. There those layers read of all
positions what they kept in the same pass, as in rmse_edge/arch/common/recurrent_model.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rmse_edge.arch.common.exits import ExitRules
from rmse_edge.errors import ConfigError
from rmse_edge.layers import policy
from rmse_edge.layers.convolution import ShortConvolution
from rmse_edge.layers.experts import SparseExperts, soft_capped
from rmse_edge.layers.norm import RMSNorm, rms
from rmse_edge.layers.relative import RelativeBias
from rmse_edge.layers.residual import BlockAttention
from rmse_edge.layers.router_margins import RouterMargins
from rmse_edge.layers.trajectory import trajectory_of
from rmse_edge.loop.contract import InjectedHits, LoopSpec, Tensors, TensorSpec, WholeText
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.predictions import carried
from rmse_edge.loop.whole import in_one_call
from rmse_edge.numbers import SEGMENT, SLOTS

from .config import InklingConfig
from .layers import InklingLayer, InklingStack, Messages, call_specs, of_call, of_rows

NEW, HELD, EXIT = (
    "new_",
    "held_",
    "exit_",
)  # begin the names of rows: emitted, held by what stopped, of the coda in a loop


class NormedEmbedding(nn.Embedding):
    """Rows of a table, normed."""

    def __init__(self, c: InklingConfig) -> None:
        super().__init__(c.vocab_size, c.hidden_size)
        self.embed_norm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed_norm(super().forward(tokens))


class InklingModel(nn.Module):
    """All but the head, by the names of transformers. `prelude`, `core` and `coda` have the layers as they run."""

    def __init__(self, c: InklingConfig) -> None:
        super().__init__()
        assert c.layer_types is not None
        self.embed_tokens = NormedEmbedding(c)
        layers = [InklingLayer(c, i) for i in range(c.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.final_input = BlockAttention(c.hidden_size)
        start, end = c.loop_layer_index_start, c.loop_layer_index_end
        self.message_input = BlockAttention(end - start, 4, c.hidden_size)
        self.prelude, self.core, self.coda = (
            InklingStack(c, layers[part], c.layer_types[part], c.max_loops if i == 1 else None)
            for i, part in enumerate(c.sections)
        )


class Inkling(ExitRules):
    """The model, as a `TextModel` for runtimes and exporters and as a trajectory of states for training."""

    def __init__(self, config: InklingConfig) -> None:
        super().__init__(config, config.blocks[1] * config.hidden_size)
        self.model = InklingModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.unpadded_vocab_size, bias=False)
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / inputs; queries that mix all blocks alike."""
        self.normal_weights()
        self.model.embed_tokens.weight.normal_(std=self.config.hidden_size**-0.5)
        for module in self.modules():
            if isinstance(module, SparseExperts):
                for weight in (module.gate_up_proj, module.down_proj):
                    weight.normal_(std=weight.shape[-1] ** -0.5)
            elif isinstance(module, RelativeBias):
                module.proj.normal_(std=module.dims**-0.5)
            elif isinstance(module, ShortConvolution):
                module.conv1d.weight.normal_(std=module.size**-0.5)

    # ------------------------------------------------------------------------------------------------ LoopModel

    def call_sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((1, min(SEGMENT, self.config.max_position_embeddings))))

    def spec(self, chunk: int) -> LoopSpec:
        c, m, capacity = self.config, self.model, self.config.max_position_embeddings
        if not 1 <= chunk <= capacity:
            raise ConfigError(f"chunk: got {chunk}, expected 1..{capacity}, the positions of a call")
        width, entered = c.hidden_size, c.blocks[0]
        context = tuple(TensorSpec(name, (1,), torch.int64) for name in ("position", "n_valid"))
        if c.attends_to_all:
            context += (TensorSpec(SLOTS, (capacity,), torch.int64, None, slots_axis=0),)
        exits = m.coda.rows if self.compares else None
        held = m.core.rows.specs(HELD, chunk)
        if exits is not None:
            held += exits.specs(HELD + EXIT, chunk)
        h = TensorSpec("h", (1, chunk, self.width))
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("tokens", (1, chunk), torch.int64), *context),
            prelude=(TensorSpec("x0", (1, chunk, entered * width)), *m.prelude.rows.kept_specs("prelude_", chunk)),
            context=context,
            state=(
                *m.prelude.rows.state("prelude_", capacity, ("prelude",)),
                *m.core.rows.state("", capacity, ("loop",)),
                *(exits.state(EXIT, capacity, ("loop",), c.max_loops) if exits is not None else ()),
                *m.coda.rows.state("coda_", capacity, ("coda",)),
            ),
            h=h,
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(
                *((TensorSpec("log_survival", (1, chunk)),) if c.gated else ()),
                *policy.carried(c.kv_policy, chunk, h.shape[-1], held),
                *carried(c.rules, chunk, c.unpadded_vocab_size),
            ),
            invariants=call_specs(c, chunk),
            emits=(*m.core.rows.specs(NEW, chunk), *(exits.specs(NEW + EXIT, chunk) if exits is not None else ())),
            coda=(TensorSpec("y", (1, chunk, width)), *m.coda.rows.kept_specs("coda_", chunk)),
            head=(TensorSpec("logits", (1, chunk, c.unpadded_vocab_size)),),
            commit=(
                *m.core.rows.kept_specs("", chunk, c.max_loops),
                *(exits.kept_specs(EXIT, chunk, c.max_loops) if exits is not None else ()),
            ),
            dials=("max_loops", "min_loops", *c.rules),
            ids={"tokens": c.unpadded_vocab_size},
            examples={"position": [min(40, capacity - chunk)], "n_valid": [max(1, chunk - 3)]},
        )

    def prelude(self, tensors: Tensors) -> Tensors:
        stack = self.model.prelude
        x = self.model.embed_tokens(tensors["tokens"])
        fixed = of_call(self.config, tensors, x.shape[1])
        sources, rows = stack(x, [rms(x)], 0, past_of(stack, tensors, "prelude_"), fixed)
        return {"x0": torch.cat(sources, -1)} | stack.rows.kept(rows, "", "prelude_")

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        c, x0 = self.config, tensors["x0"]
        count = x0.shape[1]
        valid = torch.arange(count, device=x0.device) < tensors["n_valid"][:, None]  # (B, C)
        held = self.model.core.rows.nothing(HELD, x0)
        if self.compares:
            held |= self.model.coda.rows.nothing(HELD + EXIT, x0)
        h = (x0[..., :1] * 0).repeat(1, 1, self.width)  # computed, as `nothing` is
        carry = policy.first_carry(c.kv_policy, h, valid, held) | self.first_of_rules(x0, c.unpadded_vocab_size)
        return carry, of_call(c, tensors, count)

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        c, core = self.config, self.model.core
        before, runs = policy.entering(c.kv_policy, carry)
        active, held = (None, None) if c.kv_policy == "all" else (runs, named(carry, core, HELD))
        there = (k > 0).to(before.dtype)
        messages = Messages(self._split(before), self.model.message_input, there)
        x0 = self._split(fixed["x0"])
        sources, rows = core(None, x0, k, past_of(core, past), fixed, messages, active, held)
        after = torch.cat(sources[len(x0) :], -1)
        h = torch.where(runs.unsqueeze(-1), after, carry["h"])
        emitted, holding = named(rows, core, "", NEW), named(rows, core, "", HELD)
        logits = None
        if self.compares:
            coda = self.model.coda
            seen = after if active is None else h
            kept = None if active is None else named(carry, coda, HELD + EXIT)
            y, of_coda = self._behind(x0, seen, past_of(coda, past, EXIT), fixed, active, kept)
            logits = self.logits(y)
            emitted |= named(of_coda, coda, "", NEW + EXIT)
            holding |= named(of_coda, coda, "", HELD + EXIT)
        stop, new = self.judged(k, carry, before, after, runs, dials, logits)
        return new | policy.next_carry(c.kv_policy, carry, h, after, runs, stop, holding), emitted

    def coda(self, tensors: Tensors) -> Tensors:
        stack, x0 = self.model.coda, self._split(tensors["x0"])
        fixed = of_call(self.config, tensors, tensors["h"].shape[1])
        y, rows = self._behind(x0, tensors["h"], past_of(stack, tensors, "coda_"), fixed)
        return {"y": y} | stack.rows.kept(rows, "", "coda_")

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.logits(h)}

    def commit(self, tensors: Tensors) -> Tensors:
        """Loops that did not run find what the last one gave; with "all", every loop has run."""
        found: Tensors = {}
        for stack, name in ((self.model.core, ""), *(((self.model.coda, EXIT),) if self.compares else ())):
            given = named(tensors, stack, NEW + name, "")
            rows = {n: policy.of_all_loops(t, tensors["iterations"], self.config.max_loops) for n, t in given.items()}
            found |= stack.rows.kept(rows, "", name, loops=True)
        return found

    # ------------------------------------------------------------------------------------------------ its own parts

    def _split(self, blocks: Tensor) -> list[Tensor]:
        """Blocks side by side, (B, C, n * d) -> n of (B, C, d)."""
        return list(blocks.split(self.config.hidden_size, -1))

    def _behind(
        self,
        x0: list[Tensor],
        h: Tensor,
        past: Tensors | None,
        fixed: Tensors,
        active: Tensor | None = None,
        held: Tensors | None = None,
    ) -> tuple[Tensor, Tensors]:
        """The layers behind the loop: what the head reads, (B, C, d), and the rows of the call by name."""
        sources, rows = self.model.coda(None, [*x0, *self._split(h)], 0, past, fixed, None, active, held)
        return self.model.norm(self.model.final_input(sources)[0]), rows

    def logits(self, y: Tensor) -> Tensor:
        """(B, C, d) -> (B, C, V)."""
        return soft_capped(self.lm_head(y), self.config.final_logit_softcapping)

    # ------------------------------------------------------------------------------------------------ TextModel

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        with RouterMargins(self) as margins:
            found = in_one_call(self, tokens, {}, dials, hits, lambda *_: margins.take(len(tokens)))
            return replace(found, margin=torch.minimum(found.margin, margins.take(len(tokens))))  # of the coda

    # ------------------------------------------------------------------------------------------------------- training

    def trajectory(
        self,
        tokens: Tensor,
        loops: int | None = None,
        stop: Stop | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """All states of whole sequences from an empty past; arguments and result as of `HasTrajectory` and, in detail, of
        `Ouro.trajectory`. A state is x0 and h side by side, (B, T, n), since the layers behind the loop read both; gate and
        `stop` are given h alone.
        """
        m, count = self.model, tokens.shape[1]
        fixed = self._of_sequences(tokens)
        x = m.embed_tokens(tokens)
        x0 = m.prelude(x, [rms(x)], 0, None, fixed)[0]

        def iterate(h: Tensor, k: int, active: Tensor | None, held: Tensors | None) -> tuple[Tensor, Tensors]:
            messages = Messages(self._split(h), m.message_input, torch.ones_like(h[0, 0, 0])) if k else None
            kept = None if held is None else named(held, m.core, HELD)
            sources, rows = m.core(None, x0, k, None, fixed, messages, active, kept)
            return torch.cat(sources[len(x0) :], -1), named(rows, m.core, "", HELD)

        first = x.new_zeros(len(tokens), count, self.width)
        states, gates, depth = trajectory_of(
            iterate,
            self.config.kv_policy,
            first,
            m.core.rows.nothing(HELD, first),
            self.config.trained_loops if loops is None else loops,
            gate=self.gate if self.config.gated else None,
            stop=stop,
            every=every,
            watcher=watcher,
        )
        return [torch.cat([*x0, h], -1) for h in states], gates, depth

    def read_out(self, state: Tensor) -> Tensor:
        """Logits (B, T, V) of states (B, T, n) of a trajectory."""
        x0, h = state[..., : -self.width], state[..., -self.width :]
        return self.logits(self._behind(self._split(x0), h, None, self._of_sequences(state))[0])

    def _of_sequences(self, rows: Tensor) -> Tensors:
        """What layers are told of whole sequences, whose positions are those of `rows` (B, T, ...)."""
        position = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        return of_rows(self.config, {"position": position, "n_valid": position[:1] + rows.shape[1]}, rows.shape[1])


def past_of(stack: InklingStack, tensors: Tensors, prefix: str = "") -> Tensors:
    """What hosts keep for a stack, by the names of its rows."""
    return named(tensors, stack, f"past_{prefix}")


def named(tensors: Tensors, stack: InklingStack, prefix: str, to: str = "") -> Tensors:
    """The rows of a stack by other names: those that began with `prefix` begin with `to`."""
    return {f"{to}{kind.name}": tensors[f"{prefix}{kind.name}"] for kind in stack.rows.kinds}
