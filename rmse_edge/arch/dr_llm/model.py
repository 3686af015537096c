"""Dr.LLM: a dense model whose layers have weights of their own, and a router before each that reads the prompt.

    h = embed(tokens)
    for each layer:
        once per text:  p = mean over windows of the prompt (router(mean of h over the window));  n = argmax of 0, 1, 2
        n times:        h = h + attention(norm(h));  h = h + mlp(norm(h))
    logits = head(norm(h))

    router(x) = W2 gelu(W1 x + b1) + b2, gelu by tanh

The loop is a planned one (rmse_edge/loop/plan.py): an iteration is one execution of one layer, with keys and values of its own. The
model is a Llama (`LlamaForCausalLM` of transformers), all of which stays as it was trained; the routers are added.

Source: Heakl et al. 2025, Dr.LLM, arXiv 2510.12773, section 3, and `models/modeling_llama.py` of parameterlab/dr-llm 14e8837.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.errors import ConfigError
from rmse_edge.layers.cache import KeptKeysValues
from rmse_edge.layers.dense import FullAttention, GatedMLP, Pair, gelu, normal_by_fan_in
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.layers.rope import given_angles
from rmse_edge.layers.routers import chances, lead, windows
from rmse_edge.layers.stack import context, mask_specs, masks_of
from rmse_edge.layers.trajectory import of_one_text, whole_masks
from rmse_edge.loop.contract import Append, InjectedHits, LoopSpec, Replace, StateSpec, Tensors, TensorSpec, WholeText
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.plan import PLAN, times
from rmse_edge.loop.reading import TrajectoryReader
from rmse_edge.numbers import PROMPT

from .config import ONCE, DrLlmConfig


class Router(nn.Module):
    """Linear, gelu by tanh, linear: (..., d) -> (..., 3)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(gelu(self.linear1(x)))


class DrLlmLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: DrLlmConfig) -> None:
        super().__init__()
        self.self_attn = FullAttention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_width)
        self.mlp = GatedMLP(c.hidden_size, c.intermediate_size)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.dropout = nn.Dropout(c.dropout)

    def forward(
        self, x: Tensor, k: int | Tensor, cache: KeptKeysValues, fixed: Tensors, past: Pair | None
    ) -> tuple[Tensor, Pair]:
        """One execution.

        Args:
            x: (B, C, d).
            k: which execution of the text it is, from 0.
            fixed: angles and masks.
            past: keys and values of this execution in slots, (B, G, S, hd) each; None: there is nothing before.
        Returns:
            (the stream behind the layer, keys and values of the call, (B, G, C, hd) each, as the cache can hold them).
        """
        entered = self.input_layernorm(x)
        pair = self.self_attn.keys_values(entered, fixed["cos"], fixed["sin"])
        own = (cache.rounded(pair[0], 0, k), cache.rounded(pair[1], 1, k))
        masks = fixed["slots_mask"], fixed["causal_mask"]
        x = x + self.dropout(self.self_attn(entered, fixed["cos"], fixed["sin"], own, past, masks))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x))), own


class DrLlmModel(nn.Module):
    """All but the head, by the names of published checkpoints."""

    def __init__(self, c: DrLlmConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(DrLlmLayer(c) for _ in range(c.num_hidden_layers))
        self.routers = nn.ModuleList(Router(c.hidden_size, c.router_hidden) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.cache = KeptKeysValues(c.kv_dtype, c.max_loops, c.num_key_value_heads)


class LayerReader(TrajectoryReader):
    """Reads texts with every layer run once; a state is that behind a layer, and the head reads it behind the last norm."""

    def logits(self, state: Tensor) -> Tensor:
        return self.head(self.read_by_head(state))

    def read_by_head(self, state: Tensor) -> Tensor:
        return self.model.model.norm(state)


class DrLlm(nn.Module):
    """The model, as a `TextModel` with layers for runtimes and exporters, and of whole sequences for training."""

    def __init__(self, config: DrLlmConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DrLlmModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fan-in scaled normal weights, branches that add up to about the size of the stream they go into, and routers that
        run every layer once.
        """
        normal_by_fan_in(self)
        c = self.config
        self.model.embed_tokens.weight.normal_(std=c.hidden_size**-0.5 if c.tie_word_embeddings else 1.0)
        if not c.tie_word_embeddings:
            self.lm_head.weight.normal_(std=0.5 * c.hidden_size**-0.5)
        for layer in self.model.layers:
            assert isinstance(layer, DrLlmLayer)
            for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
                last.weight.mul_((2 * c.num_hidden_layers) ** -0.5)
        self.reset_routers()

    @torch.no_grad()
    def reset_routers(self) -> None:
        """Routers as they are before they are trained: whatever the prompt, a layer is run once."""
        for router in self.model.routers:
            assert isinstance(router, Router)
            router.linear1.weight.normal_(std=router.linear1.in_features**-0.5)
            router.linear1.bias.zero_()
            router.linear2.weight.zero_()
            router.linear2.bias.copy_(torch.tensor(ONCE))

    # ------------------------------------------------------------------------------------------------ LoopModel

    def call_sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((1, self.config.prompt)))

    def spec(self, chunk: int) -> LoopSpec:
        c, capacity = self.config, self.config.max_position_embeddings
        if not 1 <= chunk <= capacity:
            raise ConfigError(f"chunk: got {chunk}, expected 1..max_position_embeddings ({capacity})")
        vector, kept = TensorSpec("h", (1, chunk, c.hidden_size)), getattr(torch, c.kv_dtype)
        pair = (1, c.num_key_value_heads, chunk, c.head_width)
        slots = (c.max_loops, 1, c.num_key_value_heads, capacity, c.head_width)
        prompt, route = TensorSpec(PROMPT, (1,), torch.int64), TensorSpec("route", ())
        # Of examples: every layer once, and the first twice.
        example = np.zeros(c.max_loops, np.int64)
        example[: c.num_hidden_layers + 1] = [1, *range(1, c.num_hidden_layers + 1)]
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("tokens", (1, chunk), torch.int64),),
            prelude=(TensorSpec("x0", vector.shape),),
            context=(*context(chunk, c.head_width, capacity), prompt),
            state=(
                *(StateSpec(f"past_{name}", slots, kept, update=Append(name)) for name in ("keys", "values")),
                StateSpec(
                    PLAN, (c.max_loops,), torch.int64, None, Replace("plan"), ("commit",), per_loop=False
                ),
            ),
            h=vector,
            active=TensorSpec("active", (1, chunk), torch.bool),
            invariants=mask_specs(chunk, capacity),
            emits=(
                TensorSpec("new_keys", pair), TensorSpec("new_values", pair), TensorSpec("layer", (1,), torch.int64, None),
            ),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=(
                *(TensorSpec(name, (c.max_loops, *pair), kept, 1) for name in ("keys", "values")),
                TensorSpec("plan", (c.max_loops,), torch.int64, None),
            ),
            extra={"decide": ((vector, prompt, route), (TensorSpec("chances", (1, c.num_hidden_layers, 3)),))},
            dials=("max_loops", "route"),
            layers=c.num_hidden_layers,
            ids={"tokens": c.vocab_size},
            examples={
                "position": [min(40, capacity - chunk)], "n_valid": [max(1, chunk - 3)], PROMPT: [max(1, chunk - 3)],
                PLAN: example,
            },
        )  # fmt: skip

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x0": self.model.embed_tokens(tensors["tokens"])}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0 = tensors["x0"]
        count = x0.shape[1]
        valid = torch.arange(count, device=x0.device) < tensors["n_valid"][:, None]  # (B, C)
        return {"h": x0, "active": valid}, masks_of(tensors, count)

    def layer(
        self, index: int, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors
    ) -> tuple[Tensors, Tensors]:
        """As `step`, of one layer."""
        model = self.model
        pair = tuple(
            model.cache.from_cache(past[f"past_{n}"], i, k, carry["h"].dtype) for i, n in enumerate(("keys", "values"))
        )
        x, own = model.layers[index](carry["h"], k, model.cache, fixed, pair)
        executed = torch.full((1,), index + 1, dtype=torch.int64, device=x.device)
        return {"h": x, "active": carry["active"].clone()}, {
            "new_keys": own[0],
            "new_values": own[1],
            "layer": executed,
        }

    def decide(self, tensors: Tensors) -> Tensors:
        """h (B, C, d), of whose rows `prompt` are read, and the dial -> chances (B, L, 3) by the router of each layer."""
        means, share = windows(tensors["h"], tensors[PROMPT], self.config.num_windows)
        found = [
            chances((router(means) * share.unsqueeze(-1)).sum(1), tensors["route"]) for router in self.model.routers
        ]
        return {"chances": torch.stack(found, 1)}

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.lm_head(self.model.norm(h))}

    def commit(self, tensors: Tensors) -> Tensors:
        loops = torch.arange(self.config.max_loops, device=tensors["h"].device)
        ran = loops < tensors["iterations"]
        new = (torch.where(ran.view(-1, 1, 1, 1, 1), tensors[name], 0.0) for name in ("new_keys", "new_values"))
        kept = {n: self.model.cache.to_cache(t, i) for i, (n, t) in enumerate(zip(("keys", "values"), new))}
        made = torch.where(ran, tensors["layer"].squeeze(-1), 0)
        return kept | {"plan": torch.where(tensors["position"] == 0, made, tensors[PLAN])}

    # ------------------------------------------------------------------------------------------------ whole sequences

    @torch.no_grad()
    def whole_text(
        self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None, prompt: int = 0
    ) -> WholeText:
        """As of `TextModel`; the routers read the first `prompt` tokens, 0: all, as far as one call takes them."""
        assert hits is None, "the model looks nothing up"
        read = prompt or min(len(tokens), self.config.prompt)
        x = self.prelude({"tokens": tokens[None]})["x0"]
        fixed = self.angles_of(len(tokens)) | whole_masks(len(tokens), x.device)
        k, margin = 0, torch.full((), torch.inf, dtype=torch.float64)
        for index, layer in enumerate(self.model.layers):
            found = chances(self.router_logits(index, x[:, :read]), dials["route"])
            margin = torch.minimum(margin, lead(found)[0].double())
            for _ in range(min(times(found[0]), int(dials["max_loops"]) - k)):
                x, _ = layer(x, k, self.model.cache, fixed, None)
                k += 1
        count = len(tokens)
        depth = torch.full((count,), k)
        return WholeText(self.head(x)["logits"][0], depth, x[0], torch.zeros(0), {}, margin.expand(count))

    def router_logits(self, index: int, prompt: Tensor) -> Tensor:
        """What a layer's router says of a prompt's states (B, T, d): (B, 3)."""
        return self.model.routers[index](self.window_means(prompt)).mean(1)

    def window_means(self, prompt: Tensor) -> Tensor:
        """What a router reads of a prompt's states (B, T, d): means of at most `num_windows` windows, (B, W, d)."""
        count = min(self.config.num_windows, prompt.shape[1])
        return prompt[:, : prompt.shape[1] // count * count].unflatten(1, (count, -1)).mean(2)

    def angles_of(self, count: int) -> Tensors:
        """Of the first `count` positions of a text, (1, count, hd/2) each."""
        return of_one_text(given_angles(np.arange(count), self.config.head_width, self.config.rope_theta))

    def fixed_of(self, count: int, device: torch.device) -> Tensors:
        """Angles and masks of whole sequences of `count` positions."""
        angles = {name: t.to(device) for name, t in self.angles_of(count).items()}
        return angles | whole_masks(count, device)

    def run_layer(self, index: int, x: Tensor, fixed: Tensors) -> Tensor:
        """One execution of a layer over whole sequences (B, T, d), as `fixed_of` has their positions."""
        return self.model.layers[index](x, 0, self.model.cache, fixed, None)[0]

    def trajectory(
        self,
        tokens: Tensor,
        loops: int | None = None,
        stop: Stop | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """States (B, T, d) behind each of the first `loops` layers, each run once: how the model under the routers is trained.

        As `HasTrajectory.trajectory`; there is no exit gate, and no position stops.
        """
        assert stop is None and watcher is None, "positions do not stop by themselves"
        count = loops or self.config.num_hidden_layers
        x, fixed = self.prelude({"tokens": tokens})["x0"], self.fixed_of(tokens.shape[1], tokens.device)
        states: list[Tensor] = []
        for index in range(count):
            x = self.run_layer(index, x, fixed)
            states = [*states, x] if every else [x]
        gates = torch.full((count, *tokens.shape), -torch.inf, device=tokens.device)
        return states, gates, torch.full(tokens.shape, count, device=tokens.device)

    def read_out(self, state: Tensor) -> Tensor:
        """Logits (B, T, V) of states (B, T, d) of a trajectory."""
        return self.head(state)["logits"]
