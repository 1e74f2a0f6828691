"""Training of the corrector from cached tensors alone: one loop, exact resume, no silent NaN."""

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evenlight.cache.errors import EvenlightError
from evenlight.cache.files import Lock, atomic_write, write_json
from evenlight.stages.corrector.batches import Draw, TrainingData, take
from evenlight.stages.corrector.checkpoint import checkpoint_path, load_checkpoint, save_corrector
from evenlight.stages.corrector.correction import correct
from evenlight.stages.corrector.losses import Frozen, mse, total
from evenlight.stages.corrector.network import Corrector
from evenlight.stages.corrector.run import (
    Progress,
    Run,
    RunLog,
    begin,
    checkpoints_of,
    choices_of,
    learning_rate,
)
from evenlight.stages.corrector.scan import choose
from evenlight.stages.corrector.streams import draw, plan_streams, validation_draws
from evenlight.stages.settings import Settings

log = logging.getLogger(__name__)


class NonFinite(EvenlightError):  # noqa: N818 - reads as the sentence it is
    """A loss or gradient was NaN or infinite; the weights are those of the step before."""


class Kept(NamedTuple):
    """What is kept with a corrector beside its weights."""

    info: dict[str, Any]  # JSON values: fingerprints of its priors; must be the same on resume
    tensors: dict[str, Tensor]  # small ones of its priors, without which it cannot be used
    toml: str = ""  # all settings, for people: settings.toml


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    folder: Path  # holds corrector.safetensors and corrector.json
    steps: int
    best_step: int
    best_psnr: float  # dB, EMA output on the held-out photos
    seconds_per_step: float  # of the steps of this call; 0 if there was none left to do

    def summary(self) -> str:
        """In a sentence."""
        return (
            f"{self.folder}: {self.steps} steps, {self.seconds_per_step:.2f} s each; best at step "
            f"{self.best_step}, {self.best_psnr:.2f} dB to held-out pseudo-GT"
        )


def train(
    data: TrainingData,
    models: Frozen,
    settings: Settings,
    lock: Lock,
    kept: Kept,
    *,
    resume: bool = True,
    on_progress: Progress = lambda step, steps, record: None,
) -> TrainResult:
    """Train a corrector and write it into the folder of the lock, which is held (EMA weights of the
    best validation).

    It is trained on the device where the models lie, and data where it fits.
    on_progress(step, steps, record) is called for each line of log.jsonl.  Raises UsageError,
    StoreError (damaged or foreign checkpoints, a folder that is gone), NonFinite.
    """
    run = begin(data.p3.shape[1], settings, lock, kept.info, resume, models.device)
    atomic_write(run.folder / "settings.toml", kept.toml.encode())
    record = RunLog(run, settings.train.steps, on_progress)
    _take_steps(run, data, models, settings, record)
    return _finish(run, settings, kept)


def _take_steps(
    run: Run, data: TrainingData, models: Frozen, settings: Settings, record: RunLog
) -> None:
    """The loop: every step that the run has yet to do."""
    options, device = settings.train, models.device
    pools, held_out = plan_streams(data, options)
    extents, checks = data.extent.tolist(), validation_draws(held_out, options)
    amp = options.amp and device.type == "cuda" and torch.cuda.is_bf16_supported()
    log.info("training on %s, scan: %s (%s)", device, *choose(device))

    while run.step < options.steps:
        started = time.perf_counter()
        rate = learning_rate(run.step, options)
        chosen = draw(run.step, pools, extents, options)
        batch = take(data, extents, chosen, min(options.crop, options.size), device)

        # forward, in bfloat16 where the device gains; scan, FFT and tone curves stay in float32
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            correction = run.network(batch.photo, batch.proto, batch.p3, batch.strength)
        output = correct(batch.photo, correction, settings.network.family)
        loss, parts = total(batch, output, run.calibration.weights, settings.losses, models)

        # backward; finite? else stop with the weights of the step before
        if run.calibration.measures(run.step):
            run.calibration.measure(parts, output)
        run.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in run.network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        figures = {"loss": loss, "gradient": norm, **parts}
        if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
            names = [data.names[sample.photo] for sample in chosen.samples]
            raise _not_finite(run, settings, chosen, names, figures)

        # step
        nn.utils.clip_grads_with_norm_(run.network.parameters(), options.clip_norm, norm)
        for group in run.optimiser.param_groups:
            group["lr"] = rate
        run.optimiser.step()
        run.follow(min(options.ema, (1 + run.step) / (10 + run.step)))
        run.step += 1
        run.history.append(time.perf_counter() - started)

        # log, calibrate, validate, save
        last = run.step == options.steps
        if run.step % options.log_every == 0 or last:
            values = {name: part.item() for name, part in parts.items()}
            line = {"loss": loss.item(), "parts": values, "gradient": norm.item()}
            record(run.step, line | {"rate": rate, "seconds": run.history[-1]})
        if run.step == run.calibration.window[1] and not run.calibration.done:
            record(run.step, {"weights": run.calibration.finish()})
        validated = run.step % options.validate_every == 0 or last
        if validated:
            psnr = validate(run.ema, data, checks, settings)
            record(run.step, {"validation_psnr": psnr})
            if psnr > run.best_psnr:
                run.best_psnr, run.best_step = psnr, run.step
        if validated or run.step % options.save_every == 0:
            run.save()


@torch.no_grad()
def validate(
    network: Corrector, data: TrainingData, checks: list[Draw], settings: Settings
) -> float:
    """Mean PSNR in dB of corrected photos against their answers, where these are known."""
    device = next(network.parameters()).device
    extents, size = data.extent.tolist(), settings.train.size
    values = []
    for check in checks:
        batch = take(data, extents, check, size, device)
        correction = network(batch.photo, batch.proto, batch.p3, batch.strength)
        output = correct(batch.photo, correction, settings.network.family).clamp(0, 1)
        values.append(-10 * mse(output, batch.target, batch.confidence).clamp_min(1e-10).log10())
    return float(torch.stack(values).mean())


def _finish(run: Run, settings: Settings, kept: Kept) -> TrainResult:
    """Write the EMA weights of the best validation as the corrector of this run."""
    run.lock.confirm()
    best = load_checkpoint(checkpoint_path(checkpoints_of(run.folder), run.best_step))
    run.restore(best)
    steps = settings.train.steps
    figures = {"best_step": best.step, "best_psnr": run.best_psnr, "steps": steps}
    about = {"loss_weights": run.calibration.weights, "figures": figures}
    save_corrector(run.folder, run.ema, run.info | about, kept.tensors)
    return TrainResult(
        folder=run.folder,
        steps=steps,
        best_step=best.step,
        best_psnr=run.best_psnr,
        seconds_per_step=sum(run.history) / max(1, len(run.history)),
    )


def _not_finite(
    run: Run, settings: Settings, chosen: Draw, photos: list[str], figures: dict[str, Tensor]
) -> NonFinite:
    """Write down what the step saw; the error that says where."""
    values = {name: x.item() for name, x in figures.items()}
    what = next(name for name in ("loss", "gradient") if not math.isfinite(values[name]))
    path = run.folder / f"nonfinite_step_{run.step:07d}.json"
    report = {
        "step": run.step,
        "what": what,
        "photos": photos,
        "draw": chosen._asdict(),
        "parts": {name: repr(value) for name, value in values.items()},
        "settings": choices_of(settings),
    }
    write_json(path, report)
    return NonFinite(
        f"the {what} of step {run.step} is {values[what]}: stopped before the update, "
        f"the photos and choices of the step are in {path}; check them, or lower "
        "train.learning_rate and run again, which resumes from the last checkpoint"
    )
