"""RMS-E: token embedding, one block applied up to K times, a brake, and a head.

    x0 = embed(tokens) (+ what was retrieved);  h = x0
    for k = 1..K:
        u  = h + inject(x0) + step[k]
        u  = u + norm(attention(norm(u))) + memory(norm(u))
        h' = u + norm(experts(norm(u)))                  # a shared expert and 10 of 512 routed ones
        h  = where(active, h', h)                        # a stopped position keeps its state
        stop a position when an exit rule holds          # rmse_edge/loop/stop.py
    logits = head(norm(h))

**KV rule.** Loop k attends to loop k's own keys and values. A position that stopped at depth d supplies, for every
deeper loop k, K_k, V_k = kv(norm(h_exit + inject(x0) + step[k])): inside a call that is simply what the block computes
from the kept state; for loops the call never ran, `commit` does it in one batched product. Chunked prefill and decode
therefore give the same numbers wherever positions stop.

**Memory rule.** What leaves the window lives on in the neural memory (rmse_edge/layers/memory/base.py): read by every iteration,
written when a segment of 64 positions is complete, from the states its positions stopped with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.errors import ConfigError
from rmse_edge.layers.cache import table_row
from rmse_edge.layers.fixed import is_fixed
from rmse_edge.layers.masks import MASKED, ring_mask
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.layers.rope import rotary_angles
from rmse_edge.loop.contract import InjectedHits, LoopSpec, Ring, StateSpec, Tensors, TensorSpec, WholeText, Written
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.stop import add_log_survival, margins, scores, stops
from rmse_edge.numbers import SEGMENT

from .config import RINGS, RMSEConfig
from .parts import make_attention, make_experts, make_memory, make_retrieval

WHOLE_TEXT_PIECE = 256  # positions of a whole text computed together, where the memory does not say how many

Signatures = dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]  # method -> (inputs, outputs)
Recall = Callable[[Tensor], Tensor]  # normed states (B, C, d) -> what the memory knows about them (B, C, d)


class Block(nn.Module):
    """The block that is looped: attention, then experts, each normed before and after (sandwich, as in Ouro)."""

    def __init__(self, config: RMSEConfig) -> None:
        super().__init__()
        # 2K branches add up to about the size of x0; a token must not drown in few large ones either.
        branch = min(config.max_loops**-0.5, 0.3)
        self.attention_norm = RMSNorm(config.d_model, config.norm_eps)
        self.attention = make_attention(config)
        self.attention_post_norm = RMSNorm(config.d_model, config.norm_eps, init=branch)
        self.experts_norm = RMSNorm(config.d_model, config.norm_eps)
        self.experts = make_experts(config)
        self.experts_post_norm = RMSNorm(config.d_model, config.norm_eps, init=branch)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        u: Tensor,
        k: int | Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor] | None = None,
        active: Tensor | None = None,
        recall: Recall | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One iteration's computation on u (B, C, d).

        Args:
            past: keys and values (B, G, W, hd) of loop k from earlier calls.
            mask: (B or 1, 1, C, S), over past then chunk.
            active: (B, C) bool; h' of the others is not going to be read, their keys and values are. None: all.
            recall: reads the memory for normed states (B, C, d) -> (B, C, d).
        Returns:
            (h' (B, C, d), this chunk's keys and values of loop k, each (B, G, C, hd)).
        """
        x = self.attention_norm(u)
        keys, values = self.attention.keys_values(x, k, cos, sin)
        seen = self.attention.seen(past, (keys, values))
        index = self.computed(active)
        if index is None:
            return self._rest(u, x, k, cos, sin, seen, mask, active, recall), keys, values
        if not index.shape[1]:
            return u, keys, values

        def few(t: Tensor) -> Tensor:  # (B or 1, C, n) -> (B, M, n)
            t = t.expand(len(index), -1, -1)
            return t.gather(1, index.unsqueeze(-1).expand(-1, -1, t.shape[-1]))

        masked, live = few(mask.squeeze(1)).unsqueeze(1), active.gather(1, index)  # type: ignore[union-attr]
        h = self._rest(few(u), few(x), k, few(cos), few(sin), seen, masked, live, recall)
        return u.scatter(1, index.unsqueeze(-1).expand_as(h), h), keys, values

    def computed(self, active: Tensor | None) -> Tensor | None:
        """The positions (B, M) of each sequence that are computed, by `active` (B, C); None: all of them.

        M is the largest number of active positions, so that those of all sequences make one tensor.
        """
        if active is None or self.training or is_fixed() or self.experts.observer is not None:
            return None
        most = int(active.sum(1).max())
        if most == active.shape[1]:
            return None
        return active.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]

    def _rest(
        self,
        u: Tensor,
        x: Tensor,
        k: int | Tensor,
        cos: Tensor,
        sin: Tensor,
        seen: tuple[Tensor, ...],
        mask: Tensor,
        active: Tensor | None,
        recall: Recall | None,
    ) -> Tensor:
        """h' of u (B, C, d) with x = attention_norm(u), attending to `seen` keys and values (B, G, S, hd)."""
        u = u + self.dropout(self.attention_post_norm(self.attention(x, k, cos, sin, *seen, mask)))
        if recall is not None:
            u = u + self.dropout(recall(x))
        return u + self.dropout(self.experts_post_norm(self.experts(self.experts_norm(u), k, active)))


class Hits(NamedTuple):
    """What was retrieved for the segments of a batch of sequences."""

    values: Tensor  # (B, segments, R, d)
    scores: Tensor  # (B, segments, R)
    valid: Tensor  # (B, segments, R) bool
    since: Tensor  # (B, segments) int64: the first position of the segment that sees them

    @classmethod
    def injected(cls, hits: InjectedHits, count: int) -> Hits:
        """`hits` of one text of `count` positions."""
        segments, width = -(-count // SEGMENT), hits.values.shape[-1]
        at = hits.since // SEGMENT
        values = hits.values.new_zeros(1, segments, hits.values.shape[0] * hits.values.shape[1], width)
        found = cls(
            values,
            values[..., 0].clone(),
            torch.zeros_like(values[..., 0], dtype=torch.bool),
            torch.zeros(1, segments, dtype=torch.int64),
        )
        found.values[0, at] = hits.values.reshape(-1, width)
        found.scores[0, at] = hits.scores.repeat_interleave(hits.values.shape[1])
        found.valid[0, at] = True
        found.since[0, at] = hits.since % SEGMENT
        return found

    def of_segment(self, i: int, count: int) -> Tensors:
        """The inputs of prelude for segment i, of `count` positions: each sees the hits from its own row on."""
        row = torch.arange(count, device=self.since.device)
        seen = (row >= self.since[:, i, None])[..., None] & self.valid[:, i, None, :]  # (B, C, R)
        return {"retrieved": self.values[:, i], "retrieved_scores": self.scores[:, i], "retrieved_valid": seen}


class RMSE(nn.Module):
    """The model, as a `TextModel` for runtimes and exporters and as a trajectory of states for training."""

    def __init__(self, config: RMSEConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.inject = nn.Linear(config.d_model, config.d_model, bias=False)
        if config.step_encoding == "learned":
            self.step_encoding = nn.Parameter(torch.zeros(config.max_loops, config.d_model))
        self.block = Block(config)
        self.memory = make_memory(config)
        self.retrieval = make_retrieval(config)
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.gate = nn.Linear(config.d_model, 1)
        self.head_proj = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        if config.tie_embeddings:
            self.head_proj.weight = self.embed.weight
        if not self.embed.weight.is_meta:  # where there is nothing to draw, PyTorch would import its compiler to do it
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fan-in scaled normal weights; random step encodings, so that loops differ from the first update on.

        The injection enters K times and adds up, so it starts at 1/K.
        """
        config = self.config
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=max(module.in_features, 1) ** -0.5)  # no shared expert: zero wide
        self.embed.weight.normal_(std=1.0)
        self.inject.weight.mul_(1 / config.max_loops)
        # The head starts as the embedding, scaled: what a loop or a memory copies can be said at once.
        self.head_proj.weight.copy_(self.embed.weight * (3 / config.d_model))
        self.gate.weight.zero_()
        # A gate that starts at 1/K gives every loop a similar share of the exit distribution.
        self.gate.bias.fill_(-float(np.log(max(config.max_loops - 1, 1))))
        if config.step_encoding == "learned":
            self.step_encoding.normal_(std=0.15)
        experts = self.block.experts
        if experts.tells_loops:
            experts.step_logits.normal_(std=1.0)
        experts.gate_up_proj.normal_(std=config.d_model**-0.5)
        experts.down_proj.normal_(std=config.expert_width**-0.5)
        if self.memory is not None:
            self.memory.reset_parameters()
        if self.retrieval is not None:
            self.retrieval.reset_parameters()
        if config.tie_embeddings:
            self.embed.weight.normal_(std=0.02)

    # ------------------------------------------------------------------------------------------------ LoopModel

    def spec(self, chunk: int) -> LoopSpec:
        c = self.config
        if not 1 <= chunk <= c.window:
            raise ConfigError(f"chunk: got {chunk}, expected 1..window ({c.window})")
        vector = (1, chunk, c.d_model)
        half = c.rotary_dims // 2
        new_kv = (1, c.n_kv_heads, chunk, c.head_dim)
        kv = getattr(torch, c.kv_dtype)
        scalar = ((1,), torch.int64)
        memory = self.memory.specs() if self.memory is not None else ()
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("tokens", (1, chunk), torch.int64), *self._retrieved()),
            prelude=(TensorSpec("x0", vector), TensorSpec("injection", vector)),
            context=(
                TensorSpec("cos", (1, chunk, half)),
                TensorSpec("sin", (1, chunk, half)),
                TensorSpec("position", *scalar),  # of the chunk's first row
                TensorSpec("n_valid", *scalar),  # rows that are not padding
            ),
            state=(
                *(StateSpec(name, c.ring_shape, kv, update=Ring(source)) for name, source in RINGS.items()),
                *(StateSpec(t.name, t.shape, t.dtype, 0, Written("memorize"), per_loop=False) for t in memory),
            ),
            h=TensorSpec("h", vector),
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(TensorSpec("log_survival", (1, chunk)),),
            invariants=(TensorSpec("mask", (1, 1, chunk, c.window + chunk)),),
            emits=(TensorSpec("new_keys", new_kv), TensorSpec("new_values", new_kv)),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=(
                TensorSpec("keys", (c.max_loops, *new_kv), kv, batch_axis=1),
                TensorSpec("values", (c.max_loops, *new_kv), kv, batch_axis=1),
            ),
            extra=self._extra(memory) if chunk == SEGMENT else {},
            dials=("max_loops", "min_loops", "exit_threshold", "exit_epsilon")
            + (("exit_entropy",) if "entropy" in c.exit_rules else ()),
            segment=SEGMENT,
            ids={"tokens": c.vocab_size},
            # A wrapped ring, and a call of many rows over its end.
            examples={"position": [3 * c.window - (chunk + 1) // 2], "n_valid": [max(1, chunk - 3)]},
        )

    def call_sizes(self) -> tuple[int, ...]:
        return (1, SEGMENT)

    def _retrieved(self) -> tuple[TensorSpec, ...]:
        """The hits that the host gives to prelude."""
        rows = self.config.retrieval_hits * self.config.retrieval_slots
        if rows == 0:
            return ()
        return (
            TensorSpec("retrieved", (1, rows, self.config.d_model)),
            TensorSpec("retrieved_scores", (1, rows)),
            TensorSpec("retrieved_valid", (1, rows), torch.bool),
        )

    def _extra(self, memory: tuple[TensorSpec, ...]) -> Signatures:
        """Methods around segments: `blank`, `memorize` and `embed_segment`."""
        c = self.config
        segment = (TensorSpec("segment", (1, SEGMENT, c.d_model)), TensorSpec("n_valid", (1,), torch.int64))
        methods: Signatures = {}
        if memory:
            methods["blank"] = ((), memory)
            learned = (*(TensorSpec(f"next_{t.name}", t.shape) for t in memory), TensorSpec("surprise", (1,)))
            methods["memorize"] = ((*segment, *memory), learned)
        if c.retrieval_slots:
            found = TensorSpec("key", (1, c.retrieval_dim)), TensorSpec("query", (1, c.retrieval_dim))
            methods["embed_segment"] = (segment, (*found, TensorSpec("value", (1, c.retrieval_slots, c.d_model))))
        return methods

    def prelude(self, tensors: Tensors) -> Tensors:
        x0 = self.embed(tensors["tokens"])
        if self.retrieval is not None and "retrieved" in tensors:
            hits = (tensors[name] for name in ("retrieved", "retrieved_scores", "retrieved_valid"))
            x0 = x0 + self.retrieval.inject(x0, *hits)
        x0 = self.dropout(x0)
        return {"x0": x0, "injection": self.inject(x0)}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0, position, n_valid = tensors["x0"], tensors["position"], tensors["n_valid"]
        row = torch.arange(x0.shape[1], device=x0.device)
        valid = row < n_valid[:, None]  # (B, C)
        carry = {"h": x0, "active": valid, "log_survival": torch.zeros_like(x0[..., 0], dtype=torch.float32)}
        return carry, {"mask": ring_mask(position, n_valid, x0.shape[1], self.config.window)}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        before, active = carry["h"], carry["active"]
        from_cache = self.block.attention.from_cache
        ring = (from_cache(past["past_keys"], 0, k, before.dtype), from_cache(past["past_values"], 1, k, before.dtype))
        u = self.enter(before, fixed["injection"], k)
        after, keys, values = self.block(
            u, k, fixed["cos"], fixed["sin"], fixed["mask"], ring, active, self.recall(fixed)
        )
        normed = self.norm(after)
        log_survival = add_log_survival(carry["log_survival"], self.gate(normed).squeeze(-1), active)
        logits = self.head_proj(normed) if "entropy" in self.config.exit_rules else None
        new = {
            "h": torch.where(active.unsqueeze(-1), after, before),
            "active": active & ~stops(k, before, after, log_survival, dials, logits),
            "log_survival": log_survival,
        }
        return new, {"new_keys": keys, "new_values": values}

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.head_proj(self.norm(h))}

    def commit(self, tensors: Tensors) -> Tensors:
        keys, values = self.propagate(tensors["h"], tensors["injection"], tensors["cos"], tensors["sin"])
        loops = torch.arange(self.config.max_loops, device=keys.device)
        ran = (loops < tensors["iterations"]).view(-1, 1, 1, 1, 1)
        attention = self.block.attention
        return {
            "keys": attention.to_cache(torch.where(ran, tensors["new_keys"], keys), 0),
            "values": attention.to_cache(torch.where(ran, tensors["new_values"], values), 1),
        }

    def blank(self, tensors: Tensors) -> Tensors:
        """The memory of a sequence that has not begun."""
        assert self.memory is not None
        return {name: tensor.clone() for name, tensor in self.memory.initial(1).items()}

    def embed_segment(self, tensors: Tensors) -> Tensors:
        """`segment` (B, 64, d) and `n_valid` (B,) -> key and query (B, retrieval_dim), value (B, slots, d)."""
        assert self.retrieval is not None
        key, query, value = self.retrieval.embed(self.norm(tensors["segment"]), tensors["n_valid"])
        return {"key": key, "query": query, "value": value}

    def memorize(self, tensors: Tensors) -> Tensors:
        """Teach the memory a segment: `segment` (B, 64, d), the states its positions stopped with.

        With `n_valid` (B,) below 64 only `surprise` (B,) means anything: the memory's loss on what there is so far.
        """
        assert self.memory is not None
        new, surprise = self.memory.write(self.norm(tensors["segment"]), tensors["n_valid"], tensors)
        return {f"next_{name}": tensor for name, tensor in new.items()} | {"surprise": surprise}

    # ------------------------------------------------------------------------------------------------ pieces

    def recall(self, state: Tensors) -> Recall | None:
        """Reads the memory whose tensors are among `state`; None for a model without one."""
        memory = self.memory
        return None if memory is None else lambda x: memory.read(x, state)

    def enter(self, h: Tensor, injection: Tensor, k: int | Tensor) -> Tensor:
        """u = h + inject(x0) + step[k], (B, C, d)."""
        u = h + injection
        return u + table_row(self.step_encoding, k) if self.config.step_encoding == "learned" else u

    def propagate(self, h: Tensor, injection: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values that final states h (B, C, d) supply to every loop: each (K, B, G, C, hd)."""
        loops, attention = self.config.max_loops, self.block.attention
        u = (h + injection).unsqueeze(0)  # (1, B, C, d)
        if self.config.step_encoding == "learned":
            u = u + self.step_encoding.view(loops, 1, 1, -1)
        x = self.block.attention_norm(u.expand(loops, *h.shape)).flatten(0, 1)  # (K * B, C, d)
        keys, values = attention.keys_values(x, None, cos, sin)
        return keys.unflatten(0, (loops, -1)), values.unflatten(0, (loops, -1))

    # ------------------------------------------------------------------------------------------------ whole texts

    @torch.no_grad()
    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        """See `TextModel`: `trajectory`, told where to stop, and watched."""
        loops, experts, own = int(dials["max_loops"]), self.block.experts, self.spec(1).dials
        ends: list[Tensor] = []
        surprises: list[Tensor] = []
        found: list[Tensors] = []  # of every iteration of every piece of the text
        routed: list[Tensor] = []

        def stop(k: int, before: Tensor, after: Tensor, log_survival: Tensor) -> Tensor:
            logits = self.head(after)["logits"] if "entropy" in self.config.exit_rules else None
            every = scores(before, after, log_survival, logits)
            found.append({name: score for name, score in every.items() if name in own})
            if k + 1 == loops:
                ends.append(after)
            return stops(k, before, after, log_survival, dials, logits)

        observer, experts.observer = experts.observer, lambda k, routing: routed.append(experts.margin(routing))
        try:
            given = None if hits is None else Hits.injected(hits, len(tokens))
            states, _, depth = self.trajectory(
                tokens[None], loops, stop, hits=given, surprises=surprises, together=WHOLE_TEXT_PIECE
            )
        finally:
            experts.observer = observer
        of_loops = {
            name: torch.stack([torch.cat([f[name] for f in found[k::loops]], 1)[0] for k in range(loops)])
            for name in found[0]
        }
        margin = torch.stack([torch.cat(routed[k::loops]) for k in range(loops)]).double()  # (K, T)
        margin = torch.minimum(margin, margins(of_loops, dials))
        running = torch.arange(loops)[:, None] < depth
        return WholeText(
            self.head_proj(states[-1])[0],
            depth[0],
            torch.cat(ends, 1)[0],
            torch.cat([*surprises, tokens.new_zeros(0, dtype=torch.float32)]),
            of_loops,
            margin.masked_fill(~running, torch.inf).amin(0),
        )

    # ------------------------------------------------------------------------------------------------ training

    def trajectory(
        self,
        tokens: Tensor,
        loops: int | None = None,
        stop: Stop | None = None,
        stopped_kv: str = "propagate",
        remember: bool = True,
        hits: Hits | None = None,
        surprises: list[Tensor] | None = None,
        together: int | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """All states of a whole sequence from an empty past, every iteration computed that somebody reads.

        A model with a memory goes through it segment by segment, each read by what the ones before it wrote; gradients
        flow through the writes.

        Args:
            tokens: (B, T) int64, T positions from 0 on.
            loops: iterations, at most the trained depth (default).
            stop: called as stop(k, before, after, log_survival (B, C)) after iteration k (0-based) of C of the positions
                and returns which of them to stop, (B, C) bool; stopped positions keep their state, so that deeper loops
                see the keys and values that the deployed KV rule gives them.
            stopped_kv: "propagate", the rule of this project, or "frozen": a stopped position repeats the keys and
                values of its last iteration. Kept so that the comparison can be run again.
            remember: False leaves the memory blank.
            hits: what was retrieved for each segment; None: nothing.
            surprises: a list to which the memory's surprise (B,) at every whole segment is added.
            together: positions computed at once by a model without a memory, all by default: attention scores take
                the square of that. With a memory it is always a segment.
            every: False keeps the states after the last iteration only.
            watcher: is told of every iteration before it is computed.
        Returns:
            (normed states after each iteration [(B, T, d)] * loops, or one without `every`; gate logits (loops, B, T), depth
            (B, T)).
        """
        batch, count = tokens.shape
        loops = self.config.max_loops if loops is None else loops
        length = (together or count) if self.memory is None else SEGMENT
        memory = {} if self.memory is None else self.memory.initial(batch)
        past: list[tuple[Tensor, Tensor] | None] = [None] * loops
        parts = []
        for i, start in enumerate(range(0, count, length)):
            part = tokens[:, start : start + length]
            found = {} if hits is None else hits.of_segment(i, part.shape[1])
            piece = self._segment(part, start, past, memory, found, stop, stopped_kv, every, watcher)
            parts.append(piece)
            whole = start + length < count or (surprises is not None and start + length == count)
            if self.memory is not None and remember and whole:
                full = torch.full((batch,), length, device=tokens.device)
                memory, surprise = self.memory.write(piece[0][-1], full, memory)
                if surprises is not None:
                    surprises.append(surprise)
        states, gates, depths = zip(*parts)
        return [torch.cat(of_loop, 1) for of_loop in zip(*states)], torch.cat(gates, 2), torch.cat(depths, 1)

    def read_out(self, state: Tensor) -> Tensor:
        """Logits (..., V) of states (..., d) of a trajectory."""
        return self.head_proj(state)

    def _segment(
        self,
        tokens: Tensor,
        start: int,
        past: list[tuple[Tensor, Tensor] | None],
        memory: Tensors,
        retrieved: Tensors,
        stop: Stop | None,
        stopped_kv: str,
        every: bool,
        watcher: Watcher | None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Positions `start` to `start + C` of `trajectory`; `past`, each loop's keys and values before them, moves on."""
        window, count = self.config.window, tokens.shape[1]
        row = torch.arange(start, start + count, device=tokens.device)
        angles = rotary_angles(row.cpu().numpy(), self.config.rotary_dims, self.config.rope_theta)
        cos, sin = (torch.from_numpy(a).to(tokens.device)[None] for a in angles)
        distance = row[:, None] - torch.arange(start - min(start, window), start + count, device=tokens.device)
        mask = torch.where((distance >= 0) & (distance < window), 0.0, MASKED)[None, None]
        if watcher is not None:
            watcher.begins(torch.ones_like(tokens, dtype=torch.bool))
        prelude = self.prelude({"tokens": tokens} | retrieved)
        h, injection = prelude["x0"], prelude["injection"]
        active = torch.ones_like(tokens, dtype=torch.bool)
        depth = torch.zeros_like(tokens)
        log_survival = torch.zeros(tokens.shape, device=tokens.device)
        states: list[Tensor] = []
        gates = []
        frozen: tuple[Tensor, Tensor] | None = None
        recall = self.recall(memory)
        for k in range(len(past)):
            u = self.enter(h, injection, k)
            running = None if stop is None else active
            if watcher is not None:
                watcher.iterates(active, log_survival, self.block.computed(running), k)
            if stopped_kv == "frozen":
                after, frozen = self._frozen_iteration(u, k, cos, sin, mask, past[k], active, frozen, recall)
                keys, values = frozen
            else:
                after, keys, values = self.block(u, k, cos, sin, mask, past[k], running, recall)
            if past[k] is not None:
                keys, values = (torch.cat([p, n], 2) for p, n in zip(past[k], (keys, values)))  # type: ignore[arg-type]
            past[k] = (keys[:, :, -window:], values[:, :, -window:])
            normed = self.norm(torch.where(active.unsqueeze(-1), after, h))
            gate = self.gate(normed).float().squeeze(-1)
            log_survival = add_log_survival(log_survival, gate, active)
            states = [*states, normed] if every else [normed]
            gates.append(gate)
            depth = depth + active
            before, h = h, torch.where(active.unsqueeze(-1), after, h)
            if stop is not None:
                active = active & ~stop(k, before, h, log_survival)
        if watcher is not None:
            watcher.ends()
        return states, torch.stack(gates), depth

    def _frozen_iteration(
        self,
        u: Tensor,
        k: int,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        past: tuple[Tensor, Tensor] | None,
        active: Tensor,
        kept: tuple[Tensor, Tensor] | None,
        recall: Recall | None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The ablated rule: as the block, but stopped positions are read through the K and V they had last."""
        block = self.block
        x = block.attention_norm(u)
        keys, values = block.attention.keys_values(x, k, cos, sin)
        if kept is not None:
            keys, values = (torch.where(active[:, None, :, None], n, o) for n, o in zip((keys, values), kept))
        seen = (keys, values) if past is None else tuple(torch.cat([p, n], 2) for p, n in zip(past, (keys, values)))
        u = u + block.attention_post_norm(block.attention(x, k, cos, sin, *seen, mask))
        if recall is not None:
            u = u + recall(x)
        return u + block.experts_post_norm(block.experts(block.experts_norm(u), k)), (keys, values)
