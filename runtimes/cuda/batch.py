"""Many texts at once on one model, each at its own position; those that have stopped leave the batch between iterations.

A row is out of the loop when all of its positions have stopped. Out of date rows cost what the others cost, so the batch is
made smaller: whenever no more than half of its rows go on, those are gathered, and every later iteration is of so many. So a
batch of B rows is gathered log2(B) times at most, and a call costs what the deepest half, quarter, ... of its rows costs.
From then on, too, the row of the past that an iteration reads is gathered.

`commit` is told the number of iterations of its call. Rows that left early ran fewer, so it is called once for each number.

These calls are not recorded: their sizes follow what the tensors hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmse_edge.arch.common.kept_batch import KeptBatch, call_context
from rmse_edge.errors import UserError
from rmse_edge.info import ModelInfo
from rmse_edge.loop.contract import LoopModel, LoopSpec, Tensors, TensorSpec
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.drive import depth_after, empty_stacks
from rmse_edge.runtimes.host.base import Fed


def of_rows(specs: Sequence[TensorSpec], tensors: Tensors, rows: Tensor) -> Tensors:
    """Some rows of those tensors that have a batch; the others as they are."""
    axes = {t.name: t.batch_axis for t in specs if t.shape}
    found = {}
    for name, tensor in tensors.items():
        axis = axes.get(name)
        found[name] = tensor if axis is None else tensor.index_select(axis, rows)
    return found


def compacting_loop(model: LoopModel, spec: LoopSpec, tensors: Tensors, dials: Tensors, max_loops: int) -> Tensors:
    """`run_loop` of a batch that gets smaller.

    Returns:
        h, depth, every emit stacked, and iterations (B,): of each row those that it was computed in.
    """
    first, invariants = model.begin(tensors)
    carry = first | {"depth": torch.zeros_like(first["active"], dtype=torch.int64)}
    assert spec.h.batch_axis == 0 and spec.active.batch_axis == 0
    batch, device = len(carry["h"]), carry["h"].device
    final = {name: carry[name].clone() for name in ("h", "depth")}
    emits = empty_stacks(spec, carry["h"])
    iterations = torch.zeros(batch, dtype=torch.int64, device=device)
    read = (*spec.prelude, *spec.inputs, *spec.context, *spec.whole)
    names = {t.name for t in read}
    given = {name: t for name, t in tensors.items() if name in names}
    rows = torch.arange(batch, device=device)
    loops = torch.arange(spec.max_loops, device=device)
    for k in range(max_loops):
        alive = carry["active"].flatten(1).any(1)
        going = int(alive.sum())
        if going == 0:
            break
        if 2 * going <= len(rows):
            chosen = alive.nonzero().squeeze(1)
            carry, given = of_rows(spec.carried, carry, chosen), of_rows(read, given, chosen)
            invariants = model.begin(given)[1]  # made anew: some of them count the rows of their batch
            rows = rows.index_select(0, chosen)
        past = {t.name: tensors[t.name][k] for t in spec.rows}
        if len(rows) < batch:
            past = of_rows([t.row for t in spec.rows], past, rows)
        new, emitted = model.step(loops[k], carry, past, given | invariants, dials)
        new["depth"] = depth_after(carry, new)
        carry = new
        for name in final:
            final[name].index_copy_(0, rows, carry[name])
        for t in spec.emits:
            if t.batch_axis is None:
                emits[t.name][k] = emitted[t.name]
            else:
                emits[t.name][k].index_copy_(t.batch_axis, rows, emitted[t.name])
        iterations.index_fill_(0, rows, k + 1)
    return final | emits | {"iterations": iterations}


def commit_rows(model: LoopModel, spec: LoopSpec, tensors: Tensors) -> Tensors:
    """`commit` of rows with different numbers of iterations: `iterations` among the tensors is (B,).

    Of rows without any, which were given no token, nothing is asked; what stands there for them means nothing.
    """
    stacked = [
        TensorSpec(t.name, (spec.max_loops, *t.shape), t.dtype, None if t.batch_axis is None else t.batch_axis + 1)
        for t in spec.emits
    ]
    depth = next(t for t in spec.carried if t.name == "depth")
    known = (*spec.inputs, *spec.prelude, *spec.context, *spec.state, spec.h, depth, *stacked, *spec.coda)
    names = {t.name for t in known}
    given = {name: t for name, t in tensors.items() if name in names}
    iterations, batch = tensors["iterations"], len(tensors["iterations"])
    found: Tensors = {}
    for count in iterations[iterations > 0].unique():
        rows = (iterations == count).nonzero().squeeze(1)
        some = model.commit(of_rows(known, given, rows) | {"iterations": count})
        for t in spec.commit:
            if t.batch_axis is None:
                found[t.name] = some[t.name]
                continue
            if t.name not in found:
                found[t.name] = some[t.name].new_zeros(t.of_batch(batch))
            found[t.name].index_copy_(t.batch_axis, rows, some[t.name])
    return found


class TextBatch:
    """Texts side by side, each going on where it was."""

    def __init__(self, model: Any, info: ModelInfo, rows: int, device: str = "cuda", seed: int = 0) -> None:
        """
        Args:
            model: on the device.
            rows: texts.
            seed: of the noise that some models begin from.
        """
        if info.plan is not None:
            raise UserError(f"{info.name}: each of its texts has a plan of its own; feed them one by one")
        self.model, self.info, self.rows, self.seed = model, info, rows, seed
        self.device = torch.device(device)
        self.kept = KeptBatch()
        self.reset()

    @torch.inference_mode()
    def reset(self) -> None:
        """Forget all texts."""
        self.kept.forget()
        self.kept.allocate(self.model, self.model.spec(self.model.call_sizes()[0]), self.rows, self.device)

    @torch.inference_mode()
    def feed(self, texts: Sequence[Sequence[int] | np.ndarray], dials: Dials) -> list[Fed]:
        """Continue every text by some tokens, or by none.

        Returns:
            Of each text the logits behind its last token, (1, V), or (0, V) where it was given none; depths; iterations of
            its row and rows of each call it was in.
        Raises:
            UserError: another number of texts than rows, a token outside of the vocabulary, or no room for more.
        """
        if len(texts) != self.rows:
            raise UserError(
                f"texts: got {len(texts)}, expected {self.rows}, one of each row; an empty one changes nothing"
            )
        ids = [np.asarray(text, np.int64) for text in texts]
        for text in ids:
            if len(text) and not 0 <= text.min() <= text.max() < self.info.vocab_size:
                raise UserError(f"a token is outside the vocabulary (0..{self.info.vocab_size - 1})")
        self.info.check(dials)
        total = np.array([len(text) for text in ids])
        self.kept.require_room(self.model.spec(self.model.call_sizes()[0]), total)
        fed = [Fed(np.zeros((0, self.info.vocab_size), np.float32), np.zeros(0, np.int64), [], []) for _ in ids]
        done = np.zeros_like(total)
        while (done < total).any():
            self._call(ids, total, done, dials, fed)
        return fed

    def _call(self, ids: list[np.ndarray], total: np.ndarray, done: np.ndarray, dials: Dials, fed: list[Fed]) -> None:
        """One call of every row's next tokens, no more than the largest has and none beyond its segment."""
        model, sizes = self.model, self.model.call_sizes()
        count = np.minimum(total - done, sizes[-1])
        segment = self.info.segment
        if segment is not None:
            count = np.minimum(count, segment - self.kept.position % segment)
        spec = model.spec(min(size for size in sizes if size >= count.max()))
        tokens = np.zeros((self.rows, spec.chunk), np.int64)
        for row, text in enumerate(ids):
            tokens[row, : count[row]] = text[done[row] : done[row] + count[row]]
        scalars = {
            name: torch.from_numpy(a).to(self.device) for name, a in dials.arrays().items() if name in spec.dials
        }
        tensors = {"tokens": torch.from_numpy(tokens).to(self.device)} | self.kept.tensors()
        prefix = np.zeros(self.rows, np.int64)
        tensors |= call_context(spec, self.info.language, self.kept.position, count, self.seed, self.device, prefix)
        tensors |= model.prelude(tensors)
        tensors |= compacting_loop(model, spec, tensors, scalars, dials.max_loops)
        if spec.coda:
            tensors |= model.coda(tensors)
        if spec.commit:
            tensors |= commit_rows(model, spec, tensors)
        self.kept.commit(model, spec, tensors, count)
        last = torch.from_numpy(np.maximum(count, 1) - 1).to(self.device)
        y = tensors[spec.final.name]
        final = y.gather(1, last[:, None, None].expand(-1, 1, y.shape[-1]))  # head sees one position of each row
        logits = model.head(final)["logits"].cpu().numpy()
        depth, iterations = tensors["depth"].cpu().numpy(), tensors["iterations"].cpu().numpy()
        for row in map(int, np.nonzero(count)[0]):
            n, before = count[row], fed[row]
            fed[row] = Fed(
                logits[row].copy(),
                np.concatenate([before.depth, depth[row, :n]]),
                [*before.iterations, int(iterations[row])],
                [*before.chunks, spec.chunk],
            )
        done += count
