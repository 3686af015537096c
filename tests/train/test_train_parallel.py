"""Two processes over gloo, DDP and FSDP2: the same run as one process, also after a resume under either number."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import small_recipe, small_text, text_source

from rmse_edge.errors import UserError
from rmse_edge.train.journal import read_rows
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.trainer import STATE_FILE, Trainer

pytestmark = pytest.mark.slow

STOP = 7  # in the gate stage
# Without dropout, which every process draws for itself; clipped in every step.
RECIPES = {
    "ddp": small_recipe(model={"dropout": 0.0}),
    "ddp-accumulate": small_recipe(model={"dropout": 0.0}, accumulate=2),
    "fsdp": small_recipe(model={"dropout": 0.0}),
    "fsdp-accumulate": small_recipe(model={"dropout": 0.0}, accumulate=2),
    "ddp-gpt": Recipe(
        {"vocab_size": 40, "d_model": 32, "n_heads": 2, "n_layers": 2, "block_size": 64, "dropout": 0.0}, "gpt",
        batch_size=4, steps=9, warmup=2, eval_every=3, eval_blocks=4, clip=0.3, precision="fp32",
    ),
}  # fmt: skip

WORKER = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
import torch
from torch.distributed.tensor import DTensor
from test_train_parallel import RECIPES, STOP, trainer_in
torch.set_num_threads(1)
root = Path({root!r})
for name, recipe in RECIPES.items():
    mode = name.split("-")[0]
    trainer = trainer_in(root / name, recipe, mode)
    assert trainer.parallel.world == 2 and trainer.parallel.sharded == (mode == "fsdp")
    if mode == "fsdp":
        whole = sum(p.numel() for p in trainer.model.parameters())
        mine = sum(p.to_local().numel() for p in trainer.model.parameters())
        assert mine < 0.6 * whole, (mine, whole)
        assert all(isinstance(v, DTensor) for v in trainer.optimizer.param_groups[0]["params"])
    trainer.run(stop_at=STOP)
    trainer = trainer_in(root / name, recipe, mode)
    trainer.resume()
    assert trainer.step == STOP
    trainer.run()
    weights = trainer.final_weights()
    if trainer.parallel.first:
        torch.save(weights, root / name / "weights.pt")
trainer_in(root / "ddp-then-one", RECIPES["ddp"], "ddp").run(stop_at=STOP)
trainer.parallel.barrier()
trainer.parallel.close()
"""


def trainer_in(out: Path, recipe: Recipe, mode: str = "ddp") -> Trainer:
    out.mkdir(parents=True, exist_ok=True)
    ids = small_text()
    return Trainer(recipe, text_source(ids), out, mode=mode)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes leave behind, for every recipe."""
    root = tmp_path_factory.mktemp("together")
    script = root / "worker.py"
    script.write_text(WORKER.format(tests=[str(p) for p in Path(__file__).parents[:2]], root=str(root)))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    done = subprocess.run([*command, "--standalone", str(script)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, torch.Tensor]]]:
    """The same recipes in this one process."""
    root, runs = tmp_path_factory.mktemp("alone"), {}
    for name in ("ddp", "ddp-gpt"):
        trainer = trainer_in(root / name, RECIPES[name])
        trainer.run()
        runs[name] = (root / name, trainer.final_weights())
    return runs


def assert_same_run(
    ours: Path, weights: dict[str, torch.Tensor], theirs: Path, expected: dict[str, torch.Tensor]
) -> None:
    rows, expected_rows = read_rows(ours / "log.csv"), read_rows(theirs / "log.csv")
    assert [r["step"] for r in rows] == [r["step"] for r in expected_rows]
    for a, b in zip(rows, expected_rows):
        for field in ("loss", "last_loss", "depth", "grad_norm", "idle_experts", "val_loss"):
            assert (a[field] == "") == (b[field] == "")
            if a[field]:
                assert float(a[field]) == pytest.approx(float(b[field]), rel=1e-4), (a["step"], field)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_are_one_run(together: Path, alone: dict, name: str) -> None:
    """Losses, clipped gradient norms, expert loads and weights, through all stages and a resume in the middle."""
    reference = alone["ddp-gpt" if name == "ddp-gpt" else "ddp"]
    weights = torch.load(together / name / "weights.pt", weights_only=True)
    assert_same_run(together / name, weights, *reference)


def test_gradients_were_clipped(alone: dict) -> None:
    rows = [r for r in read_rows(alone["ddp"][0] / "log.csv") if r["stage"] != "gate"]
    assert all(float(r["grad_norm"]) > RECIPES["ddp"].clip for r in rows), (
        "or the comparison says nothing about clipping"
    )


@pytest.mark.parametrize("source", ["ddp-then-one", "fsdp"])
def test_one_process_goes_on_where_two_stopped(together: Path, alone: dict, tmp_path: Path, source: str) -> None:
    if source == "fsdp":  # its last state is that of the finished run: it must read back whole
        trainer = trainer_in(together / source, RECIPES[source])
        trainer.resume()
        assert trainer.step == RECIPES[source].total_steps
    else:
        trainer = trainer_in(together / source, RECIPES["ddp"])
        trainer.resume()
        assert trainer.step == STOP
        trainer.run()
    assert_same_run(together / source, trainer.final_weights(), *alone["ddp"])


def test_two_processes_go_on_where_one_stopped_needs_no_other_state(together: Path) -> None:
    """The saved state holds whole tensors under the same names, whoever wrote it."""
    states = [torch.load(together / n / STATE_FILE, weights_only=True) for n in ("ddp", "fsdp")]
    for part in ("model", "average", "best_weights"):
        assert {k: v.shape for k, v in states[0][part].items()} == {k: v.shape for k, v in states[1][part].items()}
    slots = [s["optimizer"]["state"] for s in states]
    assert {i: v["exp_avg"].shape for i, v in slots[0].items()} == {i: v["exp_avg"].shape for i, v in slots[1].items()}


def test_a_batch_that_does_not_divide_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = small_recipe(batch_size=6, accumulate=2)
    monkeypatch.setattr("rmse_edge.train.parallel.Parallel.__init__", two_processes)
    with pytest.raises(UserError, match=r"batch_size / accumulate \(6/2\) is not divisible by the 2 processes"):
        trainer_in(tmp_path, recipe)


def two_processes(self, device: str, mode: str) -> None:
    self.mode, self.world, self.rank, self.device = mode, 2, 0, torch.device("cpu")
    self.wrap = lambda objective: objective


def test_unknown_modes_and_missing_devices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^mode: got 'magic', expected one of ddp, fsdp"):
        trainer_in(tmp_path, RECIPES["ddp"], "magic")
    if not torch.cuda.is_available():
        ids = small_text()
        with pytest.raises(UserError, match=r"^device=cuda: PyTorch sees no CUDA device here; use device=cpu$"):
            Trainer(RECIPES["ddp"], text_source(ids), tmp_path, device="cuda")
