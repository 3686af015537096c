"""A package with a gigabyte of int4 experts that routes, stops and writes like the trained one that it is made from.

    python docs/experiments/offload/widen.py rmse-shakespeare-executorch.rmse --width 6496 -o wide.rmse

Every expert keeps its trained channels, and gets random ones besides: their gates and ups are random codes with the trained scales, and
what comes down from them counts 2^-40 of what a trained channel counts. They are read and multiplied like any other, and change no
token. So nothing about the routing is imitated: which experts a token uses in which loop, how uneven they are used, what loops
share and when a token stops is what the trained model does on the text that it reads.

The program is taken apart and put together again, with larger constants: exporting it would take eight times their size in floats.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary
from executorch.exir.schema import Int, Tensor

from rmse_edge.export.executorch.tiles import BLOCK, BYTES, TILE
from rmse_edge.package import Package, seal, writing

OPERATOR = "rmse_edge::quantized_experts"
ARGUMENTS = ("gate_up_codes", "gate_up_scales", "down_codes", "down_scales", "width")  # from the fifth on
QUIET = 40  # halvings of the scales of what is added


def random_bytes(draw: np.random.Generator, *shape: int) -> np.ndarray:
    return np.frombuffer(draw.bytes(int(np.prod(shape))), np.uint8).reshape(shape)


def widened(name: str, old: np.ndarray, width: int, draw: np.random.Generator) -> np.ndarray:
    """A constant of experts (E, tiles, blocks or groups, entries) with the random channels behind its own."""
    count, tiles, blocks, entries = old.shape
    added = [count, 2 * width // TILE - tiles, blocks, entries] if name.startswith("gate_up") else [count, tiles, width // BLOCK - blocks, entries]  # fmt: skip
    if name.endswith("codes"):
        new = random_bytes(draw, *added)
    else:
        usual = np.float32(np.median(old.astype(np.uint32) << 16).astype(np.uint32).view(np.float32))
        if name.startswith("down"):
            usual *= np.float32(2.0**-QUIET)
        new = np.full(added, (usual.view(np.uint32) >> 16).astype(np.uint16), np.uint16)
    return np.concatenate([old, new], 1 if name.startswith("gate_up") else 2)


def widen(program: Any, width: int) -> int:
    """Give every expert of a program `width` channels. Returns the bytes that experts have then."""
    draw, made = np.random.default_rng(0), {}
    for plan in program.execution_plan:
        for instruction in (i for chain in plan.chains for i in chain.instructions):
            call = instruction.instr_args
            if getattr(call, "op_index", None) is None or plan.operators[call.op_index].name != OPERATOR:
                continue
            for name, at in zip(ARGUMENTS, call.args[4:]):
                value = plan.values[at].val
                if isinstance(value, Int):
                    # This call's own: the same number may be another operator's argument, too.
                    plan.values.append(type(plan.values[at])(val=Int(int_val=width)))
                    call.args[4 + ARGUMENTS.index(name)] = len(plan.values) - 1
                    continue
                assert isinstance(value, Tensor)
                index = value.data_buffer_idx
                if index not in made:
                    shape = tuple(value.sizes)
                    kind = np.uint8 if name.endswith("codes") else np.uint16
                    stored = np.frombuffer(program.constant_buffer[index].storage, kind, int(np.prod(shape)))
                    new = widened(name, stored.reshape(shape), width, draw)
                    program.constant_buffer[index].storage = new.tobytes()
                    made[index] = new.shape, new.nbytes
                value.sizes = list(made[index][0])
    if not made:
        raise SystemExit(f"the program has no {OPERATOR}; give a package of --quant int4 or int8")
    return sum(nbytes for _, nbytes in made.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="made with --target executorch --quant int4")
    parser.add_argument("--width", type=int, required=True, help="channels of an expert, a multiple of 32")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    assert args.width % BLOCK == 0 and BYTES[4] == TILE * BLOCK // 2
    package = Package.open(args.package)
    name = package.manifest["lowering"]["program"]
    file = deserialize_pte_binary(package.path(name).read_bytes())
    experts = widen(file.program, args.width)
    with writing(args.output, overwrite=True) as folder:
        for other in package.digests:
            if other not in (name, "manifest.json"):
                shutil.copyfile(package.path(other), folder / other)
        with (folder / name).open("wb") as out:
            serialize_pte_binary(file, extract_delegate_segments=True, segment_alignment=128).write_to_file(out)
        manifest = json.loads((package.folder / "manifest.json").read_text())
        manifest["model"]["name"] = args.output.stem
        seal(
            folder, {key: value for key, value in manifest.items() if key not in ("format", "format_version", "sizes")}
        )
    print(f"{args.output}: {Package.open(args.output).nbytes:,} bytes, of which experts {experts:,}")


if __name__ == "__main__":
    main()
