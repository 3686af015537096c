"""What a package's manifest says about its model and methods, checked before anything is allocated or run by it.

A manifest can be whole, its hash right, and still lie: written by another version, by hand, or to do harm. Here every
value is held against its type, against the other values, and, by the runtimes, against the engine's own file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Annotated, Any, NoReturn

from pydantic import Field

from rmse_edge.arch.registry import arch_of
from rmse_edge.errors import ConfigError, PackageError, UserError
from rmse_edge.info import LARGEST_STATE, PAGE, SIZES, BlocksInfo, DraftingInfo, Dtype, Form, ModelInfo, PlanInfo
from rmse_edge.loop.dials import DIALS
from rmse_edge.loop.plan import PLAN
from rmse_edge.numbers import PREFIX, PROMPT, SLOTS
from rmse_edge.package import AGAIN, MANIFEST, Package
from rmse_edge.schema import Name, Shape

FLOATS = frozenset({"float32", "float16", "bfloat16"})
LARGEST_CALL = 1 << 16  # rows of a call
LARGEST_TENSOR = 2 << 30  # bytes of anything that goes into a call or comes out of it


@dataclass(frozen=True)
class Tensor:
    """A tensor that a method takes or gives."""

    name: Name
    shape: Shape
    dtype: Dtype
    # The axis of which a call has no more than the appended state has slots just then.
    slots_axis: Annotated[int, Field(ge=0, le=8)] | None = None

    @property
    def form(self) -> Form:
        return self.shape, self.dtype


@dataclass(frozen=True)
class Method:
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def read_model(package: Package) -> ModelInfo:
    """What the manifest says about the model: typed, bounded, of one piece.

    Raises:
        PackageError: a value does not fit; one line names the manifest and the field.
    """
    values = package.section(dict[str, Any], "model")
    info = ModelInfo.from_json(values, package.nbytes, str(package.folder / MANIFEST))
    refuse = refusal(package)
    check_model(info, refuse)
    weights = package.section(dict[str, Any], "quantization").get("weights")
    for name, got, elsewhere, said in (
        ("target", info.target, "target", package.target), ("quant", info.quant, "quantization.weights", weights)
    ):  # fmt: skip
        if got != said:
            refuse(f"model.{name}", got, f"{said}, as {elsewhere} says")
    return info


def read_methods(package: Package) -> dict[str, Method]:
    """What every METHOD_ROWS takes and gives, by the manifest. Raises as `read_model`."""
    return package.section(dict[Name, Method], "methods")


def refusal(package: Package) -> Callable[[str, object, str], NoReturn]:
    """Raises the `PackageError` of a field of the manifest: (its name, what it is, what was expected)."""

    def refuse(field: str, got: object, expected: str) -> NoReturn:
        raise PackageError(f"{package.folder / MANIFEST}: {field}: got {got}, expected {expected}; {AGAIN}")

    return refuse


Refuse = Callable[[str, object, str], NoReturn]


def check_model(info: ModelInfo, refuse: Refuse) -> None:
    """Hold the fields of a `ModelInfo` against each other, and against what its own configuration makes of it."""
    try:
        arch = arch_of(info.model_type)
    except ConfigError as error:
        refuse("model.model_type", info.model_type, str(error).partition("expected ")[2])
    try:
        config = arch.config.from_dict(info.config, "model.config")
    except ConfigError as error:
        refuse("model.config", f"one that no model has ({error})", "that of the exported checkpoint")
    for name, value in arch.stated(config).items():
        if (got := _stated(info, name)) != value:
            refuse(f"model.{name}", got, f"{value}, as model.config says")
    try:
        info.check(info.dials)
    except UserError as error:
        refuse("model.dials", f"some that cannot be set ({error})", "the checkpoint's own")
    kinds = [name for name in ("text", "board", "blocks") if getattr(info, name) is not None]
    if len(kinds) != 1:
        refuse("model", " and ".join(kinds) or "no kind", "one of text, board and blocks")
    if (text := info.text_part) is not None:
        part = "text" if info.blocks is None else "blocks.text"
        for name in ("eos_token_ids", "unused_token_ids"):
            ids = getattr(text, name)
            ranges = ids if name == "unused_token_ids" else [(token, token + 1) for token in ids]
            if any(not first < end <= text.vocab_size for first, end in ranges):
                refuse(f"model.{part}.{name}", list(ids), f"ids below {text.vocab_size}")
    if info.blocks is not None:
        _check_blocks(info, info.blocks, refuse)
    if info.plan is not None:
        _check_plan(info, info.plan, refuse)
    chunks = info.chunks
    if not chunks or list(chunks) != sorted(set(chunks)) or (info.text is not None and chunks[0] != 1):
        refuse("model.chunks", list(chunks), "rising numbers of rows, the first of a model of texts 1")
    if chunks[-1] > (most := info.segment or LARGEST_CALL):
        refuse("model.chunks", list(chunks), f"at most {most} rows")
    for name in info.state:
        check_state(info, name, refuse)
    appended = {s.shape[-2] for s in info.state.values() if s.kind == "append"}
    if len(appended) > 1:
        refuse("model.state", f"appended ones of {' and '.join(map(str, sorted(appended)))} slots", "as many in each")
    if info.page is not None and not appended:
        refuse("model.page", info.page, "null, since nothing is appended")
    if info.kept_bytes() > LARGEST_STATE:
        refuse("model.state", f"{info.kept_bytes()} bytes", f"at most {LARGEST_STATE} (4 GiB)")


def _check_blocks(info: ModelInfo, blocks: BlocksInfo, refuse: Refuse) -> None:
    """Of a model that writes block by block: every call is a block, and there is an id that stands for what is to be written."""
    if info.chunks != (blocks.size,):
        refuse("model.chunks", list(info.chunks), f"[{blocks.size}], the size of a block")
    if not blocks.mask_token_id < blocks.text.vocab_size:
        refuse("model.blocks.mask_token_id", blocks.mask_token_id, f"an id below {blocks.text.vocab_size}")
    if info.capacity is None or info.capacity < blocks.size:
        refuse("model.state", f"room for {info.capacity} positions", f"appended ones of at least {blocks.size} slots")


def _check_plan(info: ModelInfo, plan: PlanInfo, refuse: Refuse) -> None:
    """Of a model whose iterations are executions of layers: it keeps its plan, and one call has all that this is made of."""
    kept = info.state.get(PLAN)
    if info.text is None:
        refuse("model.plan", "one of layers", "null, since the model reads no text token by token")
    if kept is None or (kept.kind, kept.form) != ("replace", ((info.max_loops,), "int64")):
        refuse(
            f"model.state.{PLAN}", "none" if kept is None else kept.kind, f"{info.max_loops} layers, int64, replaced"
        )
    if plan.prompt > info.chunks[-1]:
        refuse("model.plan.prompt", plan.prompt, f"at most {info.chunks[-1]}, the rows of the largest call")


def _stated(info: ModelInfo, name: str) -> Any:
    """A field by its dotted name; None where a part is missing on the way."""
    found: Any = info
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else getattr(found, part, None)
    return found


def check_state(info: ModelInfo, name: str, refuse: Refuse) -> None:
    """Hold one tensor of the state against its own kind."""
    state, field = info.state[name], f"model.state.{name}"
    if not state.read_by:
        refuse(f"{field}.read_by", "nothing", "the methods that read it")
    if state.per_loop and (not state.shape or state.shape[0] != info.max_loops):
        refuse(f"{field}.shape", list(state.shape), f"a row for each of the {info.max_loops} loops")
    if state.kind in ("ring", "append") and len(state.shape) < 3:
        refuse(f"{field}.shape", list(state.shape), "positions in the last axis but one")
    if state.kind == "written":
        if info.segment is None:
            refuse(f"{field}.kind", state.kind, "another one, since model.segment is null")
        if state.source not in info.methods:
            refuse(f"{field}.source", state.source, f"some of {', '.join(info.methods)}")


def _nbytes(form: Form) -> int:
    return prod(form[0]) * SIZES[form[1]]


# ------------------------------------------------------------------------------------- methods against the model


def check_methods(
    info: ModelInfo, methods: Mapping[str, Method], in_graph: bool, refuse: Refuse, engine_keeps: bool = False
) -> None:
    """Follow every tensor from the method that gives it to those that take it, without running any.

    Args:
        in_graph: whether the loop is the graph's (`loop`) or the host's (`begin` and `step`).
        engine_keeps: the rings are the engine's, neither given nor returned.
    """
    for name, method in methods.items():
        for tensor in (*method.inputs, *method.outputs):
            shape = list(tensor.shape)
            if tensor.slots_axis is not None and tensor.slots_axis < len(shape):  # the rest comes with the text
                shape[tensor.slots_axis] = min(shape[tensor.slots_axis], info.page or PAGE)
            if _nbytes((tuple(shape), tensor.dtype)) > LARGEST_TENSOR:
                refuse(f"methods.{name}.{tensor.name}", list(tensor.shape), "at most 2 GiB")
    flow = Flow(info, methods, refuse, engine_keeps)
    for rows in info.chunks:
        flow.call(rows, in_graph)
    if info.memory:
        assert info.segment is not None
        flow.segment(info.segment)


class Flow:
    """The tensors that a host has at hand, as call follows call."""

    def __init__(self, info: ModelInfo, methods: Mapping[str, Method], refuse: Refuse, engine_keeps: bool) -> None:
        self.info, self.methods, self.refuse, self.engine_keeps = info, methods, refuse, engine_keeps
        self.width = info.width
        self.made: dict[str, Form] = {}  # what methods gave, of what a host has at hand
        self.axes: dict[str, int] = {}  # of tensors that grow with the appended state: the axis that does

    def given(self, rows: int) -> dict[str, Form]:
        """What the host itself gives to the methods of a call of so many rows."""
        info = self.info
        found: dict[str, Form] = {"k": ((), "int64")}
        found |= {name: ((), dial.dtype) for name, dial in DIALS.items()}
        found["scale"] = ((1,), "float32")  # of Core ML's `blank`
        if (text := info.text_part) is not None:
            found |= {"tokens": ((1, rows), "int64"), "position": ((1,), "int64")}
            if info.blocks is None:  # whose calls are whole
                found["n_valid"] = ((1,), "int64")
            if text.prefix:
                found[PREFIX] = ((1,), "int64")
            if info.plan is not None:
                found[PROMPT] = ((1,), "int64")
            if pairs := text.rotary_dims // 2:
                endings = ("", *(f"_{name}" for name in text.further_thetas))
                angles = [f"{name}{ending}" for ending in endings for name in ("cos", "sin")]
                found |= {name: ((1, rows, pairs), "float32") for name in angles}
        if info.board is not None:
            found["board"] = ((1, info.board.cells), "int64")
            found["puzzle"] = ((1,), "int64")
        if info.memory and info.segment is not None:
            found["segment"] = ((1, info.segment, self.width), "float32")
        if info.retrieval is not None:
            hits = info.retrieval["slots"] * info.retrieval["hits"]
            found["retrieved"] = ((1, hits, self.width), "float32")
            found["retrieved_scores"] = ((1, hits), "float32")
            found["retrieved_valid"] = ((1, hits), "bool")
        noise: dict[str, Form] = {name: ((1, rows, self.width), "float32") for name in info.noise}
        if info.capacity is not None:
            found[SLOTS] = ((info.capacity,), "int64")
        if info.page is not None:
            self.axes = {name: len(kept.shape) - 2 for name, kept in info.state.items() if kept.kind == "append"}
            self.axes[SLOTS] = 0
        state = {name: kept.form for name, kept in info.state.items()}
        for field, new in (("noise", noise), ("state", state)):
            for name in found.keys() & new.keys():
                self.refuse(f"model.{field}.{name}", "a name that hosts give themselves", "another")
            found |= new
        return found

    def call(self, rows: int, in_graph: bool) -> None:
        """prelude, the loop, coda, head, commit, and what is left to be kept."""
        have, self.made = self.given(rows), {}
        self.run(f"prelude_{rows}", have)
        in_graph = in_graph and self.info.plan is None
        begins = f"{'loop' if in_graph else 'begin'}_{rows}"
        if (
            self.info.text is not None
            and self.info.text.prefix
            and PREFIX not in {t.name for t in self.method(begins).inputs}
        ):
            self.refuse("model.text.prefix", "true", f"false, since {begins} takes no {PREFIX}")
        if in_graph:
            self.run(begins, have)
        elif self.info.plan is None:
            self.host_loop(rows, have, "step")
        else:
            for index in range(self.info.plan.layers):  # every layer takes and gives what the others do
                self.host_loop(rows, have, f"step{index}")
            self.run(f"decide_{rows}", have)
            self.require(f"decide_{rows}", {"chances": ((1, self.info.plan.layers, 3), "float32")})
        held = rows + (self.info.board.prefix if self.info.board is not None else 0)
        self.require(f"the loop of {rows} rows", {"h": ((1, held, self.width), "float32"), "iterations": ((), "int64")})
        if "depth" not in self.made or self.made["depth"][1] != "int64":
            self.refuse(f"methods.loop_{rows}.outputs", ", ".join(sorted(self.made)), "depth, int64, among them")
        if "coda" in self.info.methods:
            self.run(f"coda_{rows}", have)
        self.run(f"head_{rows}", have)
        if self.info.text_part is not None:
            self.require(f"head_{rows}", {"logits": ((1, rows, self.info.vocab_size), "float32")})
            self.require(f"the loop of {rows} rows", {"depth": ((1, rows), "int64")})
        if rows == 1 and self.info.drafting is not None:
            self.drafts(self.info.drafting)
        if "commit" in self.info.methods:
            self.run(f"commit_{rows}", have)
        if self.info.blocks is not None:
            self.require(f"commit_{rows}", {"block": ((1, rows), "int64")})
        for state in self.info.state.values():
            if state.kind != "written" and not (self.engine_keeps and state.kind in ("ring", "append")):
                self.require(f"the call of {rows} rows", {state.source: (state.taken(rows), state.dtype)})

    def host_loop(self, rows: int, have: dict[str, Form], method: str) -> None:
        """begin, then `method`, which is step: `first_X` and `next_X` are X, all else that step gives is stacked over the loops."""
        begin, step = f"begin_{rows}", f"{method}_{rows}"
        self.run(begin, have, {"first_"})
        have.setdefault("depth", (have["active"][0] if "active" in have else (1, rows), "int64"))
        self.take(step, have, of_loop=True)
        outputs = {t.name: t.form for t in self.method(step).outputs}
        if "any_active" not in outputs or prod(outputs["any_active"][0]) != 1:
            self.refuse(f"methods.{step}.outputs", ", ".join(outputs), "any_active, of one element, among them")
        taken = {t.name for t in self.method(step).inputs}
        for name in ("h", "active", "depth"):
            if f"next_{name}" not in outputs:
                self.refuse(f"methods.{step}.outputs", ", ".join(outputs), f"next_{name} among them")
        for name, (shape, dtype) in outputs.items():
            if name.startswith("next_"):
                carried = name.removeprefix("next_")
                if carried not in taken:
                    self.refuse(f"methods.{step}.outputs", name, f"an input {carried} that it goes into")
                self.give(step, have, carried, (shape, dtype))
            elif name != "any_active":
                self.give(step, have, name, ((self.info.max_loops, *shape), dtype))
        self.give(step, have, "iterations", ((), "int64"))

    def drafts(self, drafting: DraftingInfo) -> None:
        """Heads in a chain: each takes a state and a token, and gives a state that the next one and the model's own head read."""
        state: Form = ((1, 1, self.width), "float32")
        reads = {t.name for t in self.method("head_1").inputs}
        if reads != {drafting.reads}:
            self.refuse("model.drafting.reads", drafting.reads, f"{', '.join(sorted(reads))}, what head_1 takes")
        call = self.made
        for name in (f"draft{index}_1" for index in range(drafting.heads)):
            self.made = {}  # each head gives the same, in a call of its own
            self.run(name, {"h": state, "tokens": ((1, 1), "int64")})
            self.require(name, {"drafted": state})
        self.made = call

    def segment(self, rows: int) -> None:
        """blank, memorize, embed_segment: what is done once per segment."""
        have, memory, self.made = self.given(rows), self.info.memory, {}
        self.run(f"blank_{rows}", have)
        names = {t.name for t in self.method(f"blank_{rows}").outputs}
        for name in memory:
            if name not in names:
                self.refuse(f"methods.blank_{rows}.outputs", ", ".join(sorted(names)), f"{name} among them")
        if "surprise_stats" not in memory or memory["surprise_stats"].shape != (1, 3):
            self.refuse("model.state.surprise_stats", memory.get("surprise_stats"), "a shape of [1, 3]")
        self.run(f"memorize_{rows}", have)
        wanted = {f"next_{name}": state.form for name, state in memory.items()}
        self.require(f"memorize_{rows}", wanted | {"surprise": ((1,), "float32")})
        if self.info.retrieval is not None:
            self.run(f"embed_segment_{rows}", have)
            key: Form = ((1, self.info.retrieval["key_dims"]), "float32")
            value: Form = ((1, self.info.retrieval["slots"], self.width), "float32")
            self.require(f"embed_segment_{rows}", {"key": key, "query": key, "value": value})

    # ------------------------------------------------------------------------------------------------- one method

    def method(self, name: str) -> Method:
        if name not in self.methods:
            self.refuse("methods", ", ".join(self.methods), f"{name} among them")
        return self.methods[name]

    def run(self, name: str, have: dict[str, Form], prefixes: Iterable[str] = ()) -> None:
        """Take a method's inputs from `have` and put its outputs there."""
        self.take(name, have)
        for tensor in self.method(name).outputs:
            known = tensor.name
            for prefix in prefixes:
                known = known.removeprefix(prefix)
            self.give(name, have, known, tensor.form)
            if tensor.slots_axis is not None:
                self.grows(name, known, tensor)

    def take(self, name: str, have: Mapping[str, Form], of_loop: bool = False) -> None:
        for tensor in self.method(name).inputs:
            field = f"methods.{name}.inputs.{tensor.name}"
            if tensor.name not in have:
                self.refuse(field, "a tensor that nothing gives", f"some of {', '.join(sorted(have))}")
            shape, dtype = have[tensor.name]
            axis = self.axes.get(tensor.name)
            if of_loop and tensor.name in self.info.state:
                shape, dtype = self.info.state[tensor.name].row
                axis = axis - 1 if axis is not None and self.info.state[tensor.name].per_loop else axis
            if tensor.slots_axis != axis:
                got, expected = ("null" if a is None else str(a) for a in (tensor.slots_axis, axis))
                self.refuse(f"{field}.slots_axis", got, expected)
            if not _fits(tensor.form, (shape, dtype)):
                self.refuse(field, f"{list(tensor.shape)} {tensor.dtype}", f"{list(shape)} {dtype}")

    def give(self, name: str, have: dict[str, Form], known: str, form: Form) -> None:
        if known in have and not _fits(have[known], form):
            shape, dtype = have[known]
            self.refuse(f"methods.{name}.outputs.{known}", f"{list(form[0])} {form[1]}", f"{list(shape)} {dtype}")
        have.setdefault(known, form)
        self.made.setdefault(known, form)

    def grows(self, name: str, known: str, tensor: Tensor) -> None:
        """Take note of a result that grows with the appended state: only the masks of `begin` do."""
        field, axis = f"methods.{name}.outputs.{tensor.name}.slots_axis", tensor.slots_axis
        if self.info.page is None or not name.startswith("begin_"):
            self.refuse(field, axis, "null")
        if axis is None or axis >= len(tensor.shape) or tensor.shape[axis] != self.info.capacity:
            self.refuse(field, axis, f"an axis of {self.info.capacity}, as the appended state has")
        self.axes[known] = axis

    def require(self, name: str, wanted: Mapping[str, Form]) -> None:
        """Fail unless methods gave all of `wanted`."""
        for known, (shape, dtype) in wanted.items():
            got = self.made.get(known)
            if got is None or not _fits(got, (shape, dtype)):
                said = "no such tensor" if got is None else f"{list(got[0])} {got[1]}"
                self.refuse(f"methods.{name}.outputs.{known}", said, f"{list(shape)} {dtype}")


def _fits(form: Form, other: Form) -> bool:
    """The same shape, and types that a host converts into each other: floats, where an engine wants halves."""
    return form[0] == other[0] and (form[1] == other[1] or {form[1], other[1]} <= FLOATS)


# --------------------------------------------------------------------------------------- methods against the engine


def check_engine(
    name: str,
    side: str,
    tensors: Iterable[Any],
    found: Iterable[tuple[str | None, tuple[tuple[int, ...], str]]],
    refuse: Refuse,
) -> None:
    """Hold one side of a method, as the manifest has it, against what the engine's own file says.

    Args:
        tensors: of the manifest, as objects of `Tensor` or as JSON has them.
        found: in the same order, name (None: the engine does not tell), shape and type.
    """
    said = [t if isinstance(t, Tensor) else Tensor(t["name"], tuple(t["shape"]), t["dtype"]) for t in tensors]
    there = list(found)
    for tensor, (known, (shape, dtype)) in zip(said, there):
        if known not in (None, tensor.name) or tensor.form != (tuple(shape), dtype):
            got = f"{tensor.name} {list(tensor.shape)} {tensor.dtype}"
            refuse(
                f"methods.{name}.{side}", got, f"{known or tensor.name} {list(shape)} {dtype}, as the program has it"
            )
    if len(said) != len(there):
        refuse(f"methods.{name}.{side}", f"{len(said)} tensors", f"{len(there)}, as the program has them")
