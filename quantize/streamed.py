"""A checkpoint rounded tensor by tensor, for models that do not fit into memory as floats.

Rounding to the nearest needs no text, and so no model: every weight is read, rounded and dropped before the next one. What is
taken are the packed integers, and one weight as floats. `quantize` on the loaded model gives the same integers.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from rmse_edge.arch.common.identity import fingerprint_of
from rmse_edge.arch.registry import arch_of
from rmse_edge.checkpoint import check_size, empty_model, read_config, tensors_of
from rmse_edge.errors import ArgumentError, CheckpointError
from rmse_edge.layers.held import hold
from rmse_edge.progress import Report, Work, silent
from rmse_edge.shards import StoredTensors, weight_files

from .quantizer import Quantized, QuantizeRequest, report_of, tensor_report
from .scheme import table_of
from .store import is_quantized_checkpoint
from .tensors import PackedTensor, QuantizedTensor, round_to_nearest

ROUNDING = "rounding"


def can_stream(request: QuantizeRequest, text: object) -> bool:
    """Whether a request can be carried out without the model: rounding to the nearest, nothing calibrated or compared."""
    return not request.needs_text and text is None and request.kv is None


def quantize_folder(folder: str | Path, request: QuantizeRequest, progress: Report = silent) -> Quantized:
    """Round the weights of a float checkpoint to the nearest.

    Returns:
        The model holds its integers and decodes a weight whenever it reads it (`rmse_edge/layers/held.py`).
    Raises:
        CheckpointError: as `load_checkpoint`.
        UserError: a tensor the quantiser does not know, or a group size that does not divide.
    """
    if not can_stream(request, None):
        raise ArgumentError("method", "needs the whole model, and with it `quantize`", request.method)
    folder = Path(folder)
    config = read_config(folder)
    if is_quantized_checkpoint(folder):
        raise CheckpointError(f"{folder}: a quantised checkpoint; give the float one it was made from")
    check_size(config, *weight_files(folder))
    model = empty_model(config)  # memory that nobody has written to is not taken yet
    formats, state = request.scheme.formats(model), model.state_dict()
    tied = arch_of(config.model_type).tied(config)
    # In the order of a fingerprint, in which a tensor counts under each of its names.
    names = sorted(state)
    note = Work({ROUNDING: 1.0}, progress).start(ROUNDING, len(names))
    tensors: dict[str, QuantizedTensor] = {}
    reports: dict[str, dict[str, Any]] = {}

    def each(stored: StoredTensors) -> Iterator[tuple[str, Tensor]]:
        """Every tensor as it is read; in between it goes where it belongs."""
        order = [tied.get(name, name) for name in names]
        for name, (of, weight) in zip(names, tensors_of(model, stored, order)):
            if of in formats and of not in tensors:
                whole = round_to_nearest(weight, formats[of])
                reports[of] = tensor_report(weight, whole)
                tensors[of] = PackedTensor(whole.format, whole.codes, whole.scales, whole.zeros)
            elif of not in formats:
                state[of].copy_(weight)
            note(1)
            yield name, weight

    stored = StoredTensors(folder)
    found = fingerprint_of(config, each(stored))
    ordered = {name: tensors[name] for stage in table_of(model).in_order(formats) for name in stage}
    report = report_of(request, ordered, {n: reports[n] for n in ordered}, [n for n in state if n not in formats])
    state.clear()  # what it named is about to be replaced
    hold(model, ordered, tied)
    return Quantized(model.eval(), ordered, request.scheme.quant, found, report)
