"""Measure a CLIP as judge of exposure, on photos that training never saw.

python benchmarks/measure_clip_lite0.py [--weights FILE] [--good FOLDER] [--brackets FOLDER] \
    [--triplets FOLDER]

--good: well-exposed photos, re-exposed here by the camera model. --brackets: the folder of real
brackets given to training (its held-out scenes are used). --triplets: scenes with under, ref and
over. Prints one JSON object.
"""

import argparse
import json
import time
from pathlib import Path

import clip_lite0_data as data
import cv2
import numpy as np
import torch

from evenlight.stages.priors.clip import Clip, load_clip
from evenlight.stages.priors.prompts import Scorer, spearman, zero_shot
from evenlight.stages.settings import ClipSettings, LadderSettings

RULE_LUMA = 119 / 255
EVS = (-2.0, -1.5, -1.0, 0.0, 1.0, 1.5, 2.0)
UNSEEN = [  # under, normal, over in wordings that no training caption has
    ("a snapshot lacking light", "a snapshot with the light just right", "a glaring snapshot"),
    ("my camera made this too dark", "my camera got this right", "my camera made this too bright"),
    ("an underexposed shot", "a well-exposed shot", "an overexposed shot"),
    ("they underexposed it", "they exposed it well", "they overexposed it"),
    ("a murky, dark image", "a clean, balanced image", "a blinding, bright image"),
    ("the frame came out dark", "the frame came out balanced", "the frame came out bright"),
    ("shot much too dark", "shot with correct exposure", "shot much too bright"),
    ("dark underexposed jpeg", "well exposed jpeg", "bright overexposed jpeg"),
    ("it was dim in this photo", "it was evenly lit here", "it was washed out in this photo"),
    ("bad photo: underexposed", "good photo: well exposed", "bad photo: overexposed"),
]


def embeddings(clip: Clip, images: list[np.ndarray]) -> torch.Tensor:
    """images: H,W,3 float32 RGB in [0, 1], one size."""
    parts = [np.stack(images[i : i + 64]).transpose(0, 3, 1, 2) for i in range(0, len(images), 64)]
    return torch.cat([clip.embed(torch.from_numpy(np.ascontiguousarray(p))) for p in parts])


def re_exposed(clip: Clip, folder: Path) -> dict[str, float]:
    """3-way accuracy at |EV| >= 1, Spearman of d with EV, calibration, unseen wordings."""
    rng = np.random.default_rng(7)
    images, evs = [], []
    for path in data.image_files(folder):
        photo = data.read(path)
        for ev in EVS:
            images.append((data.camera(photo, ev, rng) if ev else photo).astype(np.float32) / 255)
            evs.append(ev)
    ev = np.array(evs)
    start = time.process_time()
    embedded = embeddings(clip, images)
    seconds = time.process_time() - start
    scorer = zero_shot(clip)
    logits = scorer.logits(embedded).numpy()
    figures = judged(logits, ev) | {"images_per_cpu_s": len(images) / seconds}
    probability = torch.from_numpy(logits).softmax(1).numpy()
    sure, right = probability.max(1), probability.argmax(1) - 1 == np.sign(ev)
    bins = np.minimum((sure * 10).astype(int), 9)
    figures["calibration_error"] = float(
        sum(abs(sure[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean()
            for b in set(bins.tolist()))
    )  # fmt: skip
    unseen = [Scorer(clip.embed_text(list(w)), 1 / clip.logit_scale) for w in UNSEEN]
    rows = [judged(s.logits(embedded).numpy(), ev) for s in unseen]
    for name in ("accuracy", "spearman"):
        figures[f"unseen_{name}"] = float(np.mean([r[name] for r in rows]))
        figures[f"unseen_{name}_worst"] = float(min(r[name] for r in rows))
    luma = np.array([data.mean_luma(i * 255) for i in images])
    figures["luma_spearman"] = spearman(luma, ev)
    figures["luma_accuracy"] = best_thresholds(luma, ev)
    return figures


def judged(logits_N3: np.ndarray, ev_N: np.ndarray) -> dict[str, float]:
    far = np.abs(ev_N) >= 1
    right = logits_N3.argmax(1) - 1 == np.sign(ev_N)
    d = logits_N3[:, 2] - logits_N3[:, 0]
    return {
        "accuracy": float(right[far].mean()),
        "accuracy_normal": float(right[ev_N == 0].mean()),
        "sign_accuracy": float((np.sign(d) == np.sign(ev_N))[far].mean()),
        "spearman": spearman(d, ev_N),
    }


def best_thresholds(luma: np.ndarray, ev: np.ndarray) -> float:
    """Accuracy of the sign at |EV| >= 1 by one threshold on mean luma, chosen in hindsight."""
    far = np.abs(ev) >= 1
    return max(
        float((np.sign(luma[far] - threshold) == np.sign(ev[far])).mean())
        for threshold in np.linspace(0.2, 0.8, 61)
    )


def crossing(scorer: Scorer, clip: Clip, photo: np.ndarray, offsets: np.ndarray) -> tuple:
    """(strength of the mean-luma rule, strength where d crosses 0 on the ladder around it)."""
    small = cv2.resize(photo, (224, 224), interpolation=cv2.INTER_AREA)
    rule = data.matching_strength(small, RULE_LUMA)
    strengths = rule + offsets
    images = list(data.film_tables(strengths)[:, small])
    d = scorer.exposure(embeddings(clip, images)).numpy()
    # d rises with the strength; a running mean of both directions makes it monotone
    rising = (np.maximum.accumulate(d) + np.minimum.accumulate(d[::-1])[::-1]) / 2
    return rule, float(np.interp(0, rising, strengths))


def psnr_table(scorer: Scorer, clip: Clip, pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """Mean PSNR of the film curve at each chooser's strength.  pairs: (input, reference) uint8."""
    offsets = np.array(LadderSettings().offsets)
    rows: dict[str, list[float]] = {}
    bias = []
    for photo, reference in pairs:
        rule, judged_t = crossing(scorer, clip, photo, offsets)
        best = data.closest_strength(photo, reference)
        bias.append((rule - best, judged_t - best))
        choices = {"input": 0.0, "rule": rule, "crossing": judged_t,
                   "average": (rule + judged_t) / 2, "best": best}  # fmt: skip
        for name, t in choices.items():
            mended = data.film(photo, t)
            error = np.mean((mended - reference.astype(np.float32) / 255) ** 2)
            rows.setdefault(name, []).append(-10 * np.log10(max(error, 1e-8)))
    table = {name: round(float(np.mean(values)), 2) for name, values in rows.items()}
    rule_error, judged_error = np.array(bias).T
    return table | {
        "photos": len(pairs),
        "rule_t_error": round(float(np.abs(rule_error).mean()), 3),
        "crossing_t_error": round(float(np.abs(judged_error).mean()), 3),
        "crossing_t_bias": round(float(judged_error.mean()), 3),
        "error_correlation": round(float(np.corrcoef(rule_error, judged_error)[0, 1]), 2),
    }


def brackets(clip: Clip, folder: Path) -> dict[str, object]:
    """Order inside held-out real brackets, and PSNR to their best frame."""
    scorer = zero_shot(clip)
    orders, pairs = [], []
    for bracket in data.load_pool([folder]).held_brackets:
        d = scorer.exposure(embeddings(clip, [f.astype(np.float32) / 255 for f in bracket.frames]))
        orders.append(spearman(d.numpy(), np.arange(len(bracket.frames))))
        best = bracket.frames[bracket.best]
        near = [i for i, t in enumerate(bracket.to_best) if 0.3 < abs(t) < 1.8]
        pairs += [(bracket.frames[i], best) for i in near]
    return {"order": float(np.mean(orders))} | psnr_table(scorer, clip, pairs)


def triplets(clip: Clip, folder: Path) -> dict[str, dict]:
    scenes = sorted(p for p in folder.iterdir() if p.is_dir())
    tables = {}
    for names in (("under",), ("over",), ("under", "over")):
        pairs = []
        for scene in scenes:
            files = {p.stem: p for p in data.image_files(scene)}
            pairs += [(data.read(files[n], 512), data.read(files["ref"], 512)) for n in names]
        tables["+".join(names)] = psnr_table(zero_shot(clip), clip, pairs)
    return tables


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", default="")
    parser.add_argument("--good", type=Path)
    parser.add_argument("--brackets", type=Path)
    parser.add_argument("--triplets", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    clip = load_clip(ClipSettings(weights=args.weights))
    parts = {"good": re_exposed, "brackets": brackets, "triplets": triplets}
    report = {"fingerprint": clip.fingerprint}
    for name, measure in parts.items():
        if getattr(args, name):
            report[name] = measure(clip, getattr(args, name))
    print(json.dumps(report, indent=1, default=float))


if __name__ == "__main__":
    main()
