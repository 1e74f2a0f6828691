"""What is installed and what a store holds: doctor, cache info, cache verify, weights fetch."""

import importlib.metadata
import platform
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from evenlight.cache.errors import EnvironmentLacks, UsageError
from evenlight.cache.files import atomic_write, sha256_bytes
from evenlight.cache.schema import Damage
from evenlight.cache.store import Store

PACKAGES = (
    "torch", "torchvision", "ultralytics", "open_clip_torch", "timm", "zarr", "h5py", "dask",
    "numpy", "opencv-python", "pillow", "safetensors", "torchmetrics", "mamba-ssm",
)  # fmt: skip
OPTIONAL = ("mamba-ssm",)

# name -> address.  Opened by `evenlight weights fetch` alone, on the user's word.
OFFICIAL_WEIGHTS = {
    "FastSAM-s": "https://github.com/ultralytics/assets/releases/download/v8.4.0/FastSAM-s.pt",
    "FastSAM-x": "https://github.com/ultralytics/assets/releases/download/v8.4.0/FastSAM-x.pt",
    "ViT-B-32-openai": "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/"
    "resolve/main/open_clip_model.safetensors",
}


def doctor() -> dict[str, Any]:
    """Packages, devices, the scan that would run and why, and the weights that are there.

    "lacks" lists what the commands cannot do without; it is empty on a healthy machine.
    """
    import torch

    from evenlight.stages.corrector.scan import choose

    versions = {name: _version(name) for name in PACKAGES}
    cuda = torch.cuda.is_available()
    threads = f"cpu, {torch.get_num_threads()} threads"
    scan, reason = choose("cuda" if cuda else "cpu")
    weights = {name: _weights(name) for name in ("fastsam-n", "clip-lite0", "base/corrector")}
    lacks = [name for name, found in versions.items() if not found and name not in OPTIONAL]
    lacks += [name for name in ("fastsam-n", "clip-lite0") if not weights[name]]
    return {
        "evenlight": _version("evenlight"),
        "python": platform.python_version(),
        "packages": versions,
        "device": torch.cuda.get_device_name() if cuda else threads,
        "scan": {"runs": scan, "why": reason},
        "weights": weights,
        "lacks": lacks,
    }


def cache_info(store: Path) -> dict[str, Any]:
    """Counts, parts, sizes and fingerprints of a store, and which units are stale or missing."""
    from evenlight.pipeline import config
    from evenlight.pipeline.models import load_models
    from evenlight.pipeline.plan import made_by, recorded_plans
    from evenlight.pipeline.prompts import prompts_info

    with Store.open(store) as source:
        info = source.info()
        if not source.index.num_units:
            return info
        settings = config.build(base=source.index.settings)
        info["prompts"] = prompts_info(source.path)
        try:
            makers = made_by(load_models(settings), info["prompts"]["fingerprint"])
        except EnvironmentLacks as error:
            info["stale"] = f"unknown: {error}"
        else:
            plans = recorded_plans(source, settings, makers)
            info["stale"] = {str(plan.unit): plan.reason for plan in plans if plan.todo}
    return info


def cache_verify(store: Path, *, repair: bool = False) -> list[Damage]:
    """Check every stored byte against its record.  repair: forget damaged parts, so that
    `evenlight precompute` remakes exactly them."""
    opened = Store.create_or_open(store) if repair else Store.open(store)
    with opened as source:
        damages = source.verify()
        if repair:
            for damage in damages:
                if damage.unit is not None and damage.part:
                    source.drop(damage.unit, damage.part)
    return damages


def fetch_weights(name: str, folder: Path) -> Path:
    """Download official weights: the only function of evenlight that opens a connection.

    Returns the file written.  Raises EnvironmentLacks where the host cannot be reached.
    """
    if name not in OFFICIAL_WEIGHTS:
        raise UsageError(f"unknown weights {name!r}; known: {', '.join(OFFICIAL_WEIGHTS)}")
    address = OFFICIAL_WEIGHTS[name]
    try:
        with urllib.request.urlopen(address, timeout=30) as response:
            data = response.read()
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise EnvironmentLacks(
            f"cannot fetch {name} from {address} ({reason}): check the connection, or download "
            "the file elsewhere and give its path"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}{Path(address).suffix}"
    atomic_write(target, data)
    atomic_write(target.with_suffix(".sha256"), f"{sha256_bytes(data)}  {target.name}\n".encode())
    return target


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _weights(name: str) -> str:
    """sha256 of shipped weights; empty where they are not there."""
    path = Path(__file__).parent.parent / "stages" / "weights" / f"{name}.safetensors"
    return sha256_bytes(path.read_bytes()) if path.is_file() else ""
