"""Float model + calibration text -> integers, scales and a report of what they cost."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from rmse_edge.arch.common.quantization import QuantTable
from rmse_edge.arch.registry import arch_of_model
from rmse_edge.errors import ArgumentError
from rmse_edge.layers.cache import cache_dtype, caches_of, with_cache_dtype
from rmse_edge.numbers import KvDtype
from rmse_edge.progress import Report, Work, silent
from rmse_edge.puzzles.sets import Boards
from rmse_edge.shards import check_finite
from rmse_edge.text import consecutive_blocks, random_blocks, split, spread

from .boards import compare_boards, split_boards
from .compare import compare
from .gate import recalibrate
from .gptq import gptq
from .hessians import LOOPS, Hessians, gather
from .kv_scales import with_int8_cache
from .qat import finetune
from .reader import text_length, text_of
from .scheme import METHODS, Scheme, table_of
from .tensors import Format, QuantizedTensor, in_blocks, round_to_nearest

KV = get_args(KvDtype)
KV_SCALES, FINETUNING = "scales of keys and values", "finetuning"
GATE, COMPARING = "recalibrating the exit gate", "comparing with the float model"

GATE_TOKENS = 8192  # that the exit gate is recalibrated on: every trial of a bias reads them all
# Of the calibration text, for weights that read every position: this share, and if there are so many this many tokens.
# A routed expert reads few positions, and needs all of the text.
DENSE_SHARE, DENSE_TOKENS = 0.25, 8192
LEAST_TOKENS = 512  # of a calibration: fewer say too little about 512 experts
SMALLEST = 1e-24  # square of a norm that is divided by
LEAST_TEXT = 1024  # tokens of a text that is split into calibration and evaluation


@dataclass(frozen=True)
class QuantizeRequest:
    """Everything a quantisation may be asked for."""

    scheme: Scheme = field(default_factory=Scheme)
    method: str = "gptq"
    loops: str = "exits"  # whose inputs GPTQ sees, see `hessians.gather`
    in_flow: bool = True  # inputs from the model as far as it is quantised; False: from the float model
    kv: KvDtype | None = None  # the KV cache's type; None: the checkpoint's own
    calibration_tokens: int = 32_768
    evaluation_tokens: int = 8_192  # 0: no comparison with the float model
    recalibrate_gate: bool = True
    qat_steps: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("method", self.method, METHODS),
            ("loops", self.loops, LOOPS),
            ("kv", self.kv, (None, *KV)),
        ):
            if value not in known:
                raise ArgumentError(name, f"got {value!r}, expected one of {', '.join(k for k in known if k)}")
        if self.calibration_tokens < LEAST_TOKENS:
            raise ArgumentError(
                "calibration_tokens", f"got {self.calibration_tokens}, expected at least {LEAST_TOKENS}"
            )

    @property
    def needs_text(self) -> bool:
        return self.method != "rtn" or self.kv == "int8" or self.qat_steps > 0


@dataclass
class Quantized:
    """A quantised model: float32 in PyTorch, with the integers that its weights stand for."""

    model: Any
    tensors: dict[str, QuantizedTensor]
    quant: str  # "int8" or "int4"
    fingerprint: str  # of the float model it was made from
    report: dict[str, Any]


def blocks_of(ids: np.ndarray, length: int, request: QuantizeRequest) -> tuple[Tensor, Tensor | None]:
    """Calibration blocks (n, T) from the first 90 % of a text, evaluation blocks (m, T + 1) from the rest.

    Raises:
        ArgumentError: the text is too short.
    """
    if len(ids) < LEAST_TEXT:
        raise ArgumentError("ids", f"the text has {len(ids)} tokens, expected at least {LEAST_TEXT}")
    train, held_out = split(ids, "train"), split(ids, "validation")
    length = min(length, len(held_out) - 1)
    count = max(1, request.calibration_tokens // length)
    calibration = torch.from_numpy(random_blocks(train, count, length, (request.seed,)))[:, :-1]
    if request.evaluation_tokens == 0:
        return calibration, None
    every = torch.from_numpy(consecutive_blocks(held_out, length))
    return calibration, every[spread(len(every), max(1, request.evaluation_tokens // length))]


def quantize(
    model: Any,
    request: QuantizeRequest,
    ids: np.ndarray | Boards | None = None,
    fingerprint: str = "",
    progress: Report = silent,
) -> Quantized:
    """Quantise a copy of `model`.

    Args:
        ids: (n,) tokens of a text like those the model will read. The first 90 % calibrate, the rest evaluate. None:
            weights are rounded to the nearest, and nothing is compared. Of a model of boards: boards, alike.
        fingerprint: of `model`, kept with the result.
        progress: told what is being done and how far the whole is, from several threads.
    Raises:
        UserError: a tensor the quantiser does not know, a group size that does not divide, a text that is too short or on
            which the model does not give numbers, or a method that needs a text.
    """
    formats = request.scheme.formats(model)
    if ids is None and request.needs_text:
        raise ArgumentError("ids", "is missing: a text like those the model will read (method=rtn rounds without one)")
    for name, p in model.state_dict().items():
        check_finite("the model", name, p)
    calibration, held_out, boards = None, None, None
    if isinstance(ids, Boards):
        if request.qat_steps:
            raise ArgumentError("qat_steps", f"got {request.qat_steps}, expected 0: a model of boards is not finetuned")
        calibration, boards = split_boards(ids, request.calibration_tokens, request.seed)
    elif ids is not None:
        last = text_of(model).vocab_size - 1
        if len(ids) and ids.max() > last:
            raise ArgumentError(
                "ids", f"token {ids.max()} is outside the vocabulary (0..{last}); the tokenizer is of another model"
            )
        calibration, held_out = blocks_of(ids, text_length(model), request)
    model = model.eval()
    table = table_of(model)
    stages = table.in_order(formats)
    done = Work(_costs(model, request, stages, calibration, held_out), progress)
    work = with_kv(model, request, calibration, done)
    tensors: dict[str, QuantizedTensor] = {}
    rare = 0
    for stage in stages:
        found = _hessians(model, work, stage, calibration, request, done)
        rare = max(rare, found.rare()) if found else rare
        for name in stage:
            weight = model.get_parameter(name).detach()
            tensors[name] = _quantize_tensor(name, weight, formats[name], found)
            with torch.no_grad():
                work.get_parameter(name).copy_(tensors[name].dequantize())
    if request.qat_steps and calibration is not None:
        note = done.start(FINETUNING, request.qat_steps)
        tensors = finetune(model, work, tensors, calibration, request.qat_steps, request.seed, lambda loss: note(1))
    moved = None
    if request.recalibrate_gate and calibration is not None:
        note = done.start(GATE, 1)
        moved = recalibrate(model, work, calibration[: max(1, GATE_TOKENS // calibration.shape[1])])
        note(1)
    paths = {name.rpartition(".")[0]: len(tensors[name].codes) for name in tensors if table.use(name) == "experts"}
    experts = sum(paths.values())
    report = report_of(
        request,
        tensors,
        {name: tensor_report(model.get_parameter(name).detach(), q) for name, q in tensors.items()},
        [name for name in work.state_dict() if name not in tensors],
    ) | {
        "rarely_routed_experts": {"count": rare, "of": experts} if experts and request.method == "gptq" else None,
        "gate": None if moved is None else dataclasses.asdict(moved),
        "calibration_tokens": 0 if calibration is None else calibration.numel(),
    }
    if boards is not None and request.evaluation_tokens:
        report["evaluation"] = compare_boards(model, work, boards)
    if held_out is not None:
        report["evaluation"] = compare(model, work, held_out, done.start(COMPARING, held_out[:, 1:].numel()))
        if not math.isfinite(report["evaluation"]["full_depth"]["increase"]):
            raise ArgumentError(
                "ids", "the model's loss is no number on this text; check the checkpoint with rmse-eval"
            )
    return Quantized(work, tensors, request.scheme.quant, fingerprint, report)


def with_kv(model: Any, request: QuantizeRequest, calibration: Tensor | None, done: Work) -> Any:
    """A copy of `model` with the KV cache that was asked for, its weights unchanged.

    Raises:
        ArgumentError: its architecture has no such cache.
    """
    wanted = request.kv
    if wanted == "int8" and caches_of(model):
        assert calibration is not None  # `needs_text`
        return with_int8_cache(model, calibration, done.start(KV_SCALES, calibration.numel()))
    changed = cached_in(model, wanted)
    return copy.deepcopy(model) if changed is model else changed


def cached_in(model: Any, kv: KvDtype | None) -> Any:
    """`model`, or a copy whose KV cache has another type. In int8 it is good for its shapes: no scales are found.

    Raises:
        ArgumentError: its architecture has no such cache.
    """
    changed = model if kv is None else with_cache_dtype(model, kv)
    if kv is not None and (own := cache_dtype(changed)) != kv:
        raise ArgumentError("kv", f"model_type {model.config.model_type} keeps its cache in {own}; leave it out", kv)
    return changed


def _hessians(
    model: Any, work: Any, stage: list[str], calibration: Tensor | None, request: QuantizeRequest, done: Work
) -> Hessians | None:
    """What a stage's weights see; None where that does not matter: rounded to the nearest, or looked up."""
    text = _text_of(model, stage, calibration, request)
    if text is None:
        return None
    note = done.start(_label(stage), text.numel())
    table = table_of(model)
    if stage == [table.embedding]:  # it is the head as well, and what the head says is what counts
        assert table.embedding is not None and table.head is not None
        found = gather(model, text, [table.head], request.loops, note)
        found.sums[table.embedding] = found.sums.pop(table.head)
        return found
    return gather(work if request.in_flow else model, text, stage, request.loops, note)


def _text_of(model: Any, stage: list[str], calibration: Tensor | None, request: QuantizeRequest) -> Tensor | None:
    """The part of the calibration text (n, T) that a stage reads; None: it needs none."""
    table = table_of(model)
    looked_up = stage == [table.embedding] and not is_tied(model, table)
    if calibration is None or request.method == "rtn" or looked_up:
        return None
    if any(table.use(name) == "experts" for name in stage):
        return calibration
    blocks, length = calibration.shape
    return calibration[: math.ceil(max(DENSE_SHARE * blocks, DENSE_TOKENS / length))]


def is_tied(model: Any, table: QuantTable) -> bool:
    """Whether the head's weight is the embedding's."""
    return table.head is not None and arch_of_model(model).tied(model.config).get(table.head) == table.embedding


def _label(stage: list[str]) -> str:
    """For people who wait: the tensor's own name, and where there is one per layer all of it."""
    name = stage[0].removesuffix(".weight")
    parts = name.split(".")
    return name if any(part.isdecimal() for part in parts) else parts[-1]


def _costs(
    model: Any,
    request: QuantizeRequest,
    stages: list[list[str]],
    calibration: Tensor | None,
    held_out: Tensor | None,
) -> dict[str, float]:
    """Roughly what each part of a quantisation costs, in positions that are computed to the end."""
    texts = {_label(stage): _text_of(model, stage, calibration, request) for stage in stages}
    found: dict[str, float] = {label: text.numel() for label, text in texts.items() if text is not None}
    loops = model.spec(model.call_sizes()[0]).max_loops
    for stage in stages:
        if _label(stage) in found and all(table_of(model).is_once(name) for name in stage):
            found[_label(stage)] /= loops
    if calibration is not None:
        if request.kv == "int8":
            found[KV_SCALES] = 1.5 * calibration.numel()
        if request.qat_steps:
            found[FINETUNING] = (
                30 * request.qat_steps * calibration.shape[1]
            )  # a batch of 8, forth and back, and the float model
        if request.recalibrate_gate:
            found[GATE] = min(calibration.numel(), GATE_TOKENS)
    if held_out is not None:
        found[COMPARING] = 3 * held_out[:, 1:].numel()
    return found


def _quantize_tensor(name: str, weight: Tensor, fmt: Format, found: Hessians | None) -> QuantizedTensor:
    if found is None:
        return round_to_nearest(weight, fmt)
    return gptq(weight, found.of(name), fmt)


def report_of(
    request: QuantizeRequest,
    tensors: Mapping[str, QuantizedTensor],
    reports: dict[str, dict[str, Any]],
    floats: list[str],
) -> dict[str, Any]:
    """A report of weights that were rounded and not calibrated.

    Args:
        reports: `tensor_report` of each.
        floats: the names of what stayed float.
    """
    return {
        "quant": request.scheme.quant,
        "request": dataclasses.asdict(request),
        "bytes": sum(q.nbytes for q in tensors.values()),
        "tensors": reports,
        "float_tensors": floats,
        "rarely_routed_experts": None,
        "gate": None,
        "calibration_tokens": 0,
    }


def tensor_report(weight: Tensor, q: QuantizedTensor) -> dict[str, Any]:
    """Format and relative error |w - q| / |w| of one tensor; of stacked experts also the worst one's."""
    count = weight.shape[:-2].numel()
    # Of every matrix (N, K) the squares of its error and of itself, block by block. As Python's numbers: tensors of one number
    # would lie between the memory of one block and the next, which could not be used again.
    sums = [(float((got - rows).double().square().sum()), float(rows.double().square().sum()))
            for rows, got in zip(in_blocks(weight), q.blocks())]  # fmt: skip
    error, size = torch.tensor(sums, dtype=torch.float64).view(count, -1, 2).sum(1).unbind(-1)
    found = {
        "bits": q.format.bits,
        "group": q.format.group,
        "symmetric": q.format.symmetric,
        "shape": list(weight.shape),
        "bytes": q.nbytes,
        "relative_error": float((error.sum() / size.sum().clamp_min(SMALLEST)).sqrt()),
    }
    if weight.dim() == 3:
        found["worst_expert"] = float((error / size.clamp_min(SMALLEST)).sqrt().max())
    return found
