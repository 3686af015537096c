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

from .contract import Append, InjectedHits, LoopModel, Tensors, WholeText
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
    return _call(model, tokens, context, 0, {}, dials, decided)[0]


@torch.no_grad()
def one_by_one(
    model: LoopModel,
    tokens: Tensor,
    context: Tensors,
    dials: Tensors,
    left: Callable[[Tensors], Tensors],
    hits: InjectedHits | None = None,
) -> WholeText:
    """What `model` says of a text of T tokens, given to it position by position, each with all that those before it left.

    For a model of which it is a part of the definition that a call has one position. All its state is appended.

    Args:
        left: what the last iteration emitted -> what the loop leaves to later positions, by the names of its sources.
        tokens, context, dials, hits: as in `in_one_call`.
    Returns:
        As `in_one_call`.
    """
    assert hits is None, "a model that is looked things up for reads its texts itself"
    state: Tensors = {}
    said: list[WholeText] = []
    for position in range(len(tokens)):
        here = slice(position, position + 1)
        own = {name: rows[:, here] for name, rows in context.items()}
        found, given, emitted = _call(model, tokens[here], own, position, state, dials)
        said.append(found)
        given |= left(emitted)
        for s in model.spec(1).state:
            assert isinstance(s.update, Append), f"{s.name}: is not appended"
            row = given[s.update.source]
            state[s.name] = torch.cat([state[s.name], row], -2) if s.name in state else row
    return WholeText(
        torch.cat([w.logits for w in said]),
        torch.cat([w.depth for w in said]),
        torch.cat([w.h for w in said]),
        torch.zeros(0),
        {name: torch.cat([w.scores[name] for w in said], 1) for name in said[0].scores},
        torch.cat([w.margin for w in said]),
    )


def _call(
    model: LoopModel,
    tokens: Tensor,
    context: Tensors,
    position: int,
    state: Tensors,
    dials: Tensors,
    decided: Decided | None = None,
) -> tuple[WholeText, Tensors, Tensors]:
    """One call, of which the other arguments are as in `in_one_call`.

    Args:
        state: what was appended by the positions before; empty at the first.
    Returns:
        (what it says, what prelude and coda gave, what the last iteration emitted).
    """
    count, loops = len(tokens), int(dials["max_loops"])
    spec = model.spec(count)
    # Of an appended state one slot is enough, since nothing lies in it.
    tensors = {s.name: s.of_slots(1).zeros() for s in spec.state} | state | context
    tensors |= {SLOTS: torch.arange(max(position, 1)), "tokens": tokens[None]}
    tensors |= {"position": torch.tensor([position]), "n_valid": torch.tensor([count])}
    tensors |= model.prelude(tensors)
    carry, invariants = model.begin(tensors)
    fixed = tensors | invariants
    depth = torch.zeros(1, count, dtype=torch.int64)
    emits: Tensors = {}
    found: list[Mapping[str, Tensor]] = []
    lead: list[Tensor] = []  # of the likeliest token
    margin = torch.full((loops, count), torch.inf, dtype=torch.float64)
    for k in range(loops):
        before = carry | {"depth": depth}
        past = {s.name: tensors[s.name][k] for s in spec.rows}
        carry, emits = model.step(torch.tensor(k), before, past, fixed, dials)
        depth = depth_after(before, carry)
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
    tensors |= {"h": carry["h"], "depth": depth}
    if spec.coda:
        tensors |= model.coda(tensors)  # type: ignore[attr-defined]
    said = WholeText(
        model.head(tensors[spec.final.name])["logits"][0],
        depth[0],
        carry["h"][0],
        torch.zeros(0),
        of_loops,
        margin.masked_fill(~ran, torch.inf).amin(0),
    )
    return said, tensors, emits
