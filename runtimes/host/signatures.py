"""What a package's manifest says about its model and methods, checked before anything is allocated or run by it.

A manifest can be whole, its hash right, and still lie: written by another version, by hand, or to do harm. Here every
value is held against its type, against the other values, and, by the runtimes, against the engine's own file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from rmse_edge.arch.rmse.config import RINGS, RMSEConfig
from rmse_edge.arch.rmse.costs import parameters
from rmse_edge.errors import ConfigError, PackageError, UserError
from rmse_edge.numbers import SEGMENT
from rmse_edge.package import AGAIN, MANIFEST, Package
from rmse_edge.schema import Name, Shape

from .base import Dtype, ModelInfo

Form = tuple[tuple[int, ...], Dtype]  # shape and type
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1, "uint8": 1, "bool": 1}
FLOATS = frozenset({"float32", "float16", "bfloat16"})
LARGEST_STATE = 4 << 30  # bytes that a model may keep between calls: what is zeroed before the first one
LARGEST_TENSOR = 2 << 30  # bytes of anything that goes into a call or comes out of it


@dataclass(frozen=True)
class Tensor:
    """A tensor that a method takes or gives."""

    name: Name
    shape: Shape
    dtype: Dtype

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
    """Hold the fields of a `ModelInfo` against each other."""
    try:
        config = RMSEConfig.from_dict(info.config, "model.config")
    except ConfigError as error:
        refuse("model.config", f"one that no model has ({error})", "that of the exported checkpoint")
    own = {
        "vocab_size": config.vocab_size,
        "max_loops": config.max_loops,
        "window": config.window,
        "rotary_dims": config.rotary_dims,
        "rope_theta": config.rope_theta,
        "parameters": parameters(config),
        "rings": RINGS,
    }
    for name, value in own.items():
        if getattr(info, name) != value:
            refuse(f"model.{name}", getattr(info, name), f"{value}, as model.config says")
    if bool(info.memory) != (config.memory != "none"):
        there = "memory tensors" if info.memory else "no memory tensors"
        refuse("model.memory", there, f"those of model.config.memory {config.memory!r}")
    space = {name: getattr(config, f"retrieval_{of}") for name, of in
             (("key_dims", "dim"), ("slots", "slots"), ("hits", "hits"), ("gamma", "gamma"))}  # fmt: skip
    if info.retrieval != (space if config.retrieval_slots else None):
        refuse("model.retrieval", info.retrieval, f"{space if config.retrieval_slots else None}, as model.config says")
    try:
        info.dials.check(info.max_loops)
    except UserError as error:
        refuse("model.dials", f"some that cannot be set ({error})", "the checkpoint's own")
    for name, value in vars(info.dials).items():
        if value != getattr(config, name):
            refuse(f"model.dials.{name}", value, f"{getattr(config, name)}, as model.config says")
    for name in ("eos_token_ids", "unused_token_ids"):
        ids = getattr(info, name)
        ranges = ids if name == "unused_token_ids" else [(token, token + 1) for token in ids]
        if any(not first < end <= info.vocab_size for first, end in ranges):
            refuse(f"model.{name}", list(ids), f"ids below {info.vocab_size}")
    chunks = info.chunks
    if not chunks or chunks[0] != 1 or chunks[-1] > SEGMENT or list(chunks) != sorted(set(chunks)):
        refuse("model.chunks", list(chunks), f"rising numbers of rows from 1 to {SEGMENT}, the first of them 1")
    if kept_bytes(info) > LARGEST_STATE:
        refuse("model.state", f"{kept_bytes(info)} bytes with model.memory", f"at most {LARGEST_STATE} (4 GiB)")
    for name in sorted(RINGS.keys() | info.state.keys()):
        form, ring = info.state.get(name), (config.ring_shape, config.kv_dtype) if name in RINGS else None
        if form != ring:
            refuse(f"model.state.{name}", _said(form), f"{_said(ring)}, as model.config says")


def _said(form: Form | None) -> str:
    return "none" if form is None else f"{list(form[0])} {form[1]}"


def kept_bytes(info: ModelInfo) -> int:
    """Bytes of the rings and the memory."""
    return sum(_nbytes(form) for form in (*info.state.values(), *info.memory.values()))


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
            if _nbytes(tensor.form) > LARGEST_TENSOR:
                refuse(f"methods.{name}.{tensor.name}", list(tensor.shape), "at most 2 GiB")
    flow = Flow(info, methods, refuse, engine_keeps)
    for rows in info.chunks:
        flow.call(rows, in_graph)
    if info.memory:
        flow.segment()


class Flow:
    """The tensors that a host has at hand, as call follows call."""

    def __init__(self, info: ModelInfo, methods: Mapping[str, Method], refuse: Refuse, engine_keeps: bool) -> None:
        self.info, self.methods, self.refuse, self.engine_keeps = info, methods, refuse, engine_keeps
        self.width = info.config["d_model"]

    def given(self, rows: int) -> dict[str, Form]:
        """What the host itself gives to the methods of a call of so many rows."""
        info, pairs = self.info, self.info.rotary_dims // 2
        scalars: dict[str, Form] = {name: ((), "int64") for name in ("max_loops", "min_loops", "k")}
        scalars |= {name: ((), "float32") for name in ("exit_threshold", "exit_epsilon", "exit_entropy")}
        found: dict[str, Form] = scalars | {
            "tokens": ((1, rows), "int64"),
            "cos": ((1, rows, pairs), "float32"),
            "sin": ((1, rows, pairs), "float32"),
            "position": ((1,), "int64"),
            "n_valid": ((1,), "int64"),
            "segment": ((1, SEGMENT, self.width), "float32"),
            "scale": ((1,), "float32"),  # of Core ML's `blank`
        }
        if info.retrieval is not None:
            hits = info.retrieval["slots"] * info.retrieval["hits"]
            found["retrieved"] = ((1, hits, self.width), "float32")
            found["retrieved_scores"] = ((1, hits), "float32")
            found["retrieved_valid"] = ((1, hits), "bool")
        return found | info.state | info.memory

    def call(self, rows: int, in_graph: bool) -> None:
        """prelude, the loop, head, commit."""
        have = self.given(rows)
        self.run(f"prelude_{rows}", have)
        if in_graph:
            self.run(f"loop_{rows}", have)
        else:
            self.host_loop(rows, have)
        self.require(f"the loop of {rows} rows", have, {
            "h": ((1, rows, self.width), "float32"), "depth": ((1, rows), "int64"), "iterations": ((), "int64"),
        })  # fmt: skip
        self.run(f"head_{rows}", have)
        self.require(f"head_{rows}", have, {"logits": ((1, rows, self.info.vocab_size), "float32")})
        self.run(f"commit_{rows}", have)
        if self.engine_keeps:
            return
        for ring, source in self.info.rings.items():
            shape, dtype = self.info.state[ring]
            self.require(f"commit_{rows}", have, {source: ((*shape[:-2], rows, shape[-1]), dtype)})

    def host_loop(self, rows: int, have: dict[str, Form]) -> None:
        """begin, then step: `first_X` and `next_X` are X, all else that step gives is stacked over the loops."""
        begin, step = f"begin_{rows}", f"step_{rows}"
        self.run(begin, have, {"first_"})
        have.setdefault("depth", ((1, rows), "int64"))
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
        have["iterations"] = ((), "int64")

    def segment(self) -> None:
        """blank, memorize, embed_segment: what is done once per segment."""
        have = self.given(SEGMENT)
        self.run(f"blank_{SEGMENT}", have)
        names = {t.name for t in self.method(f"blank_{SEGMENT}").outputs}
        for name in self.info.memory:
            if name not in names:
                self.refuse(f"methods.blank_{SEGMENT}.outputs", ", ".join(sorted(names)), f"{name} among them")
        if "surprise_stats" not in self.info.memory or self.info.memory["surprise_stats"][0] != (1, 3):
            self.refuse("model.memory.surprise_stats", self.info.memory.get("surprise_stats"), "a shape of [1, 3]")
        self.run(f"memorize_{SEGMENT}", have)
        wanted = {f"next_{name}": form for name, form in self.info.memory.items()}
        self.require(f"memorize_{SEGMENT}", have, wanted | {"surprise": ((1,), "float32")})
        if self.info.retrieval is not None:
            self.run(f"embed_segment_{SEGMENT}", have)
            key: Form = ((1, self.info.retrieval["key_dims"]), "float32")
            value: Form = ((1, self.info.retrieval["slots"], self.width), "float32")
            self.require(f"embed_segment_{SEGMENT}", have, {"key": key, "query": key, "value": value})

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

    def take(self, name: str, have: Mapping[str, Form], of_loop: bool = False) -> None:
        for tensor in self.method(name).inputs:
            field = f"methods.{name}.inputs.{tensor.name}"
            if tensor.name not in have:
                self.refuse(field, "a tensor that nothing gives", f"some of {', '.join(sorted(have))}")
            shape, dtype = have[tensor.name]
            rows = of_loop and len(shape) > 1 and shape[0] == self.info.max_loops
            if not _fits(tensor.form, (shape, dtype)) and not (rows and _fits(tensor.form, (shape[1:], dtype))):
                self.refuse(field, f"{list(tensor.shape)} {tensor.dtype}", f"{list(shape)} {dtype}")

    def give(self, name: str, have: dict[str, Form], known: str, form: Form) -> None:
        if known in have and not _fits(have[known], form):
            shape, dtype = have[known]
            self.refuse(f"methods.{name}.outputs.{known}", f"{list(form[0])} {form[1]}", f"{list(shape)} {dtype}")
        have.setdefault(known, form)

    def require(self, name: str, have: Mapping[str, Form], wanted: Mapping[str, Form]) -> None:
        for known, (shape, dtype) in wanted.items():
            if known not in have or not _fits(have[known], (shape, dtype)):
                got = f"{list(have[known][0])} {have[known][1]}" if known in have else "no such tensor"
                self.refuse(f"methods.{name}.outputs.{known}", got, f"{list(shape)} {dtype}")


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
