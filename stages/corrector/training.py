"""Training of the corrector from cached tensors alone: one loop, exact resume, no silent NaN."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evenlight.cache.errors import StoreError, UsageError
from evenlight.cache.files import Lock, atomic_write, write_json
from evenlight.stages.corrector.batches import take
from evenlight.stages.corrector.cached import Photos
from evenlight.stages.corrector.checkpoint import checkpoint_path, load_checkpoint, save_corrector
from evenlight.stages.corrector.correction import correct
from evenlight.stages.corrector.launch import SaidByFirst
from evenlight.stages.corrector.losses import Frozen, mse, total
from evenlight.stages.corrector.network import Corrector
from evenlight.stages.corrector.ranks import ALONE, Ranks
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
from evenlight.stages.corrector.streams import Draw, draw, plan_streams, validation_draws
from evenlight.stages.settings import Settings

log = logging.getLogger(__name__)


class NonFinite(SaidByFirst):
    """A loss or gradient was NaN or infinite; the weights are those of the step before."""


Record = Callable[[int, dict[str, Any]], None]  # step, what the log holds of it


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
    waited_per_step: float = 0.0  # of those seconds, for photos to be read

    def summary(self) -> str:
        """In a sentence."""
        waited = f" ({self.waited_per_step:.2f} waiting for photos)" * (self.waited_per_step > 0)
        return (
            f"{self.folder}: {self.steps} steps, {self.seconds_per_step:.2f} s each{waited}; "
            f"best at step "
            f"{self.best_step}, {self.best_psnr:.2f} dB to held-out pseudo-GT"
        )


def train(
    data: Photos,
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

    It is trained on the device where the models lie, and data where it fits.  Of several ranks
    (`data.ranks`) each calls this alike; rank 0 holds the lock, writes, and reports.
    on_progress(step, steps, record) is called for each line of log.jsonl.  Raises UsageError,
    StoreError (damaged or foreign checkpoints, a folder that is gone), NonFinite, and Lost where
    another rank is gone.
    """
    ranks, batch = data.ranks, settings.train.batch
    if ranks.count > batch:
        raise UsageError(
            f"{ranks.count} processes for the {batch} photos of a batch: start {batch} at most, "
            "or raise train.good, train.scenes or train.bad"
        )
    with ranks.in_turn():
        run = begin(
            data.about.p3_channels, settings, lock, kept.info, resume, models.device, ranks.count
        )
    _refuse_other_folders(run, ranks)
    record: Record = lambda step, line: None  # noqa: E731
    if ranks.leads:
        atomic_write(run.folder / "settings.toml", kept.toml.encode())
        record = RunLog(run, settings.train.steps, on_progress)
    _take_steps(run, data, models, settings, record)
    return _finish(run, settings, kept, ranks)


def _refuse_other_folders(run: Run, ranks: Ranks) -> None:
    """Raise StoreError where ranks stand at different steps: they do not see one folder."""
    steps = ranks.each(run.step)
    if steps != [run.step] * ranks.count:
        raise StoreError(
            f"{run.folder} is not the same to every process (checkpoints of steps "
            f"{', '.join(f'{step:.0f}' for step in steps)}): name a folder that all of them see"
        )


def _take_steps(run: Run, data: Photos, models: Frozen, settings: Settings, record: Record) -> None:
    """The loop: every step that the run has yet to do."""
    options, device, ranks = settings.train, models.device, data.ranks
    pools, held_out = plan_streams(data.about, options)
    extents, checks = data.about.extents, validation_draws(held_out, options)
    amp = options.amp and device.type == "cuda" and torch.cuda.is_bf16_supported()
    log.info("training on %s, scan: %s (%s)", device, *choose(device))
    draws = (draw(step, pools, extents, options) for step in range(run.step, options.steps))

    with closing(data.ready(draws, ranks)) as coming:
        started = time.perf_counter()
        for chosen, photos, waited in coming:
            rate = learning_rate(run.step, options)
            batch = take(photos, extents, chosen, min(options.crop, options.size), device, ranks)

            # forward, in bfloat16 where the device gains; scan, FFT and tone curves stay in float32
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                correction = run.network(batch.photo, batch.proto, batch.p3, batch.given)
            output = correct(batch.photo, correction, settings.network.family)
            loss, parts = total(batch, output, run.calibration.weights, settings.losses, models)

            # backward; finite? else stop with the weights of the step before
            if run.calibration.measures(run.step):
                run.calibration.measure(parts, output, ranks)
            run.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            gradients = [p.grad for p in run.network.parameters() if p.grad is not None]
            ranks.add_up(gradients)
            norm = nn.utils.get_total_norm(gradients)
            figures = ranks.totals({"loss": loss, **parts}) | {"gradient": norm.item()}
            if not (math.isfinite(figures["loss"]) and math.isfinite(figures["gradient"])):
                raise _not_finite(run, data, settings, chosen, figures)

            # step
            nn.utils.clip_grads_with_norm_(run.network.parameters(), options.clip_norm, norm)
            for group in run.optimiser.param_groups:
                group["lr"] = rate
            run.optimiser.step()
            run.follow(min(options.ema, (1 + run.step) / (10 + run.step)))
            run.step += 1
            run.history.append(time.perf_counter() - started)
            run.waited.append(waited)

            _look_back(run, data, checks, settings, figures | {"rate": rate}, record)
            started = time.perf_counter()


def _look_back(
    run: Run,
    data: Photos,
    checks: list[Draw],
    settings: Settings,
    figures: dict[str, float],
    record: Record,
) -> None:
    """What is due after a step: log, calibrate, validate, save."""
    options, leads = settings.train, data.ranks.leads
    last = run.step == options.steps
    if run.step % options.log_every == 0 or last:
        whole = ("loss", "gradient", "rate")
        parts = {name: part for name, part in figures.items() if name not in whole}
        line = {"loss": figures["loss"], "parts": parts, "gradient": figures["gradient"]}
        waited = sum(run.waited[-options.log_every :])
        told = {"waited": waited} if waited else {}  # seconds, since the line before
        record(run.step, line | {"rate": figures["rate"], "seconds": run.history[-1]} | told)
    if run.step == run.calibration.window[1] and not run.calibration.done:
        record(run.step, {"weights": run.calibration.finish()})
    validated = run.step % options.validate_every == 0 or last
    if validated:
        psnr = validate(run.ema, data, checks, settings)
        record(run.step, {"validation_psnr": psnr})
        if psnr > run.best_psnr:
            run.best_psnr, run.best_step = psnr, run.step
    if leads and (validated or run.step % options.save_every == 0):
        run.save()


@torch.no_grad()
def validate(network: Corrector, data: Photos, checks: list[Draw], settings: Settings) -> float:
    """Mean PSNR in dB of corrected photos against their answers, where these are known.

    Ranks share the photos out and have the mean of all.
    """
    device, ranks = next(network.parameters()).device, data.ranks
    values = torch.zeros(len(checks), device=device)
    own = ranks.rows(len(checks))
    with closing(data.ready((checks[i] for i in own), ALONE)) as coming:
        for i, (check, photos, _) in zip(own, coming, strict=True):
            batch = take(photos, data.about.extents, check, settings.train.size, device)
            correction = network(batch.photo, batch.proto, batch.p3, batch.given)
            output = correct(batch.photo, correction, settings.network.family).clamp(0, 1)
            error = mse(output, batch.target, batch.confidence)
            values[i] = -10 * error.clamp_min(1e-10).log10()
    return float(ranks.total(values).mean())


def _finish(run: Run, settings: Settings, kept: Kept, ranks: Ranks) -> TrainResult:
    """Write the EMA weights of the best validation as the corrector of this run."""
    if ranks.leads:
        run.lock.confirm()
        best = load_checkpoint(checkpoint_path(checkpoints_of(run.folder), run.best_step))
        run.restore(best)
        figures = {
            "best_step": best.step,
            "best_psnr": run.best_psnr,
            "steps": settings.train.steps,
        }
        about = {"loss_weights": run.calibration.weights, "figures": figures}
        save_corrector(run.folder, run.ema, run.info | about, kept.tensors)
    steps = max(1, len(run.history))
    return TrainResult(
        folder=run.folder,
        steps=settings.train.steps,
        best_step=run.best_step,
        best_psnr=run.best_psnr,
        seconds_per_step=sum(run.history) / steps,
        waited_per_step=sum(run.waited) / steps,
    )


def _not_finite(
    run: Run, data: Photos, settings: Settings, chosen: Draw, figures: dict[str, float]
) -> NonFinite:
    """Write down what the step saw; the error that says where."""
    what = next(name for name in ("loss", "gradient") if not math.isfinite(figures[name]))
    path = run.folder / f"nonfinite_step_{run.step:07d}.json"
    report = {
        "step": run.step,
        "what": what,
        "photos": [data.about.names[sample.photo] for sample in chosen.samples],
        "draw": chosen._asdict(),
        "parts": {name: repr(value) for name, value in figures.items()},
        "settings": choices_of(settings),
    }
    if data.ranks.leads:
        write_json(path, report)
    return NonFinite(
        f"the {what} of step {run.step} is {figures[what]}: stopped before the update, "
        f"the photos and choices of the step are in {path}; check them, or lower "
        "train.learning_rate and run again, which resumes from the last checkpoint"
    )
