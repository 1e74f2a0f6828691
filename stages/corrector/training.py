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
from evenlight.cache.files import Lock, make_folder, write_json
from evenlight.stages.corrector.batches import (
    Batch,
    Draw,
    TrainingData,
    draw,
    small_copies,
    split_photos,
    take,
)
from evenlight.stages.corrector.checkpoint import (
    checkpoint_path,
    load_checkpoint,
    save_checkpoint,
    save_corrector,
)
from evenlight.stages.corrector.losses import Features, Logits, Sample, total
from evenlight.stages.corrector.network import Corrector, correct
from evenlight.stages.corrector.run import Progress, Run, RunLog, begin, choices_of
from evenlight.stages.corrector.scan import choose
from evenlight.stages.settings import Settings

log = logging.getLogger(__name__)
FINAL_RATE = 0.005  # of the learning rate, at the end of the cosine


class NonFinite(EvenlightError):  # noqa: N818 - reads as the sentence it is
    """A loss or gradient was NaN or infinite; the weights are those of the step before."""


class Frozen(NamedTuple):
    """The priors that the losses ask. Differentiable, their own weights never change."""

    features: Features  # rgb B,3,H,W in [0, 1] -> proto, p3
    logits: Logits  # rgb B,3,H,W in [0, 1] -> B,3 (under, normal, over)


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    folder: Path  # holds corrector.safetensors and corrector.json
    steps: int
    best_step: int
    best_psnr: float  # dB, EMA output against pseudo-GT on the held-out photos
    seconds_per_step: float  # of the steps of this call; 0 if there was none left to do


def train(
    data: TrainingData,
    models: Frozen,
    settings: Settings,
    out: Path,
    *,
    info: dict[str, Any],
    extra: dict[str, Tensor] | None = None,
    resume: bool = True,
    device: torch.device | str = "cpu",
    on_progress: Progress = lambda step, steps, record: None,
) -> TrainResult:
    """Train a corrector and write it to `out` (EMA weights of the best validation).

    The models behind `models` lie on `device`, and data where it fits. info (JSON values:
    fingerprints of the priors) is kept with every checkpoint and must be the same on resume; extra
    tensors (the scorer's) go into the corrector file. on_progress(step, steps, record) is called
    for each line of `out`/log.jsonl. Raises UsageError, StoreError (damaged or foreign
    checkpoints), NonFinite.
    """
    make_folder(out)
    with Lock(out / ".lock", f"run {out}"):
        return _train(data, models, settings, out, info, extra, resume, device, on_progress)


def _train(
    data: TrainingData,
    models: Frozen,
    settings: Settings,
    out: Path,
    info: dict[str, Any],
    extra: dict[str, Tensor] | None,
    resume: bool,
    device: torch.device | str,
    on_progress: Progress,
) -> TrainResult:
    options, device = settings.train, torch.device(device)
    checkpoints = out / "checkpoints"
    info = info | choices_of(settings)
    run = begin(data.p3.shape[1], settings, checkpoints, info, resume, device)
    record = RunLog(out / "log.jsonl", run.step, options.steps, on_progress)
    photos, held_out = split_photos(len(data.photo), options)
    extents, small = data.extent.tolist(), small_copies(data).to(device)
    paired = settings.losses.consistency > 0
    amp = options.amp and device.type == "cuda" and torch.cuda.is_bf16_supported()
    log.info("training on %s, scan: %s (%s)", device, *choose(device))

    while run.step < options.steps:
        started = time.perf_counter()
        step, rate = run.step, learning_rate(run.step, settings)
        chosen = draw(step, photos, extents, options, paired)
        batch = take(data, small, extents, chosen, options.crop)

        # forward, in bfloat16 where the device gains; scan, FFT and tone curves stay in float32
        with torch.autocast(device.type, torch.bfloat16, enabled=amp):
            correction = run.network(batch.photo, batch.proto, batch.p3, batch.whole)
        output = correct(batch.photo, correction, settings.network.family)
        weights = run.calibration.weights
        loss, parts = _loss(_sample(batch, output, paired), weights, models, chosen, step, settings)

        # finite? else stop with the weights of the step before
        _require_finite(loss, "loss", step, chosen, parts, data, settings, out)
        if run.calibration.measures(step):
            run.calibration.measure(parts, output)
        run.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        gradients = [p.grad for p in run.network.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        _require_finite(norm, "gradient", step, chosen, parts, data, settings, out)

        # step
        nn.utils.clip_grads_with_norm_(run.network.parameters(), options.clip_norm, norm)
        for group in run.optimiser.param_groups:
            group["lr"] = rate
        run.optimiser.step()
        run.follow(min(options.ema, (1 + step) / (10 + step)))
        run.step += 1
        run.history.append(time.perf_counter() - started)

        # log, calibrate, validate, save
        last = run.step == options.steps
        if run.step % options.log_every == 0 or last:
            values = {name: float(part.detach()) for name, part in parts.items()}
            line = {"loss": float(loss.detach()), "parts": values, "gradient": float(norm)}
            record(run.step, line | {"rate": rate, "seconds": run.history[-1]})
        if run.step == run.calibration.window[1] and not run.calibration.done:
            record(run.step, {"weights": run.calibration.finish()})
        validated = run.step % options.validate_every == 0 or last
        if validated:
            _note_best(run, validate(run.ema, data, held_out, settings), record)
        if validated or run.step % options.save_every == 0:
            save_checkpoint(checkpoints, run.step, *run.state(info), best=run.best_step)

    return _finish(run, settings, out, info, extra)


def _loss(
    sample: Sample,
    weights: dict[str, float],
    models: Frozen,
    chosen: Draw,
    step: int,
    settings: Settings,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses of one step, and its parts."""
    return total(
        sample,
        weights,
        settings.losses,
        features=models.features,
        logits=models.logits,
        spc_rows=_spc_rows(step, settings),
        view=chosen.view,
    )


def _note_best(run: Run, psnr: float, record: RunLog) -> None:
    record(run.step, {"validation_psnr": psnr})
    if psnr > run.best_psnr:
        run.best_psnr, run.best_step = psnr, run.step


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then a cosine down to FINAL_RATE of the peak."""
    options = settings.train
    warm = min(1.0, (step + 1) / max(1, options.warmup))
    fall = 0.5 * (1 + math.cos(math.pi * step / options.steps))
    return options.learning_rate * warm * (FINAL_RATE + (1 - FINAL_RATE) * fall)


@torch.no_grad()
def validate(
    network: Corrector, data: TrainingData, photos: list[int], settings: Settings
) -> float:
    """Mean PSNR in dB of the corrected photos against their pseudo-GT, whole photos."""
    device = next(network.parameters()).device
    values = []
    for i in photos:
        height, width = data.extent[i].tolist()
        photo = data.photo[i : i + 1, :, :height, :width].to(device).float() / 255
        target = data.pseudo_gt[i : i + 1, :, :height, :width].to(device).float() / 255
        proto = data.proto[i : i + 1, :, : height // 4, : width // 4].to(device).float()
        p3 = data.p3[i : i + 1, :, : height // 8, : width // 8].to(device).float()
        output = correct(photo, network(photo, proto, p3), settings.network.family).clamp(0, 1)
        error = (output - target).square().mean().clamp_min(1e-10)
        values.append(-10 * torch.log10(error))
    return float(torch.stack(values).mean())


def _finish(
    run: Run, settings: Settings, out: Path, info: dict[str, Any], extra: dict[str, Tensor] | None
) -> TrainResult:
    """Write the EMA weights of the best validation as the corrector of this run."""
    best = load_checkpoint(checkpoint_path(out / "checkpoints", run.best_step))
    run.restore(best.tensors, best.info)
    figures = {"best_step": best.step, "best_psnr": run.best_psnr, "steps": settings.train.steps}
    loss_weights = run.calibration.weights
    about = {"loss_weights": loss_weights, "figures": figures}
    save_corrector(out, run.ema, info | about, extra)
    return TrainResult(
        folder=out,
        steps=settings.train.steps,
        best_step=best.step,
        best_psnr=run.best_psnr,
        seconds_per_step=sum(run.history) / max(1, len(run.history)),
    )


def _sample(batch: Batch, output: Tensor, paired: bool) -> Sample:
    return Sample(
        photo=batch.photo,
        output=output,
        target=batch.target,
        confidence=batch.confidence,
        labels=batch.labels,
        well_exposed=batch.well_exposed,
        paired=paired,
    )


def _spc_rows(step: int, settings: Settings) -> slice | None:
    """The photos that FastSAM and CLIP see in this step, from either half in turn; or None.

    The last of every spc_every steps has them, so that logged steps show these parts too.
    """
    turn, idle = divmod(step + 1, settings.train.spc_every)
    if idle:
        return None
    half = settings.train.batch // 2
    first = half * (turn % 2)
    return slice(first, min(first + settings.train.spc_photos, settings.train.batch))


def _require_finite(
    value: Tensor,
    what: str,
    step: int,
    chosen: Draw,
    parts: dict[str, Tensor],
    data: TrainingData,
    settings: Settings,
    out: Path,
) -> None:
    if math.isfinite(float(value.detach())):
        return
    path = out / f"nonfinite_step_{step:07d}.json"
    report = {
        "step": step,
        "what": what,
        "photos": [data.names[i] for i in chosen.photos],
        "draw": chosen._asdict(),
        "parts": {name: repr(float(part.detach())) for name, part in parts.items()},
        "settings": choices_of(settings),
    }
    write_json(path, report)
    raise NonFinite(
        f"the {what} of step {step} is {float(value.detach())}: stopped before the update, "
        f"the photos and choices of the step are in {path}; check them, or lower "
        "train.learning_rate and run again, which resumes from the last checkpoint"
    )
