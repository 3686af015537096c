"""What `rmse-eval --store` leaves: a measured setting of the exit rules as the default of a checkpoint or package.

The setting itself stands where the settings always are, in `config.json`, or in a package's manifest. Beside it is written what
it was measured on, so that a reader of the package can tell a measured default from a guess: in a checkpoint folder in
`exits.json`, in a package as `exits` of the manifest. An export carries the one to the other, if the settings are still those.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from .arch.registry import arch_of
from .checkpoint import CONFIG_FILE, read_config
from .errors import ArgumentError, CheckpointError, ExportError, PackageError
from .files import changed_folder
from .loop.dials import DIALS, Dials
from .numbers import Loops
from .package import MANIFEST, Package, seal, writing
from .schema import Finite, Name, read_json, validated

EXITS_FILE = "exits.json"


@dataclass(frozen=True)
class Measured:
    """A setting, and what it cost and saved on a text."""

    dials: dict[Name, Finite]  # min_loops and the exit rules of the model, by `DIALS`
    rule: Name  # that was varied
    text_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]  # of the whole file
    split: Literal["train", "validation", "all"]  # of it that was read
    tokens: Annotated[int, Field(ge=1)]  # that were scored
    runtime: Name
    loss: Finite  # nats per token
    over_full_percent: Finite  # loss over that at the trained depth
    budget_percent: Finite  # what that was allowed to be
    mean_loops: Finite  # per token
    full_loops: Loops  # the trained depth

    def describes(self, dials: Dials) -> bool:
        """Whether these are still its settings."""
        return self.dials == settings_of(dials, self.dials)


def settings_of(dials: Dials, names: Mapping[str, Any]) -> dict[str, float]:
    """Those of the dials that are named."""
    return {name: float(getattr(dials, name)) for name in names}


def with_dials(config: Any, dials: Dials) -> Any:
    """A configuration whose own settings are these, but for its number of loops.

    Raises:
        ArgumentError: it has no field for one of them.
    """
    for name in ("min_loops", *(name for name, dial in DIALS.items() if dial.off is not None)):
        value = getattr(dials, name)
        if getattr(config.dials, name) != value:
            config = _with_dial(config, name, value)
    return config


def _with_dial(config: Any, name: str, value: float) -> Any:
    """An architecture calls its settings what its published files do: the field is the one that moves the dial."""
    prefixes = arch_of(config.model_type).settings
    fields = [f.name for f in dataclasses.fields(config) if f.name.startswith(prefixes)]
    for field in sorted(fields, key=lambda field: field != name):
        if type(getattr(config, field)) not in (int, float):
            continue
        changed = dataclasses.replace(config, **{field: value})
        if getattr(changed.dials, name) == value:
            return changed
    raise ArgumentError(name, f"got {value}, and config.json of {config.model_type} has no field for it", value)


def store(path: Path, measured: Measured, dials: Dials) -> None:
    """Make `dials` the default of the package or checkpoint folder `path`, all or nothing.

    Raises:
        PackageError, CheckpointError, ExportError: it is not readable, or cannot be written.
        ArgumentError: as `with_dials`.
    """
    if (path / MANIFEST).is_file():
        _store_in_package(path, measured, dials)
        return
    config = with_dials(read_config(path), dials)
    with changed_folder(path, CheckpointError) as scratch:
        (scratch / CONFIG_FILE).write_text(_changed_text(path / CONFIG_FILE, config), encoding="utf-8")
        text = json.dumps(dataclasses.asdict(measured), indent=2) + "\n"
        (scratch / EXITS_FILE).write_text(text, encoding="utf-8")


def _changed_text(path: Path, config: Any) -> str:
    """The text of config.json with the settings of `config`. Keys that this project has no use for stay."""
    values: dict[str, Any] = read_json(path, CheckpointError)
    known = type(config).from_dict({k: v for k, v in values.items() if k != "model_type"}, str(path)).to_dict()
    new = config.to_dict()
    return json.dumps(values | {name: new[name] for name in new if new[name] != known[name]}, indent=2) + "\n"


def _store_in_package(path: Path, measured: Measured, dials: Dials) -> None:
    package = Package.open(path)
    manifest = {name: part for name, part in package.manifest.items() if name != "sizes"}
    model = dict(manifest["model"])
    try:
        config = arch_of(model["model_type"]).config.from_dict(model["config"], f"{path / MANIFEST}: model.config")
    except (KeyError, TypeError):
        raise PackageError(f"{path / MANIFEST}: model: is not as it should be; export the package again") from None
    config = with_dials(config, dials)
    model |= {"config": config.to_dict(), "dials": model["dials"] | {n: getattr(dials, n) for n in measured.dials}}
    with writing(path, overwrite=True) as folder:
        for name in package.digests:
            if name != MANIFEST:
                _same(path / name, folder / name)
        seal(folder, manifest | {"model": model, "exits": dataclasses.asdict(measured)})


def _same(source: Path, target: Path) -> None:
    """A file as another name of what is there, where the file system has that; a copy otherwise. It is never written to."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def carried(checkpoint: Path | None, dials: Dials) -> dict[str, Any]:
    """`exits` of the manifest of a package that is made of a checkpoint; nothing if its settings are not those measured.

    Raises:
        ExportError: exits.json cannot be read.
    """
    if checkpoint is None or not (checkpoint / EXITS_FILE).is_file():
        return {}
    path = checkpoint / EXITS_FILE
    values = read_json(path, ExportError)
    found = validated(
        Measured, values, str(path), ExportError, "measure again with rmse-eval --store, or remove it", ""
    )
    return {"exits": dataclasses.asdict(found)} if found.describes(dials) else {}
