"""The library names arguments; the command line says the same with its flags."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers import assert_one_line

from rmse_edge.cli.common import Parser, run_verb
from rmse_edge.cli.flags import add_dial_flags
from rmse_edge.cli.quantize import main as rmse_quantize
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.errors import ArgumentError, ExportError, UserError
from rmse_edge.export import CoremlOptions, ExecutorchOptions, ExportRequest, OnnxOptions
from rmse_edge.loop.dials import DIALS, Dials
from rmse_edge.quantize import QuantizeRequest, Scheme

Say = Callable[[BaseException], str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """What a command with some flags writes to stderr for a failure of the library."""

    def run(failure: BaseException) -> str:
        def main(argv: Sequence[str] | None) -> None:
            parser = Parser(prog="rmse-x")
            parser.arguments |= {"compact": "--no-compact", "hits": "--kb-hits"}
            parser.add_argument("text")
            parser.add_argument("-n", "--max-new-tokens", type=int)
            for flag in ("--quant", "--group-size", "--kb-hits"):
                parser.add_argument(flag)
            for flag in ("--no-compact", "--resume"):
                parser.add_argument(flag, action="store_true")
            parser.parse_args(argv)
            Parser(prog="another").parse_args([])  # such as one for defaults: the flags are those of the command
            raise failure

        run_verb("rmse-x", main, ["a.txt"])
        return capsys.readouterr().err.strip().removeprefix("rmse-x: error: ")

    return run


@pytest.mark.parametrize(
    ("failure", "python", "command"),
    [
        (ArgumentError("group_size", "got 7, expected 16"), "group_size: got 7, expected 16", "--group-size: got 7, expected 16"),
        (ArgumentError("quant", "onnx takes fp32", "int8"), "quant=int8: onnx takes fp32", "--quant int8: onnx takes fp32"),
        (ArgumentError("hits", "got 9"), "hits: got 9", "--kb-hits: got 9"),
        (ArgumentError("compact", "leave it out", False), "compact=False: leave it out", "--no-compact: leave it out"),
        (ArgumentError("max_new_tokens", "got 0"), "max_new_tokens: got 0", "--max-new-tokens: got 0"),
        (ArgumentError("text", "is empty"), "text: is empty", "text: is empty"),  # it has no flag here
        (ArgumentError("block", "got 0"), "block: got 0", "block: got 0"),
        (UserError("quant: got 7"), "quant: got 7", "quant: got 7"),  # some other quant, as of a file
        (
            ExportError("a.weight: too large; export with quant=fp32, or group_size=16 or 32"),
            "a.weight: too large; export with quant=fp32, or group_size=16 or 32",
            "a.weight: too large; export with --quant fp32, or --group-size 16 or 32",
        ),
        (UserError("x: holds a run; go on with resume=True."), "x: holds a run; go on with resume=True.", "x: holds a run; go on with --resume."),
    ],
)  # fmt: skip
def test_arguments_and_flags(say: Say, failure: UserError, python: str, command: str) -> None:
    assert str(failure) == python
    assert say(failure) == command


@pytest.mark.parametrize(
    "message",
    [
        "runs/quant=int8/a.rmse: no such file",
        "got 'quant=int8', expected another",
        "use a smaller block (model.quant=4)",
        "block=64 is too large; pass other=1",
        "compute y=quant",
    ],
)
def test_what_only_looks_like_advice_stays(say: Say, message: str) -> None:
    assert say(UserError(message)) == message


def test_an_interrupt_says_how_to_go_on(say: Say) -> None:
    assert say(KeyboardInterrupt("go on with resume=True")) == "rmse-x: interrupted; go on with --resume"


def test_before_there_are_flags(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Sequence[str] | None) -> None:
        raise ArgumentError("quant", "got 7")

    assert run_verb("rmse-x", main) == 2
    assert capsys.readouterr().err == "rmse-x: error: quant: got 7\n"


def test_an_error_of_another_process_is_the_same() -> None:
    error = ArgumentError("quant", "onnx takes fp32", "int8")
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is ArgumentError and (str(other), other.name) == (str(error), "quant")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--max-loops", "9"), "--max-loops: got 9, expected 1..4 (the depth the model was trained to)"),
        (("--max-loops", "2", "--min-loops", "3"), "--min-loops: got 3, expected 1..2 (max_loops)"),
        (("--stop", ""), "--stop: got an empty string"),
        (("--runtime", "onnx"), "is not a package; --runtime onnx needs one"),
        (("--runtime", "tpu"), "--runtime: got 'tpu', expected one of torch"),
    ],
)
def test_rmse_run_speaks_of_flags(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert rmse_run([str(checkpoint), "-p", "HELLO", "-n", "2", *flags]) == 2
    assert_one_line(capsys.readouterr().err, said)


def test_rmse_quantize_speaks_of_flags(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin = ["-m", str(checkpoint), "-o", str(tmp_path / "q")]
    for flags, said in (
        (("--asymmetric", "--quant", "int8"), "--asymmetric: int8 is symmetric, its range is wide enough"),
        (("--quant", "int8", "--dense-group-size", "16"), "--dense-group-size: int8 has one scale"),
        (
            (),
            "--calibrate FILE is missing: a text like those the model will read, or a CSV of boards (--method rtn rounds "
            "without one)",
        ),
    ):
        assert rmse_quantize([*begin, *flags]) == 2
        assert_one_line(capsys.readouterr().err, said)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: ExportRequest(quant="int3"), "quant: got 'int3', expected one of fp32"),
        (
            lambda: ExportRequest(options=OnnxOptions(accuracy_level=4)),
            "accuracy_level=4: quant=fp32 has no integers; leave it out",
        ),
        (lambda: ExportRequest(options=CoremlOptions()), "options: got CoremlOptions, onnx takes OnnxOptions"),
        (lambda: OnnxOptions(accuracy_level=3), "accuracy_level: got 3, expected 0 or 4"),
        (lambda: CoremlOptions(compute="npu"), "compute: got 'npu', expected one of cpu, gpu, ane"),
        (lambda: CoremlOptions(compute="ane").check("coreml", "fp32"), "compute=ane: has no fp32; export with quant="),
        (
            lambda: ExecutorchOptions(accuracy_level=0).check("executorch", "int4"),
            "accuracy_level=0: executorch rounds the activations of quantised weights to int8 (level 4); leave it out",
        ),
        (
            lambda: OnnxOptions.of("onnx", {"compute": "ane"}),
            "compute=ane: onnx packages are the same everywhere; leave it out",
        ),
        (lambda: Scheme("int8", symmetric=False), "symmetric=False: int8 is symmetric, its range is wide enough"),
        (lambda: QuantizeRequest(method="best"), "method: got 'best', expected one of"),
    ],
)
def test_python_is_told_of_arguments(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        wrong()
    assert_one_line(str(caught.value), said)
    assert str(caught.value).startswith(said) and caught.value.name == said.split(":")[0].split("=")[0]


# --------------------------------------------------------------------------------------------------------------- dials


def test_one_table_of_dials() -> None:
    """Settings and their table have the same names and order; what is off by default is off by the table."""
    fields = dataclasses.fields(Dials)
    assert [field.name for field in fields] == list(DIALS)
    assert all(DIALS[field.name].off in (None, field.default) for field in fields)
    parser = Parser(prog="rmse-x")
    add_dial_flags(parser)
    assert set(vars(parser.parse_args([]))) == set(DIALS)


@pytest.mark.parametrize(("name", "value"), [("max_loops", 1.5), ("max_loops", float("nan")), ("min_loops", 1.5)])
def test_loops_are_whole_numbers(name: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}: got {value}, expected a whole number in 1\.\.4 "):
        Dials(4).changed(4, **{name: value})
