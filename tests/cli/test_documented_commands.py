"""What the documents tell people to type: every flag and file exists, and the commands run, here at a small size."""

from __future__ import annotations

import ast
import functools
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from helpers import ALPHABET, random_tokens, require_executorch
from small_models import small_recipe

from rmse_edge.cli.train import main as rmse_train

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "android_demo/README.md", "web_demo/README.md")),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("models/*/README.md"),
    ]
)
SCRIPTS = sorted(ROOT.glob("docs/**/*.py"))
STARTS = re.compile(r"(?:\w+=\S+ +)*(rmse-[a-z]+|python|make|pip|build/native/rmse-runner)\b(?!:)")
FLAG = re.compile(r"(?<![\w-])--?[a-zA-Z][\w-]*")


def cleaned(line: str) -> Iterator[str]:
    """The commands of a line, without their comment."""
    for part in re.sub(r"\s+# .*$", "", line).split("&&"):
        if STARTS.match(part.strip()):
            yield re.sub(r"\s+", " ", part.strip())


def in_blocks() -> Iterator[tuple[str, str]]:
    """(document, command) of every line that stands for itself: those that are copied and run."""
    for path in DOCUMENTS:
        for line in path.read_text().splitlines():
            if line.startswith("    "):
                yield from ((str(path.relative_to(ROOT)), command) for command in cleaned(line))
    for path in SCRIPTS:
        for line in (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines():
            if line.startswith("    "):
                yield from ((str(path.relative_to(ROOT)), command) for command in cleaned(line))


def in_text() -> Iterator[tuple[str, str]]:
    """(document, command) of every command within a sentence or a table."""
    for path in DOCUMENTS:
        for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)):
            yield from ((str(path.relative_to(ROOT)), command) for command in cleaned(" ".join(code.split())))


EVERY = sorted({*in_blocks(), *in_text()})
BLOCKS = sorted({command for _, command in in_blocks()})


def words(command: str) -> list[str]:
    """A command's words; [what may be left out] is in them, settings of the environment are not."""
    found = shlex.split(re.sub(r"[\[\]](?!')", " ", command))
    while "=" in found[0]:
        found.pop(0)
    return found


@functools.cache
def known_flags(verb: str, sub: str | None) -> frozenset[str]:
    """What --help of a verb, or of one of its own verbs, lists."""
    module, function = PROJECT["scripts"][verb].split(":")
    shown = io.StringIO()
    with redirect_stdout(shown), pytest.raises(SystemExit):
        getattr(importlib.import_module(module), function)([*([sub] if sub else []), "--help"])
    return frozenset(FLAG.findall(shown.getvalue()))


def script_flags(path: Path) -> set[str]:
    """What a script's parser is told, there or in modules beside it; read and not run: some import an engine first."""
    source = path.read_text()
    beside = (path.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", source, re.MULTILINE))
    source += "".join(module.read_text() for module in beside if module.is_file())
    ours = re.findall(r"^from rmse_edge\.cli\.(\w+) import", source, re.MULTILINE)
    source += "".join((ROOT / "rmse_edge" / "cli" / f"{name}.py").read_text() for name in ours)
    calls = re.findall(r"add_argument\(([^)]*)", source)
    return {flag for call in calls for flag in re.findall(r'"(--?[a-z][\w-]*)"', call)}


@pytest.mark.parametrize(("document", "command"), EVERY, ids=lambda value: value.replace("/", "."))
def test_every_flag_and_file_of_a_documented_command_exists(document: str, command: str) -> None:
    program, *rest = words(command)
    flags = [flag for word in rest for flag in FLAG.findall(word.split("=")[0]) if word.startswith("-")]
    if program == "make":
        targets = [word for word in rest if re.fullmatch(r"[a-z][a-z0-9-]*", word)]
        makefile = (ROOT / "Makefile").read_text()
        for name in () if "-C" in rest else targets:
            assert re.search(rf"^\.PHONY:.* {re.escape(name)}\b", makefile, re.MULTILINE), f"make {name}"
        given = next((word.removeprefix("BENCHMARKS=") for word in rest if word.startswith("BENCHMARKS=")), "")
        assert set(FLAG.findall(given)) <= {"--help", *script_flags(ROOT / "benchmarks" / "options.py")}
        return
    if program == "pip":
        for extra in re.findall(r"\[(\w+)\]", command):
            assert extra in PROJECT["optional-dependencies"]
        return
    if program == "python":
        script = ROOT / (rest[1].removeprefix("rmse_edge.") if rest[0] == "-m" else rest[0])
        flags = [flag for flag in flags if flag != "-m" or rest[0] != "-m"]
        script = script / "__main__.py" if script.is_dir() else script
        assert script.is_file(), rest[0]
        known = script_flags(script)
    elif program.endswith("rmse-runner"):
        native = ROOT / "runtimes" / "native"
        source = "".join(p.read_text() for p in (native / "cli").glob("*.cpp"))
        dials = re.findall(r'\{"([a-z_]+)", &Dials::', (native / "core" / "info.cpp").read_text())
        known = {*re.findall(r'"(--?[a-z][a-z-]*)"', source), *(f"--{name.replace('_', '-')}" for name in dials)}
    else:
        sub = rest[0] if rest and rest[0] in ("report", "gpt") and program == "rmse-train" else None
        if program == "rmse-lm-eval":
            pytest.importorskip("lm_eval")
            sub = "run"
        known = set(known_flags(program, sub))
    assert set(flags) <= known, sorted(set(flags) - known)
    for word in rest:
        if word.startswith(("docs/", "models/")):
            assert (ROOT / word).exists(), word


# ------------------------------------------------------------------------------------------------------ and they run

SMALL_INKLING = {
    "vocab_size": 70, "unpadded_vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1,
    "swa_head_dim": 16, "loop_layer_index_start": 1, "loop_layer_index_end": 3, "n_layers_per_attn_res_block": 1,
    "eos_token_id": 3, "moe_intermediate_size": 16,
}  # fmt: skip

# In this order, in one folder; what is added makes them small.
QUICK = ["--calibration-tokens", "512", "--evaluation-tokens", "128"]
RUN: dict[str, list[str]] = {
    'rmse-run rmse-shakespeare-onnx.rmse --prompt "ROMEO:" --show-depth': ["-n", "4"],
    'rmse-run rmse-shakespeare-onnx.rmse --prompt "ROMEO:" --show-depth -n 160 --seed 1': ["-n", "4"],
    "rmse-eval rmse-shakespeare-onnx.rmse --text FILE --sweep": ["--block", "64", "--max-tokens", "128"],
    "rmse-bench rmse-shakespeare-onnx.rmse": ["-p", "64", "-n", "4", "-r", "1"],
    'rmse-run MODEL --prompt "..." --save-session talk.session': ["-n", "2"],
    'rmse-run MODEL --session talk.session --prompt "..."': ["-n", "2"],
    'rmse-run MODEL -p "ROMEO:"': ["-n", "2"],
    "rmse-run MODEL -f scene.txt": ["-n", "2"],
    'rmse-run MODEL -p "ROMEO:" --max-loops 4 --exit-threshold 1 --temperature 0 --speculate 1': ["-n", "4"],
    'rmse-run MODEL -p "ROMEO:" -n 100 --save-session talk.session': ["-n", "2"],
    'rmse-run MODEL -p "" -n 100 --session talk.session': ["-n", "2"],
    "python docs/experiments/knowledge/recall.py --passages 10000": ["--passages", "2000"],
    "rmse-index MODEL notes.txt manual.txt -o my.kb": [],
    'rmse-run MODEL --kb my.kb --prompt "..."': ["-n", "2"],
    "rmse-eval rmse-shakespeare-onnx.rmse --text shakespeare.txt --split validation --block 256": [],
    "rmse-eval rmse-shakespeare-onnx.rmse --text shakespeare.txt --split validation [--no-memory] [--exit-threshold 1]": [
        "--block", "64",
    ],
    "rmse-train report models/rmse-shakespeare --text shakespeare.txt --thresholds 0.9": ["--max-tokens", "128"],
    "rmse-quantize -m models/rmse-shakespeare --quant int4 --calibrate shakespeare.txt": QUICK,
    'python docs/experiments/quantization/measure.py --text shakespeare.txt [--only "NAME;NAME"] [--seeds 0,1,2]': [
        "--only", "int8 rtn", "--max-blocks", "1", "-o", "measured.json",
    ],
    "rmse-train --text shakespeare.txt --recipe models/rmse-shakespeare/base-recipe.json -o runs/mine --stop-at 1500": [
        "--stop-at", "3",
    ],
    "python docs/experiments/exits/policies.py models/ouro-shakespeare --text shakespeare.txt": [
        "--text", "models/ouro-shakespeare/sample.txt", "--blocks", "1", "--rule", "exit-threshold=0.5",
    ],
    "rmse-train --text shakespeare.txt --recipe docs/experiments/dory/recipe.json -o runs/dory": [
        "--set", "steps=2", "--set", "warmup=1", "--set", "eval_blocks=2", "--set", "block_size=64",
    ],
    "rmse-train --text shakespeare.txt --recipe docs/experiments/inkling/recipe.json -o runs/inkling": [
        "--set", "steps=2", "--set", "warmup=1", "--set", "eval_blocks=2", "--set", "block_size=64",
    ],
    "rmse-train --text shakespeare.txt --recipe docs/experiments/diffusion/blocks.json -o runs/blocks": [
        "--set", "steps=2", "--set", "warmup=1", "--set", "eval_blocks=2", "--set", "batch_size=2",
    ],
    "rmse-train --text shakespeare.txt --recipe docs/experiments/diffusion/one.json -o runs/one": [
        "--set", "steps=2", "--set", "warmup=1", "--set", "eval_blocks=2", "--set", "batch_size=2",
    ],
    "python docs/experiments/diffusion/measure.py runs/blocks runs/one shakespeare.txt": ["--prompts", "1"],
    "python docs/experiments/dr_llm/measure.py brake models/ouro-shakespeare --text shakespeare.txt --recipe docs/experiments/dr_llm/routers.json": [
        "--prompts", "2", "--text", "models/ouro-shakespeare/sample.txt",
    ],
    "rmse-train --text shakespeare.txt --stage gate --init runs/dory -o runs/gated": [
        "--set", "gate_steps=2", "--set", "eval_blocks=2", "--set", "block_size=64",
    ],
    "rmse-eval runs/dory --text FILE --sweep --rule exit-kl --store": [
        "--max-tokens", "64", "--points", "2", "--budget", "1000",
    ],
    "rmse-eval runs/gated --text FILE --sweep --rule exit-threshold --store": [
        "--max-tokens", "64", "--points", "2", "--budget", "1000",
    ],
    "python docs/experiments/random_checkpoint.py FOLDER [--shape inkling-2-mini] [--set n_routed_experts=16] [--seed 0]": [
        word for field, value in SMALL_INKLING.items() for word in ("--set", f"{field}={value}")
    ],
    "rmse-run models/trm-sudoku --board board.txt --show-steps": [],
    "rmse-data sudoku --size 6 --count 1500 --test 300 --seed 0 -o boards": ["--count", "24", "--test", "2"],
    "rmse-train --recipe models/trm-sudoku/recipe.json -o runs/trm": [
        "--set", "steps=2", "--set", "batch_size=4", "--set", "eval_blocks=2", "--set", "task.train=8",
        "--set", "task.held_out=2", "--set", "task.test=2",
    ],
    "rmse-quantize -m runs/trm --quant int4 --calibrate boards/train.csv": ["--calibration-tokens", "512"],
    "rmse-quantize -m models/trm-sudoku --quant int8 --calibrate boards/train.csv": ["--calibration-tokens", "512"],
    "rmse-quantize -m models/trm-sudoku --quant int4 --calibrate boards/train.csv": ["--calibration-tokens", "512"],
    "python docs/experiments/gate_objective.py runs/mine --text shakespeare.txt": ["--blocks", "2", "--steps", "2"],
    "python docs/experiments/offload/record.py models/rmse-shakespeare --text shakespeare.txt -o exits.npz": [
        "--tokens", "128",
    ],
    "python docs/experiments/offload/record.py models/rmse-shakespeare --text shakespeare.txt -o full.npz --exit-threshold 1": [
        "--tokens", "128",
    ],
    "python docs/experiments/offload/replay.py exits.npz full.npz": [],
    "python docs/experiments/offload/placement.py exits.npz full.npz": [],
    "rmse-probe models/rmse-shakespeare --text shakespeare.txt -o probe": ["--blocks", "2"],
    'rmse-trace models/rmse-shakespeare -p "ROMEO:" -o trace': ["-n", "4"],
    "rmse-data problems --text shakespeare.txt --share 0.6 -o problems.txt": [],
    "rmse-train --text problems.txt --recipe docs/experiments/problems/recipe.json -o runs/mixed": [
        "--set", "steps=1", "--set", "gate_steps=1", "--set", "eval_blocks=1", "--set", "batch_size=2",
    ],
    "rmse-probe runs/mixed --text problems.txt --task hops --task addition --task brackets -o probe": [
        "--blocks", "1", "--problems", "16", "--no-probes", "-o", "probe-mixed",
    ],
    "rmse-probe models/ouro-shakespeare --text shakespeare.txt -t 1 -o probe-ouro": [
        "--text", "models/ouro-shakespeare/sample.txt", "--blocks", "1",
    ],
}  # fmt: skip


def changed(*changes: str) -> list[str]:
    """Flags that change a recipe, so that it ends at once."""
    return [word for change in changes for word in ("--set", change)]


SAMPLE = str(ROOT / "models" / "ouro-shakespeare" / "sample.txt")
# Engines start and programs are exported: half a minute together. What is added replaces what was given.
SLOW: dict[str, list[str]] = {
    "python docs/experiments/executorch/state.py [--windows 128,256] [--reps 60]": [
        "--sizes", "192", "--windows", "64", "--reps", "5",
    ],
    "python docs/experiments/executorch/experts.py [--sizes 192x32,768x128] [--rows 1,64]": [
        "--sizes", "64x32", "--rows", "1,2", "--reps", "2,2", "--sample", "1",
    ],
    "python docs/experiments/hybrid/decode.py --only gated_deltanet,rodimus,mamba3,atlas --plain gated_deltanet,rodimus": [
        "--width", "32", "--turns", "2", "--only", "gated_deltanet", "--plain", "gated_deltanet",
    ],
    "python docs/experiments/facts/measure.py runs/facts.rmse": ["--questions", "3"],
    "python docs/experiments/gathered_experts.py [--experts 512] [--top-k 10] [--d-model 192] [--width 32] [--reps 31]": [
        "--experts", "8", "--top-k", "2", "--d-model", "32", "--reps", "1",
    ],
    "python docs/experiments/hybrid/stopped.py --text shakespeare.txt": [
        "--text", SAMPLE, "--seeds", "0", "--only", "one", "-o", "stopped.json", *changed(
            "steps=2", "warmup=1", "eval_every=2", "eval_blocks=2", "batch_size=2",
        ),
    ],
    "python docs/experiments/hybrid/mqar.py": [
        "--seeds", "0", "--only", "gated_deltanet-256", "-o", "mqar.json", *changed(
            "steps=2", "warmup=1", "eval_every=2", "eval_blocks=2", "batch_size=2",
        ),
    ],
    "python docs/experiments/space_time/compare.py --text shakespeare.txt": [
        "--text", SAMPLE, "--seeds", "0", "--only", "gpt-1,loop-2", "-o", "results.json", *changed(
            "steps=4", "warmup=1", "eval_every=2", "eval_blocks=2", "batch_size=2",
        ),
    ],
    "python docs/experiments/space_time/depths.py --text shakespeare.txt": [
        "--text", SAMPLE, "--seeds", "0", "--only", "none,last", "-o", "depths.json", *changed(
            "steps=2", "warmup=1", "gate_steps=1", "eval_every=2", "eval_blocks=2", "batch_size=2",
        ),
    ],
    "python docs/experiments/trm/ablations.py": [
        "--seeds", "0", "-o", "results.json", *changed(
            "steps=2", "warmup=1", "eval_every=2", "task.train=24", "task.held_out=4", "task.test=4", "batch_size=4",
        ),
    ],
}  # fmt: skip

EXPORTS = "the session's packages are exported by the same verb, and tests/test_export*.py hold its flags"
OTHER = "runs above, for another model"
TEXT = " --text shakespeare.txt"
TRAINS = "training takes hours as documented; tests/cli/test_train_cli.py and test_train_resume.py run the verb"
PUBLISHED = "a checkpoint of gigabytes; tests/arch/test_{ouro,dory,hrm_text,inkling}.py and tests/quantize/test_streamed.py have small ones"
BOARDS_OF_PACKAGES = (
    "tests/cli/test_boards.py runs the verbs on the checkpoint, tests/arch/test_packages.py packages of small solvers"
)
SPECULATES = "minutes; tests/runtimes/test_speculation.py runs it on a tiny model"
HEADS = "minutes; tests/train/test_train_mtp.py and tests/runtimes/test_speculation.py do so with a tiny model"
ROUTERS = "minutes; tests/train/test_train_routing.py runs the verb on a tiny model"
BLOCKWISE = "MODEL writes by blocks there; tests/runtimes/test_blocks.py runs the verbs on one"
GPU = "needs a GPU; tests/runtimes/test_cuda.py runs the verbs with --device cpu"
SERVES = "serves until it is ended; tests/serve"
NOT_RUN: dict[str, str] = {
    **{
        f"python docs/experiments/hybrid/{name}.py{text}": "tests/train/test_train_studies.py; stopped.py and mqar.py run above"
        for name, text in {"etd": TEXT, "rodimus": TEXT, "sinks": TEXT, "reach": ""}.items()
    },
    "python docs/experiments/hybrid/state.py PACKAGE.rmse --positions 1000,10000,100000": "tests/arch/test_packages.py asks for these bytes",
    "make apk": "tests/android/test_apk.py builds it with a tiny model, its nightly test as here",
    "make demo": "tests/test_shipped.py does what it does",
    "make test test-devices": "this is it",
    "make runner": "tests/runtimes/test_runner.py builds it",
    "make benchmarks": "takes an hour and compiles llama.cpp; tests/benchmarks runs its parts on tiny models",
    'make benchmarks BENCHMARKS="--models dense -t 1 -r 7 --json results.json --plot results.png"': "as above",
    "make gpu": "needs a GPU; tests/benchmarks/test_gpu_benchmark.py runs its benchmark on the CPU",
    "make gpu-dry-run": "tests/benchmarks/test_gpu_benchmark.py, of a smaller model",
    'rmse-run models/rmse-shakespeare --runtime cuda --prompt "ROMEO:"': GPU,
    "rmse-eval models/rmse-shakespeare --runtime cuda --dtype bf16 --text shakespeare.txt": GPU,
    "rmse-bench models/rmse-shakespeare --runtime cuda": GPU,
    "make fuzz": "takes hours; tests/cli/test_robustness.py runs a few of its cases",
    'rmse-run MODEL --chat --system "Be brief."': "the shipped model has no template; tests/cli/test_chat.py",
    "python docs/experiments/knowledge/recall.py": "runs above, at another size",
    "python docs/experiments/exits/policies.py runs/dory --text shakespeare.txt --rule exit-kl=0.003,0.01,0.03,0.1": OTHER,
    "python docs/experiments/exits/policies.py runs/dory --text shakespeare.txt --blocks 24 --rule exit-epsilon=0.05,0.1,0.2,0.3": OTHER,
    "python docs/experiments/exits/policies.py runs/gated --text shakespeare.txt --blocks 24 --rule exit-threshold=0.2,0.3,0.5,0.9": OTHER,
    "python docs/experiments/exits/policies.py runs/inkling --text shakespeare.txt --blocks 24 --rule exit-epsilon=0.3,0.45,0.6": OTHER,
    "python docs/experiments/exits/policies.py runs/inkling-gated --text shakespeare.txt --blocks 24 --rule exit-threshold=0.3,0.9": OTHER,
    "rmse-eval runs/inkling --text shakespeare.txt --split validation --block 256 --max-tokens 6144 --sweep --rule exit-kl=0.01,0.03,0.1": OTHER,
    "rmse-train --text shakespeare.txt --stage gate --init runs/inkling -o runs/inkling-gated": OTHER,
    "rmse-export -m runs/inkling": EXPORTS,
    "rmse-bench inkling-onnx.rmse --ids FILE -p 256 -n 64 -d 3,2,1 -r 9 -t 1 --exit-epsilon 0.6": "tests/runtimes/test_bench.py; its model is trained above",
    "rmse-export -m runs/gated": EXPORTS,
    "rmse-bench gated-onnx.rmse --ids FILE -p 256 -n 64 -d 4,2,1 -r 3 -t 1 --exit-epsilon 0.2": "tests/runtimes/test_bench.py; its model is trained above",
    "rmse-export -m models/rmse-shakespeare": EXPORTS,
    "rmse-export -m models/rmse-shakespeare --archive": "tests/test_archive.py",
    "rmse-export -m models/ouro-shakespeare --archive": "tests/test_archive.py",
    'rmse-run rmse-shakespeare-onnx.rmse.zip -p "ROMEO:"': "tests/test_archive.py",
    "rmse-export -m rmse-shakespeare-int4": EXPORTS,
    "rmse-export -m runs/mine": EXPORTS,
    "rmse-export -m runs/facts -o runs/facts.rmse": EXPORTS,
    "rmse-export --target executorch -m models/rmse-shakespeare": EXPORTS,
    "rmse-export --target executorch -m rmse-shakespeare-int4": EXPORTS,
    "rmse-export --target coreml -m models/rmse-shakespeare --quant fp16": EXPORTS,
    "rmse-export --target coreml -m rmse-shakespeare-int4 --compute gpu": EXPORTS,
    "rmse-export -m models/rmse-shakespeare --quant int4 --calibrate shakespeare.txt": EXPORTS,
    'rmse-run rmse-shakespeare-executorch.rmse --prompt "ROMEO:" --show-depth': "as above; tests/runtimes/test_executorch.py",
    'build/native/rmse-runner rmse-shakespeare-executorch.rmse --prompt "ROMEO:" --show-depth': "tests/runtimes/test_runner.py",
    'rmse-run rmse-shakespeare-coreml.rmse --prompt "ROMEO:" --show-depth': "as above; tests/runtimes/test_coreml.py",
    'rmse-run MODEL -p "ROMEO:" --speculate 2 --draft-tokens 5': "runs above, with other drafts",
    'rmse-run MODEL -p "ROMEO:" --speculate heads': HEADS,
    'rmse-run MODEL -p "ROMEO:" --speculate auto': HEADS,
    "rmse-train --text shakespeare.txt --stage mtp --init models/ouro-shakespeare --recipe docs/experiments/speculation/ouro-heads.json -o runs/heads": HEADS,
    "rmse-train --text shakespeare.txt --stage mtp --init models/ouro-shakespeare --recipe docs/experiments/speculation/ouro-heads.json -o runs/ouro-heads": HEADS,
    "rmse-train --text shakespeare.txt --stage mtp --init models/rmse-shakespeare --recipe docs/experiments/speculation/rmse-heads.json -o runs/rmse-heads": HEADS,
    "rmse-export -m runs/heads": HEADS,
    "rmse-export -m runs/ouro-heads": HEADS,
    "rmse-export -m runs/rmse-heads": HEADS,
    "rmse-export -m runs/ouro-heads --target executorch --draft-tokens 3": HEADS,
    'rmse-run heads-onnx.rmse -p "ROMEO:" --speculate heads': HEADS,
    "python docs/experiments/speculation/measure.py ouro-heads-onnx.rmse --loops 1 --heads --tokens 2,3,5 -n 32 -r 3": HEADS,
    "python docs/experiments/speculation/measure.py ouro-heads-onnx.rmse --loops 1 --heads --auto --tokens 3,5 -n 32 -r 3 --adaptive": HEADS,
    "python docs/experiments/speculation/measure.py ouro-heads-onnx.rmse --costs --loops 1 --tokens 2,3,5,7": HEADS,
    "python docs/experiments/speculation/measure.py ouro-heads-executorch.rmse --loops 1 --heads --tokens 3 -n 32 -r 3": HEADS,
    "python docs/experiments/speculation/measure.py rmse-heads-onnx.rmse --loops 2 --heads --tokens 2,3 -n 32 -r 3": HEADS,
    "python docs/experiments/speculation/measure.py rmse-heads-onnx.rmse --loops 2 --heads --tokens 2,3 -n 32 -r 3 --adaptive": HEADS,
    'rmse-run MODEL -p "ROMEO:" -n 128 --show-depth': BLOCKWISE,
    'rmse-run MODEL -p "ROMEO:" -n 128 --exit-threshold 0.9': BLOCKWISE,
    "rmse-export -m MODEL --target onnx": BLOCKWISE,
    "rmse-export -m models/rmse-shakespeare --target executorch --archive": "tests/android/test_android_executorch.py, of tiny models",
    "python docs/experiments/diffusion/measure.py BLOCKS ONE TEXT [--prompts 8] [-o results.json]": "runs above, with names",
    "rmse-train --text shakespeare.txt --recipe docs/experiments/dr_llm/recipe.json -o runs/dense": TRAINS,
    "rmse-train --text shakespeare.txt --stage routers --init runs/dense --recipe docs/experiments/dr_llm/routers.json -o runs/routed": ROUTERS,
    "rmse-train --text shakespeare.txt --stage routers --init runs/dense --recipe docs/experiments/dr_llm/routers.json --set beta=0.999 -o runs/balanced": ROUTERS,
    "rmse-export -m runs/routed": EXPORTS,
    "python docs/experiments/dr_llm/measure.py time PACKAGE --text TEXT [-n 32] [-r 5]": "runs/routed is trained above; tests/runtimes/test_planned.py",
    "python docs/experiments/dr_llm/measure.py time routed-onnx.rmse --text shakespeare.txt -r 9": "as above",
    "python docs/experiments/dr_llm/measure.py brake OURO --text TEXT [--recipe routers.json]": "runs above, with names",
    "python docs/experiments/speculation/measure.py PACKAGE [--loops 1,2] [--heads] [--auto] [--tokens 1,2,3,5] [--adaptive] [-n 64] [-r 5]": SPECULATES,
    "python docs/experiments/speculation/measure.py PACKAGE --costs": SPECULATES,
    "python docs/experiments/speculation/measure.py ouro-shakespeare-onnx.rmse --costs": SPECULATES,
    "python docs/experiments/speculation/measure.py rmse-shakespeare-onnx.rmse --costs --loops 2,4": SPECULATES,
    "python docs/experiments/speculation/measure.py ouro-shakespeare-onnx.rmse -n 32 -r 3": SPECULATES,
    "python docs/experiments/speculation/measure.py ouro-shakespeare-onnx.rmse --loops 1 --tokens 1,3 -n 32 -r 3 --adaptive": SPECULATES,
    "python docs/experiments/speculation/measure.py rmse-shakespeare-onnx.rmse --loops 2,4 --tokens 2,4 -n 32 -r 3": SPECULATES,
    "python docs/experiments/speculation/measure.py rmse-shakespeare-onnx.rmse --loops 2 --tokens 1,3 -n 32 -r 3 --adaptive": SPECULATES,
    "python docs/experiments/speculation/measure.py ouro-shakespeare-executorch.rmse --loops 1 --tokens 2,3 -n 32 -r 3": SPECULATES,
    "rmse-export -m models/ouro-shakespeare --target executorch --draft-tokens 3": EXPORTS,
    "rmse-run MODEL --prompt-tokens 1,2,3": "tests/runtimes/test_other_models.py",
    'rmse-run Ouro-1.4B --chat -p "..." --exit-threshold 0.9': PUBLISHED,
    "rmse-export -m Dory-4B-int4 --target executorch --max-seq-len 4096": PUBLISHED,
    "rmse-quantize -m NVIDIA-Nemotron-Labs-Dory1.0-4B-BF16 --quant int4 --method rtn -o Dory-4B-int4": PUBLISHED,
    "rmse-export -m HRM-Text-1B-int4 --target executorch --max-seq-len 2048": PUBLISHED,
    "rmse-quantize -m HRM-Text-1B --quant int4 --method rtn": PUBLISHED,
    'rmse-run HRM-Text-1B -p "..."': PUBLISHED,
    'rmse-run Dory-4B-int4 --chat -p "..." --exit-cosine 0.01': PUBLISHED,
    "rmse-quantize -m Inkling-2-Mini-bf16 --quant int4 --method rtn -o Inkling-2-Mini-int4": PUBLISHED,
    'rmse-run Inkling-2-Mini-int4 -p "..." --exit-cosine 0.01': PUBLISHED,
    "rmse-export -m Inkling-2-Mini-int4 --target executorch --max-seq-len 4096": PUBLISHED,
    "rmse-quantize -m Ouro-1.4B --quant int4 --method rtn": PUBLISHED,
    "rmse-export -m Ouro-1.4B-int4 --target executorch --max-seq-len 4096": PUBLISHED,
    "rmse-eval Ouro-1.4B-int4-executorch.rmse --text FILE --sweep": PUBLISHED,
    "rmse-export -m models/ouro-shakespeare": EXPORTS,
    "rmse-export -m models/trm-sudoku": EXPORTS,
    "rmse-export -m models/trm-sudoku --target executorch": EXPORTS,
    "rmse-eval trm-sudoku-onnx.rmse --boards models/trm-sudoku/test.csv --sweep --rule exit-threshold=0.5,0.9 -t 1": BOARDS_OF_PACKAGES,
    "rmse-bench trm-sudoku-onnx.rmse --boards models/trm-sudoku/test.csv -t 1": BOARDS_OF_PACKAGES,
    "rmse-eval trm-sudoku-executorch.rmse --boards models/trm-sudoku/test.csv --sweep": BOARDS_OF_PACKAGES,
    "rmse-bench trm-sudoku-executorch.rmse --boards models/trm-sudoku/test.csv": BOARDS_OF_PACKAGES,
    'rmse-run models/ouro-shakespeare --prompt "ROMEO:" --show-depth': "tests/test_shipped.py reads the model",
    "rmse-train --text shakespeare.txt --recipe models/ouro-shakespeare/recipe.json -o runs/ouro": TRAINS,
    "rmse-train --text shakespeare.txt --recipe docs/experiments/space_time/step-0.json -o runs/step-0": TRAINS,
    "rmse-bench PACKAGE --profile": "tests/runtimes/test_executorch.py",
    "rmse-data shakespeare -o shakespeare.txt": "downloads; tests/train/test_train_data.py",
    "rmse-train --text shakespeare.txt --recipe models/rmse-shakespeare/base-recipe.json -o runs/base": TRAINS,
    "rmse-train --text shakespeare.txt --recipe models/rmse-shakespeare/recipe.json --init runs/base -o runs/mine": TRAINS,
    "rmse-train --recipe docs/experiments/recall/recipe.json -o runs/recall": TRAINS,
    "rmse-train --recipe docs/experiments/facts/recipe.json -o runs/facts": TRAINS,
    "rmse-train --text shakespeare.txt --recipe docs/experiments/hybrid/recipe.json -o runs/hybrid": TRAINS,
    "rmse-train --recipe docs/experiments/hybrid/mqar.json -o runs/mqar": TRAINS,
    "rmse-train --recipe docs/experiments/hybrid/parity.json -o runs/parity": TRAINS,
    "rmse-train --recipe docs/experiments/hybrid/parity.json --set model.mamba_angles=0 -o runs/real": TRAINS,
    "python docs/experiments/quantization/measure.py --text shakespeare.txt --seeds 0,1,2": "runs above, for one variant",
    "python docs/experiments/peak_memory.py COMMAND": "runs below",
    "python docs/experiments/ungated.py FOLDER-int4 FOLDER.rmse [--target executorch] [--max-seq-len 4096]": PUBLISHED,
    "rmse-quantize -m FOLDER --quant int4 --method rtn": PUBLISHED,
    "rmse-export -m FOLDER-int4 --target executorch --max-seq-len 4096": PUBLISHED,
    "python docs/experiments/random_checkpoint.py FOLDER --shape dory-4b": PUBLISHED,
    "python docs/experiments/quantization/agreement.py PACKAGE.rmse QUANTISED-CHECKPOINT --text shakespeare.txt": "compares as the parity gate does, with its functions; tests/export/test_parity.py",
    "python docs/experiments/quantization/speed.py BASE NEW --text shakespeare.txt [--rounds 3] [--seeds 0] [--threads N]": "needs two checkouts",
    "python docs/experiments/executorch/experts.py --sizes 192x32": "run below, at another size",
    "python docs/experiments/executorch/experts.py --sizes 768x128": "run below, at another size",
    "python docs/experiments/executorch/state.py": "run below, with sizes",
    "python docs/mac_checklist rmse-shakespeare-coreml.rmse -o report.md": "tests/cli/test_mac_checklist.py",
    "python docs/mac_checklist PACKAGE.rmse -o report.md": "tests/cli/test_mac_checklist.py",
    'build/native/rmse-runner PACKAGE --prompt "ROMEO:" --expert-ram 300M --stats': "tests/runtimes/test_offload.py",
    "python docs/experiments/offload/widen.py rmse-shakespeare-executorch.rmse --width 6496 -o wide.rmse": "a gigabyte; tests/runtimes/test_offload.py widens a tiny package",
    "python docs/experiments/offload/widen.py rmse-shakespeare-executorch.rmse --width 640 -o wide640.rmse": "as above",
    "python docs/experiments/offload/pressure.py wide.rmse --text shakespeare.txt": "a gigabyte, for half an hour; as below",
    'python docs/experiments/offload/pressure.py wide.rmse --text shakespeare.txt --limit "" --tokens 200 --budgets 50%,25% --threads 1 --exits': "as below",
    'python docs/experiments/offload/pressure.py wide640.rmse --text shakespeare.txt --limit "" --tokens 300 --rounds 5 --budgets 50%,25%': "a hundred megabytes, for minutes; tests/runtimes/test_offload.py runs what it runs",
    "rmse-export --target executorch -m models/rmse-shakespeare --quant int4 --calibrate shakespeare.txt --profile-experts shakespeare.txt": EXPORTS,
    "rmse-export --target executorch -m models/rmse-shakespeare --quant int4 --method rtn": EXPORTS,
    "rmse-probe models/rmse-shakespeare --text shakespeare.txt -t 1 -o probe-rmse": "runs above, for fewer texts",
    "rmse-lm-eval --model rmse --model_args package=models/rmse-shakespeare --tasks docs/examples/shakespeare.yaml": "tests/test_harness.py, and its nightly test the command",
    "pip install 'rmse-edge[eval]'": "installs",
    "pip install 'rmse-edge[optimum,onnx]'": "installs",
    "rmse-trace models/rmse-shakespeare --text shakespeare.txt -o trace-text": "tests/probe/test_trace_cli.py",
    "rmse-export": EXPORTS,
    'rmse-run rmse-shakespeare-onnx.rmse --prompt "ROMEO:"': "runs above, with --show-depth",
    "python docs/examples/echo.py": "tests/arch/test_contributing.py saves, exports and runs that model",
    "pip install 'rmse-edge[coreml]'": "installs",
    "pip install -c constraints.txt '.[onnx]'": "installs",
    "pip install -c constraints.txt '.[onnx,serve]'": "installs",
    "pip install -c constraints.txt -e '.[onnx,serve]' pytest": "installs",
    "pip install -c constraints.txt '.[cuda]'": "installs",
    "rmse-serve rmse-shakespeare-onnx.rmse": SERVES,
    "rmse-serve rmse-shakespeare-onnx.rmse --host 0.0.0.0 --api-key-file keys.txt": SERVES,
    "python -m rmse_edge.web_demo rmse-shakespeare-onnx.rmse": "serves until it is ended; tests/web",
    "python -m rmse_edge.web_demo": "as above",
    "rmse-lm-eval --model rmse --model_args package=rmse-shakespeare --tasks mine.yaml": "as the one on docs/examples/shakespeare.yaml",
    "rmse-run trm-sudoku --board board.txt": "runs above, by the folder",
    "rmse-export -m models/rmse-shakespeare --experts gathered": "minutes; tests/layers/test_router_ties.py has both forms of experts",
    "rmse-export -m models/rmse-shakespeare --quant int4 --calibrate shakespeare.txt --accuracy-level 0 --archive": EXPORTS,
    "python docs/experiments/serve/load.py MODEL [-n 1000] [--clients 16] [--seconds 600]": SERVES,
    "python docs/experiments/serve/load.py rmse-shakespeare-onnx.rmse --seconds 600": SERVES,
    "pip install --no-deps --no-build-isolation -e . --config-settings editable_mode=strict": "installs",
}


def test_every_documented_command_is_run_or_says_why_not() -> None:
    listed = {re.sub(r"^OMP_NUM_THREADS=1 ", "", command) for command in BLOCKS}
    known = {*RUN, *SLOW, *NOT_RUN}
    assert listed == known, sorted(listed ^ known)


@pytest.fixture(scope="module")
def workplace(remembering: Path, remembering_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands name, small."""
    folder = tmp_path_factory.mktemp("documented")
    (folder / "docs").symlink_to(ROOT / "docs")
    (folder / "MODEL").symlink_to(remembering)
    (folder / "rmse-shakespeare-onnx.rmse").symlink_to(remembering_package)
    shutil.copytree(remembering, folder / "models" / "rmse-shakespeare")
    (folder / "models" / "ouro-shakespeare").symlink_to(ROOT / "models" / "ouro-shakespeare")
    (folder / "models" / "trm-sudoku").symlink_to(ROOT / "models" / "trm-sudoku")
    (folder / "board.txt").write_text(
        (ROOT / "models" / "trm-sudoku" / "test.csv").read_text().splitlines()[1].split(",")[1]
    )
    shutil.copyfile(ROOT / "tests" / "data" / "ouro" / "config.json", folder / "config.json")
    recipe = json.loads(small_recipe(steps=3, gate_steps=1, exit_steps=1).to_json())
    del recipe["model"]["vocab_size"]
    (folder / "models" / "rmse-shakespeare" / "base-recipe.json").write_text(json.dumps(recipe))
    text = "".join(ALPHABET[i] for i in random_tokens(4000, 5))
    for name in ("shakespeare.txt", "FILE", "notes.txt", "manual.txt", "scene.txt"):
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("command", RUN)
def test_a_documented_command_runs(
    command: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the order of `RUN`: some read what others wrote."""
    monkeypatch.chdir(workplace)
    program, *rest = words(command)
    rest += RUN[command]
    if program == "python":
        monkeypatch.setattr(sys, "argv", rest)
        monkeypatch.syspath_prepend(str(Path(rest[0]).parent))  # as python does, for modules beside a script
        runpy.run_path(rest[0], run_name="__main__")
        return
    module, function = PROJECT["scripts"][program].split(":")
    assert not getattr(importlib.import_module(module), function)(rest), capsys.readouterr().err


def test_the_python_of_the_readme_runs(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder with a package of the name that it opens, whose tokenizer knows other characters."""
    monkeypatch.chdir(workplace)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 1
    found: dict[str, Any] = {}
    exec(compile(blocks[0], "README.md", "exec"), found)
    assert len(found["fed"].depth) == len("ROMEO:") and capsys.readouterr().out.startswith("[")


HOLDS = """
import subprocess, sys, time
held = bytearray(100_000_000)
if "child" not in sys.argv:
    subprocess.run([sys.executable, "-c", sys.argv[1], sys.argv[1], "child"], check=True)
else:
    time.sleep(2)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_a_command_is_that_of_all_its_processes() -> None:
    script = str(ROOT / "docs" / "experiments" / "peak_memory.py")
    command = [sys.executable, script, sys.executable, "-c", HOLDS, HOLDS]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"([\d.]+) GB anonymous, ([\d.]+) GB with mapped files", done.stderr)
    assert found and 0.2 <= float(found[1]) <= float(found[2]) < 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    # Exports of tiny models, a minute and more: benchmarks of this kind are for people to read.
    [
        pytest.param(c, marks=[pytest.mark.nightly] if re.search("experiments/executorch|hybrid/decode", c) else [])
        for c in SLOW
    ],
)
def test_a_documented_experiment_runs(command: str, tmp_path: Path) -> None:
    """In a process of its own: it sets threads and logging for all of it."""
    require_executorch()
    _, script, *rest = words(command)
    rest = [word for word in rest if word == "runs/facts.rmse"] + SLOW[command]
    if "facts" in script:
        recipe = json.loads((ROOT / "docs/experiments/facts/recipe.json").read_text())
        recipe |= {"steps": 2, "gate_steps": 1, "exit_steps": 1, "batch_size": 2, "warmup": 1, "eval_every": 1}
        (tmp_path / "recipe.json").write_text(json.dumps(recipe))
        # A checkpoint folder answers like the package made of it.
        assert not rmse_train(["--recipe", str(tmp_path / "recipe.json"), "-o", str(tmp_path / "runs" / "facts")])
        rest[0] = "runs/facts"
    command_line = [sys.executable, str(ROOT / script), *rest]
    done = subprocess.run(command_line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "|" in done.stdout or json.loads(done.stdout)["questions"] == 3
