"""Model -> LoopProgram -> lowered files -> parity gate -> Package, all or nothing."""

from __future__ import annotations

import copy
import dataclasses
import gc
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rmse_edge.arch.common.identity import fingerprint, model_info
from rmse_edge.arch.registry import arch_of_model
from rmse_edge.chat import chat_files
from rmse_edge.chat_turns import turns_of
from rmse_edge.errors import ArgumentError, ExportError, ParityError, UserError
from rmse_edge.exits import carried
from rmse_edge.files import Digests
from rmse_edge.heads import load_heads
from rmse_edge.info import ModelInfo
from rmse_edge.layers.cache import cache_dtype, with_cache_dtype
from rmse_edge.layers.held import holds, shape_of
from rmse_edge.loop.contract import LoopSpec
from rmse_edge.loop.dials import DIALS
from rmse_edge.numbers import SEGMENT
from rmse_edge.package import Package, seal, writing
from rmse_edge.parts import PARTS
from rmse_edge.progress import Report, Stages, silent
from rmse_edge.quantize import Format, Quantized
from rmse_edge.quantize.parallel import aside, one_thread
from rmse_edge.quantize.scheme import BITS, table_of
from rmse_edge.runtimes import blocks_for, board_for, other_runtimes, runtime_for
from rmse_edge.runtimes.engines.release import release_freed
from rmse_edge.runtimes.host.text import LoopRuntime
from rmse_edge.shards import all_finite
from rmse_edge.text import Tokenizer, read_text
from rmse_edge.vocabulary import TOKENIZER_FILE

from .gate.blocks import block_gate
from .gate.board import board_gate
from .gate.compare import POSITIONS, compare_host, compared, computed_ahead, gate
from .gate.reference import LEAST_POSITIONS, Reference
from .program import LoopProgram, Signature, method_names, signature, tensors_json, trace
from .repeated import done_once
from .targets import QUANTIZATIONS, LowerOptions, Target, TargetOptions, get_target

SAMPLE = "sample.txt"
SAMPLE_LIMIT = 64 * 1024  # bytes
SELDOM = (300_000, 2, 2)  # new objects between two collections of the youngest, see `gc.set_threshold`


@dataclass(frozen=True)
class ExportRequest:
    """Everything an export may be asked for."""

    target: str = "onnx"
    quant: str = "fp32"
    # Of the target alone: `OnnxOptions`, `ExecutorchOptions`, `CoremlOptions`; None: as it is by default.
    options: TargetOptions | None = None
    max_seq_len: int | None = None
    # Tokens that hosts draft and verify together: the package has calls of one row more. Targets of `any_rows` have them anyway.
    draft_tokens: int | None = None
    overwrite: bool = False
    check: bool = True  # run the parity gate; only benches of random weights go without

    def __post_init__(self) -> None:
        target = get_target(self.target)
        if self.quant not in QUANTIZATIONS:
            raise ArgumentError("quant", f"got {self.quant!r}, expected one of {', '.join(QUANTIZATIONS)}")
        if self.quant not in target.quants:
            raise ArgumentError("quant", f"{self.target} takes {', '.join(target.quants)}", self.quant)
        if self.max_seq_len is not None and self.max_seq_len < 1:
            raise ArgumentError("max_seq_len", f"got {self.max_seq_len}, expected a positive number of tokens")
        if self.draft_tokens is not None and not 1 <= self.draft_tokens < SEGMENT:
            raise ArgumentError("draft_tokens", f"got {self.draft_tokens}, expected 1..{SEGMENT - 1}")
        if not isinstance(self.own, target.options):
            raise ArgumentError(
                "options", f"got {type(self.own).__name__}, {self.target} takes {target.options.__name__}"
            )
        self.own.check(self.target, self.quant)

    @property
    def own(self) -> TargetOptions:
        """`options`, or the target's default ones."""
        return get_target(self.target).options() if self.options is None else self.options

    def call_sizes(self, model: Any) -> tuple[int, ...]:
        """Rows of the calls that the package of a model has, ascending.

        Raises:
            ArgumentError: rows to verify drafts in are asked for, and the model is none of texts.
        """
        sizes = model.call_sizes()
        if self.draft_tokens is None:
            return sizes
        if sizes[0] != 1:
            raise ArgumentError(
                "draft_tokens", "the model does not write token by token, and drafts nothing; leave it out"
            )
        return sizes if get_target(self.target).any_rows else tuple(sorted({*sizes, self.draft_tokens + 1}))

    @property
    def level(self) -> int:
        """Of the activations of quantised weights, see `TargetOptions.accuracy_level`."""
        return self.own.level

    def check_integers(self, quantized: Quantized | None) -> None:
        """Fail unless `quantized` is what this request needs.

        Raises:
            UserError: integers are missing or not asked for, or the target has no form for them; names what.
        """
        if quantized is None:
            if self.quant in BITS:
                raise ArgumentError("quant", "needs a quantised model; make one with rmse-quantize", self.quant)
            return
        if quantized.quant != self.quant:
            raise ArgumentError(
                "quant",
                f"the checkpoint is quantised to {quantized.quant}; leave it out, or give the float checkpoint it was made "
                "from",
                self.quant,
            )
        zeros = next((name for name, q in quantized.tensors.items() if q.zeros is not None), None)
        if zeros is not None and not get_target(self.target).asymmetric:
            raise UserError(
                f"{zeros}: is asymmetric, and {self.target} takes symmetric weights only; quantise without symmetric=False"
            )


def check_formats(model: Any, formats: Mapping[str, Format], target: str) -> None:
    """Fail, before anything is computed, where a target has no form for a weight.

    Raises:
        ExportError: naming the weight.
    """
    check = get_target(target).check_format
    if check is None or not formats:
        return
    use = table_of(model).use
    inputs = {name: shape_of(model, name)[-1] for name in formats}
    # The tensor with the fewest choices speaks first, so that no other one refuses what it says to do.
    for name in sorted(formats, key=lambda name: (inputs[name] & -inputs[name], use(name) != "experts")):
        check(name, formats[name], inputs[name], use(name))


def rounded(model: Any, quant: str) -> Any:
    """The model a package of this precision is compared with: the same weights after the same rounding."""
    if quant != "fp16":
        return model  # a quantised model holds what its integers stand for
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in [*twin.named_parameters(), *twin.named_buffers()]:
            half = p.half()
            if not torch.isfinite(half).all():
                raise ExportError(f"{name}: has values beyond float16's range; export with quant=fp32")
            if p.numel() * 4 >= 1024:  # smaller tensors stay float32 in every package
                p.copy_(half)
    return twin


def as_cached(model: Any, request: ExportRequest) -> Any:
    """`model`, or a copy whose keys and values are stored in the type that the request's packages have, a float."""
    cache = get_target(request.target).cache
    return with_cache_dtype(model, cache(request.quant, cache_dtype(model))) if cache else model


def export_package(
    model: Any,
    destination: str | Path,
    request: ExportRequest,
    checkpoint: Path | None = None,
    progress: Report = silent,
    quantized: Quantized | None = None,
) -> Package:
    """Export `model` into the package folder `destination`.

    Args:
        quantized: for int8 and int4, the quantised model; `model` is then its model.
        checkpoint: the folder the model came from; its tokenizer.json and sample.txt go into the package, and its heads for
            multi-token prediction, where the target has a form for them.
        progress: told each stage as it begins, and how far the whole is.
    Raises:
        ExportError, ParityError: nothing is left behind but what stood at `destination` before.
    """
    destination = Path(destination)
    for name, p in model.state_dict().items():
        if p.is_floating_point() and not all_finite(p):
            raise ExportError(f"{name}: holds NaN or infinite values; the checkpoint is damaged")
    request.check_integers(quantized)
    if arch_of_model(model).planned:
        if not get_target(request.target).plans:
            raise ArgumentError(
                "target", "its hosts run no layers by a plan of the text; export to onnx or executorch", request.target
            )
        if request.draft_tokens is not None:
            raise ArgumentError("draft_tokens", "the model's texts have a plan, and draft nothing; leave it out")
    with writing(destination, request.overwrite) as folder, one_thread(model) as idle, ExitStack() as stack:
        target = get_target(request.target)
        idle = idle and not holds(model)  # a second process takes memory, which a model that is held so lacks
        source = quantized.fingerprint if quantized else None
        heads = load_heads(checkpoint, model, source) if checkpoint is not None and target.drafts else None
        if heads is not None:
            heads = rounded(heads, request.quant)
        cached = as_cached(model, request)
        if cached is not model:
            source = source or fingerprint(model)
            model = cached
        rounds_activations = quantized is not None and request.level != 0
        exact_twin = rounds_activations and request.check and target.twins
        stage = Stages(_plan(model, request, target, exact_twin), progress)
        name = destination.name.removesuffix(".rmse")
        info = model_info(
            model,
            name,
            0,
            request.target,
            source,
            request.quant,
            checkpoint,
            request.max_seq_len,
            request.call_sizes(model),
            heads,
        )
        if not target.grows:
            info = dataclasses.replace(info, page=None)
        options = LowerOptions(
            quant=request.quant,
            tensors=quantized.tensors if quantized else {},
            own=request.own,
            exact_twin=exact_twin,
            info=info,
            scratch=folder,
            idle=idle,
            progress=stage,
        )
        text = _carry_text(checkpoint, folder)
        proof = Proof(model, info, request, target, folder, text, stage, idle)
        if request.check and info.text is not None:
            ahead = stack.enter_context(aside(lambda: computed_ahead(proof.reference, proof.longest), idle))
        traced = target.prepare(model, options) if target.prepare else model
        with collection_seldom(), done_once():
            program = trace(
                traced,  # type: ignore[arg-type]
                request.call_sizes(model),
                stage,
                target.any_rows,
                target.host_loop,
                target.grows,
                request.max_seq_len,
                target.batches,
                **({} if heads is None else {"heads": heads}),
            )
            lowering = target.lower(program, folder, options)
        # What was traced may have its weights in a form of the target's own. The gate does without, and needs room.
        program, traced = program.without_traces(model), None
        release_freed()
        own_types, parts = lowering.pop("kept", {}), lowering.pop(PARTS, {})
        kept = {name: dataclasses.replace(info.state[name], dtype=dtype) for name, dtype in own_types.items()}
        info = dataclasses.replace(info, state=info.state | kept)
        manifest: dict[str, Any] = {
            "target": request.target,
            "model": info.to_json(),
            "methods": {
                name: {"inputs": tensors_json(takes, target.grows), "outputs": tensors_json(gives, target.grows)}
                for name, (takes, gives) in signatures(program.specs, target, request.quant).items()
            },
            "quantization": _quantization(request, quantized),
            "lowering": lowering,
            "text": text,
            "versions": _versions(),
            **carried(checkpoint, info.dials),
            **({PARTS: parts} if parts else {}),
            **({"chat": dataclasses.asdict(turns)} if (turns := turns_of(folder)) is not None else {}),
        }
        manifest["parity"] = None
        twin = lowering.pop("exact_twin", None)
        if request.check and info.board is not None:
            manifest["parity"] = proof.board(program, manifest)
        elif request.check and info.blocks is not None:
            manifest["parity"] = proof.blocks(program, manifest)
        elif request.check:
            if (known := ahead()) is not None:
                proof.reference.learn(known)
            manifest["parity"] = proof.text(program, manifest, twin)
        seal(folder, manifest, proof.digests)
    return Package.open(destination, proof.digests)


@dataclass
class Proof:
    """The gate of one export, over the package in the making."""

    model: Any
    info: ModelInfo
    request: ExportRequest
    target: Target
    folder: Path
    files: dict[str, str]  # tokenizer and text sample in the folder, as the manifest names them
    stage: Stages
    idle: bool = False  # a core is left for the integers' own gate
    digests: Digests = field(default_factory=Digests)  # of the folder's files, which are sealed for every candidate

    def board(self, program: LoopProgram, manifest: dict[str, Any]) -> dict[str, Any]:
        """Of a model that fills in boards."""
        exact = self.request.quant == "fp32"
        counterpart, package = rounded(self.model, self.request.quant), self.sealed(manifest)
        return board_gate(program, counterpart, board_for(package), exact, self.stage, self.rounded_activations)

    def blocks(self, program: LoopProgram, manifest: dict[str, Any]) -> dict[str, Any]:
        """Of a model that writes by blocks."""
        counterpart, candidate = rounded(self.model, self.request.quant), blocks_for(self.sealed(manifest))
        candidate.info = candidate.info.with_limit(None)  # the gate's texts may be longer than the package is to take
        return block_gate(program, counterpart, candidate, self.tokens, self.exact, self.stage)

    def sealed(self, manifest: dict[str, Any]) -> Package:
        """The package in the making, as a runtime would find it."""
        seal(self.folder, manifest, self.digests)
        return Package.open(self.folder, self.digests)

    @property
    def float_cache(self) -> bool:
        """An int8 or float16 cache rounds K and V before use: two engines a millionth apart round a few otherwise."""
        return cache_dtype(self.model) == "float32"

    @property
    def rounded_activations(self) -> bool:
        level = self.request.level if self.request.quant in BITS else 0
        return level != 0 or self.request.quant in self.target.halves

    @property
    def exact(self) -> bool:
        return self.request.quant != "fp16" and not self.rounded_activations and self.float_cache

    @cached_property
    def tokens(self) -> np.ndarray:
        return parity_tokens(self.info.vocab_size, self.folder, self.files)

    @property
    def longest(self) -> np.ndarray:
        """The longest text that is compared."""
        return compared(self.tokens, self.info, self.exact, self.target.positions)

    @cached_property
    def reference(self) -> Reference:
        return Reference(rounded(self.model, self.request.quant), self.info, self.longest)

    def text(self, program: LoopProgram, manifest: dict[str, Any], twin: dict[str, Any] | None) -> dict[str, Any]:
        """Of a model of texts.

        Args:
            twin: of a package that rounds activations, what its lowering says of graphs that do not.
        """
        tokens, reference, float_cache = self.tokens, self.reference, self.float_cache
        whole = None if twin is None else self.sealed(manifest | {"lowering": twin})

        def integers(stage: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
            assert whole is not None
            return gate(program, reference, candidate_of(whole), tokens, float_cache, stage)

        with aside(integers, self.idle and whole is not None) as ahead:

            def of_integers() -> dict[str, Any]:
                self.stage("parity of the integers")
                return ahead() or integers(self.stage)

            alone = None
            if not self.exact and not (whole is not None and float_cache):
                self.stage("parity of the host")
                alone = compare_host(with_cache_dtype(reference.model, "float32"), tokens, reference)
            failed = ""
            try:
                report = self.of_engines(program, manifest)
            except ParityError as error:
                if whole is None:
                    raise
                failed = str(error)  # the error itself would keep an engine
            release_freed()  # an engine less in memory, while that of the integers runs here
            found = None if whole is None else of_integers()  # where these fail, that is what there is to say
            if failed:
                # The twin went through the very check that a package of level 0 goes through, on the graphs it has.
                raise ParityError(
                    f"{failed}; without the rounding of activations to int8 the same integers pass: "
                    "export with accuracy_level=0"
                )
        for file in set(twin["graphs"].values()) if twin is not None else ():
            (self.folder / file).unlink()
        if found is not None:
            report["integers"] = found
        if alone is not None:
            report["host"] = alone
        return report

    def of_engines(self, program: LoopProgram, manifest: dict[str, Any]) -> dict[str, Any]:
        """Of the package as it is, on every engine that runs it; those behind the first by their names."""
        package = self.sealed(manifest)
        candidates = [candidate_of(package), *map(unlimited, other_runtimes(package))]
        rounds, positions = self.rounded_activations, self.target.positions
        reports = [
            gate(program, self.reference, c, self.tokens, self.exact, self.stage, rounds, positions) for c in candidates
        ]
        return reports[0] | dict(zip((c.info.target for c in candidates[1:]), reports[1:]))


@contextmanager
def collection_seldom() -> Iterator[None]:
    """With a cyclic garbage collector that comes seldom. As often as it does by itself, it goes through growing graphs of objects
    again and again; without it, every graph that a pass of an exporter replaces stays in memory, since its nodes know each other.
    """
    before = gc.get_threshold()
    gc.set_threshold(*SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _plan(model: Any, request: ExportRequest, target: Target, exact_twin: bool) -> list[tuple[str, float]]:
    """The stages of an export in order and roughly what each costs, in seconds of a small model; see `Stages`."""
    specs = {chunk: model.spec(chunk) for chunk in request.call_sizes(model)}
    names = [name for spec in specs.values() for name in method_names(spec, target.host_loop)]
    if target.any_rows:
        names = list(dict.fromkeys(names))
    plan = [("tracing", 4.0 if name == "loop" else 0.5) for name in names]
    plan += [(begins, cost * (4 if name == "loop" else 1)) for begins, cost in target.stages for name in names]
    settings = 1 + sum(DIALS[name].off is not None for name in next(iter(specs.values())).dials)
    gate = [*[("parity at", 1.0)] * settings, ("parity of each method", 1.0), ("parity of the memory", 1.0)]
    if not request.check:
        return plan
    return plan + gate + ([("parity of the integers", 0.0), *gate] if exact_twin else [])


def candidate_of(package: Package) -> LoopRuntime:
    """The runtime of the package in the making, which the gate runs."""
    candidate = runtime_for(package)
    assert isinstance(candidate, LoopRuntime)
    return unlimited(candidate)


def unlimited(runtime: LoopRuntime) -> LoopRuntime:
    """`runtime`, which takes texts of any length: the gate's may be longer than the package is to take."""
    runtime.info = runtime.info.with_limit(None)
    return runtime


def parity_tokens(vocab_size: int, folder: Path, text: dict[str, str]) -> np.ndarray:
    """What the gate is run on: the sample text if the package has one, random tokens otherwise."""
    if "sample" in text and "tokenizer" in text:
        head = read_text(folder / text["sample"])[: 8 * POSITIONS[False]]
        ids = np.asarray(Tokenizer(folder / text["tokenizer"]).encode(head), np.int64)
        if len(ids) >= LEAST_POSITIONS:
            return ids[: POSITIONS[False]]
    return np.random.default_rng(0).integers(0, vocab_size, POSITIONS[False])


def _carry_text(checkpoint: Path | None, folder: Path) -> dict[str, str]:
    """Copy the tokenizer, the chat template and the text sample, where the checkpoint has them."""
    text: dict[str, str] = {}
    if checkpoint is None:
        return text
    for name in (TOKENIZER_FILE, *chat_files(checkpoint), SAMPLE):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
            text[Path(name).stem] = name
    if "sample" in text and (folder / SAMPLE).stat().st_size > SAMPLE_LIMIT:
        raise ExportError(f"{checkpoint / SAMPLE}: larger than {SAMPLE_LIMIT} bytes; shorten it")
    return text


def _quantization(request: ExportRequest, quantized: Quantized | None) -> dict[str, Any]:
    """How the weights are stored, for the manifest: of integers the format of every tensor and what they cost."""
    if quantized is None:
        return {"weights": request.quant}
    kept = ("tensors", "float_tensors", "request", "evaluation", "gate", "calibration_tokens")
    report = {name: quantized.report[name] for name in kept if name in quantized.report}
    return {"weights": request.quant, "accuracy_level": request.level, **report}


def signatures(specs: Mapping[int, LoopSpec], target: Target, quant: str) -> dict[str, Signature]:
    """What every method of a package takes and gives, by METHOD_ROWS."""
    found: dict[str, Signature] = {}
    for chunk, spec in specs.items():
        if target.signatures is not None:
            own = target.signatures(spec, quant)
        else:
            names = method_names(spec, target.host_loop)
            own = {name: signature(spec, name, target.host_loop) for name in names}
        found |= {f"{name}_{chunk}": tensors for name, tensors in own.items()}
    return found


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("rmse-edge", "torch", "onnx", "onnxscript", "onnxruntime", "executorch", "torchao", "coremltools"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def weight_bytes(model: Any, quant: str, formats: Mapping[str, Format], scale_bytes: int) -> int:
    """Bytes of all weights as stored: integers with their scales, and what stays float in float32."""
    parameters = sum(p.numel() for p in model.parameters())
    if quant not in BITS:
        return parameters * {"fp32": 4, "fp16": 2}[quant]
    total = 4 * parameters
    for name, fmt in formats.items():
        weight = model.get_parameter(name)
        groups = weight.numel() // weight.shape[-1] * fmt.groups(weight.shape[-1])
        total += weight.numel() * fmt.bits // 8 + groups * (scale_bytes + (not fmt.symmetric)) - 4 * weight.numel()
    return total


def describe(model: Any, request: ExportRequest, formats: Mapping[str, Format] | None = None) -> dict[str, Any]:
    """What an export would contain, without tracing anything: methods, shapes, sizes in bytes.

    Args:
        formats: for int8 and int4, the format of every tensor that is quantised.
    """
    target = get_target(request.target)
    cached = as_cached(model, request)
    specs = {chunk: cached.spec(chunk).of_capacity(request.max_seq_len) for chunk in request.call_sizes(model)}
    parameters = sum(p.numel() for p in model.parameters())
    first = next(iter(specs.values()))
    segment = 4 * (first.segment or 0) * first.h.shape[-1] if first.written else 0
    return {
        "target": request.target,
        "quantization": request.quant,
        "parameters": parameters,
        "weight_bytes": weight_bytes(model, request.quant, formats or {}, target.scale_bytes),
        "state_bytes": sum(t.nbytes for t in (*first.state, *first.inputs[1:])) + segment,
        "max_loops": first.max_loops,
        "methods": {
            name: {
                side: {t["name"]: [t["shape"], t["dtype"]] for t in tensors_json(tensors)}
                for side, tensors in zip(("inputs", "outputs"), both)
            }
            for name, both in signatures(specs, target, request.quant).items()
        },
    }
