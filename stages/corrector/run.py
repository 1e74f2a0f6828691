"""A training run as it stands: begun, resumed, written to checkpoints, logged."""

import copy
import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evenlight.cache.errors import StoreError, UsageError, one_line
from evenlight.cache.files import Lock, atomic_write, checked
from evenlight.stages.corrector.checkpoint import (
    Checkpoint,
    load_corrector,
    load_latest,
    save_checkpoint,
)
from evenlight.stages.corrector.events import events
from evenlight.stages.corrector.losses import START_WEIGHTS, Calibration
from evenlight.stages.corrector.network import Corrector
from evenlight.stages.settings import Settings, TrainSettings
from evenlight.stages.weights import shipped

log = logging.getLogger(__name__)
Progress = Callable[[int, int, dict[str, Any]], None]  # step, steps, record
FINAL_RATE = 0.005  # of the learning rate, at the end of the cosine


@dataclass(frozen=True)
class _Calibrated:
    weights: dict[str, float]
    norms: dict[str, list[int | float]]
    done: bool

    def __post_init__(self) -> None:
        assert self.weights.keys() == START_WEIGHTS.keys(), f"weights of {sorted(self.weights)}"
        known = self.norms.keys() <= START_WEIGHTS.keys()
        assert known and (not self.norms or "data" in self.norms), f"norms of {sorted(self.norms)}"
        for norm in self.norms.values():
            assert len(norm) == 2 and all(0 < x < 1e30 for x in norm), f"norm {norm}"


@dataclass(frozen=True)
class _Progress:
    """What a checkpoint says of the run, beside its tensors."""

    best_step: int
    best_psnr: float | None
    calibration: _Calibrated
    ranks: int = 1  # of the process that wrote it

    def __post_init__(self) -> None:
        assert self.ranks > 0, f"{self.ranks} ranks"


@dataclass(kw_only=True)
class Run:
    """Everything that a step changes: what a checkpoint holds, and where it is kept."""

    lock: Lock  # of the folder, held
    info: dict[str, Any]  # what must be the same on resume
    network: Corrector
    ema: Corrector
    optimiser: torch.optim.AdamW
    calibration: Calibration
    step: int = 0  # steps done
    best_step: int = 0
    best_psnr: float = -math.inf
    ranks: int = 1  # that it is trained by
    history: list[float] = field(default_factory=list)  # seconds of the steps of this call
    waited: list[float] = field(default_factory=list)  # of those, for photos to be read

    @property
    def folder(self) -> Path:
        return self.lock.path.parent

    def save(self) -> None:
        """Write a checkpoint of this step.  Raises OSError with the earlier ones untouched."""
        self.lock.confirm()
        tensors = {f"network.{name}": x for name, x in self.network.state_dict().items()}
        tensors |= {f"ema.{name}": x for name, x in self.ema.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{name}": x for name, x in state.items()}
        progress = {
            "best_step": self.best_step,
            "best_psnr": self.best_psnr if math.isfinite(self.best_psnr) else None,
            "calibration": self.calibration.state(),
            "ranks": self.ranks,
        }
        info = self.info | {"progress": progress}
        save_checkpoint(checkpoints_of(self.folder), self.step, tensors, info, self.best_step)

    def restore(self, checkpoint: Checkpoint) -> int:
        """Take the state of a checkpoint; how many processes trained it.

        Raises StoreError where it is that of another run.
        """
        where = f"checkpoint {checkpoint.step} of {self.folder}"
        progress = checked(_Progress, checkpoint.info.get("progress"), where)
        try:
            self._take(checkpoint.tensors)
        except (KeyError, ValueError, RuntimeError) as error:
            raise StoreError(f"{where} does not fit this run ({one_line(error)})") from error
        self.step, self.best_step = checkpoint.step, progress.best_step
        self.best_psnr = -math.inf if progress.best_psnr is None else progress.best_psnr
        self.calibration.restore(vars(progress.calibration))
        return progress.ranks

    def _take(self, tensors: dict[str, Tensor]) -> None:
        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}

        self.network.load_state_dict(part("network."))
        self.ema.load_state_dict(part("ema."))
        states: dict[int, dict[str, Tensor]] = {}
        for name, x in part("optimiser.").items():
            index, key = name.split(".")
            states.setdefault(int(index), {})[key] = x
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": states, "param_groups": groups})

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the EMA weights towards those of the network."""
        for slow, fast in zip(self.ema.parameters(), self.network.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)


def begin(
    p3_channels: int,
    settings: Settings,
    lock: Lock,
    info: dict[str, Any],
    resume: bool,
    device: torch.device,
    ranks: int = 1,
) -> Run:
    """A new run, or the newest whole checkpoint of the same run in the folder of the lock.

    More steps than it was begun with train it on.  Raises UsageError where it may not be resumed,
    StoreError where anything else differs.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.train.seed)
        network = Corrector(settings.network, p3_channels).to(device)
    matrices = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.train.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    run = Run(
        lock=lock,
        info=info | choices_of(settings),
        network=network,
        ema=copy.deepcopy(network).eval().requires_grad_(False),
        optimiser=torch.optim.AdamW(groups, lr=settings.train.learning_rate, betas=(0.9, 0.99)),
        calibration=Calibration(settings.losses, settings.train.calibrate),
        ranks=ranks,
    )
    checkpoints = checkpoints_of(run.folder)
    checkpoint = load_latest(checkpoints)
    if checkpoint is None:
        if settings.train.start:
            _start_from(run, settings)
        return run
    if not resume:
        raise UsageError(
            f"{checkpoints} holds a run at step {checkpoint.step}: resume it, "
            "remove it, or choose another output folder"
        )
    changed = _changed(checkpoint.info, run.info)
    told = ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changed.items())
    if changed and not _only_more_steps(changed):
        raise StoreError(
            f"the run in {checkpoints}, at step {checkpoint.step}, was begun otherwise ({told}): "
            "restore that (train.steps may rise), or choose another output folder"
        )
    ranks = run.restore(checkpoint)
    if ranks != run.ranks:
        log.info(
            "trained by %d process%s until now, by %d from here on: the steps are the same, "
            "their losses to rounding",
            ranks,
            "" if ranks == 1 else "es",
            run.ranks,
        )
    log.info("resuming %s at step %d", run.folder, run.step)
    if changed:
        rate = learning_rate(run.step, settings.train)
        log.info("%s: the learning rate is that of the longer run from now on: %.2g", told, rate)
    return run


def learning_rate(step: int, options: TrainSettings) -> float:
    """Linear warm-up, then a cosine down to FINAL_RATE of the peak."""
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * step / options.steps))
    return options.learning_rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * fall)


def _changed(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What of a run's info is not as in a checkpoint's: key -> values before and now."""
    found = {}
    for name, value in json.loads(json.dumps(now)).items():
        was, is_now = (dict(_flat({name: x})) for x in (before.get(name), value))
        for key in {**is_now, **was}:
            if was.get(key) != is_now.get(key):
                found[key.removeprefix("settings.")] = was.get(key), is_now.get(key)
    return found


def _only_more_steps(changed: dict[str, tuple[Any, Any]]) -> bool:
    before, now = changed.get("train.steps", (None, 0))
    return changed.keys() == {"train.steps"} and isinstance(before, int) and before < now


def _flat(nested: dict[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested ones, by dotted key."""
    for key, value in nested.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{at}{key}.")
        else:
            yield f"{at}{key}", value


def _start_from(run: Run, settings: Settings) -> None:
    """Take over the weights of another corrector.  Raises UsageError where it is another network,
    StoreError and EnvironmentLacks as loading it."""
    start = settings.train.start
    folder = Path(start) if Path(start).is_dir() else shipped(start)
    other, _, _ = load_corrector(folder)
    if (other.settings, other.p3_channels) != (run.network.settings, run.network.p3_channels):
        raise UsageError(f"train.start = {start!r} is another network: give its network.* settings")
    for network in (run.network, run.ema):
        network.load_state_dict(other.state_dict())


def checkpoints_of(folder: Path) -> Path:
    return folder / "checkpoints"


def choices_of(settings: Settings) -> dict[str, Any]:
    """The settings that decide the weights."""
    parts = ("network", "losses", "train")
    return {name: asdict(getattr(settings, name)) for name in parts}


class RunLog:
    """JSON lines, one per record, and events; on resume those of steps to be done again go."""

    def __init__(self, run: Run, steps: int, on_progress: Progress) -> None:
        self.lock, self.steps, self.on_progress = run.lock, steps, on_progress
        self.path = run.folder / "log.jsonl"
        if self.path.exists():
            lines = [x for x in self.path.read_bytes().splitlines(True) if x.endswith(b"\n")]
            steps_of = {line: _step_of(line) for line in lines}
            if damaged := sum(steps_of[line] is None for line in lines):
                log.warning("%s: damaged lines are dropped (%d)", self.path, damaged)
            kept = (x for x in lines if (at := steps_of[x]) is not None and at <= run.step)
            atomic_write(self.path, b"".join(kept))
        self.events = events(run.folder, run.step)
        if self.events:
            log.info("TensorBoard: tensorboard --logdir %s", run.folder)

    def __call__(self, step: int, record: dict[str, Any]) -> None:
        record = {"step": step} | record
        self.lock.confirm()
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        figures = {name: value for name, value in _flat(record) if name != "step"}
        if self.events:
            self.events.add(step, figures)
        told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        log.debug("step %d: %s", step, told)
        self.on_progress(step, self.steps, record)


def _step_of(line: bytes) -> int | None:
    """The step that a line of the log tells of; None where it is damaged."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        return int(json.loads(line)["step"])
    return None
