"""Weights that ship with the package, each with its model card; `shipped` finds them."""

from pathlib import Path

FOLDER = Path(__file__).parent


def shipped(name: str) -> Path:
    """Where the weights that ship under a name lie: a safetensors file, for a corrector its folder.

    name: "fastsam-n", "clip-lite0", "region-embedder", "judge", "base".  Nothing is opened: where
    the install lacks them, or nothing ships under the name, the path leads to no file.
    """
    folder = FOLDER / name
    return folder if folder.is_dir() else FOLDER / f"{name}.safetensors"
