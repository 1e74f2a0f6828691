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
from evenlight.stages.corrector.batches import Batch
from evenlight.stages.corrector.cached import TrainingData
from evenlight.stages.corrector.checkpoint import load_checkpoint, load_corrector, load_latest
from evenlight.stages.corrector.losses import Frozen
from evenlight.stages.corrector.run import Run
from evenlight.stages.corrector.streams import Draw, plan_streams, validation_draws
from evenlight.stages.corrector.training import Kept, NonFinite, train
from evenlight.stages.priors import tone
from evenlight.stages.settings import LossSettings, NetworkSettings, Settings, TrainSettings

STEPS = 12
TOY = Settings(
    network=NetworkSettings(size="tiny"),
    losses=LossSettings(semantic=0.15, prompt=0.15),
    train=TrainSettings(
        steps=STEPS,
        good=2,
        scenes=1,
        bad=1,
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


def toy_data(num_photos: int = 12, side: int = 32) -> TrainingData:
    """Smooth pictures, badly exposed by a known strength; every third well exposed; two not square.

    The last three are frames of one scene, and the three before of another.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(num_photos, 3, 4, 4, generator=generator)
    good = F.interpolate(coarse, size=side, mode="bicubic").clamp(0, 1)
    strengths = torch.rand(num_photos, generator=generator) * 3 - 1.5
    strengths[::3] = 0
    extent = torch.full((num_photos, 2), side)
    names = [f"photo{i}.jpg" for i in range(num_photos)]
    for first in (num_photos - 6, num_photos - 3) if num_photos >= 8 else ():
        good[first + 1 : first + 3] = good[first]
        strengths[first : first + 3] = torch.tensor([0.0, -0.7, 0.7])
        names[first : first + 3] = [f"scene{first}/{i}.jpg" for i in range(3)]
    extent[0, 0] = extent[1:2, 1] = side - 8
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
        names=names,
        **noise,
    )


def toy_models() -> Frozen:
    generator = torch.Generator().manual_seed(1)
    w4, w8 = (torch.randn(4, 3, k, k, generator=generator) for k in (4, 8))

    def logits(rgb: Tensor) -> Tensor:
        mean = rgb.mean((1, 2, 3))
        return 10 * torch.stack([0.5 - mean, 0.1 - (mean - 0.5).abs(), mean - 0.5], dim=1)

    return Frozen(lambda x: (F.conv2d(x, w4, stride=4), F.conv2d(x, w8, stride=8)), logits)


def run(
    out: Path,
    settings: Settings = TOY,
    kept: Kept = KEPT,
    *,
    data: TrainingData | None = None,
    models: Frozen | None = None,
    **options,
) -> training.TrainResult:
    out.mkdir(exist_ok=True)
    with Lock(out / ".lock", f"run {out}") as lock:
        return train(data or toy_data(), models or toy_models(), settings, lock, kept, **options)


def with_train(**changes) -> Settings:
    return replace(TOY, train=replace(TOY.train, **changes))


def log_lines(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "waited")} for line in lines]


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


# epochs of the streams are a few steps each; calibration runs from 2 to 7
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


def test_more_steps_train_on_at_the_rate_of_the_longer_run(uninterrupted, tmp_path, caplog):
    """The steps that were done stay as they were; stopped on the way, the run still ends the same.

    The toy run validates every 5 steps and at its end.
    """
    longer, ends = with_train(steps=18), []
    for name in ("through", "stopped"):
        out = tmp_path / name
        shutil.copytree(uninterrupted[0], out)
        with caplog.at_level("INFO", logger="evenlight"):
            if name == "stopped":
                with pytest.raises(KeyboardInterrupt):
                    run(out, longer, on_progress=halt_at(15))
            result = run(out, longer)
        assert result.steps == 18
        ends.append((out / "corrector.safetensors").read_bytes())
        ends.append(log_lines(out))
    assert ends[:2] == ends[2:]
    assert "train.steps 12 -> 18: the learning rate is that of the longer run" in caplog.text
    lines = log_lines(uninterrupted[0])
    assert ends[1][: len(lines)] == lines
    rates = {line["step"]: line["rate"] for line in ends[1] if "rate" in line}
    # step 13 is step 12 counted from 0: the cosine of 18 steps at two thirds
    assert rates[13] == pytest.approx(5e-4 * (0.005 + 0.995 * 0.25))
    assert max(rates[12], rates[18]) < rates[13] / 10


def halt_at(last: int):
    def on_progress(step: int, steps: int, record: dict) -> None:
        if step == last:
            raise KeyboardInterrupt

    return on_progress


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
        run(tmp_path, settings, models=models)

    for name, x in saboteur.weights().items():
        assert torch.equal(x.nan_to_num(7e7), saboteur.before[name].nan_to_num(7e7))
    report = json.loads((tmp_path / f"nonfinite_step_{bad_step:07d}.json").read_text())
    assert all(name in toy_data().names for name in report["photos"])
    assert len(report["photos"]) == 4 and report["settings"]["train"]["good"] == 2
    last = load_latest(tmp_path / "checkpoints")
    if last is not None:
        assert all(torch.isfinite(x).all() for x in last.tensors.values())


def test_training_learns_what_the_curve_does_not_do(tmp_path):
    settings = with_train(
        steps=40, learning_rate=4e-3, validate_every=40, save_every=40, good=0, scenes=0, bad=4
    )
    data = toy_data()
    tinted = data.pseudo_gt.float() * torch.tensor([1.0, 0.8, 0.9]).view(3, 1, 1)
    data = replace(data, pseudo_gt=tinted.byte())
    result = run(tmp_path, settings, data=data)
    checks = validation_draws(plan_streams(data.about, settings.train)[1], settings.train)
    elsewhere = Lock(tmp_path / "none" / ".lock", "none")
    untrained = training.begin(6, settings, elsewhere, {}, True, torch.device("cpu"))
    start = training.validate(untrained.network, data, checks, settings)
    assert result.best_psnr > start + 3
    network, info, _ = load_corrector(tmp_path)
    assert training.validate(network, data, checks, settings) == pytest.approx(result.best_psnr)
    assert info["priors"] == KEPT.info["priors"] and info["figures"]["best_step"] == 40
    assert set(info["loss_weights"]) >= {"data", "edges", "semantic", "prompt"}


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
        "edges",
        "colour",
        "clipped",
        "semantic",
        "prompt",
    }


def test_other_settings_other_priors_or_no_resume_are_refused(uninterrupted):
    out = uninterrupted[0]
    refused = r"at step 12, was begun otherwise \({}\): restore .*another output folder$"
    for changes, told in (
        ({"learning_rate": 1e-4}, "train.learning_rate 0.0005 -> 0.0001"),
        ({"crop": 64, "bad": 2}, "train.bad 1 -> 2, train.crop 32 -> 64"),
        ({"steps": 11}, "train.steps 12 -> 11"),
        ({"steps": 20, "bad": 2}, "train.steps 12 -> 20, train.bad 1 -> 2"),
    ):
        with pytest.raises(StoreError, match=refused.format(told)):
            run(out, with_train(**changes))
    others = Kept({"priors": {"segmenter": "toy", "clip": "other"}}, {})
    with pytest.raises(StoreError, match=refused.format("priors.clip toy -> other")):
        run(out, kept=others)
    with pytest.raises(UsageError, match="holds a run at step 12"):
        run(out, resume=False)


def test_what_is_refused_leaves_the_settings_of_the_run_as_they_were(uninterrupted, tmp_path):
    out = tmp_path / "kept"
    shutil.copytree(uninterrupted[0], out)
    (out / "settings.toml").write_text("as it was")
    with pytest.raises(StoreError, match="was begun otherwise"):
        run(out, with_train(learning_rate=1e-4), KEPT._replace(toml="other"))
    assert (out / "settings.toml").read_text() == "as it was"
    run(out, kept=KEPT._replace(toml="[train]"))
    assert (out / "settings.toml").read_text() == "[train]"


def test_tensorboard_shows_the_log_of_a_resumed_run_where_it_is_installed(
    uninterrupted, tmp_path, monkeypatch
):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "resumed"
    shutil.copytree(uninterrupted[1][6], out)
    run(out)
    shown = EventAccumulator(str(out))
    shown.Reload()
    lines = log_lines(uninterrupted[0])
    for tag, figure in (
        ("loss", lambda line: line["loss"]),
        ("parts.data", lambda line: line["parts"]["data"]),
        ("validation_psnr", lambda line: line["validation_psnr"]),
    ):
        wanted = [(x["step"], figure(x)) for x in lines if tag.split(".")[0] in x]
        found = [(event.step, event.value) for event in shown.Scalars(tag)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in wanted]

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    run(tmp_path / "without", with_train(steps=1))
    assert list((tmp_path / "without").glob("events*")) == []


@pytest.mark.parametrize("again", [False, True], ids=["gone", "taken by another run"])
@pytest.mark.parametrize("log_every", [1, 100], ids=["seen by the log", "seen by a checkpoint"])
def test_a_run_whose_folder_vanishes_ends_and_writes_into_no_other(tmp_path, again, log_every):
    out, data = tmp_path / "run", toy_data()
    place = training.take

    def vanish(*args):
        if out.exists() and not (tmp_path / "moved").exists():
            out.rename(tmp_path / "moved")
            if again:
                out.mkdir()
                Lock(out / ".lock", "the other run").__enter__()
        return place(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "take", vanish)
        with pytest.raises(StoreError, match=f"run {out} was removed or taken over"):
            run(out, with_train(log_every=log_every), data=data)
    found = [p.name for p in out.iterdir()] if out.exists() else []
    assert found == ([".lock"] if again else [])


@pytest.mark.parametrize(
    "damage",
    [b"\0" * 40, b"{", b"[]", b"3", b'{"step": null}', b'{"step": "x"}', b"[" * 100_000, b"\xff"],
)
def test_damaged_lines_of_the_log_are_dropped_with_a_word(uninterrupted, tmp_path, damage, caplog):
    out = tmp_path / "damaged"
    shutil.copytree(uninterrupted[1][6], out)
    log = out / "log.jsonl"
    lines = log.read_bytes().splitlines(True)
    log.write_bytes(b"".join([lines[0], damage + b"\n", *lines[1:], damage]))
    run(out)
    assert "log.jsonl: damaged lines are dropped (1)" in caplog.text
    assert log_lines(out) == log_lines(uninterrupted[0])


def test_one_photo_is_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 2 photos"):
        run(tmp_path, data=toy_data(1))


def test_training_can_begin_with_the_weights_of_another_corrector(tmp_path):
    run(tmp_path / "first", with_train(steps=3))
    first = load_corrector(tmp_path / "first")[0].state_dict()
    onward = with_train(steps=1, start=str(tmp_path / "first"), learning_rate=1e-9)
    run(tmp_path / "second", onward)
    second = load_corrector(tmp_path / "second")[0].state_dict()
    assert all(torch.allclose(second[name], first[name], atol=1e-6) for name in first)
    afresh = with_train(steps=1, learning_rate=1e-9)
    run(tmp_path / "third", afresh)
    third = load_corrector(tmp_path / "third")[0].state_dict()
    assert any(not torch.allclose(third[name], first[name], atol=1e-4) for name in first)
    other = replace(onward, network=replace(TOY.network, attention="channel"))
    with pytest.raises(UsageError, match="is another network"):
        run(tmp_path / "fourth", other)
    with pytest.raises(StoreError, match="nowhere"):
        run(tmp_path / "fifth", with_train(start="nowhere"))
