"""Tensors on disk, whole or absent: training checkpoints, corrector files, other small artefacts.

Tensors are safetensors; beside them a sealed JSON holds their size and sha256 and is written last.
A checkpoint is a folder, built under a temporary name and renamed in one go.
"""

import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load as parse_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from evenlight.cache.errors import StoreError, UsageError, one_line
from evenlight.cache.files import (
    atomic_write,
    checked,
    make_folder,
    read_json,
    sha256_bytes,
    write_json,
)
from evenlight.cache.system import sync_folder
from evenlight.stages.corrector.network import Corrector
from evenlight.stages.settings import NetworkSettings

log = logging.getLogger(__name__)
FORMAT = 1  # of every file written here
MOST_STEPS = 10**9
LARGEST = 1e6  # of weights; those that ship are below 10
KEEP = 2  # newest checkpoints; one alone could be the one that is damaged
_NAME = re.compile(r"step_(\d{7,})")
_BUILDING, _LEAVING = ".building-", ".leaving-"


@dataclass(frozen=True)
class _Seal:
    format: int
    bytes: int
    tensors: str  # sha256


@dataclass(frozen=True)
class _Vouching:
    """The JSON beside tensors."""

    file: _Seal
    info: dict[str, Any]


@dataclass(frozen=True)
class _Step:
    step: int

    def __post_init__(self) -> None:
        assert 0 <= self.step < MOST_STEPS, f"step {self.step}"


@dataclass(frozen=True)
class _OfNetwork:
    """What of the info of a corrector its network is made by."""

    settings: dict[str, Any]
    p3_channels: int

    def __post_init__(self) -> None:
        assert 0 < self.p3_channels <= 4096, f"p3_channels {self.p3_channels}"


class Checkpoint(NamedTuple):
    step: int
    tensors: dict[str, Tensor]  # on the CPU
    info: dict[str, Any]


def save_tensors(stem: Path, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
    """Write `stem`.safetensors, then `stem`.json with `info`, size and sha256; read back.

    Each file is replaced whole. A kill between the two leaves tensors that the JSON does not
    match, which `load_tensors` refuses.
    """
    data = to_safetensors({name: x.detach().cpu().contiguous() for name, x in tensors.items()})
    atomic_write(_tensors_path(stem), data)
    seal = {"format": FORMAT, "bytes": len(data), "tensors": sha256_bytes(data)}
    write_json(_json_path(stem), {"file": seal, "info": info})
    load_tensors(stem)


def load_tensors(stem: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote: tensors on the CPU, info.

    Raises StoreError naming the file if either is missing, damaged, or not of this format.
    """
    path = _tensors_path(stem)
    vouching = checked(_Vouching, read_json(_json_path(stem)), _json_path(stem))
    seal = vouching.file
    if seal.format != FORMAT:
        raise StoreError(
            f"{_json_path(stem)} has format {seal.format}, this version reads {FORMAT}: "
            "use the version of evenlight that wrote it, or make it again"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) != seal.bytes or sha256_bytes(data) != seal.tensors:
        raise StoreError(
            f"{path} is damaged: {len(data)} bytes with another sha256 than the "
            f"{seal.bytes} bytes that {_json_path(stem).name} vouches for"
        )
    try:
        return parse_safetensors(data), vouching.info
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:  # kinds torch lacks too
        raise StoreError(f"{path} is not a safetensors file: {error}") from error


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, Tensor], info: dict[str, Any], best: int | None
) -> Path:
    """Put a checkpoint of this step into folder, whole or not at all; returns its path.

    Then the newest KEEP and the one of step `best` stay, others go. Raises OSError (disk full)
    with the earlier checkpoints untouched.
    """
    make_folder(folder)
    _sweep(folder)
    final = checkpoint_path(folder, step)
    if final.exists():  # only a damaged one is ever made again: the loader stepped back past it
        _retire(final)
    building = folder / f"{_BUILDING}{final.name}"
    make_folder(building)
    save_tensors(building / "state", tensors, info | {"step": step})
    building.rename(final)
    sync_folder(folder)
    steps = checkpoint_steps(folder)
    for old in set(steps) - set(steps[-KEEP:]) - {best}:
        _retire(checkpoint_path(folder, old))
    return final


def load_checkpoint(path: Path) -> Checkpoint:
    """One checkpoint, verified by digest.

    Raises StoreError; if the checkpoint is damaged it names the newest earlier one that is whole.
    """
    try:
        tensors, info = load_tensors(path / "state")
        step = checked(_Step, info, path / "state.json").step
    except StoreError as error:
        siblings = checkpoint_steps(path.parent) if path.parent.is_dir() else []
        others = [checkpoint_path(path.parent, step) for step in reversed(siblings)]
        earlier = [other.name for other in others if other.name < path.name and _is_whole(other)]
        offer = f"{earlier[0]} is whole" if earlier else "no earlier one is whole"
        raise StoreError(f"checkpoint {path.name} cannot be used: {error}; {offer}") from error
    return Checkpoint(step, tensors, info)


def load_latest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None where there is none at all.

    A damaged one is passed over with a warning that names it and what is used instead. Raises
    StoreError if there are checkpoints and none is whole.
    """
    steps = checkpoint_steps(folder) if folder.is_dir() else []
    reasons = []
    for step in reversed(steps):
        try:
            checkpoint = load_checkpoint(checkpoint_path(folder, step))
        except StoreError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            log.warning("%s; going on from %s", reason, checkpoint_path(folder, step).name)
        return checkpoint
    if reasons:
        raise StoreError(
            f"no checkpoint in {folder} is whole ({'; '.join(reasons)}): "
            "remove the folder to train from the start"
        )
    return None


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:07d}"


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in folder, rising, damaged ones too."""
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in found if match)


def save_corrector(
    folder: Path, network: Corrector, info: dict[str, Any], extra: dict[str, Tensor] | None = None
) -> Path:
    """Write corrector.safetensors and corrector.json into folder; returns folder.

    info: settings, fingerprints of the priors, figures. extra: other tensors that belong to it
    (the scorer's), kept under "extra." in the same file.
    """
    make_folder(folder)
    tensors = {f"network.{name}": x for name, x in network.state_dict().items()}
    tensors |= {f"extra.{name}": x for name, x in (extra or {}).items()}
    network_info = {"settings": vars(network.settings), "p3_channels": network.p3_channels}
    save_tensors(folder / "corrector", tensors, info | {"network": network_info})
    return folder


def load_corrector(folder: Path) -> tuple[Corrector, dict[str, Any], dict[str, Tensor]]:
    """Network (CPU, eval mode), info and extra tensors that `save_corrector` wrote.

    Raises StoreError if the files are missing, damaged, or hold another network.
    """
    tensors, info = load_tensors(folder / "corrector")
    weights, extra = (
        {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        for prefix in ("network.", "extra.")
    )
    made_by = checked(_OfNetwork, info.get("network"), f"network of {folder / 'corrector.json'}")
    try:
        network = Corrector(NetworkSettings(**made_by.settings), made_by.p3_channels)
        network.load_state_dict(weights)
    except (TypeError, RuntimeError, UsageError) as error:
        raise StoreError(
            f"{folder} holds a corrector that this version of evenlight does not know "
            f"({one_line(error)}): "
            "use the version that wrote it, or train again"
        ) from error
    if not all(bool((x.abs() < LARGEST).all()) for x in weights.values()):
        raise StoreError(
            f"{folder} holds a corrector with weights that are NaN or beyond {LARGEST:g}: "
            "train again"
        )
    return network.eval(), info, extra


def _tensors_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.safetensors")


def _json_path(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}.json")


def _is_whole(path: Path) -> bool:
    try:
        load_tensors(path / "state")
    except StoreError:
        return False
    return True


def _retire(path: Path) -> None:
    """Remove a checkpoint: first its name, so that none is ever seen half deleted."""
    leaving = path.with_name(f"{_LEAVING}{path.name}")
    path.rename(leaving)
    sync_folder(path.parent)
    shutil.rmtree(leaving)


def _sweep(folder: Path) -> None:
    """Remove what a killed save or removal left."""
    for path in folder.iterdir():
        if path.name.startswith((_BUILDING, _LEAVING)):
            shutil.rmtree(path)
