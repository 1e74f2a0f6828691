"""Arrays of torch, or of NumPy where torch is left out: one code works on both.

What a function is given decides what it works in, and it gives back the same.  Training needs
torch; models that were exported (runtime.py) correct photos in a process that never imports it.
"""

import contextlib
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any  # a torch tensor or a NumPy array


def namespace(x: Array) -> Any:
    """The module whose array x is: numpy or torch."""
    return np if isinstance(x, np.ndarray) else _torch()


def from_numpy(x: np.ndarray, xp: Any = None) -> Array:
    """x as an array of xp: numpy, or torch (None)."""
    return x if xp is np else _torch().from_numpy(x)


def to_numpy(x: Array) -> np.ndarray:
    return x if isinstance(x, np.ndarray) else x.cpu().numpy()


def like(value: Any, x: Array) -> Array:
    """A number, some numbers or an array, of the type of x, on its device."""
    if isinstance(x, np.ndarray):
        return np.asarray(value, x.dtype)
    return _torch().as_tensor(value, dtype=x.dtype, device=x.device)


def float32(x: Array) -> Array:
    return x.astype(np.float32, copy=False) if isinstance(x, np.ndarray) else x.float()


def sigmoid(x: Array) -> Array:
    if isinstance(x, np.ndarray):
        return 0.5 + 0.5 * np.tanh(0.5 * x)  # which does not overflow
    return x.sigmoid()


def full_precision(x: Array) -> contextlib.AbstractContextManager:
    """Within it autocast is off."""
    if isinstance(x, np.ndarray):
        return contextlib.nullcontext()
    return _torch().autocast(x.device.type, enabled=False)


def without_gradients(x: Array) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if isinstance(x, np.ndarray) else _torch().no_grad()


def _torch() -> Any:
    import torch

    return torch
