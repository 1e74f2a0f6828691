"""CLIP through open_clip: what it promises about loading and embedding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from skimage import data as photos
from torch.nn import functional as F

from evenlight.cache.errors import EnvironmentLacks, UsageError
from evenlight.stages import weights
from evenlight.stages.priors import open_clip_models, tone
from evenlight.stages.priors.clip import Clip, load_clip
from evenlight.stages.settings import ClipSettings

TINY = "evenlight-tiny-test"
TINY_CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def shipped() -> Clip:
    return load_clip(ClipSettings())


@pytest.fixture(scope="module")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a tiny open_clip model, registered by name as a stock one is."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / f"{TINY}.json").write_text(json.dumps(TINY_CONFIG))
    open_clip.add_model_config(folder)
    torch.manual_seed(0)
    model = open_clip.create_model(TINY)
    torch.save(model.state_dict(), folder / "tiny.pt")
    return folder / "tiny.pt"


def tiny_settings(path: Path, **changes: object) -> ClipSettings:
    given = {"model": TINY, "weights": str(path), "mean": HALF, "std": HALF} | changes
    return ClipSettings(**given)  # type: ignore[arg-type]


def ladder(photo: np.ndarray) -> torch.Tensor:
    """Nine exposures of a photo, the film curve from -1.6 to 1.6.  Returns 9,3,H,W."""
    x = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
    gains = torch.linspace(-1.6, 1.6, 9).exp().view(-1, 1, 1, 1)
    return (1 - (1 - x ** (1 / 1.6)) ** gains) ** 1.6


def test_embeddings_have_unit_norm_and_do_not_depend_on_the_batch(shipped: Clip) -> None:
    batch = torch.rand(70, 3, 96, 64)  # more than one chunk
    together = shipped.embed(batch)
    alone = torch.cat([shipped.embed(batch[i : i + 1]) for i in (0, 33, 69)])
    assert together.shape == (70, shipped.dim) and together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(70), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[[0, 33, 69]], alone, atol=1e-4, rtol=0)


def test_gradient_reaches_the_photo_and_not_the_model(shipped: Clip) -> None:
    photo = torch.rand(2, 3, 80, 120, requires_grad=True)
    shipped.embed(photo)[:, 0].sum().backward()
    assert photo.grad is not None and photo.grad.isfinite().all()
    assert (photo.grad != 0).any(dim=(1, 2, 3)).all()
    assert not any(p.requires_grad for p in shipped.image.parameters())


def test_same_embedding_with_and_without_gradient(shipped: Clip) -> None:
    photo = torch.rand(3, 3, 150, 90)
    with_gradient = shipped.embed(photo.clone().requires_grad_(True)).detach()
    torch.testing.assert_close(shipped.embed(photo), with_gradient, atol=1e-5, rtol=0)


def test_resizing_never_leaves_the_range_of_a_photo(tiny_weights: Path) -> None:
    clip = load_clip(tiny_settings(tiny_weights))
    edges = torch.zeros(1, 3, 12, 12)
    edges[..., ::4] = 1.0  # bicubic overshoots beside each line
    resized = F.interpolate(edges, (32, 32), mode="bicubic", antialias=True)
    assert resized.max() > 1.01 and resized.min() < -0.01
    torch.testing.assert_close(clip.embed(edges), clip.embed(resized.clamp(0, 1)))


def test_shipped_clip_orders_exposures_in_seen_and_unseen_wordings(shipped: Clip) -> None:
    wordings = [
        ("a photo with underexposed lighting", "a photo with overexposed lighting"),
        ("my camera made this one too dark", "my camera made this one too bright"),
        ("the photographer got an underexposed frame", "the photographer got an overexposed frame"),
    ]
    for photo in (photos.coffee(), photos.chelsea(), photos.rocket()):
        embeddings = shipped.embed(ladder(photo[::2, ::2]))
        for under, over in wordings:
            text = shipped.embed_text([under, over])
            d = embeddings @ (text[1] - text[0])
            within = d[:7]  # beyond two stops too bright it levels off (its card says so)
            assert (within.diff() > 0).sum() >= 5, (under, d)  # of 6
            assert d[0] < 0 < d[-1], (under, d)


def test_the_tower_of_its_own_agrees_with_that_of_open_clip(shipped: Clip) -> None:
    batch = torch.rand(3, 3, 160, 160)
    theirs = open_clip_models.shipped_words(weights.shipped("clip-lite0"), "cpu").model
    expected = F.normalize(theirs.encode_image((batch - 0.5) / 0.5), dim=-1)
    torch.testing.assert_close(shipped.embed(batch), expected, atol=1e-6, rtol=0)


def squares() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A photo as regions are embedded from it, after a rule, and cells of a left, a right, none."""
    photo = torch.from_numpy(photos.coffee()).permute(2, 0, 1)[None].float() / 255
    photo = F.interpolate(photo, (160, 160), mode="area")
    cells = torch.zeros(1, 3, 40, 40)
    cells[:, 0, :, :20] = cells[:, 1, :, 20:] = 1
    return tone.apply("film", photo, 0.3), photo, cells


def test_a_region_is_embedded_with_its_colours_and_one_without_cells_is_none(shipped: Clip) -> None:
    ruled, photo, cells = squares()
    embedded = shipped.embed_regions(ruled, photo, cells)
    assert embedded.shape == (1, 3, shipped.region_dim) and embedded.dtype == torch.float32
    colours = [x[..., :80].mean((2, 3)) for x in (ruled, photo)]
    torch.testing.assert_close(embedded[:, 0, -6:], torch.cat(colours, 1), atol=1e-5, rtol=0)
    assert embedded[0, 2].abs().max() < 0.01


def test_a_region_is_embedded_by_what_lies_around_it_too(shipped: Clip) -> None:
    _, photo, cells = squares()
    other = photo.clone()
    other[..., 100:] *= 0.3
    here, there = (
        shipped.embed_regions(tone.apply("film", x, 0.3), x, cells)[0, 0] for x in (photo, other)
    )
    assert (here - there).abs().max() > 0.05


@pytest.mark.parametrize("damage", ["cut", "not finite", "lacks a tensor", "of another shape"])
def test_damaged_weights_of_the_shipped_clip_are_refused(damage: str, tmp_path: Path) -> None:
    tensors = load_file(weights.shipped("clip-lite0"))
    name = "visual.trunk.blocks.1.0.conv_dw.weight"
    if damage == "not finite":
        tensors[name][3, 0, 1, 1] = float("nan")
    elif damage == "lacks a tensor":
        del tensors[name]
    elif damage == "of another shape":
        tensors[name] = tensors[name][:7].clone()
    bad = tmp_path / "bad.safetensors"
    save_file(tensors, bad)
    if damage == "cut":
        bad.write_bytes(bad.read_bytes()[:5000])
    with pytest.raises(EnvironmentLacks, match="cannot be used as weights of clip-lite0"):
        load_clip(ClipSettings(weights=str(bad)))


def test_context_of_token_vectors_equals_the_text(shipped: Clip) -> None:
    words = ["underexposed lighting", "good lighting", "too bright"]
    context = shipped.token_vectors("a photo with").expand(3, -1, -1)
    expected = shipped.embed_text([f"a photo with {word}" for word in words])
    torch.testing.assert_close(shipped.encode_context(context, words), expected, atol=1e-5, rtol=0)


def test_gradient_reaches_the_context(shipped: Clip) -> None:
    context = torch.randn(3, 16, shipped.token_vectors("a").shape[1]) * 0.02
    context.requires_grad_(True)
    shipped.encode_context(context, ["dark", "good", "bright"])[:, 0].sum().backward()
    assert context.grad is not None and (context.grad != 0).any(dim=(1, 2)).all()


def test_context_too_long_for_the_tower_is_refused_in_words(shipped: Clip) -> None:
    context = torch.zeros(1, 40, shipped.token_vectors("a").shape[1])
    with pytest.raises(UsageError, match=r"prompts\.context = 40 leaves no room"):
        shipped.encode_context(context, ["dark"])


def test_any_open_clip_model_loads_from_pt_and_from_safetensors(tiny_weights: Path) -> None:
    other = tiny_weights.with_suffix(".safetensors")
    save_file(torch.load(tiny_weights, weights_only=True), other)
    from_pt, from_safetensors = (load_clip(tiny_settings(p)) for p in (tiny_weights, other))
    photo = torch.rand(2, 3, 50, 70)
    assert torch.equal(from_pt.embed(photo), from_safetensors.embed(photo))
    assert from_pt.dim == 16 and from_pt.size == 32
    assert from_pt.embed_text(["a photo", "dark"]).shape == (2, 16)


def test_fingerprint_follows_weights_normalisation_and_size(tiny_weights: Path) -> None:
    other = tiny_weights.with_name("other.pt")
    state = torch.load(tiny_weights, weights_only=True)
    torch.save(state | {"logit_scale": torch.tensor(1.0)}, other)
    settings = [
        tiny_settings(tiny_weights),
        tiny_settings(other),
        tiny_settings(tiny_weights, mean=(0.4, 0.5, 0.5)),
        tiny_settings(tiny_weights, std=(0.4, 0.5, 0.5)),
        tiny_settings(tiny_weights, image_size=64),
    ]
    prints = [load_clip(s).fingerprint for s in settings]
    assert len(set(prints)) == len(prints)
    assert load_clip(settings[0]).fingerprint == prints[0]


def test_unknown_normalisation_is_refused_and_half_known_settings_too(tiny_weights: Path) -> None:
    with pytest.raises(UsageError, match=r"set clip\.mean and clip\.std"):
        load_clip(tiny_settings(tiny_weights, mean=(), std=()))
    with pytest.raises(UsageError, match=r"set clip\.mean and clip\.std"):
        load_clip(tiny_settings(tiny_weights, std=()))
    with pytest.raises(UsageError, match=r"clip\.mean must be three numbers"):
        load_clip(tiny_settings(tiny_weights, mean=(0.5,)))


def test_normalisation_on_which_all_known_weights_agree_is_used(
    tiny_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = {"one": (0.1, 0.2, 0.3), "two": (0.1, 0.2, 0.3)}
    monkeypatch.setattr(
        open_clip_models, "get_pretrained_cfg", lambda model, tag: {"mean": table[tag], "std": HALF}
    )
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: list(table))
    known = load_clip(tiny_settings(tiny_weights, mean=(), std=()))
    given = load_clip(tiny_settings(tiny_weights, mean=(0.1, 0.2, 0.3)))
    assert known.fingerprint == given.fingerprint
    table["two"] = HALF
    with pytest.raises(UsageError, match="2 conventions are known"):
        load_clip(tiny_settings(tiny_weights, mean=(), std=()))


def test_openai_models_are_normalised_as_openai_did(tmp_path: Path) -> None:
    """Up to the weights file: the normalisation is settled, then the missing file is named."""
    mean, std = open_clip_models._normalisation(ClipSettings(model="ViT-B-32"))
    assert mean == (0.48145466, 0.4578275, 0.40821073)
    assert std == (0.26862954, 0.26130258, 0.27577711)
    with pytest.raises(EnvironmentLacks, match=r"weights of ViT-B-32 are not at .*none\.pt"):
        load_clip(ClipSettings(model="ViT-B-32", weights=str(tmp_path / "none.pt")))


def test_missing_weights_and_unknown_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentLacks, match=r"clip\.weights names no file"):
        load_clip(ClipSettings(model="ViT-B-32"))
    with pytest.raises(EnvironmentLacks, match="are not at"):
        load_clip(ClipSettings(weights=str(tmp_path / "none.safetensors")))
    with pytest.raises(UsageError, match=r"did you mean .*ViT-B-32"):
        load_clip(ClipSettings(model="ViT-B32", weights="x"))


class Trap:
    """Unpickling it would make a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_damaged_foreign_or_malicious_weights_are_refused(
    tiny_weights: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.pt"
    cut.write_bytes(tiny_weights.read_bytes()[:5000])
    foreign = tmp_path / "foreign.safetensors"
    save_file({"something.else": torch.zeros(3)}, foreign)
    trap = tmp_path / "trap.pt"
    torch.save({"logit_scale": Trap(tmp_path / "sprung")}, trap)
    for path in (cut, foreign, trap):
        with pytest.raises(EnvironmentLacks, match="cannot be used as weights"):
            load_clip(tiny_settings(path))
    assert not (tmp_path / "sprung").exists()


def test_import_switches_the_hub_off() -> None:
    code = (
        "import evenlight.stages.priors.open_clip_models, huggingface_hub.constants as c;"
        "assert c.HF_HUB_OFFLINE and c.HF_HUB_DISABLE_TELEMETRY"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=env, timeout=60)


def test_shipped_weights_are_small_and_half_precision() -> None:
    path = weights.shipped("clip-lite0")
    assert path.stat().st_size < 23_000_000
    kinds = {t.dtype for t in load_file(path).values() if t.is_floating_point()}
    assert kinds == {torch.float16}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(
    value: float, tiny_weights: Path, tmp_path: Path
) -> None:
    weights = torch.load(tiny_weights, weights_only=True)
    weights["visual.proj"][3, 3] = value
    torch.save(weights, tmp_path / "bad.pt")
    with pytest.raises(EnvironmentLacks, match=r"1 tensors hold NaN or infinity, .*visual\.proj"):
        load_clip(tiny_settings(tmp_path / "bad.pt"))
