"""LoopProgram -> ExecuTorch: one `.pte` with a method for every METHOD_ROWS, whose weights it holds once.

The loop is the host's: no control flow in the runtime both stops early and keeps XNNPACK's delegates, and a call of
`step` costs no more than an iteration inside a graph. What is kept between calls belongs to the host, too: `step` reads
row k of the KV ring where it lies, and leaves the call's keys and values to be committed. Rings in the program's own buffers
are no faster, several times slower as exported by default, and out of the host's hands (docs/experiments/executorch).
"""

from __future__ import annotations

import gc
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor
from torch.export import ExportedProgram

from rmse_edge.errors import ExportError, first_line, quiet
from rmse_edge.export.program import LoopProgram
from rmse_edge.export.targets import LowerOptions, target
from rmse_edge.parts import PARTS, cut
from rmse_edge.quantize import QuantizedTensor

from .constants import left_on_disk
from .ops import check_format, prepare, rows_of
from .options import ExecutorchOptions
from .passes import EDGE_PASSES
from .tiles import tiles_of

PROGRAM = "program.pte"
UNLIMITED = 2**31 - 1  # of get_max_context_len: a window and a memory hold any text
PLAIN = ("begin", "blank")  # methods without arithmetic to speak of: a delegate would only cost


@target(
    "executorch",
    quants=("fp32", "int8", "int4"),
    options=ExecutorchOptions,
    host_loop=True,
    grows=True,
    plans=True,
    drafts=True,
    check_format=check_format,
    prepare=prepare,
)
def lower(program: LoopProgram, folder: Path, options: LowerOptions) -> dict[str, Any]:
    """Write program.pte into `folder`.

    Returns:
        "program": its file name; "methods": the names of its methods; "delegates": XNNPACK's parts of each method;
        "expert_bytes": of integers and scales that a host may read expert by expert, within a budget (0: there are none);
        "parts": how large files are cut, for the manifest; "expert_profile": of the profile that experts are laid out by, where
        there is one, its digest and its tokens.
    Raises:
        ExportError: ExecuTorch refuses a method, or the file does not hold exactly the quantised weights.
    """
    methods = {f"{method.name}_{method.chunks[0]}": method.program for method in program.methods}
    options.progress("lowering to XNNPACK")
    with quiet(), left_on_disk(options.scratch):
        partitioners = {name: [XnnpackPartitioner()] if delegated(name, options) else [] for name in methods}
        try:
            edge = to_edge_transform_and_lower(
                methods,
                transform_passes=EDGE_PASSES,
                partitioner=partitioners,
                constant_methods=metadata(program, options),
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            delegates = {name: _delegates(edge.exported_program(name)) for name in methods}
            lowered = edge.to_executorch(
                ExecutorchBackendConfig(
                    # Inputs and outputs lie where the host has them.
                    memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False),
                    do_quant_fusion_and_const_prop=True,  # makes readers of quantised embeddings
                )
            )
        except Exception as error:
            raise ExportError(f"ExecuTorch does not lower the program: {first_line(error)}") from error
    path = folder / PROGRAM
    with path.open("wb") as file:
        lowered.write_to_file(file)
    del lowered, edge
    gc.collect()  # graphs go round in circles; what is compared next takes room of its own
    own: ExecutorchOptions = options.own or ExecutorchOptions()
    profile = own.profile_experts
    stored = options.tensors
    if profile is not None:
        stored = {name: profile.placed(name, q) for name, q in stored.items()}
    parts = cut(path.stat().st_size, check_weights(path, stored))
    experts = sum(q.nbytes for q in stored.values() if len(q.shape) == 3)
    found: dict[str, Any] = {"program": PROGRAM, "methods": [*methods], "delegates": delegates, "expert_bytes": experts}
    if parts is not None:
        found[PARTS] = {PROGRAM: parts}
    if profile is not None:
        found["expert_profile"] = {"sha256": profile.digest, "tokens": profile.tokens}
    return found


def delegated(name: str, options: LowerOptions) -> bool:
    """Whether XNNPACK takes its parts of a method. Of a quantised model, little but sums and transpositions is left for it: in
    calls of one row these are done before a delegate has begun.
    """
    method, _, rows = name.rpartition("_")
    return method not in PLAIN and not (options.tensors and rows == "1")


def metadata(program: LoopProgram, options: LowerOptions) -> dict[str, Any]:
    """Methods that return a constant, by the names that ExecuTorch's own runners look for; -1 for a token there is not."""
    spec = next(iter(program.specs.values()))
    found: dict[str, Any] = {"get_max_loops": spec.max_loops}
    info = options.info
    if info is None or info.text is None:
        return found
    limit = info.longest or UNLIMITED
    begins = info.config.get("bos_token_id")
    return found | {
        "get_vocab_size": info.vocab_size,
        "get_bos_id": -1 if begins is None else begins,
        "get_eos_ids": list(info.text.eos_token_ids),
        "get_n_layers": 1,
        "get_max_seq_len": limit,
        "get_max_context_len": limit,
        "get_window": info.window or limit,
        "use_kv_cache": True,
        "enable_dynamic_shape": False,
    }


def check_weights(path: Path, tensors: Mapping[str, QuantizedTensor]) -> list[tuple[int, int]]:
    """Fail unless the file holds the codes and the scales of every quantised weight, byte for byte.

    Returns:
        The first byte and the end of all of them.
    Raises:
        ExportError: naming the weight.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        behind = 0
        places = []

        def find(part: Tensor) -> bool:
            """Whether it is there. Weights lie in about the order in which a model has them: so behind the last one first."""
            nonlocal behind
            wanted = _bytes(part)
            place = content.find(wanted, behind)
            if place < 0:
                place = content.find(wanted, 0, min(behind + len(wanted), len(content)))
            if place >= 0:
                behind = place + len(wanted)
                places.append((place, behind))
            return place >= 0

        for name, q in tensors.items():
            missing = "integers"
            for codes, scales in stored_forms(q):
                if find(codes):
                    missing = "scales"
                    if find(scales):
                        break
            else:
                raise ExportError(
                    f"{name}: ExecuTorch did not store the {missing} it was given; export with quant=fp32"
                )
    return places


def stored_forms(q: QuantizedTensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The codes and scales that a weight may be stored as: for the kernels, or for looking up rows."""
    yield tiles_of(q)
    yield rows_of(q), q.scales


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1).data


def _delegates(program: ExportedProgram) -> int:
    return sum("executorch_call_delegate" in str(n.target) for n in program.graph.nodes)
