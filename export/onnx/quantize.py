"""Quantised weights in ONNX: readers of a weight given by its integers become ONNX Runtime's operators on them.

    MatMul, Gemm  -> MatMulNBits            Gather -> GatherBlockQuantized            MoE -> QMoE
    ExpertLoop    -> Loop, with MatMulNBits on one expert's integers at a time

The program is traced with `rmse_edge::stored_weight` (rmse_edge/layers/held.py). Scales are bfloat16 numbers stored as float32: the
operators keep them beside what they pack, and so these stay pages of the file instead of becoming memory. Per-channel scales
are stored once per channel, and `Expand` gives every block its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper
from torch import nn

from rmse_edge.arch.common.quantization import Use
from rmse_edge.arch.registry import arch_of_model
from rmse_edge.errors import ExportError
from rmse_edge.export.targets import LowerOptions
from rmse_edge.layers.held import with_stored
from rmse_edge.layers.mixers.base import Mixer
from rmse_edge.quantize import Format, QuantizedTensor
from rmse_edge.quantize.parallel import shared_copy

from .experts import DOWN, UP, Product, expert_loop
from .ops import CONTRIB, EXPERT_LOOP, STORED_WEIGHT, TRANSPOSED
from .options import OnnxOptions
from .passes import forget_own_operators, graphs, names_read, remove_dead_nodes
from .weights import MODEL

QMOE_SCALES = (3, 6)  # places of its inputs
BLOCKS = (128, 64, 32, 16)  # for weights with one scale per channel, by preference: the operators insist on blocks


def prepare(model: nn.Module, options: LowerOptions) -> nn.Module:
    """`model`, or a copy in which quantised weights are their integers, and mixers trace to ONNX Runtime's operators."""
    if options.tensors:
        model = with_stored(model, options.tensors, arch_of_model(model).tied(model.config))
    own: OnnxOptions = options.own or OnnxOptions()
    if not own.recurrent_operators or not any(isinstance(module, Mixer) for module in model.modules()):
        return model
    model = shared_copy(model)
    for module in model.modules():
        if isinstance(module, Mixer):
            module.operators = True
    return model


def use_integers(
    model: ModelProto, tensors: Mapping[str, QuantizedTensor], names: Mapping[str, str], accuracy_level: int
) -> set[str]:
    """Replace every reader of a quantised weight, in the graph and in its bodies.

    Given:   y = MatMul(x, Transposed(StoredWeight(w.codes, w.scales)))
    Result:  y = MatMulNBits(x, w.codes, w.scales); w.codes and w.scales in outer scope

    Args:
        tensors: by name of the weight.
        names: of the initializers that hold codes -> of the weights.
        accuracy_level: 4 rounds activations to int8, 0 computes in float32.
    Returns:
        The names of the weights that the graph reads.
    Raises:
        ExportError: a quantised weight is read by an operator that has no form for integers.
    """
    found = _weights(model.graph, names)
    stored = _Stored(model.graph, tensors)
    for graph in [*graphs(model.graph)]:
        for index, node in enumerate(graph.node):
            weights = {i: found[name] for i, name in enumerate(node.input) if name in found}
            if not weights or node.output[0] in found:
                continue
            replace = REPLACEMENTS.get(node.op_type)
            new = replace(node, weights, stored, accuracy_level) if replace else None
            if new is None:
                name = next(iter(weights.values()))
                raise ExportError(
                    f"{name.removesuffix('.T')}: is quantised, but {node.op_type} reads it, which ONNX Runtime has only "
                    "for floating point; export with quant=fp32 or fp16"
                )
            graph.node[index].CopyFrom(new)
        for node in [n for n in graph.node if n.output and n.output[0] in found]:
            graph.node.remove(node)
    stored.finish(model)
    _remove_unread(model.graph)
    forget_own_operators(model)
    return {name.removesuffix(".T") for name in found.values()}


def _weights(graph: GraphProto, names: Mapping[str, str]) -> dict[str, str]:
    """Values that are a quantised weight -> its name, "NAME.T" if transposed."""
    found: dict[str, str] = {}
    for inner in graphs(graph):  # a body reads what the graphs around it have
        for node in inner.node:
            if node.op_type == STORED_WEIGHT:
                found[node.output[0]] = names[node.input[0]]
            elif node.input and node.input[0] in found and _transposes(node):
                name = found[node.input[0]]
                found[node.output[0]] = name.removesuffix(".T") if name.endswith(".T") else f"{name}.T"
    return found


def _transposes(node: NodeProto) -> bool:
    perms = [list(a.ints) for a in node.attribute if a.name == "perm"]
    return node.op_type == TRANSPOSED or (node.op_type == "Transpose" and perms == [[1, 0]])


def _remove_unread(graph: GraphProto) -> None:
    """Initializers that only the operators read that are gone: codes and scales as they were traced."""
    read = names_read(graph)
    kept = [t for t in graph.initializer if t.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def with_float_activations(model: ModelProto) -> None:
    """Make a graph that rounds activations compute in float32, on the same integers of the same file.

    Given:   y = MatMulNBits(x, w.codes, w.scales), accuracy_level 4
    Result:  the same with accuracy_level 0; of int8, which `QMoE` reads in blocks only with rounded activations,
             y = QMoE(x, w.codes, w.scales) without blocks, w.scales one per channel
    """
    makers = {o: n for n in model.graph.node for o in n.output}
    initializers = {t.name: t for t in model.graph.initializer}
    for graph in graphs(model.graph):
        for node in graph.node:
            given = {a.name: a for a in node.attribute} if node.domain == CONTRIB else {}
            if "accuracy_level" in given:
                given["accuracy_level"].i = 0
            if "block_size" not in given or node.op_type != "QMoE" or given["expert_weight_bits"].i != 8:
                continue
            for i in QMOE_SCALES:
                each = makers[node.input[i]].input[0] if node.input[i] in makers else node.input[i]
                name = f"{each}.channels"
                if name not in initializers:
                    initializers[name] = model.graph.initializer.add()
                    initializers[name].CopyFrom(initializers[each])
                    initializers[name].name = name
                    del initializers[name].dims[-1]  # (E, N, 1) -> (E, N)
                node.input[i] = name
            node.attribute.remove(given["block_size"])
    remove_dead_nodes(model)


class _Stored:
    """Codes, scales and zeros in the outer graph, each once, in the layouts that the operators read."""

    def __init__(self, graph: GraphProto, tensors: Mapping[str, QuantizedTensor]) -> None:
        self.graph, self.tensors = graph, tensors
        self.known: set[str] = set()
        self.nodes: list[NodeProto] = []  # that make scales, in front of everything

    def block(self, *names: str) -> int:
        """The block size that the operators are told, one for all of `names`."""
        formats = [self.tensors[name] for name in names]
        if formats[0].format.group is not None:
            return formats[0].format.group
        return next((b for b in BLOCKS if all(q.shape[-1] % b == 0 for q in formats)), BLOCKS[-1])

    def codes(self, name: str, block: int | None = None) -> str:
        """(..., N, K * bits / 8) uint8, or (..., N, blocks, block * bits / 8) with the last block filled up."""
        q = self.tensors[name]
        packed = q.packed().numpy()
        if block is None:
            return self._keep(f"{MODEL}{name}.codes", packed)
        *first, wide = packed.shape
        packed = packed.reshape(-1, wide)
        rows = len(packed)
        bytes_of_block = block * q.format.bits // 8
        zero = q.format.middle if q.format.bits == 8 else q.format.middle * 0x11
        padded = np.full((rows, -(-wide // bytes_of_block) * bytes_of_block), zero, np.uint8)
        padded[:, :wide] = packed
        return self._keep(f"{MODEL}{name}.codes.blocks", padded.reshape(*first, -1, bytes_of_block))

    def scales(self, name: str, block: int | None) -> str:
        """(..., N, blocks) float32; with `block` None one per channel, (..., N)."""
        q = self.tensors[name]
        scales = q.scales if block is not None else q.scales.squeeze(-1)
        label = f"{MODEL}{name}.scales" if block is not None else f"{MODEL}{name}.scales.channels"
        if label in self.known:
            return label
        blocks = 1 if block is None else -(-q.shape[-1] // block)
        if blocks == 1 or blocks == scales.shape[-1]:
            return self._keep(label, scales.numpy())
        each = self._keep(f"{label}.each", scales.numpy())
        shape = self._keep(f"{label}.shape", np.array([*scales.shape[:-1], blocks], np.int64))
        self.nodes.append(helper.make_node("Expand", [each, shape], [label]))
        self.known.add(label)
        return label

    def zeros(self, name: str) -> str:
        """(..., N, bytes) uint8, two zeros of four bits in a byte; "" where symmetric."""
        q = self.tensors[name]
        if q.zeros is None:
            return ""
        zeros = q.zeros.numpy()
        if q.format.bits == 4:
            if zeros.shape[-1] % 2:
                zeros = np.concatenate([zeros, np.zeros_like(zeros[..., :1])], -1)
            zeros = zeros[..., 0::2] | (zeros[..., 1::2] << 4)
        return self._keep(f"{MODEL}{name}.zeros", zeros)

    def _keep(self, label: str, array: np.ndarray) -> str:
        if label not in self.known:
            self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array), label))
            self.known.add(label)
        return label

    def finish(self, model: ModelProto) -> None:
        for node in reversed(self.nodes):
            model.graph.node.insert(0, node)
        if self.known and not any(o.domain == CONTRIB for o in model.opset_import):
            model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def _matmul(node: NodeProto, weights: dict[int, str], stored: _Stored, accuracy_level: int) -> NodeProto | None:
    """Given: MatMul(x, w.T). Result: MatMulNBits(x, w)."""
    if set(weights) != {1} or not weights[1].endswith(".T"):
        return None
    return _nbits(node, weights[1].removesuffix(".T"), "", stored, accuracy_level)


def _gemm(node: NodeProto, weights: dict[int, str], stored: _Stored, accuracy_level: int) -> NodeProto | None:
    """Given: Gemm(x, w, bias, transB=1), or w.T without. Result: MatMulNBits(x, w, bias)."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    plain = given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
    if set(weights) != {1} or not plain or weights[1].endswith(".T") == bool(given.get("transB", 0)):
        return None
    bias = node.input[2] if len(node.input) > 2 else ""
    return _nbits(node, weights[1].removesuffix(".T"), bias, stored, accuracy_level)


def _nbits(node: NodeProto, name: str, bias: str, stored: _Stored, accuracy_level: int) -> NodeProto:
    q, block = stored.tensors[name], stored.block(name)
    inputs = [node.input[0], stored.codes(name, block), stored.scales(name, block), stored.zeros(name), "", bias]
    while not inputs[-1]:
        inputs.pop()
    rows, columns = q.shape
    return helper.make_node(
        "MatMulNBits", inputs, node.output, node.name, domain=CONTRIB,
        K=columns, N=rows, bits=q.format.bits, block_size=block, accuracy_level=accuracy_level,
    )  # fmt: skip


def _gather(node: NodeProto, weights: dict[int, str], stored: _Stored, accuracy_level: int) -> NodeProto | None:
    """Given: Gather(w, rows). Result: GatherBlockQuantized(w, rows)."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
    if set(weights) != {0} or weights[0].endswith(".T") or axis != 0:
        return None
    name = weights[0]
    q, block = stored.tensors[name], stored.block(name)
    check_format(name, q.format, q.shape[-1], "rows")
    inputs = [stored.codes(name), node.input[1], stored.scales(name, block), stored.zeros(name)]
    return helper.make_node(
        "GatherBlockQuantized", inputs if inputs[-1] else inputs[:-1], node.output, node.name, domain=CONTRIB,
        bits=q.format.bits, block_size=block, gather_axis=0, quantize_axis=len(q.shape) - 1,
    )  # fmt: skip


def check_format(name: str, fmt: Format, inputs: int, use: Use) -> None:
    """Fail unless ONNX Runtime's operators have this format; that for a matrix alone takes any number of inputs.

    Raises:
        ExportError: naming the tensor and the fix.
    """
    if inputs % BLOCKS[-1] and use != "matrix":
        raise ExportError(
            f"{name}: {inputs} inputs make no whole blocks of {BLOCKS[-1]}, which ONNX Runtime's operator needs; "
            "export the float model, with quant=fp32 or fp16"
        )


def _moe(node: NodeProto, weights: dict[int, str], stored: _Stored, accuracy_level: int) -> NodeProto | None:
    """Given: MoE(x, router, up, , down). Result: QMoE(x, router, up codes, scales, , down codes, scales)."""
    if set(weights) != {2, 4} or any(name.endswith(".T") for name in weights.values()):
        return None
    up, down = weights[2], weights[4]
    q = stored.tensors[up]
    if q.format != stored.tensors[down].format:
        return None
    # int8 in blocks always rounds activations too, whatever the level: exact results need one scale per channel.
    per_channel = q.format.bits == 8 and accuracy_level == 0
    block = None if per_channel else stored.block(up, down)
    if block is not None:
        for name in (up, down):
            check_format(name, q.format, stored.tensors[name].shape[-1], "experts")
    inputs = [
        *node.input[:2], stored.codes(up), stored.scales(up, block), "", stored.codes(down), stored.scales(down, block), "",
        "", "", "", stored.zeros(up), stored.zeros(down),
    ]  # fmt: skip
    while not inputs[-1]:
        inputs.pop()
    # Level 0 is what it has without the attribute, which ONNX Runtime knows since 1.30 only.
    level: dict[str, Any] = {"accuracy_level": accuracy_level} if accuracy_level else {}
    new = helper.make_node(
        "QMoE", inputs, node.output, node.name, domain=CONTRIB, expert_weight_bits=q.format.bits, **level
    )
    new.attribute.extend(node.attribute)
    if block is not None:
        new.attribute.append(helper.make_attribute("block_size", block))
    return new


def _expert_loop(node: NodeProto, weights: dict[int, str], stored: _Stored, accuracy_level: int) -> NodeProto | None:
    """Given: ExpertLoop(..., gate_up, down). Result: Loop, whose body takes one expert's codes and scales."""
    if set(weights) != {UP, DOWN} or any(name.endswith(".T") for name in weights.values()):
        return None

    def of_integers(name: str) -> Product:
        q, block = stored.tensors[name], stored.block(name)
        check_format(name, q.format, q.shape[-1], "experts")
        stacks = [stored.codes(name, block), stored.scales(name, block), stored.zeros(name)]
        _, outputs, inputs = q.shape

        def product(rows: str, expert: str, result: str) -> list[NodeProto]:
            mine = [f"{result}_{i}" if stack else "" for i, stack in enumerate(stacks)]
            nodes = [
                helper.make_node("Gather", [stack, expert], [one], axis=0) for stack, one in zip(stacks, mine) if stack
            ]
            nodes.append(
                helper.make_node(
                    "MatMulNBits", [rows, *(mine if mine[-1] else mine[:-1])], [result], domain=CONTRIB,
                    K=inputs, N=outputs, bits=q.format.bits, block_size=block, accuracy_level=accuracy_level,
                )
            )  # fmt: skip
            return nodes

        return product

    return expert_loop(node, of_integers(weights[UP]), of_integers(weights[DOWN]))


Replacement = Callable[[NodeProto, dict[int, str], _Stored, int], NodeProto | None]
REPLACEMENTS: dict[str, Replacement] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Gather": _gather,
    "MoE": _moe,
    EXPERT_LOOP: _expert_loop,
}
