"""Quantised checkpoints: a folder that every exporter and the PyTorch runtime read.

config.json            as in a float checkpoint
model.safetensors      NAME.codes (uint8, packed), NAME.scales (bfloat16) and, if asymmetric, NAME.zeros (uint8) of every
                       quantised tensor; the others under their own names, in bfloat16 where that loses nothing
quantization.json      format of every tensor, the report, SHA-256 of model.safetensors, the float model's fingerprint
tokenizer.json, ...    as in the float checkpoint
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rmse_edge.arch.registry import arch_of_model
from rmse_edge.chat import TEMPLATE_FILE
from rmse_edge.checkpoint import (
    CONFIG_FILE,
    QUANTIZATION_FILE,
    check_size,
    empty_model,
    finish_interrupted,
    read_config,
    stored_keys,
)
from rmse_edge.errors import CheckpointError, UserError
from rmse_edge.files import changed_folder, check_changes, digest_file, tidy
from rmse_edge.heads import HEADS_FILES
from rmse_edge.layers.held import hold, plain_state
from rmse_edge.schema import Digest, Name, annotations_of, first_of, read_json, validated
from rmse_edge.shards import WEIGHTS_FILE, check_finite
from rmse_edge.vocabulary import GENERATION_FILE, TOKENIZER_FILE

from .quantizer import Quantized
from .tensors import Format, PackedTensor, QuantizedTensor

FORMAT = "rmse-edge quantized checkpoint"
FORMAT_VERSION = 1
AGAIN = "quantise again"
LEAN = 1 << 30  # bytes of float32 weights
# From the float checkpoint.
CARRIED = (TOKENIZER_FILE, "tokenizer_config.json", TEMPLATE_FILE, GENERATION_FILE, "sample.txt", *HEADS_FILES)


def check_destination(folder: Path, overwrite: bool) -> None:
    """Fail unless a quantised checkpoint may be written to `folder`.

    Raises:
        CheckpointError: something else is there, or a checkpoint that may not be replaced.
    """
    tidy(folder)
    if folder.absolute().parent.is_dir():  # otherwise it will be made
        check_changes(folder, CheckpointError)
    if folder.exists():
        finish_interrupted(folder)
    if folder.exists() and any(folder.iterdir()):
        if not is_quantized_checkpoint(folder):
            raise CheckpointError(f"{folder}: exists and is not a quantised checkpoint; choose another folder")
        if not overwrite:
            raise CheckpointError(f"{folder}: already exists; remove it, choose another place, or pass overwrite=True")


def save_quantized(quantized: Quantized, folder: str | Path, source: str | Path | None = None) -> None:
    """Write a quantised checkpoint, all or nothing.

    Args:
        source: the float checkpoint; its tokenizer, text sample and heads for drafts come along.
    Raises:
        CheckpointError: the folder exists and holds something else, or cannot be written.
    """
    folder = Path(folder)
    check_destination(folder, overwrite=True)
    carried = [name for name in CARRIED if source is not None and (Path(source) / name).is_file()]
    # What the checkpoint that is replaced had, if there was one, goes with it.
    with changed_folder(folder, CheckpointError, remove=set(CARRIED) - set(carried)) as scratch:
        save_file(_tensors(quantized), scratch / WEIGHTS_FILE, metadata={"format": "pt"})
        (scratch / CONFIG_FILE).write_text(quantized.model.config.to_json(), encoding="utf-8")
        for name in carried:
            shutil.copyfile(Path(source or "") / name, scratch / name)
        document = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "quant": quantized.quant,
            "fingerprint": quantized.fingerprint,
            "sha256": digest_file(scratch / WEIGHTS_FILE),
            "tensors": {name: vars(q.format) for name, q in quantized.tensors.items()},
            "report": quantized.report,
        }
        (scratch / QUANTIZATION_FILE).write_text(
            json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8"
        )


def _tensors(quantized: Quantized) -> dict[str, Tensor]:
    found = {}
    state = plain_state(quantized.model)
    for name in stored_keys(quantized.model.config, list(dict.fromkeys([*state, *quantized.tensors]))):
        q = quantized.tensors.get(name)
        if q is None:
            short = state[name].detach().to(torch.bfloat16)
            exact = torch.equal(short.float(), state[name].float())
            found[name] = (short if exact else state[name].detach()).contiguous()
            continue
        found[f"{name}.codes"] = q.packed().contiguous()
        found[f"{name}.scales"] = q.scales.to(torch.bfloat16)
        if q.zeros is not None:
            found[f"{name}.zeros"] = q.zeros
    return found


def is_quantized_checkpoint(folder: str | Path) -> bool:
    return (Path(folder) / QUANTIZATION_FILE).is_file()


def load_quantized(folder: str | Path, lean: bool | None = None) -> Quantized:
    """Read a quantised checkpoint; its model is float32, in evaluation mode, with the weights its integers stand for.

    Args:
        lean: the model holds its integers and decodes a weight whenever it reads one (`held.hold`), a quarter of the memory.
            None: where its float weights would take more than `LEAN` bytes.
    Raises:
        CheckpointError: one line that names the file, and the tensor, that is missing, damaged or does not fit.
    """
    folder = Path(folder)
    config = read_config(folder)
    document = _read_document(folder / QUANTIZATION_FILE)
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        raise CheckpointError(f"{weights}: no such file; copy it beside config.json")
    if digest_file(weights) != document.sha256:
        raise CheckpointError(
            f"{weights}: its SHA-256 is not that of {QUANTIZATION_FILE}; the file is damaged, copy it again"
        )
    check_size(config, weights)
    model = empty_model(config)  # memory that nobody has written to is not taken yet
    state = model.state_dict()
    if lean is None:
        lean = sum(4 * state[name].numel() for name in document.tensors if name in state) > LEAN
    tensors = {}
    if (unknown := first_of(document.tensors, state)) is not None:
        raise CheckpointError(
            f"{folder / QUANTIZATION_FILE}: tensors.{unknown}: is no tensor of {CONFIG_FILE}'s model; quantise again"
        )
    try:
        with safe_open(weights, framework="pt", device="cpu") as file:
            for name in stored_keys(config, list(state)):
                if name in document.tensors:
                    tensors[name] = _read_quantized(file, name, document.tensors[name], state[name], weights)
                    if not lean:
                        state[name].copy_(tensors[name].dequantize())
                else:
                    tensor = _read(file, name, weights, tuple(state[name].shape))
                    check_finite(weights, name, tensor)
                    state[name].copy_(tensor)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{weights}: truncated or damaged ({' '.join(str(error).split())})") from None
    if lean:
        del state
        hold(model, tensors, arch_of_model(model).tied(config))
    return Quantized(model.eval(), tensors, document.quant, document.fingerprint, document.report)


@dataclass(frozen=True)
class Document:
    """quantization.json."""

    quant: Name
    fingerprint: Name
    sha256: Digest
    tensors: dict[Name, dict[str, Any]]  # the fields of a `Format`
    report: dict[str, Any]


def _read_document(path: Path) -> Document:
    try:
        document = read_json(path, CheckpointError, AGAIN)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; {path.parent} is not a quantised checkpoint") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not the file of an {FORMAT}")
    if document.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {document.get('format_version')!r}, this rmse-edge reads {FORMAT_VERSION}; {AGAIN}"
        )
    return validated(Document, document, str(path), CheckpointError, AGAIN)


def _read(file: Any, name: str, path: Path, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    if name not in file.keys():  # noqa: SIM118  (a safetensors file is no dict)
        raise CheckpointError(f"{path}: tensor {name} is missing; the file is not of this config.json's model")
    found = tuple(file.get_slice(name).get_shape())
    if found != shape:
        raise CheckpointError(f"{path}: tensor {name} has shape {found}, expected {shape}; quantise again")
    tensor: Tensor = file.get_tensor(name)
    if tensor.dtype != dtype if dtype is not None else not tensor.is_floating_point():
        raise CheckpointError(
            f"{path}: tensor {name} is {tensor.dtype}, expected {dtype or 'floating point'}; quantise again"
        )
    return tensor


def _read_quantized(file: Any, name: str, values: dict[str, Any], weight: Tensor, path: Path) -> QuantizedTensor:
    try:
        if (unknown := first_of(values, annotations_of(Format))) is not None:
            raise UserError(f"unknown field {unknown!r}; expected {', '.join(annotations_of(Format))}")
        if "bits" not in values:
            raise UserError("bits: is missing")
        fmt = Format(**values)
        if weight.dim() < 2 or weight.shape[-1] * fmt.bits % 8:
            raise UserError(f"a tensor of shape {tuple(weight.shape)} has no integers of {fmt.bits} bits")
        groups = fmt.groups(weight.shape[-1])
    except UserError as error:
        raise CheckpointError(f"{path.parent / QUANTIZATION_FILE}: tensor {name}: {error}; quantise again") from None
    *outer, inputs = weight.shape
    codes = _read(file, f"{name}.codes", path, (*outer, inputs * fmt.bits // 8), torch.uint8)
    scales = _read(file, f"{name}.scales", path, (*outer, groups)).float()
    check_finite(path, name, scales * fmt.largest)  # of the largest weight there may be
    zeros = None if fmt.symmetric else _read(file, f"{name}.zeros", path, (*outer, groups), torch.uint8)
    if zeros is not None and int(zeros.max()) > fmt.largest:
        raise CheckpointError(f"{path}: tensor {name}.zeros has {int(zeros.max())}, beyond {fmt.largest}; {AGAIN}")
    return PackedTensor(fmt, scales=scales, zeros=zeros, packed=codes)
