"""ONNX graph surgery after `torch.onnx.export`: a named list of small passes, each `ModelProto -> None`, in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from rmse_edge.errors import ExportError
from rmse_edge.export.program import NAMES
from rmse_edge.loop.contract import TensorSpec

from .ops import OWN, STORED_WEIGHT, TRANSPOSED


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield attribute.g


def graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """A graph and all bodies in it."""
    yield graph
    for node in graph.node:
        for inner in subgraphs(node):
            yield from graphs(inner)


def names_read(graph: GraphProto) -> set[str]:
    """Every name a graph reads, in itself or in its subgraphs."""
    read = {o.name for o in graph.output}
    for node in graph.node:
        read |= set(node.input)
        for inner in subgraphs(node):
            read |= names_read(inner)
    return read


def find_loop(model: ModelProto) -> NodeProto | None:
    return next((n for n in model.graph.node if n.op_type == "Loop"), None)


def name_sizes(model: ModelProto, takes: Sequence[TensorSpec]) -> None:
    """Give the sizes that vary from call to call the same names in every graph: the tracer's symbols differ from method to
    method.

    Given:   inputs and outputs (1, s41, 64), in the graph and in every body
    Result:  (1, "rows", 64)

    Args:
        takes: what the graph takes, in order, with `ROWS`, `SLOTS` and `BOARDS` of export/program.py in the shapes.
    Raises:
        ExportError: a dimension of an input or output is neither a number nor one of these sizes.
    """

    names = {
        dim.dim_param: NAMES[size]
        for value, spec in zip(model.graph.input, takes, strict=True)
        for dim, size in zip(value.type.tensor_type.shape.dim, spec.shape, strict=True)
        if size in NAMES
    }
    for graph in graphs(model.graph):
        for value in [*graph.input, *graph.output]:
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in names:
                    dim.dim_param = names[dim.dim_param]
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value") and dim.dim_param not in NAMES.values():
                raise ExportError(f"name_sizes: {value.name} has a dimension {dim.dim_param or 'of unknown size'}")


def stack_to_scan(model: ModelProto) -> None:
    """Turn the carried stack of emits into scan outputs: carrying it copies the whole stack in every iteration.

    Given:   Loop carries `stack`; body: stack' = ScatterND(stack, [k], emit)
    Result:  Loop has a scan output `emit` (n, ...); after it stack = Gather(emits, min(0..K-1, n - 1)), so that rows
             from n on repeat the last one: no reader may rely on them (see `run_loop`).

    Raises:
        ExportError: the loop carries a stack that is written in a way this pass does not know.
    """
    loop = find_loop(model)
    if loop is None:
        return
    graph, body = model.graph, next(subgraphs(loop))
    producers = {o: n for n in body.node for o in n.output}
    written = []  # (carry index, emit name, type of the stack)
    for i, (inner, result) in enumerate(zip(body.input[2:], body.output[1:], strict=True)):
        node = producers.get(result.name)
        if node is None or node.op_type != "ScatterND" or node.input[0] != inner.name:
            continue
        unsqueeze = producers.get(node.input[2])
        if unsqueeze is None or unsqueeze.op_type != "Unsqueeze":
            raise ExportError(f"stack_to_scan: {result.name} is scattered from {node.input[2]}, not from an Unsqueeze")
        written.append((i, unsqueeze.input[0], inner.type.tensor_type))
    iterations = loop.output[0]  # k is the first carry
    for i, emit, tensor in reversed(written):
        loops, *shape = (d.dim_param or d.dim_value for d in tensor.shape.dim)
        if not isinstance(loops, int):
            raise ExportError(
                f"stack_to_scan: {loop.output[i]} has room for {loops} iterations, not for a fixed number"
            )
        stack, scan = loop.output[i], f"{loop.output[i]}_of_runs"
        del loop.input[2 + i], loop.output[i], body.input[2 + i], body.output[1 + i]
        body.node.append(helper.make_node("Identity", [emit], [f"{scan}_row"]))
        body.output.append(helper.make_tensor_value_info(f"{scan}_row", tensor.elem_type, shape))
        loop.output.append(scan)
        graph.initializer.append(numpy_helper.from_array(np.arange(loops, dtype=np.int64), f"{stack}_loops"))
        graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), f"{stack}_one"))
        graph.node.extend([
            helper.make_node("Sub", [iterations, f"{stack}_one"], [f"{stack}_last"]),
            helper.make_node("Min", [f"{stack}_loops", f"{stack}_last"], [f"{stack}_which"]),
            helper.make_node("Gather", [scan, f"{stack}_which"], [stack], axis=0),
        ])  # fmt: skip


def hoist_invariants(model: ModelProto) -> None:
    """Move what every iteration would compute alike in front of the loop.

    Given:   body: y = Op(a, b), with a and b from outer scope
    Result:  graph: y = Op(a, b); body reads y
    """
    loop = find_loop(model)
    if loop is None:
        return
    graph, body = model.graph, next(subgraphs(loop))
    outer = {i.name for i in graph.input} | {t.name for t in graph.initializer}
    outer |= {o for n in graph.node for o in n.output}
    results = {o.name for o in body.output}
    at = list(graph.node).index(loop)
    for node in list(body.node):
        if node.op_type in ("Loop", "If", "Scan") or results & set(node.output) or not set(node.input) - {""} <= outer:
            continue
        if not node.input:  # constants weigh nothing where they are
            continue
        body.node.remove(node)
        graph.node.insert(at, node)
        at += 1
        outer |= set(node.output)


def remove_dead_nodes(model: ModelProto) -> None:
    """Drop nodes and initializers nobody reads, in the graph and in every body.

    Given:   y = Op(x), y unread
    Result:  nothing
    """

    def sweep(graph: GraphProto) -> None:
        while True:
            read = names_read(graph)
            dead = [n for n in graph.node if not read & set(n.output)]
            if not dead:
                break
            for node in dead:
                graph.node.remove(node)
        for node in graph.node:
            for inner in subgraphs(node):
                sweep(inner)

    sweep(model.graph)
    read = names_read(model.graph)
    kept = [t for t in model.graph.initializer if t.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def weights_in_outer_scope(model: ModelProto) -> None:
    """Check that no body holds weights: a body's own initializers are kept two to three times in memory.

    Raises:
        ExportError: naming the tensor.
    """
    for node in model.graph.node:
        for inner in subgraphs(node):
            for tensor in inner.initializer:
                if np.prod(tensor.dims) > 64:
                    raise ExportError(f"weights_in_outer_scope: the loop body holds {tensor.name} {list(tensor.dims)}")


def outputs_are_computed(model: ModelProto) -> None:
    """Give every output a node: weights are renamed when they move into their file, outputs keep their names.

    Given:   initializer y, which is a graph output
    Result:  y = Identity(y_value)
    """
    graph = model.graph
    outputs = {o.name for o in graph.output}
    for tensor in graph.initializer:
        if tensor.name in outputs:
            graph.node.append(helper.make_node("Identity", [f"{tensor.name}_value"], [tensor.name]))
            tensor.name = f"{tensor.name}_value"


def drop_trace_metadata(model: ModelProto) -> None:
    """Remove the exporter's notes (source lines, stack traces): they hold paths of the machine that exported."""

    def sweep(graph: GraphProto) -> None:
        del graph.metadata_props[:]
        for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
            del value.metadata_props[:]
            value.doc_string = ""
        for node in graph.node:
            del node.metadata_props[:]
            node.doc_string = ""
            for inner in subgraphs(node):
                sweep(inner)

    sweep(model.graph)
    del model.metadata_props[:]
    del model.graph.value_info[:]


def transpose_weights(model: ModelProto) -> None:
    """Lay out weights of linear layers as a product reads them. Integers are left to export/onnx/quantize.py.

    Given:   y = MatMul(x, Transposed(w)), w an initializer
    Result:  y = MatMul(x, w.T), w.T an initializer; of a w that is computed, y = MatMul(x, Transpose(w))
    """
    graph = model.graph
    weights = {t.name: t for t in graph.initializer}
    stored = {o for g in graphs(graph) for n in g.node if n.op_type == STORED_WEIGHT for o in n.output}
    names: dict[str, str] = {}
    for inner in graphs(graph):
        for node in [n for n in inner.node if n.op_type == TRANSPOSED]:
            (name,), (result,) = node.input, node.output
            if name in stored:
                continue
            if name not in weights:
                plain = helper.make_node("Transpose", [name], [result], node.name, perm=[1, 0])
                node.CopyFrom(plain)
                continue
            inner.node.remove(node)
            names[result] = f"{name}.T"
    for name in dict.fromkeys(names.values()):
        array = numpy_helper.to_array(weights[name.removesuffix(".T")])
        graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(array.T), name))
    rename(graph, names)
    forget_own_operators(model)


def forget_own_operators(model: ModelProto) -> None:
    """Take back the import of our own operators, once none stands in the graph any longer."""
    if not any(n.domain == OWN for g in graphs(model.graph) for n in g.node):
        kept = [o for o in model.opset_import if o.domain != OWN]
        del model.opset_import[:]
        model.opset_import.extend(kept)


def rename(graph: GraphProto, names: Mapping[str, str]) -> None:
    """Give values other names, where nodes read them: in the graph and in its bodies."""
    for inner in graphs(graph):
        for node in inner.node:
            for i, name in enumerate(node.input):
                if name in names:
                    node.input[i] = names[name]


PASSES = (
    stack_to_scan,
    hoist_invariants,
    transpose_weights,
    remove_dead_nodes,
    outputs_are_computed,
    weights_in_outer_scope,
    drop_trace_metadata,
)
