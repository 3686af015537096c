"""Checkpoints: a folder in the Hugging Face layout, written all or nothing and read with every tensor checked.

    config.json             the configuration; its `model_type` says of which architecture (rmse_edge/arch/registry.py)
    model.safetensors       the state dict by its own names, tied tensors left out; bfloat16 by default. Shards with an index
                            are read, too (rmse_edge/shards.py), and what others published under names of their own
    generation_config.json  special tokens; without it transformers would take settings of sampling from config.json
    tokenizer.json          where one is given
    tokenizer_config.json   what AutoTokenizer needs to read it

`rmse_edge.hf` reads and writes the same files under the same names.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .arch import registry
from .arch.registry import Arch, Stored, arch_of, arch_of_model
from .chat import TOKENIZER_CONFIG_FILE, stored_templates
from .errors import CheckpointError, ConfigError, TextError
from .files import changed_folder, finish_change, kind_of
from .numbers import token_ids
from .shards import WEIGHTS_FILE, StoredTensors, check_finite, weight_files
from .vocabulary import GENERATION_FILE, TOKENIZER_FILE

CONFIG_FILE = "config.json"
QUANTIZATION_FILE = "quantization.json"  # marks a quantised checkpoint, see rmse_edge/quantize/store.py
SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token")


def stored_keys(config: Any, keys: Iterable[str]) -> list[str]:
    """Those names of a state dict that a checkpoint holds, in order."""
    tied = arch_of(config.model_type).tied(config)
    return [key for key in keys if key not in tied]


def require_tied(where: str | Path, name: str, source: str, same: bool) -> None:
    """Raise a `CheckpointError` unless a tensor that the configuration ties to `source` has the values of that."""
    if not same:
        raise CheckpointError(
            f"{where}: tensor {name} differs from {source}, and config.json says that they are one; untie them there to "
            "have both, or leave the tensor out"
        )


# ------------------------------------------------------------------------------------------------------------ write


def save_checkpoint(
    model: Any, folder: str | Path, dtype: torch.dtype | None = None, tokenizer: str | Path | None = None
) -> None:
    """Write the model as a checkpoint folder. Other files of the folder stay as they are.

    Everything is written beside its place first and moved there at the end, so that a full disk, Ctrl-C or a kill leaves
    the old checkpoint or the new one; see `files.changed_folder`.

    Args:
        dtype: floating type of the weights on disk; None: the one that each has in the model, so that nothing is rounded.
        tokenizer: a tokenizer.json to put into the folder; None keeps the one that is there, if any.
    Raises:
        CheckpointError: a tensor holds NaN or Inf (as it is stored), the tokenizer does not fit the model, or the folder
            cannot be written.
    """
    folder = Path(folder)
    if (folder / QUANTIZATION_FILE).is_file():
        raise CheckpointError(f"{folder}: holds a quantised checkpoint; choose another folder")
    with changed_folder(folder, CheckpointError) as scratch:
        tensors = {}
        state = model.state_dict()
        for name in stored_keys(model.config, list(state)):
            tensors[name] = state[name].detach().to("cpu", dtype or state[name].dtype).contiguous()
            check_finite(folder / WEIGHTS_FILE, name, tensors[name])
        save_file(tensors, scratch / WEIGHTS_FILE, metadata={"format": "pt"})
        _write_text(scratch / CONFIG_FILE, model.config.to_json())
        special = {f"{role}_id": getattr(model.config, f"{role}_id", None) for role in SPECIAL_TOKENS}
        _write_text(scratch / GENERATION_FILE, json.dumps(special, indent=2) + "\n")
        source = folder / TOKENIZER_FILE if tokenizer is None else Path(tokenizer)
        if tokenizer is not None or source.is_file():
            text = _read_tokenizer(source)
            values = _tokenizer_config(text, source, model.config)
            if tokenizer is None and (templates := _kept_templates(folder)) is not None:
                values["chat_template"] = templates
            _write_text(scratch / TOKENIZER_CONFIG_FILE, json.dumps(values, indent=2) + "\n")
            if tokenizer is not None:
                _write_text(scratch / TOKENIZER_FILE, text)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _read_tokenizer(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as a tokenizer.json ({_one_line(error)})") from None


def _kept_templates(folder: Path) -> Any:
    """The chat templates of the tokenizer_config.json that is replaced; a broken one is no reason to lose the weights."""
    try:
        return stored_templates(folder)
    except TextError:
        return None


def _tokenizer_config(text: str, path: Path, config: Any) -> dict[str, Any]:
    """What tokenizer_config.json holds: a fast tokenizer, padded on the left as generation needs it."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception on malformed files
        raise CheckpointError(f"{path}: not a tokenizer.json ({_one_line(error)})") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{path}: {tokenizer.get_vocab_size()} tokens up to id {largest}, but the model has vocab_size "
            f"{config.vocab_size}; use the tokenizer the model was trained with"
        )
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    for role in SPECIAL_TOKENS:
        for token_id in token_ids(getattr(config, f"{role}_id", None), f"{role}_id")[:1]:  # a tokenizer has one of each
            values[role] = tokenizer.id_to_token(token_id)
    return values


# ------------------------------------------------------------------------------------------------------------- read


def load_checkpoint(folder: str | Path, device: str | torch.device = "cpu") -> Any:
    """The model of a checkpoint folder, of whatever architecture: float32, evaluation mode, on `device`.

    Tensors are read and widened one at a time, so the peak is the model and one tensor.

    Raises:
        CheckpointError: one line that names the file (and the tensor) that is missing, damaged, of another shape, not
            floating point, or not finite, or the architecture that is not known.
    """
    folder = Path(folder)
    return load_weights(folder, read_config(folder)).to(device)


def load_weights(folder: Path, config: Any) -> Any:
    """The model that `config` describes, in evaluation mode, with the weights of a checkpoint folder: `load_checkpoint`, for
    a configuration that was read already and may have other settings than the folder's.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    if (folder / QUANTIZATION_FILE).is_file():
        raise CheckpointError(
            f"{folder}: a quantised checkpoint; give the float one it was made from (rmse-run, rmse-eval, rmse-bench and "
            "rmse-export read this one)"
        )
    stored = StoredTensors(folder)
    check_size(config, *weight_files(folder))
    model = empty_model(config)
    _fill(model, stored)
    return model.eval()


def start_from(model: Any, folder: str | Path) -> list[str]:
    """Give `model` the weights of a checkpoint of the same architecture, which may lack the `additions` of that.

    Returns:
        The names of the tensors it lacks; they stay as they are.
    Raises:
        CheckpointError: it cannot be loaded, or has other tensors or shapes.
    """
    known = load_checkpoint(folder).state_dict()
    own = model.state_dict()
    for name, tensor in known.items():
        if name not in own or own[name].shape != tensor.shape:
            shape = tuple(own[name].shape) if name in own else "no such tensor"
            raise CheckpointError(f"{folder}: tensor {name} is {tuple(tensor.shape)}, the recipe's model has {shape}")
    missing = [name for name in own if name not in known]
    for name in missing:
        if not name.startswith(arch_of_model(model).additions or ("\0",)):
            raise CheckpointError(f"{folder}: tensor {name} of the recipe's model is missing")
    model.load_state_dict(known, strict=False)
    return missing


def read_config(folder: Path) -> Any:
    """The configuration of a checkpoint folder, of the architecture that it names.

    Raises:
        CheckpointError: one line that names the folder or the file, and what is wrong with it.
    """
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such checkpoint folder; train one with rmse-train or give another path")
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: is {kind_of(folder)}, expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    finish_interrupted(folder)
    if not (folder / CONFIG_FILE).is_file():
        kind = "an exported package, not a checkpoint" if (folder / "manifest.json").is_file() else "not a checkpoint"
        raise CheckpointError(f"{folder}: {kind}; expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        return registry.read_config(folder / CONFIG_FILE)
    except ConfigError as error:
        raise CheckpointError(_config_line(folder / CONFIG_FILE, error)) from None


def finish_interrupted(folder: Path) -> None:
    """Finish what a process that was killed had begun to put into a checkpoint folder.

    Raises:
        CheckpointError: it cannot be.
    """
    try:
        finish_change(folder)
    except OSError as error:
        raise CheckpointError(
            f"{folder}: whoever wrote it was killed before the last file, and the rest cannot be moved into place "
            f"({error.strerror}); use it once where it can be written"
        ) from None


class _Undrawn(TorchFunctionMode):
    """Tensors that are to be filled with random numbers stay as they are, unless from a generator of their own: such numbers
    are the same in every model, and may be in none of its files.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "kaiming_uniform_") and kwargs.get("generator") is None:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def empty_model(config: Any) -> Any:
    """A model whose parameters are yet to be filled. The caller's random state is left as it is."""
    with torch.random.fork_rng(devices=[]), _Undrawn():
        return arch_of(config.model_type).build(config)


def shapes_of(folder: Path) -> Any:
    """The model of a checkpoint folder without its weights, on PyTorch's meta device: for questions about shapes.

    Raises:
        CheckpointError: there is no configuration, or it is not one.
    """
    return _on_meta(read_config(folder))


def _on_meta(config: Any) -> Any:
    with torch.device("meta"):  # shapes without memory
        return empty_model(config)


def check_size(config: Any, *files: Path) -> None:
    """Fail, before a model is made, where the files of its weights are too small to hold them.

    Raises:
        CheckpointError: they do not belong to this configuration.
    """
    count = sum(tensor.numel() for tensor in _on_meta(config).state_dict().values())
    nbytes = sum(file.stat().st_size for file in files)
    if count > 2 * nbytes:  # an int4 weight takes half a byte
        raise CheckpointError(
            f"{files[0]}: truncated or damaged, or of another model: {nbytes} bytes are too few for the {count} parameters "
            f"that {CONFIG_FILE} asks for; copy the two files again"
        )


def _config_line(path: Path, error: ConfigError) -> str:
    """The error as one line that names the file, which a value out of range does not."""
    line = _one_line(error)
    return line if str(path) in line else f"{path}: {line}"


def _fill(model: Any, stored: StoredTensors) -> None:
    """Copy every tensor of a checkpoint into the model, after checking names, shapes and values."""
    state = model.state_dict()
    for name, tensor in tensors_of(model, stored, stored_keys(model.config, list(state))):
        state[name].copy_(tensor)


def tensors_of(model: Any, stored: StoredTensors, order: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a model that a checkpoint holds, read one by one in float32.

    A tensor that is tied may be stored beside the one that it is tied to, with the same values, or in its place.

    Args:
        order: names of the model's tensors, those that are tied left out; all of `stored_keys`.
    Raises:
        CheckpointError: before the first one, if a tensor is missing or is not the model's; then if one does not fit.
    """
    arch, state, present = arch_of_model(model), model.state_dict(), stored.names()
    ties = arch.tied(model.config)
    expected = [name for name in state if name not in ties]
    forms = _forms(arch, model.config, state, present)
    tied = {name: source for name, source in ties.items() if present.issuperset(forms[name].names)}
    for name, source in tied.items():
        if not present.issuperset(forms[source].names):
            forms[source] = forms[name]
    needed = [part for name in expected for part in forms[name].names]
    missing = list(dict.fromkeys(part for part in needed if part not in present))
    known = {part for name in (*expected, *tied) for part in forms[name].names}
    unexpected = sorted(n for n in present - known if not any(fnmatchcase(n, p) for p in arch.unread))
    if missing:
        raise CheckpointError(
            f"{stored.path}: tensor {missing[0]} is missing{_others(missing)}; the file is not of this config.json's model"
        )
    if unexpected:
        raise CheckpointError(
            f"{stored.path}: tensor {unexpected[0]} is not part of the model{_others(unexpected)}; "
            "the file is not of this config.json's model"
        )
    for name in order:
        tensor = _read(stored, forms[name], name, tuple(state[name].shape))
        for other in (other for other, source in tied.items() if source == name):
            values = _read(stored, forms[other], other, tuple(tensor.shape))
            require_tied(stored.file(forms[other].names[0]), forms[other].names[0], name, torch.equal(values, tensor))
        yield name, tensor


def _forms(arch: Arch, config: Any, names: Iterable[str], present: set[str]) -> dict[str, Stored]:
    """How each of the model's tensors is stored in a checkpoint that holds the tensors `present`."""
    own = {name: Stored((name,)) for name in (*names, *arch.tied(config))}
    expected = stored_keys(config, own)
    if present.issuperset(expected):
        return own
    ways = arch.stored(config)
    if isinstance(ways, Mapping):
        return own | dict(ways)

    def lacking(forms: Mapping[str, Stored]) -> int:
        return len({part for name in expected for part in forms[name].names} - present)

    return min((own, *(own | dict(way) for way in ways)), key=lacking)


def _read(stored: StoredTensors, form: Stored, name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor `name` of the model, of this shape, from what holds it on disk."""
    if form.make is None:
        return stored.read(form.names[0], shape)
    parts = [stored.read(part) for part in form.names]
    try:
        found = tuple((made := form.make(*parts)).shape)
    except (RuntimeError, ValueError, IndexError):  # sizes that do not go together
        found = None
    if found != shape:
        sizes = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in zip(form.names, parts))
        raise CheckpointError(
            f"{stored.file(form.names[0])}: {sizes} gives no {name} of shape {shape}, which config.json asks for; "
            "the two files do not belong together"
        )
    return made


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
