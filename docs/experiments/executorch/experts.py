"""Four layouts for the int4 experts of one iteration in ExecuTorch, side by side: time, bytes, memory, agreement.

    python docs/experiments/executorch/experts.py [--sizes 192x32,768x128] [--rows 1,64]

512 random experts in groups of 32, of which every row takes 10. All layouts hold the same integers (`float32`: what they
stand for), and do the routing themselves: top-k of logits + bias, softmax of the chosen logits, weighted sum.

    operator    rmse_edge::quantized_experts on the stacked codes
    embedding   an expert is a row of a quantised embedding: embedding_4bit unpacks the chosen ones, XNNPACK multiplies
    float32     stacked floats: index_select, XNNPACK multiplies
    methods     an expert is a method of its own, int8 activations by int4 in XNNPACK; the host makes 10 calls per row

`methods` holds a sample: expert e is method e modulo the sample, which keeps its weights in the caches. To compare with
that, the operator is timed on rows that choose among as many experts, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.devtools import Inspector
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn

from rmse_edge.export.executorch.operators import quantized_experts
from rmse_edge.export.executorch.ops import signed
from rmse_edge.export.executorch.tiles import tiles_of
from rmse_edge.layers.experts import select
from rmse_edge.quantize.tensors import Format, QuantizedTensor, round_to_nearest
from rmse_edge.runtimes.engines.executorch import load_program, set_threads, start_engine
from rmse_edge.runtimes.engines.release import release_mapped

EXPERTS, TOP_K, INT4 = 512, 10, Format(4, 32)
MB = 1e6
CONFINED = "operator on the sample"
Call = Callable[[Tensor, Tensor], Tensor]  # x (N, d), logits (N, E) -> (N, d)


def interleaved(w: QuantizedTensor) -> QuantizedTensor:
    """[gates, ups] -> [gate_0, up_0, gate_1, ...], the order that the operator reads."""
    codes, scales = (t.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2).contiguous() for t in (w.codes, w.scales))
    return QuantizedTensor(w.format, codes, scales)


class Operator(nn.Module):
    def __init__(self, up: QuantizedTensor, down: QuantizedTensor, rows: int) -> None:
        super().__init__()
        for name, q in (("up", interleaved(up)), ("down", down)):
            for part, tensor in tiles_of(q)._asdict().items():
                self.register_buffer(f"{name}_{part}", tensor)
        self.width = down.shape[-1]
        self.register_buffer("bias", torch.zeros(EXPERTS))
        self.register_buffer("active", torch.ones(rows, dtype=torch.bool))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        weights = (self.up_codes, self.up_scales, self.down_codes, self.down_scales)
        return quantized_experts(
            x, logits, logits + self.bias, self.active, *weights, self.width, TOP_K, 0.0, 0.0, None
        )


class Gathered(nn.Module):
    """Floats of the chosen experts, multiplied as batches of matrices."""

    def __init__(self, up: nn.Module, down: nn.Module, width: int) -> None:
        super().__init__()
        self.up, self.down, self.width = up, down, width
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, x: Tensor, logits: Tensor) -> Tensor:
        rows, d = x.shape
        routing = select(logits, self.bias, TOP_K)
        chosen = routing.experts.reshape(-1)
        columns = x.unsqueeze(1).expand(rows, TOP_K, d).reshape(-1, d, 1)
        hidden = torch.bmm(self.up(chosen).view(-1, 2 * self.width, d), columns)
        hidden = F.silu(hidden[:, : self.width]) * hidden[:, self.width :]
        hidden = hidden * routing.weights.reshape(-1, 1, 1)
        return torch.bmm(self.down(chosen).view(-1, d, self.width), hidden).view(rows, TOP_K, d).sum(1)


class Stack(nn.Module):
    def __init__(self, q: QuantizedTensor) -> None:
        super().__init__()
        self.register_buffer("weight", q.dequantize())

    def forward(self, chosen: Tensor) -> Tensor:
        return self.weight.index_select(0, chosen)


def torchao_rows(q: QuantizedTensor) -> Tensor:
    """A weight (N, K) of torchao's, which ExecuTorch makes readers of quantised embeddings of."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    return IntxUnpackedToInt8Tensor(
        qdata=signed(q),
        scale=q.scales,
        zero_point=torch.zeros_like(q.scales, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{q.format.bits}"),
        block_size=(1, q.format.group or q.shape[-1]),
        dtype=torch.float32,
        activation_quantization=None,
    )


def embedding(q: QuantizedTensor) -> nn.Embedding:
    """(E, N, K) as E rows of N * K: the groups stay what they are."""
    flat = QuantizedTensor(q.format, q.codes.flatten(1), q.scales.flatten(1))
    with torch.device("meta"):
        module = nn.Embedding(*flat.shape)
    module.weight = nn.Parameter(torchao_rows(flat), requires_grad=False)
    return module


class Route(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(EXPERTS))

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        routing = select(logits, self.bias, TOP_K)
        return routing.experts, routing.weights


def rounding(weight: Tensor) -> Tensor:
    """A weight of torchao's that XNNPACK multiplies with activations rounded to int8, row by row."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    weight.activation_quantization = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN
    return weight


class Expert(nn.Module):
    def __init__(self, up: QuantizedTensor, down: QuantizedTensor, e: int) -> None:
        super().__init__()
        for name, q in (("up", up), ("down", down)):
            one = QuantizedTensor(q.format, q.codes[e].clone(), q.scales[e].clone())
            linear = nn.Linear(one.shape[1], one.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(rounding(torchao_rows(one)), requires_grad=False)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


def write(path: Path, modules: dict[str, tuple[nn.Module, tuple[Tensor, ...]]], fuse: bool = False) -> float:
    """Export `modules` to the methods of one file; returns the seconds it took."""
    start = perf_counter()
    with torch.no_grad():
        programs = {name: torch.export.export(m.eval(), inputs) for name, (m, inputs) in modules.items()}
        edge = to_edge_transform_and_lower(
            programs, partitioner=[XnnpackPartitioner()], compile_config=EdgeCompileConfig(_check_ir_validity=False)
        )
        planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        config = ExecutorchBackendConfig(memory_planning_pass=planning, do_quant_fusion_and_const_prop=fuse)
        with path.open("wb") as file:
            edge.to_executorch(config).write_to_file(file)
    return perf_counter() - start


def inputs(rows: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d, generator=g), torch.randn(rows, EXPERTS, generator=g)


def confined(data: tuple[Tensor, Tensor], sample: int) -> tuple[Tensor, Tensor]:
    """The same rows, which choose among the first `sample` experts."""
    return data[0], data[1].where(torch.arange(EXPERTS) < sample, -100.0)


def caller(program, layout: str, rows: int, sample: int, routes=None) -> Call:
    """One iteration for `rows` rows from Python; routes: another program to take the routing of `methods` from."""
    if layout != "methods":
        method = program.load_method(f"rows_{rows}")
        return lambda x, logits, _owner=program: method((x, logits))[0]  # a method does not outlive its program
    routes = routes or program
    route = routes.load_method(f"route_{rows}")
    experts = [program.load_method(f"expert_{e}") for e in range(sample)]

    def call(x: Tensor, logits: Tensor, _owners=(program, routes)) -> Tensor:
        chosen, weights = route((logits,))
        found = [experts[e % sample]((x[n : n + 1],))[0] for n, row in enumerate(chosen.tolist()) for e in row]
        return torch.einsum("nk,nkd->nd", weights, torch.cat(found).view(rows, TOP_K, -1))

    return call


def reference(up: Tensor, down: Tensor, x: Tensor, logits: Tensor, sample: int) -> Tensor:
    routing = select(logits, torch.zeros(EXPERTS), TOP_K)
    chosen = routing.experts % sample
    out = []
    for row, experts, weights in zip(x, chosen, routing.weights):
        gate, ups = torch.einsum("kfd,d->kf", up[experts], row).chunk(2, -1)
        out.append(torch.einsum("k,kdf,kf->d", weights, down[experts], F.silu(gate) * ups))
    return torch.stack(out)


def native_ms(program, folder: Path) -> float:
    """The median time of Method::execute, as the runtime itself took it."""
    program.write_etdump_result_to_file(str(folder / "calls.etdp"), str(folder / "calls.debug"))
    events = [e for block in Inspector(etdump_path=str(folder / "calls.etdp")).event_blocks for e in block.events]
    return median(t for e in events if e.name == "Method::execute" for t in e.perf_data.raw)


def resident(path: Path) -> tuple[int, int]:
    """(anonymous bytes of this process, bytes of its mapping of the file) in memory."""
    status = Path("/proc/self/status").read_text()
    anonymous = int(status.split("RssAnon:")[1].split()[0]) * 1024
    mapped, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(maxsplit=1)[0]:
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            mapped += int(line.split()[1]) * 1024
    return anonymous, mapped


def measure_memory(path: Path, layout: str, d: int, sample: int) -> None:
    """In a process of its own: growth through the first call and through 100 more with random routing, as JSON."""
    start_engine()
    routes = path.with_name("routes.pte")  # first, what any program and measuring itself take
    load_program(routes).load_method("route_1")(inputs(1, d)[1:])
    release_mapped(routes)
    resident(path)
    before = resident(path)
    call = caller(load_program(path), layout, 1, sample)
    release_mapped(path)  # the engine locks what it maps into memory
    call(*inputs(1, d))
    first = resident(path)
    for seed in range(1, 101):
        call(*inputs(1, d, seed))
    after = resident(path)
    print(json.dumps([[now - then for now, then in zip(now, before)] for now in (first, after)]))


def measure(d: int, width: int, rows: list[int], reps: dict[int, int], sample: int, folder: Path) -> None:
    torch.manual_seed(0)
    up = round_to_nearest(torch.randn(EXPERTS, 2 * width, d) * d**-0.5, INT4)
    down = round_to_nearest(torch.randn(EXPERTS, d, width) * width**-0.5, INT4)
    ideal = up.nbytes + down.nbytes
    layouts = ("operator", "embedding", "float32", "methods")
    timed = (*layouts, CONFINED)
    files = {(name, n): folder / f"{name}_{n}.pte" for name in layouts for n in rows}
    gathered = {
        "embedding": Gathered(embedding(up), embedding(down), width),
        "float32": Gathered(Stack(up), Stack(down), width),
    }
    note(f"{d} x {width}: exporting")
    for (name, n), path in files.items():  # of their own: the engine gives a method the memory that the largest takes
        if name != "methods":
            module = Operator(up, down, n) if name == "operator" else gathered[name]
            write(path, {f"rows_{n}": (module, inputs(n, d))}, fuse=name == "embedding")
    routes = {f"route_{n}": (Route(), inputs(n, d)[1:]) for n in rows}
    write(folder / "routes.pte", routes)
    experts = {f"expert_{e}": (Expert(up, down, e), (torch.randn(1, d),)) for e in range(sample)}
    files |= {("methods", n): folder / "methods.pte" for n in rows}
    seconds = write(folder / "methods.pte", routes | experts) / sample
    each = ((folder / "methods.pte").stat().st_size - (folder / "routes.pte").stat().st_size) / sample
    nbytes = {name: files[name, rows[0]].stat().st_size for name in layouts}
    nbytes["methods"] = int((folder / "routes.pte").stat().st_size + EXPERTS * each)
    memory = {}
    for name in layouts:
        note(f"{d} x {width}: memory of {name}")
        command = [sys.executable, __file__, "--memory", str(files[name, 1]), name, str(d), str(sample)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        memory[name] = json.loads(done.stdout.splitlines()[-1])

    times: dict[tuple[str, int], float] = {}
    error = dict.fromkeys(timed, 0.0)
    weights = up.dequantize(), down.dequantize()
    for n in rows:
        note(f"{d} x {width}: {n} rows")
        files[CONFINED, n] = files["operator", n]
        calls = {name: caller(load_program(files[name, n]), name, n, sample) for name in timed}
        profiled = {name: load_program(files[name, n], profile=True) for name in timed}
        routes = load_program(folder / "routes.pte", profile=True)
        again = {name: caller(program, name, n, sample, routes) for name, program in profiled.items()}
        taken: dict[str, list[float]] = {name: [] for name in timed}
        for rep in range(reps[n] + 1):
            for name, call in calls.items():
                data = inputs(n, d, rep) if name != CONFINED else confined(inputs(n, d, rep), sample)
                start = perf_counter()
                out = call(*data)
                taken[name].append(1e3 * (perf_counter() - start))
                again[name](*data)
                if rep == 0:
                    expected = reference(*weights, *data, sample if name == "methods" else EXPERTS)
                    error[name] = max(error[name], ((out - expected).abs().max() / expected.abs().max()).item())
        for name, program in profiled.items():
            times[name, n], times[name, -n] = median(taken[name][1:]), native_ms(program, folder)
        times["methods", -n] = native_ms(routes, folder) + n * TOP_K * times["methods", -n]
        del calls, again, profiled

    print(f"\n### d {d}, width {width}: {ideal / MB:.1f} MB of codes and scales\n")
    print("| layout |" + "".join(f" {n} row{'s' * (n > 1)}: ms | inside the engine |" for n in rows), end="")
    print(" file, MB | memory, MB: after one call | after 100 more | largest difference |")
    print("|---" * (5 + 2 * len(rows)) + "|")
    for name in timed:
        cells = [f"{times[name, n]:.3f}" for row in rows for n in (row, -row)]
        cells.append(f"{nbytes[name] / MB:.1f}" if name in nbytes else "")
        cells += [f"{own / MB:.1f} + {mapped / MB:.1f}" for own, mapped in memory.get(name, [])] or ["", ""]
        print(f"| {name} | {' | '.join(cells)} | {error[name]:.1e} |")
    more, kept = each - ideal / EXPERTS, memory["methods"][1][0] / sample
    print(f"\n| `methods` | of one | of {EXPERTS} |\n|---|---|---|")
    print(f"| bytes beyond codes and scales | {more:.0f} | {more * EXPERTS / MB:.1f} MB |")
    print(f"| memory, loaded | {kept / 1e3:.0f} kB | {kept * EXPERTS / MB:.0f} MB |")
    print(f"| seconds to export | {seconds:.2f} | {seconds * EXPERTS:.0f} |", flush=True)


def packed_experts() -> None:
    """Whether the wheels bring what `llama::quantized_moe_ffn` needs."""
    from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401
    from executorch.extension.pybindings import portable_lib

    there = "llama::quantized_moe_ffn.out" in portable_lib._get_operator_names()
    packs = hasattr(torch.ops.torchao, "_pack_8bit_act_4bit_weight")
    print(f"\nllama::quantized_moe_ffn is {'in' if there else 'not in'} the runtime;", end=" ")
    print(f"torchao::_pack_8bit_act_4bit_weight, which packs its weights, is {'in' if packs else 'not in'} the wheel.")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    if sys.argv[1:2] == ["--memory"]:
        path, layout, d, sample = sys.argv[2:]
        return measure_memory(Path(path), layout, int(d), int(sample))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="192x32,768x128", help="d and width of the experts")
    parser.add_argument("--rows", default="1,64")
    parser.add_argument("--reps", default="200,10", help="repetitions for each number of rows")
    parser.add_argument("--sample", type=int, default=16, help="experts of the layout `methods`")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    start_engine()
    set_threads(1)
    rows = [int(n) for n in args.rows.split(",")]
    reps = dict(zip(rows, map(int, args.reps.split(","))))
    for size in args.sizes.split(","):
        with tempfile.TemporaryDirectory() as scratch:
            measure(*map(int, size.split("x")), rows, reps, args.sample, Path(scratch))
    packed_experts()


if __name__ == "__main__":
    main()
