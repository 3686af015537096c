"""A text in one call from an empty past: `TextModel.whole_text` for models that can take it so.

Such a call has no past: nothing lies in a slot, nothing was replaced before, and no position is padding. What a host does
between calls has no part in it, so the parity gate may hold hosts against it. A model qualifies if its `spec` takes a call
of any number of positions, and if its masks compare absolute positions, also within a call longer than its window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rmse_edge.numbers import SLOTS

from .contract import InjectedHits, LoopModel, Tensors, WholeText
from .drive import depth_after
from .predictions import changes, leads
from .stop import margins, scores

# What a model decides with beside its exit rules, such as a router: after every iteration, (T,) distance to another decision.
Decided = Callable[[int, Tensors, Tensors], Tensor]


@torch.no_grad()
def in_one_call(
    model: LoopModel,
    tokens: Tensor,
    context: Tensors,
    dials: Tensors,
    hits: InjectedHits | None = None,
    decided: Decided | None = None,
) -> WholeText:
    """What `model` says of a text of T tokens, given to it as one call at position 0.

    Args:
        tokens: (T,) int64.
        context: of the call, such as angles; `position` and `n_valid` are added.
        dials: the scalars of `spec.dials`.
        hits: models that take some read their texts in a way of their own.
        decided: called as decided(k, carry before, carry after) after every iteration.
    Returns:
        `scores` of the rules whose dials the model has and whose terms are in its carry: `exit_threshold` needs
        `log_survival` there, the rules of predictions.py what they carry.
    """
    assert hits is None, "a model that is looked things up for reads its texts itself"
    count, loops = len(tokens), int(dials["max_loops"])
    spec = model.spec(count)
    # Of an appended state one slot is enough, since nothing lies in it.
    tensors = {s.name: s.of_slots(1).zeros() for s in spec.state} | {SLOTS: torch.arange(1)} | context
    tensors |= {"tokens": tokens[None], "position": torch.tensor([0]), "n_valid": torch.tensor([count])}
    tensors |= model.prelude(tensors)
    carry, invariants = model.begin(tensors)
    fixed = tensors | invariants
    depth = torch.zeros(1, count, dtype=torch.int64)
    emitted: list[Tensors] = []
    found: list[Mapping[str, Tensor]] = []
    lead: list[Tensor] = []  # of the likeliest token
    margin = torch.full((loops, count), torch.inf, dtype=torch.float64)
    for k in range(loops):
        before = carry | {"depth": depth}
        past = {s.name: tensors[s.name][k] for s in spec.rows}
        carry, emits = model.step(torch.tensor(k), before, past, fixed, dials)
        depth = depth_after(before, carry)
        emitted.append(emits)
        own = scores(before["h"], carry["h"], carry.get("log_survival", torch.zeros(1, count)))
        if "log_survival" not in carry:
            del own["exit_threshold"]
        if "log_p" in carry:
            own |= changes(k, before, carry, spec.dials)
            lead.append(leads(carry)[0].double())
        found.append({name: score[0] for name, score in own.items() if name in spec.dials})
        if decided is not None:
            margin[k] = decided(k, before, carry).double()
    of_loops = {name: torch.stack([f[name] for f in found]) for name in found[0]}
    if of_loops:
        margin = torch.minimum(margin, margins(of_loops, dials, torch.stack(lead) if lead else None))
    ran = torch.arange(loops)[:, None] < depth
    result: Tensors = {"h": carry["h"], "depth": depth}
    final = carry["h"]
    if spec.coda:
        final = model.coda(tensors | result)[spec.final.name]  # type: ignore[attr-defined]
    return WholeText(
        model.head(final)["logits"][0],
        depth[0],
        carry["h"][0],
        torch.zeros(0),
        of_loops,
        margin.masked_fill(~ran, torch.inf).amin(0),
    )
