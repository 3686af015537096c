"""Huginn: a prelude of layers, a core block that is applied up to K times, a coda, and a head.

    e = prelude(sqrt(d) embed(tokens))                         two layers
    s = noise, or zeros                                        of its own for every position, at every call
    for k = 1..K:
        s = core(adapter([s ; e]))                             four layers; s is not normed between loops
        stop a position by one of its exit rules
    logits = head(norm(coda(norm(s))))                         two layers; the head's weight is the embedding's

Each layer norms what it reads and what it gives, sums included ("sandwich"). Source: Geiping et al. 2025, Scaling up
Test-Time Compute with Latent Reasoning, arXiv 2502.05171, section 3, and the published `raven_modeling_minimal.py`.

**The start** is drawn from a normal distribution of variance 2/5, truncated at three deviations. The published code draws it anew at
every call from PyTorch's generator. Here it is the project's own seeded noise (rmse_edge/loop/generator.py), which belongs to a
position whatever the calls are, cut off at three deviations; so outputs can be repeated, and are not those of the published
code unless both are given the same start, or `state_init` is "zero".

**Exit rules** that read predictions evaluate the coda and the head in every loop. There the coda of loop k reads, of all
positions, the coda's keys and values of loop k, which are kept per loop like those of the core block; a position that has stopped
supplies those of its last loop. So a text gives the same numbers however it is cut into calls. The coda behind the loop has a
cache of its own. Of the published rules "minp-kl" is not here: it drops tokens of less than a tenth of the largest
probability, so its score jumps where one crosses that line, and engines that are a millionth apart stop at other loops.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.errors import ConfigError
from rmse_edge.layers.rope import rotary_angles
from rmse_edge.layers.stack import context, mask_specs, masks_of
from rmse_edge.loop.contract import Append, InjectedHits, LoopSpec, StateSpec, Tensors, TensorSpec, WholeText
from rmse_edge.loop.generator import starts
from rmse_edge.loop.predictions import carried, carry_after, change_stops, compares, first_carry
from rmse_edge.loop.stop import cosine_stops, delta_stops
from rmse_edge.loop.whole import in_one_call
from rmse_edge.numbers import SEGMENT

from .config import HuginnConfig
from .layers import HuginnModel, kept

START = 0.4**0.5  # standard deviation of the start, before it is truncated
TRUNCATED = 3.0  # deviations


class Huginn(nn.Module):
    """The model, as a `TextModel` for runtimes and exporters."""

    def __init__(self, config: HuginnConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = HuginnModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        self.compares = compares(config.rules)  # whether its rules read predictions
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fan-in scaled normal weights; embeddings that are of size 1 once they are scaled."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
        self.transformer.wte.weight.normal_(std=self.config.n_embd**-0.5)

    # ------------------------------------------------------------------------------------------------ LoopModel

    def call_sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((1, min(SEGMENT, self.config.block_size))))

    def spec(self, chunk: int) -> LoopSpec:
        c, m = self.config, self.transformer
        capacity = c.block_size
        if not 1 <= chunk <= capacity:
            raise ConfigError(f"chunk: got {chunk}, expected 1..block_size ({capacity})")
        vector, where = (1, chunk, c.n_embd), context(chunk, c.head_width, capacity)
        noisy, every = c.state_init == "like-init", c.kv_policy == "all"
        start = (TensorSpec("start", vector),) if noisy else ()
        (coda_state, _), dtype = m.coda.state("coda_", capacity, "coda"), getattr(torch, c.kv_dtype)
        exits = ("exit_keys", "exit_values") if self.compares else ()
        of_coda = m.coda.call(chunk)
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("tokens", (1, chunk), torch.int64), *start, *where),
            prelude=(
                TensorSpec("x0", vector),
                *(TensorSpec("first_state", vector) for _ in start),
                *(TensorSpec(f"prelude_{name}", m.prelude.call(chunk), dtype) for name in ("keys", "values")),
            ),
            context=where,
            state=(
                *m.prelude.state("prelude_", capacity, "prelude"),
                *m.core_block.state("", capacity, "loop"),
                *(StateSpec(f"past_{n}", (c.max_loops, *coda_state.shape), dtype, 1, Append(n)) for n in exits),
                *m.coda.state("coda_", capacity, "coda"),
            ),
            h=TensorSpec("h", vector),
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(
                *m.core_block.carried(chunk, c.n_embd),
                *(() if every else (TensorSpec(f"held_{n}", of_coda) for n in exits)),
                *carried(c.rules, chunk, c.vocab_size),
            ),
            invariants=mask_specs(chunk, capacity),
            emits=(*m.core_block.emits(chunk), *(TensorSpec(f"new_{n}", of_coda) for n in exits)),
            coda=(
                TensorSpec("y", vector),
                *(TensorSpec(f"coda_{name}", of_coda, dtype) for name in ("keys", "values")),
            ),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=(
                *m.core_block.commits(chunk),
                *(TensorSpec(n, (c.max_loops, *of_coda), dtype, batch_axis=1) for n in exits),
            ),
            dials=("max_loops", "min_loops", *c.rules),
            noise={"start": START} if noisy else {},
            ids={"tokens": c.vocab_size},
            examples={"position": [min(40, capacity - chunk)], "n_valid": [max(1, chunk - 3)]},
        )

    def prelude(self, tensors: Tensors) -> Tensors:
        m = self.transformer
        x = m.wte(tensors["tokens"]) * self.config.n_embd**0.5
        past = tensors["past_prelude_keys"], tensors["past_prelude_values"]
        masks = tuple(masks_of(tensors, x.shape[1]).values())
        x, pair = m.prelude(x, 0, tensors["cos"], tensors["sin"], past, masks)
        found = {"x0": x} | kept(m.prelude, pair, "prelude_")
        if "start" in tensors:
            most = TRUNCATED * START
            found["first_state"] = tensors["start"].clamp(-most, most)
        return found

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0, m = tensors["x0"], self.transformer
        count = x0.shape[1]
        start = tensors["first_state"] if self.config.state_init == "like-init" else x0 * 0
        valid = torch.arange(count, device=x0.device) < tensors["n_valid"][:, None]  # (B, C)
        carry = m.core_block.first_carry(start, valid)
        if self.compares and self.config.kv_policy != "all":
            held = m.coda.nothing_held(x0)
            carry |= {"held_exit_keys": held, "held_exit_values": held}
        return carry | first_carry(self.config.rules, x0, self.config.vocab_size), masks_of(tensors, count)

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        m, every = self.transformer, self.config.kv_policy == "all"
        before, runs = m.core_block.entering(carry)
        after, pair = m.core_block.iterate(self._injected(before, fixed["x0"]), k, carry, past, fixed, runs)
        h = torch.where(runs.unsqueeze(-1), after, carry["h"])
        new: Tensors = {}
        emitted = {"new_keys": pair[0], "new_values": pair[1]}
        stop = torch.zeros_like(runs)
        if "exit_epsilon" in dials:
            stop = stop | delta_stops(before, after, dials["exit_epsilon"])
        if "exit_cosine" in dials:
            stop = stop | cosine_stops(before, after, dials["exit_cosine"])
        if self.compares:
            # Rules read the prediction of every loop, which needs the coda. Where every loop runs, so does its coda.
            held = None if every else {name: carry[f"held_exit_{name.removeprefix('held_')}"] for name in HELD}
            y, of_coda = m.coda(
                m.ln_f(after if every else h),
                0,
                fixed["cos"],
                fixed["sin"],
                (past["past_exit_keys"], past["past_exit_values"]),
                (fixed["slots_mask"], fixed["causal_mask"]),
                None if every else runs,
                held,
            )
            of_loop = carry_after(k, carry, self.head(m.ln_f(y))["logits"])
            stop = stop | change_stops(k, carry, of_loop, dials)
            new |= of_loop
            for name, t in zip(("exit_keys", "exit_values"), of_coda):
                emitted[f"new_{name}"] = t
                new |= {} if every else {f"held_{name}": t}
        stop = stop & (k + 1 >= dials["min_loops"])
        return new | m.core_block.next_carry(carry, h, after, runs, stop, pair), emitted

    def coda(self, tensors: Tensors) -> Tensors:
        m, h = self.transformer, tensors["h"]
        past = tensors["past_coda_keys"], tensors["past_coda_values"]
        masks = tuple(masks_of(tensors, h.shape[1]).values())
        y, pair = m.coda(m.ln_f(h), 0, tensors["cos"], tensors["sin"], past, masks)
        return {"y": m.ln_f(y)} | kept(m.coda, pair, "coda_")

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.lm_head(h)}

    def commit(self, tensors: Tensors) -> Tensors:
        m = self.transformer
        h = tensors["h"]  # what a loop is entered with is read by "propagate" alone
        entering = self._injected(h, tensors["x0"]) if m.core_block.policy == "propagate" else h
        found = m.core_block.filled(tensors, entering)
        if self.compares:
            loops = torch.arange(self.config.max_loops, device=h.device)
            last = torch.minimum(loops, tensors["iterations"] - 1)
            for which, name in enumerate(("exit_keys", "exit_values")):
                found[name] = m.coda.cache.to_cache(tensors[f"new_{name}"].index_select(0, last), which)
        return found

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        c, positions = self.config, np.arange(len(tokens))
        angles = rotary_angles(positions, c.head_width, c.rope_base)
        noise = starts(self.spec(1).noise, 0, positions.tolist(), c.n_embd)
        context = dict(zip(("cos", "sin"), angles)) | noise
        return in_one_call(self, tokens, {name: torch.from_numpy(a)[None] for name, a in context.items()}, dials, hits)

    def _injected(self, state: Tensor, x0: Tensor) -> Tensor:
        """What a loop enters the core block with, (B, C, d)."""
        return self.transformer.adapter(torch.cat([state, x0], -1))


HELD = ("held_keys", "held_values")
