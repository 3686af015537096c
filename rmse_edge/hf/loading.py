"""Where the files of `from_pretrained` are, and what its arguments ask for. Weights are read by `rmse_edge.checkpoint`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file

from rmse_edge.checkpoint import CONFIG_FILE
from rmse_edge.errors import ArgumentError, CheckpointError, UserError, first_line
from rmse_edge.schema import read_json
from rmse_edge.shards import INDEX_FILE, WEIGHTS_FILE

# How a file is found on the hub or in its cache.
HUB = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
# Arguments that say how transformers reads weights, which it does not do here, or whether to run code, which nobody does.
PASSED_OVER = frozenset(
    "trust_remote_code code_revision low_cpu_mem_usage use_safetensors weights_only ignore_mismatched_sizes disable_mmap "
    "offload_folder offload_buffers offload_state_dict max_memory tqdm_class adapter_kwargs adapter_name "
    "attn_implementation _commit_hash _fast_init".split()
)
WHOLE_MODEL = ("auto", "balanced", "balanced_low_0", "sequential")  # device maps of accelerate


def require_float32(model: str, dtype: Any) -> None:
    """Fail unless a type, or its name, is float32 or left to the model.

    Args:
        model: what it is called.
    """
    wanted = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if wanted not in (None, "auto", torch.float32):
        raise UserError(
            f"{model} computes in float32, got {wanted}; leave out dtype (weights stored in bfloat16 are widened on loading), "
            "or give dtype=torch.float32"
        )


def device_of(device_map: Any) -> torch.device | None:
    """The one device that a `device_map` puts the whole model on; None: where PyTorch makes tensors.

    Raises:
        ArgumentError: it names several, or none that PyTorch knows.
    """
    if isinstance(device_map, dict):
        if len({str(device) for device in device_map.values()}) != 1:
            raise ArgumentError("device_map", "names several devices, and a looped model is on one; give that")
        device_map = next(iter(device_map.values()))
    if device_map is None:
        return None
    if device_map in WHOLE_MODEL:
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError("device_map", f"got {device_map!r}, expected a device ({first_line(error)})") from None


def refuse_rest(model: str, given: dict[str, Any]) -> None:
    """Raise an `ArgumentError` for the first argument that neither the configuration nor loading knows."""
    for name, value in given.items():
        if name not in PASSED_OVER and value not in (None, False):
            raise ArgumentError(name, f"{model} does not take it when it is loaded")


def checkpoint_folder(source: str | os.PathLike[str], hub: dict[str, Any]) -> Path:
    """The folder of a checkpoint: a local one, or that of the hub's cache, with config.json and all weights in it.

    Args:
        source: a path or the hub's id.
        hub: some of `HUB`. What the cache lacks is fetched, unless `local_files_only`. No file of code is.
    Raises:
        CheckpointError: a file is not there, or cannot be had.
    """
    if Path(source).is_dir():
        return Path(source) / (hub.get("subfolder") or "")

    def found(name: str, **options: Any) -> Path | None:
        try:
            file = cached_file(source, name, **hub, **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{source}: {name} cannot be had ({first_line(error)})") from None
        return None if file is None else Path(file)

    config = found(CONFIG_FILE)
    assert config is not None  # or there was an error
    if found(WEIGHTS_FILE, _raise_exceptions_for_missing_entries=False) is None:
        index = found(INDEX_FILE, _raise_exceptions_for_missing_entries=False)
        if index is not None:
            values = read_json(index, CheckpointError)
            files = values.get("weight_map") if isinstance(values, dict) else None
            # What is wrong with an index is said when it is read with its files.
            names = {name for name in files.values() if isinstance(name, str)} if isinstance(files, dict) else ()
            for name in sorted(names):
                if name == Path(name).name and name.endswith(".safetensors"):
                    found(name)
    return config.parent
