"""What is installed, and official weights from elsewhere: doctor, weights fetch."""

import http.client
import importlib.metadata
import platform
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evenlight.cache.errors import EnvironmentLacks, EvenlightError, UsageError
from evenlight.cache.files import atomic_write, sha256_bytes
from evenlight.stages.weights import shipped

PRIORS = ("fastsam-n", "clip-lite0", "region-embedder", "judge")  # weights that ship
PACKAGES = (
    "torch", "torchvision", "ultralytics", "open_clip_torch", "timm", "zarr", "h5py", "dask",
    "numpy", "opencv-python", "pillow", "safetensors", "torchmetrics", "mamba-ssm", "onnxruntime",
    "tensorboard", "boto3", "triton",
)  # fmt: skip
OPTIONAL = ("mamba-ssm", "onnxruntime", "tensorboard", "boto3", "triton")

ULTRALYTICS = "https://github.com/ultralytics/assets/releases/download/v8.4.0"
HUGGING_FACE = "https://huggingface.co/timm/vit_base_patch32_clip_224.openai/resolve/main"


@dataclass(frozen=True)
class Official:
    address: str  # opened by `evenlight weights fetch` alone, on the user's word
    use: tuple[str, ...]  # settings that make the file the one in use; {} is its path


OFFICIAL_WEIGHTS = {
    "FastSAM-s": Official(f"{ULTRALYTICS}/FastSAM-s.pt", ("regions.segmenter={}",)),
    "FastSAM-x": Official(f"{ULTRALYTICS}/FastSAM-x.pt", ("regions.segmenter={}",)),
    # OpenAI trained with QuickGELU: under the name ViT-B-32 the same weights give other numbers.
    "ViT-B-32-openai": Official(
        f"{HUGGING_FACE}/open_clip_model.safetensors",
        ("clip.model=ViT-B-32-quickgelu", "clip.weights={}"),
    ),
}


@dataclass(frozen=True)
class FetchedWeights:
    path: Path
    sha256: str
    use: list[str]  # settings, key=value, that make these the weights in use


def doctor() -> dict[str, Any]:
    """Packages, devices, the scan that would run and why, and the weights that are there.

    "lacks" lists what the commands cannot do without; it is empty on a healthy machine.
    """
    versions = {name: _version(name) for name in PACKAGES}
    weights = {name: _sha256(shipped(name)) for name in PRIORS}
    weights["base/corrector"] = _sha256(shipped("base") / "corrector.safetensors")
    lacks = [name for name, found in versions.items() if not found and name not in OPTIONAL]
    lacks += [name for name in PRIORS if not weights[name]]
    return {
        "evenlight": _version("evenlight"),
        "python": platform.python_version(),
        "packages": versions,
        **(_machine() if versions["torch"] else {"device": "", "scan": {}}),
        "weights": weights,
        "lacks": lacks,
    }


def _machine() -> dict[str, Any]:
    import torch

    from evenlight.stages.corrector.scan import choose

    cuda = torch.cuda.is_available()
    scan, reason = choose("cuda" if cuda else "cpu")
    threads = f"cpu, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if cuda else threads,
        "scan": {"runs": scan, "why": reason},
    }


def fetch_weights(name: str, folder: Path) -> FetchedWeights:
    """Download official weights: the only function of evenlight that opens a connection.

    Raises EnvironmentLacks where the host cannot be reached or hangs up before the end.
    """
    if name not in OFFICIAL_WEIGHTS:
        raise UsageError(f"unknown weights {name!r}; known: {', '.join(OFFICIAL_WEIGHTS)}")
    official = OFFICIAL_WEIGHTS[name]
    try:
        with urllib.request.urlopen(official.address, timeout=30) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        reason = getattr(error, "reason", "") or error
        raise EnvironmentLacks(
            f"cannot fetch {name} from {official.address} ({reason}): check the connection, or "
            "download the file elsewhere and give its path"
        ) from error
    target = folder / f"{name}{Path(official.address).suffix}"
    digest = sha256_bytes(data)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(target, data)
        atomic_write(target.with_suffix(".sha256"), f"{digest}  {target.name}\n".encode())
    except OSError as error:
        raise EvenlightError(f"cannot write {target}: {error.strerror}") from error
    return FetchedWeights(target, digest, [text.format(target.absolute()) for text in official.use])


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _sha256(path: Path) -> str:
    """Of a file; empty where it is not there."""
    return sha256_bytes(path.read_bytes()) if path.is_file() else ""
