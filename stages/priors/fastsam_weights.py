"""Tensors of FastSAM weight files, read so that nothing in a file is ever called."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from evenlight.cache.errors import EnvironmentLacks
from evenlight.stages.priors.fingerprints import WHERE

# Names from elsewhere that ultralytics has put into checkpoints: settings and dates, no code.
HARMLESS = {"pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"}
HARMLESS |= {"argparse.Namespace", "types.SimpleNamespace", "datetime.datetime"}
MAX_MODULES = 20_000  # FastSAM-x has under 1000; modules that hold each other never end


def read_weights(path: Path) -> dict[str, Tensor]:
    """Every tensor of a .safetensors file or an ultralytics checkpoint, by state_dict name.

    Raises EnvironmentLacks where the file is neither, or names anything that no weights need.
    """
    return _from_safetensors(path) if path.suffix == ".safetensors" else _from_checkpoint(path)


def unusable(path: Path, reason: str) -> EnvironmentLacks:
    return EnvironmentLacks(f"FastSAM weights {path} cannot be used: {reason}; {WHERE}")


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise unusable(path, f"it is not a safetensors file ({error})") from error


class _Inert:
    """Stands in for every class that a checkpoint names: keeps attributes, does nothing."""

    def __new__(cls, *_: Any) -> "_Inert":
        return super().__new__(cls)


def _from_checkpoint(path: Path) -> dict[str, Tensor]:
    """Tensors of the model in an ultralytics checkpoint, whose classes are never instantiated.

    Constructors of ultralytics evaluate strings and fetch files, so even its own names are
    read as inert records; a name from anywhere else is refused.
    """
    try:
        with ZipFile(path) as archive:
            entries = archive.infolist()
        if any(entry.compress_type != ZIP_STORED for entry in entries):
            raise unusable(path, "its entries are compressed, which torch.save never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise unusable(path, "its entries overlap, which torch.save never does")
        names = get_unsafe_globals_in_checkpoint(path)
        allowed = ("ultralytics.", "torch.nn.")
        if foreign := [n for n in names if not n.startswith(allowed) and n not in HARMLESS]:
            raise unusable(path, f"it asks for {', '.join(sorted(foreign))}, which no weights need")
        with safe_globals([(_Inert, name) for name in names]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        model = content.get("ema") or content["model"]
        return dict(_tensors(model))
    except EnvironmentLacks:
        raise
    except Exception as error:  # a hostile file can make the reader fail in any way
        raise unusable(path, f"it is not an ultralytics checkpoint ({error})") from error


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of a record of nn.Module, named as in a state_dict."""
    pending, visited = [("", model)], 0
    while pending:
        prefix, module = pending.pop()
        visited += 1
        state = vars(module)
        for name, tensor in [*state["_parameters"].items(), *state["_buffers"].items()]:
            if tensor is None:
                continue
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                raise ValueError(f"{prefix}{name} is no plain tensor")
            yield prefix + name, tensor.detach()
        pending += [(f"{prefix}{name}.", child) for name, child in state["_modules"].items()]
        if visited + len(pending) > MAX_MODULES:
            raise ValueError(f"it holds more than {MAX_MODULES} modules")
