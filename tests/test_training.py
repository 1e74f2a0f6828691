"""Training resumes exactly, stops before a bad update, and learns; on toy priors and data."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evenlight.cache.errors import StoreError, UsageError
from evenlight.cache.files import Lock
from evenlight.stages.corrector import training
from evenlight.stages.corrector.batches import (
    Batch,
    Draw,
    TrainingData,
    draw,
    small_copies,
    split_photos,
    take,
)
from evenlight.stages.corrector.checkpoint import load_checkpoint, load_corrector, load_latest
from evenlight.stages.corrector.losses import Frozen
from evenlight.stages.corrector.run import Run
from evenlight.stages.corrector.training import Kept, NonFinite, train
from evenlight.stages.priors import tone
from evenlight.stages.settings import NetworkSettings, Settings, TrainSettings

STEPS = 12
TOY = Settings(
    network=NetworkSettings(size="tiny"),
    train=TrainSettings(
        steps=STEPS,
        batch=4,
        size=32,
        crop=32,
        warmup=2,
        calibrate=(2, 7),
        held_out=0.1,
        validate_every=5,
        save_every=1,
        log_every=1,
        spc_every=2,
        spc_photos=2,
    ),
)
KEPT = Kept({"priors": {"segmenter": "toy", "clip": "toy"}}, {})


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def toy_data(num_photos: int = 7, side: int = 32) -> TrainingData:
    """Smooth pictures, badly exposed by a known strength; some well exposed; two not square."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num_photos, 3, 4, 4, generator=generator)
    good = F.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1)
    strengths = torch.rand(num_photos, generator=generator) * 3 - 1.5
    strengths[::3] = 0
    extent = torch.full((num_photos, 2), side)
    extent[0, 0] = extent[-1, 1] = side - 8
    noise = {
        "proto": torch.randn(num_photos, 32, side // 4, side // 4, generator=generator).half(),
        "p3": torch.randn(num_photos, 6, side // 8, side // 8, generator=generator).half(),
    }
    bad = tone.apply("film", good, strengths[:, None, None, None])
    return TrainingData(
        photo=(bad * 255).round().to(torch.uint8),
        extent=extent,
        regions=torch.randint(0, 4, (num_photos, side, side), generator=generator).byte(),
        pseudo_gt=(good * 255).round().to(torch.uint8),
        confidence=torch.full((num_photos, side // 4, side // 4), 0.8).half(),
        well_exposed=strengths == 0,
        names=[f"photo{i}.jpg" for i in range(num_photos)],
        **noise,
    )


def toy_models() -> Frozen:
    generator = torch.Generator().manual_seed(1)
    w4, w8 = (torch.randn(4, 3, k, k, generator=generator) for k in (4, 8))

    def logits(rgb: Tensor) -> Tensor:
        mean = rgb.mean((1, 2, 3))
        return 10 * torch.stack([0.5 - mean, 0.1 - (mean - 0.5).abs(), mean - 0.5], dim=1)

    return Frozen(lambda x: (F.conv2d(x, w4, stride=4), F.conv2d(x, w8, stride=8)), logits)


def run(out: Path, settings: Settings = TOY, kept: Kept = KEPT, **options) -> training.TrainResult:
    return train(toy_data(), toy_models(), settings, out, kept, **options)


def with_train(**changes) -> Settings:
    return replace(TOY, train=replace(TOY.train, **changes))


def log_lines(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, dict[int, Path]]:
    """A whole run, and what lay on disk when step s was logged, for every s."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("run")
    out, stopped = folder / "whole", {}

    def keep(step: int, steps: int, record: dict) -> None:
        stopped[step] = folder / f"stopped{step}"
        if not stopped[step].exists():
            shutil.copytree(out, stopped[step])

    run(out, on_progress=keep)
    return out, stopped


# an epoch is 6 photos, 2 a step: its edges are at 3, 6, 9; calibration runs from 2 to 7
@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6, 7, 9, 10, 12])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(uninterrupted, tmp_path, stop):
    whole, stopped = uninterrupted
    out = tmp_path / "resumed"
    shutil.copytree(stopped[stop], out)
    assert load_latest(out / "checkpoints") is None or stop > 1
    run(out)
    expected = load_checkpoint(whole / "checkpoints" / f"step_{STEPS:07d}")
    found = load_checkpoint(out / "checkpoints" / f"step_{STEPS:07d}")
    assert found.info == expected.info
    assert found.tensors.keys() == expected.tensors.keys()
    assert {k.split(".")[0] for k in found.tensors} == {"network", "ema", "optimiser"}
    assert all(torch.equal(found.tensors[name], x) for name, x in expected.tensors.items())
    for name in ("corrector.safetensors", "corrector.json"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert log_lines(out) == log_lines(whole)


def test_a_finished_run_that_is_started_again_does_no_step(uninterrupted, tmp_path):
    out = tmp_path / "again"
    shutil.copytree(uninterrupted[0], out)
    result = run(out)
    assert result.seconds_per_step == 0 and log_lines(out) == log_lines(uninterrupted[0])


def test_a_damaged_newest_checkpoint_costs_one_interval_and_nothing_else(uninterrupted, tmp_path):
    out = tmp_path / "damaged"
    shutil.copytree(uninterrupted[1][10], out)
    newest = out / "checkpoints" / "step_0000009" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    run(out)
    name = "corrector.safetensors"
    assert (out / name).read_bytes() == (uninterrupted[0] / name).read_bytes()


def test_training_leaves_the_global_random_state_alone(tmp_path):
    before = torch.get_rng_state()
    run(tmp_path, with_train(steps=1))
    assert torch.equal(torch.get_rng_state(), before)


class NaNGradient(torch.autograd.Function):
    """The identity with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return grads[0] * float("nan")


class Saboteur:
    """Breaks one step of a training at one place, and keeps the weights from before the step."""

    def __init__(self, where: str, bad_step: int) -> None:
        self.where, self.bad_step, self.step = where, bad_step, -1
        self.originals = training.begin, training.draw, training.take
        self.models = toy_models()
        self.before: dict[str, Tensor] = {}

    def strikes(self, where: str) -> bool:
        return self.where == where and self.step == self.bad_step

    def weights(self) -> dict[str, Tensor]:
        state = {"network": self.run.network, "ema": self.run.ema}
        return {f"{n}.{k}": x.clone() for n, m in state.items() for k, x in m.state_dict().items()}

    def begin(self, *args) -> Run:
        self.run = self.originals[0](*args)
        return self.run

    def draw(self, step: int, *args) -> Draw:
        self.step = step
        if self.strikes("weight"):
            with torch.no_grad():
                next(self.run.network.stem.parameters())[0] = float("nan")
        self.before = self.weights()
        return self.originals[1](step, *args)

    def take(self, *args) -> Batch:
        batch = self.originals[2](*args)
        if self.strikes("input"):
            batch.proto[0, 0, 0, 0] = float("nan")
        if self.strikes("target"):
            batch.target[-1, 0, 3, 3] = float("inf")
        return batch

    def features(self, rgb: Tensor) -> tuple[Tensor, Tensor]:
        return self.models.features(NaNGradient.apply(rgb) if self.strikes("gradient") else rgb)

    def logits(self, rgb: Tensor) -> Tensor:
        return self.models.logits(rgb) * (float("nan") if self.strikes("loss") else 1)


@pytest.mark.parametrize("where", ["input", "target", "loss", "gradient", "weight"])
@pytest.mark.parametrize("bad_step", [0, 4, 6])
def test_nan_stops_before_the_update(tmp_path, monkeypatch, where, bad_step):
    settings = with_train(steps=7, spc_every=1, save_every=2, validate_every=7)
    saboteur = Saboteur(where, bad_step)
    for name in ("begin", "draw", "take"):
        monkeypatch.setattr(training, name, getattr(saboteur, name))
    what = "gradient" if where == "gradient" else "loss"
    message = f"the {what} of step {bad_step} is .*stopped before the update"
    models = Frozen(saboteur.features, saboteur.logits)
    with pytest.raises(NonFinite, match=message):
        train(toy_data(), models, settings, tmp_path, KEPT)

    for name, x in saboteur.weights().items():
        assert torch.equal(x.nan_to_num(7e7), saboteur.before[name].nan_to_num(7e7))
    report = json.loads((tmp_path / f"nonfinite_step_{bad_step:07d}.json").read_text())
    assert all(name in toy_data().names for name in report["photos"])
    assert len(report["photos"]) == 4 and report["settings"]["train"]["batch"] == 4
    last = load_latest(tmp_path / "checkpoints")
    if last is not None:
        assert all(torch.isfinite(x).all() for x in last.tensors.values())


def test_training_brings_photos_closer_to_their_pseudo_gt(tmp_path):
    settings = with_train(steps=40, learning_rate=4e-3, validate_every=40, save_every=40)
    result = run(tmp_path, settings)
    data = toy_data()
    _, held_out = split_photos(7, settings.train)
    untrained = training.begin(6, settings, tmp_path / "none", {}, True, torch.device("cpu"))
    start = training.validate(untrained.network, data, held_out, settings)
    assert result.best_psnr > start + 3
    network, info, _ = load_corrector(tmp_path)
    assert training.validate(network, data, held_out, settings) == pytest.approx(result.best_psnr)
    assert info["priors"] == KEPT.info["priors"] and info["figures"]["best_step"] == 40
    assert set(info["loss_weights"]) >= {"data", "semantic", "prompt", "consistency"}


def test_the_corrector_holds_the_best_validation_and_the_extra_tensors(tmp_path):
    extra = {"text": torch.randn(3, 4)}
    settings = with_train(steps=6, validate_every=2)
    result = run(tmp_path, settings, KEPT._replace(tensors=extra))
    psnrs = {x["step"]: x["validation_psnr"] for x in log_lines(tmp_path) if "validation_psnr" in x}
    assert result.best_psnr == max(psnrs.values()) == psnrs[result.best_step]
    network, _, found = load_corrector(tmp_path)
    assert torch.equal(found["text"], extra["text"])
    best = load_checkpoint(tmp_path / "checkpoints" / f"step_{result.best_step:07d}")
    assert all(torch.equal(x, best.tensors[f"ema.{k}"]) for k, x in network.state_dict().items())


def test_shares_are_calibrated_once_and_logged(uninterrupted):
    weights = [line for line in log_lines(uninterrupted[0]) if "weights" in line]
    assert [line["step"] for line in weights] == [7]
    assert set(weights[0]["weights"]) == {
        "data",
        "colour",
        "semantic",
        "prompt",
        "identity",
        "consistency",
    }


def test_other_settings_other_priors_or_no_resume_are_refused(uninterrupted):
    out = uninterrupted[0]
    with pytest.raises(StoreError, match=r"begun with train = .*choose another output folder"):
        run(out, with_train(learning_rate=1e-4))
    with pytest.raises(StoreError, match="begun with priors"):
        run(out, kept=Kept({"priors": "others"}, {}))
    with pytest.raises(UsageError, match="holds a run at step 12"):
        run(out, resume=False)


def test_two_trainings_of_one_folder_are_refused(tmp_path):
    with Lock(tmp_path / ".lock", "run"), pytest.raises(StoreError, match="is in use by"):
        run(tmp_path)


def test_one_photo_is_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 2 photos"):
        train(toy_data(1), toy_models(), TOY, tmp_path, KEPT)


@pytest.mark.parametrize("paired", [True, False])
def test_batch_order_is_a_function_of_seed_and_step_and_visits_every_photo(paired):
    settings = TrainSettings(batch=4, crop=32, size=64)
    photos, extents = [0, 2, 3, 5, 7, 8], [(64, 40)] * 9
    draws = [draw(step, photos, extents, settings, paired) for step in range(12)]
    assert draws == [draw(step, photos, extents, settings, paired) for step in range(12)]
    assert draws != [draw(s, photos, extents, replace(settings, seed=1), paired) for s in range(12)]
    scenes = [i for d in draws for i in (d.photos[:2] if paired else d.photos)]
    for epoch in range(len(scenes) // 6):
        assert sorted(scenes[6 * epoch : 6 * epoch + 6]) == photos
    for d in draws:
        assert all(top in range(0, 33, 8) and left in (0, 8) for top, left in d.corners)
        assert d.strengths[:2] == [0, 0] and all(abs(t) <= 0.8 for t in d.strengths)
        top, left, height, width = d.view
        assert min(top, left) >= 0 and max(top + height, left + width) <= 32
        assert height >= 0.6 * 32 - 1
        if paired:
            assert d.photos[:2] == d.photos[2:] and d.corners[:2] == d.corners[2:]


def test_held_out_photos_are_never_trained_on():
    photos, held_out = split_photos(100, TrainSettings(held_out=0.03))
    assert len(held_out) == 3 and sorted(photos + held_out) == list(range(100))


def test_crops_of_every_array_show_the_same_place():
    """All arrays hold their own coordinates, so a crop must agree with itself after any flip."""
    side, crop = 64, 32
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    place = torch.stack([rows, columns, rows + columns])[None].repeat(2, 1, 1, 1).byte()
    data = TrainingData(
        photo=place,
        extent=torch.tensor([[64, 64], [48, 24]]),
        proto=place[:, :1, ::4, ::4].expand(-1, 32, -1, -1).half(),
        p3=place[:, 1:2, ::8, ::8].half(),
        regions=place[:, 1],
        pseudo_gt=place,
        confidence=torch.ones(2, 16, 16).half(),
        well_exposed=torch.tensor([True, True]),
        names=["a", "b"],
    )
    settings = TrainSettings(batch=4, crop=crop, size=side)
    extents = data.extent.tolist()
    flipped = 0
    for step in range(20):
        chosen = draw(step, [0, 1], extents, settings, paired=True)
        batch = take(data, small_copies(data), extents, chosen, crop)
        target = (batch.target * 255).round()
        assert torch.equal(batch.labels.float(), target[:, 1])
        assert torch.equal((batch.photo[:2] * 255).round(), target[:2])  # not re-exposed
        assert not torch.equal(batch.photo[2:], batch.target[2:])
        assert batch.well_exposed.tolist() == [True, True, False, False]
        for row, (i, (top, left), flip) in enumerate(
            zip(chosen.photos, chosen.corners, chosen.flips, strict=True)
        ):
            straight = batch.target[row].flip(-1) if flip else batch.target[row]
            assert (straight[0, 0, 0] * 255).round() == top
            assert (straight[1, 0, 0] * 255).round() == left
            proto = batch.proto[row].flip(-1) if flip else batch.proto[row]
            p3 = batch.p3[row].flip(-1) if flip else batch.p3[row]
            assert float(proto[0, 0, 0]) == top and float(p3[0, 0, 0]) == left
            inside = (target[row, 0] < extents[i][0]) & (target[row, 1] < extents[i][1])
            assert torch.equal(batch.confidence[row, 0], inside.float())
            flipped += flip
    assert flipped > 5
