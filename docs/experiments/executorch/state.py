"""Where the KV ring of a loop lives in ExecuTorch: with the host, or in buffers of the program.

    python docs/experiments/executorch/state.py [--windows 128,256] [--reps 60]

One attention iteration for one row: projections in float32 (XNNPACK), grouped heads, a ring of 12 loops. All layouts see the
same keys: those of the window but the oldest, and the call's own.

    host         loop k's part of the ring is an input that points into the host's array; the call's key and value are
                 outputs, which the host keeps, and commits to the ring once a token (part of the time from Python)
    two parts    the same, but scores and sums of the ring and of the call's own are computed apart: nothing is joined
                 but scores
    buffers      mutable buffers, shared with another method (`fill`): index_put, then index_select of loop k
    in place     the same with ExecuTorch's re-inplacing pass, which keeps index_put from copying the ring
    llama        mutable buffers, llama::update_cache, index_select of loop k, llama::custom_sdpa with the mask
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.devtools import Inspector
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.passes import MemoryPlanningPass
from executorch.extension.llm.custom_ops import custom_ops  # noqa: F401  (llama::*)
from torch import Tensor, nn

from rmse_edge.export.executorch.passes import EDGE_PASSES
from rmse_edge.layers.masks import MASKED
from rmse_edge.runtimes.engines.executorch import load_program, set_threads, start_engine

LOOPS = 12
SIZES = ((192, 6, 2, 32), (768, 12, 4, 64))  # d, heads, groups that share a key, channels of a head
LAYOUTS = ("host", "two parts", "buffers", "in place", "llama")


class Attention(nn.Module):
    def __init__(self, d: int, heads: int, groups: int, hd: int, window: int) -> None:
        super().__init__()
        self.heads, self.groups, self.hd, self.window = heads, groups, hd, window
        self.q, self.o = nn.Linear(d, heads * hd, bias=False), nn.Linear(heads * hd, d, bias=False)
        self.k, self.v = (nn.Linear(d, groups * hd, bias=False) for _ in range(2))

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """x (1, d) over keys and values (G, S, hd) with mask (1, S) -> (1, d)."""
        rows = self.q(x).view(self.groups, -1, self.hd)
        weights = torch.softmax(torch.matmul(rows, keys.transpose(1, 2)) * self.hd**-0.5 + mask, -1)
        return self.o(torch.matmul(weights, values).view(1, -1))

    def new(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The call's key and value, (G, 1, hd) each."""
        return self.k(x).view(self.groups, 1, self.hd), self.v(x).view(self.groups, 1, self.hd)


class Host(nn.Module):
    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key, value = self.attention.new(x)
        keys, values = torch.cat([keys, key], 1), torch.cat([values, value], 1)
        return self.attention.attend(x, keys, values, mask), key, value


class TwoParts(Host):
    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = self.attention
        key, value = a.new(x)
        rows = a.q(x).view(a.groups, -1, a.hd) * a.hd**-0.5
        scores = [torch.matmul(rows, part.transpose(1, 2)) for part in (keys, key)]
        weights = torch.softmax(torch.cat(scores, -1) + mask, -1)
        out = torch.matmul(weights[..., : a.window], values) + weights[..., a.window :] * value
        return a.o(out.view(1, -1)), key, value


class Buffers(nn.Module):
    """Rings (K * G * W, hd): index_put works in place with a single index only."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        for name in ("keys", "values"):
            self.register_buffer(
                name, self.stored(torch.zeros(LOOPS, attention.groups, attention.window, attention.hd))
            )
        self.register_buffer("slots", torch.arange(attention.window))  # of a head; of a loop, and where its heads begin
        self.register_buffer("loop_slots", torch.arange(attention.groups * attention.window))
        self.register_buffer("heads", torch.arange(attention.groups) * attention.window)

    def stored(self, ring: Tensor) -> Tensor:
        return ring.flatten(0, 2)

    def forward(self, x: Tensor, k: Tensor, slot: Tensor, mask: Tensor) -> Tensor:
        a = self.attention
        start = k * (a.groups * a.window)
        rows, found = start + self.loop_slots, []
        for ring, new in zip((self.keys, self.values), a.new(x)):
            ring.index_put_((start + self.heads + slot,), new.view(a.groups, a.hd))
            found.append(ring.index_select(0, rows).view(a.groups, a.window, a.hd))
        return a.attend(x, *found, mask)


class Llama(Buffers):
    """Rings (1, K * W, G, hd)."""

    def stored(self, ring: Tensor) -> Tensor:
        return ring.transpose(1, 2).flatten(0, 1).unsqueeze(0).contiguous()

    def forward(self, x: Tensor, k: Tensor, slot: Tensor, mask: Tensor) -> Tensor:
        a = self.attention
        key, value = a.new(x)
        rows = k * a.window + self.slots
        at = (k * a.window + slot).item()
        torch._check(at >= 0)
        torch._check(at < LOOPS * a.window)
        torch.ops.llama.update_cache(key.view(1, 1, a.groups, a.hd), self.keys, at)
        torch.ops.llama.update_cache(value.view(1, 1, a.groups, a.hd), self.values, at)
        keys, values = (ring.index_select(1, rows) for ring in (self.keys, self.values))  # a view would copy the ring
        query = a.q(x).view(1, 1, a.heads, a.hd)
        out = torch.ops.llama.custom_sdpa(query, keys, values, a.window - 1, mask, 0.0, False, None)
        return a.o(out.view(1, -1))


class Step(nn.Module):
    """Methods share the buffers that have the same name in both: here `of.keys` and `of.values`."""

    def __init__(self, of: Buffers) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor, k: Tensor, slot: Tensor, mask: Tensor) -> Tensor:
        return self.of(x, k, slot, mask)


class Fill(nn.Module):
    def __init__(self, of: Buffers) -> None:
        super().__init__()
        self.of = of

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        self.of.keys.copy_(keys)
        self.of.values.copy_(values)
        return keys.sum()


def write(path: Path, modules: dict[str, tuple[nn.Module, tuple[Tensor, ...]]], in_place: bool) -> None:
    with torch.no_grad():
        edge = to_edge_transform_and_lower(
            {name: torch.export.export(m.eval(), inputs) for name, (m, inputs) in modules.items()},
            transform_passes=EDGE_PASSES,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False, share_mutable_buffers=True)
        config = ExecutorchBackendConfig(memory_planning_pass=planning, run_reinplace_pass=in_place)
        with path.open("wb") as file:
            edge.to_executorch(config).write_to_file(file)


class Token:
    """Runs all loops of one token at a time; its own ring goes on from the one it is given."""

    def __init__(self, program, module: nn.Module, ring: Tensor) -> None:
        self.program = program  # its buffers do not outlive it
        self.method = program.load_method("step")
        self.host = isinstance(module, Host)
        if self.host:
            self.ring, self.new = ring.clone(), torch.empty(2, *ring.shape[1:3], 1, ring.shape[-1])
            self.rows = [(*self.ring[:, k].unbind(0), *self.new[:, k].unbind(0)) for k in range(LOOPS)]
        else:
            fill = program.load_method("fill")
            fill([module.stored(part) for part in ring])
            self.k = [torch.tensor([k]) for k in range(LOOPS)]

    def __call__(self, states: Tensor, position: int, masks: tuple[Tensor, Tensor]) -> list[Tensor]:
        """states (K, 1, d), what loop k reads -> what each loop returns."""
        out = []
        if self.host:
            for x, (keys, values, new_key, new_value) in zip(states, self.rows):
                y, key, value = self.method((x, keys, values, masks[0]))
                new_key.copy_(key)
                new_value.copy_(value)
                out.append(y)
            self.ring[:, :, :, position] = self.new[:, :, :, 0]
        else:
            slot = torch.tensor([position])
            out = [self.method((x, k, slot, masks[1]))[0] for x, k in zip(states, self.k)]
        return out


def expected(a: Attention, ring: Tensor, states: Tensor, position: int, mask: Tensor) -> list[Tensor]:
    """The same in PyTorch; writes into `ring` (2, K, G, W, hd)."""
    out = []
    for k in range(LOOPS):
        for part, new in zip(ring, a.new(states[k])):
            part[k][:, position] = new[:, 0]
        keys, values = (part[k].repeat_interleave(a.heads // a.groups, 0) for part in ring)
        query = a.q(states[k]).view(a.heads, 1, a.hd)
        out.append(a.o(F.scaled_dot_product_attention(query, keys, values, attn_mask=mask).view(1, -1)))
    return out


def masks_for(window: int, position: int) -> tuple[Tensor, Tensor]:
    """(ring and the call's own, ring that holds it): a quarter of the window is out of sight."""
    own = torch.zeros(1, window)
    own[:, torch.arange(position + 1, position + 1 + window // 4) % window] = MASKED
    ring = own.clone()
    ring[:, position] = MASKED
    return torch.cat([ring, torch.zeros(1, 1)], 1), own


def native_ms(program, folder: Path) -> float:
    """The median time of Method::execute, as the runtime itself took it."""
    program.write_etdump_result_to_file(str(folder / "calls.etdp"), str(folder / "calls.debug"))
    events = [e for block in Inspector(etdump_path=str(folder / "calls.etdp")).event_blocks for e in block.events]
    return median(t for e in events if e.name == "Method::execute" for t in e.perf_data.raw)


@torch.no_grad()
def measure(size: tuple[int, int, int, int], window: int, reps: int, folder: Path) -> None:
    d, heads, groups, hd = size
    torch.manual_seed(0)
    attention = Attention(d, heads, groups, hd, window).eval()
    ring = torch.randn(2, LOOPS, groups, window, hd)
    x, k, slot, masks = torch.randn(1, d), torch.tensor([1]), torch.tensor([1]), masks_for(window, 1)
    modules: dict[str, nn.Module] = {"host": Host(attention), "two parts": TwoParts(attention)}
    modules |= {"buffers": Buffers(attention), "in place": Buffers(attention), "llama": Llama(attention)}
    tokens, profiled = {}, {}
    times, error = {name: [] for name in LAYOUTS}, dict.fromkeys(LAYOUTS, 0.0)
    for name in LAYOUTS:
        module, path = modules[name], folder / f"{name}.pte"
        if isinstance(module, Host):
            methods = {"step": (module, (x, ring[0][0], ring[1][0], masks[0]))}
        else:
            rings = tuple(module.stored(part) for part in ring)
            methods = {"step": (Step(module), (x, k, slot, masks[1])), "fill": (Fill(module), rings)}
        write(path, methods, in_place=name == "in place")
        tokens[name] = Token(load_program(path), module, ring)
        profiled[name] = Token(load_program(path, profile=True), module, ring)
    for t in range(reps):
        position = (window - 3 + t) % window  # around the end of the ring
        states, masks = torch.randn(LOOPS, 1, d), masks_for(window, position)
        wanted = torch.cat(expected(attention, ring, states, position, masks[1]))
        for name, token in tokens.items():
            start = perf_counter()
            out = token(states, position, masks)
            times[name].append(1e3 * (perf_counter() - start) / LOOPS)
            profiled[name](states, position, masks)
            error[name] = max(error[name], ((torch.cat(out) - wanted).abs().max() / wanted.abs().max()).item())
    inside = {name: native_ms(token.program, folder) for name, token in profiled.items()}
    nbytes = ring.numel() * ring.element_size()
    for name in LAYOUTS:
        cells = f"{d} | {groups} x {hd} | {window} | {nbytes / 1e6:.1f} | {name}"
        print(f"| {cells} | {median(times[name][3:]):.3f} | {inside[name]:.3f} | {error[name]:.1e} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="192,768", help="d of the models, of " + ", ".join(str(s[0]) for s in SIZES))
    parser.add_argument("--windows", default="128,256")
    parser.add_argument("--reps", type=int, default=60, help="tokens, 12 calls each")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.ERROR)
    start_engine()
    set_threads(1)
    print("| d | groups | window | rings, MB | layout | ms per iteration | inside the engine | largest difference |")
    print("|---" * 8 + "|")
    for size in (size for size in SIZES if str(size[0]) in args.sizes.split(",")):
        for window in map(int, args.windows.split(",")):
            print(f"{size}, window {window}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as scratch:
                measure(size, window, args.reps, Path(scratch))


if __name__ == "__main__":
    main()
