"""Measure clip-lite0 as judge of exposure, on photos that its training never saw.

python -m benchmarks.measure_clip_lite0 --photos FOLDER [--photos FOLDER ...] \
    --tower efficientnet-lite0.pth --good FOLDER --triplets FOLDER [--weights FILE]

--photos and --tower as given to recipes.clip_lite0.train: the baselines are fitted on the same
training photos, and the scenes that it held out are measured on. --good: well-exposed photos,
re-exposed here by the camera model. --triplets: scenes with under, ref and over. Prints markdown
tables.
"""

import argparse
import time
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks import clip_lite0_judges as judges
from evenlight.stages.priors.clip import Clip, load_clip
from evenlight.stages.priors.prompts import Scorer, spearman, zero_shot
from evenlight.stages.settings import ClipSettings, LadderSettings
from recipes.clip_lite0 import photos

RULE_LUMA = 119 / 255
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
Pair = tuple[np.ndarray, np.ndarray]  # input and reference, H,W,3 uint8


def judged(logits_N3: np.ndarray, ev_N: np.ndarray) -> dict[str, float]:
    far, truth = np.abs(ev_N) >= 1, np.sign(ev_N)
    right = logits_N3.argmax(1) - 1 == truth
    d = logits_N3[:, 2] - logits_N3[:, 0]
    return {
        "three-way accuracy at 1 EV or more": float(right[far].mean()),
        "called normal at 0 EV": float(right[~far].mean()),
        "mean recall of the three classes": float(
            np.mean([right[truth == sign].mean() for sign in (-1, 0, 1)])
        ),
        "sign of d right at 1 EV or more": float((np.sign(d) == truth)[far].mean()),
        "Spearman of d with EV": spearman(d, ev_N),
        "calibration error": calibration_error(logits_N3, right),
    }


def calibration_error(logits_N3: np.ndarray, right_N: np.ndarray) -> float:
    """Mean gap between sureness and share of right answers over ten bins of sureness."""
    sure = torch.from_numpy(logits_N3).softmax(1).numpy().max(1)
    bins = np.minimum((sure * 10).astype(int), 9)
    gaps = [abs(sure[bins == b].mean() - right_N[bins == b].mean()) * (bins == b).sum()
            for b in set(bins.tolist())]  # fmt: skip
    return float(sum(gaps) / len(sure))


def best_threshold(luma: np.ndarray, ev: np.ndarray) -> float:
    """Accuracy at |EV| >= 1 by one threshold on mean luma that never says normal, in hindsight."""
    far = np.abs(ev) >= 1
    return max(
        float((np.sign(luma[far] - threshold) == np.sign(ev[far])).mean())
        for threshold in np.linspace(0.2, 0.8, 121)
    )


def in_order(judge: judges.Judge, scenes: list[list[np.ndarray]]) -> float:
    """Mean over scenes of the Spearman of d with the true order of the frames."""
    rows = []
    for frames in scenes:
        logits = judge([f.astype(np.float32) / 255 for f in frames])
        rows.append(spearman(logits[:, 2] - logits[:, 0], np.arange(len(frames))))
    return float(np.mean(rows))


def unseen(clip: Clip, embedded: torch.Tensor, ev: np.ndarray) -> dict[str, tuple[float, float]]:
    """Mean and worst over the ten wordings."""
    scorers = [Scorer(clip.embed_text(list(w)), 1 / clip.logit_scale) for w in UNSEEN]
    rows = [judged(s.logits(embedded).numpy(), ev) for s in scorers]
    names = ("three-way accuracy at 1 EV or more", "Spearman of d with EV")
    return {n: (float(np.mean([r[n] for r in rows])), min(r[n] for r in rows)) for n in names}


# --- the strength where d crosses 0 --------------------------------------------------------------


def crossing(judge: judges.Judge, photo: np.ndarray, offsets: np.ndarray) -> tuple[float, float]:
    """(strength of the mean-luma rule, strength where d crosses 0 on the ladder around it)."""
    small = cv2.resize(photo, (224, 224), interpolation=cv2.INTER_AREA)
    rule = photos.matching_strength(small, RULE_LUMA)
    strengths = rule + offsets
    logits = judge(list(photos.film_tables(strengths)[:, small]))
    d = logits[:, 2] - logits[:, 0]
    # d rises with the strength; a running mean of both directions makes it monotone
    rising = (np.maximum.accumulate(d) + np.minimum.accumulate(d[::-1])[::-1]) / 2
    return rule, float(np.interp(0, rising, strengths))


def psnr_row(judge: judges.Judge, pairs: list[Pair]) -> dict[str, float]:
    """Mean PSNR of the film curve at each chooser's strength, and errors of the strength."""
    offsets = np.array(LadderSettings().offsets)
    rows: dict[str, list[float]] = {}
    errors = []
    for photo, reference in pairs:
        rule, judged_t = crossing(judge, photo, offsets)
        best = photos.closest_strength(photo, reference)
        errors.append((rule - best, judged_t - best))
        choices = {"input": 0.0, "rule": rule, "d crosses 0": judged_t,
                   "mean of both": (rule + judged_t) / 2, "best": best}  # fmt: skip
        for name, t in choices.items():
            error = np.mean((photos.film(photo, t) - reference.astype(np.float32) / 255) ** 2)
            rows.setdefault(name, []).append(-10 * np.log10(max(error, 1e-8)))
    rule_error, judged_error = np.array(errors).T
    return {name: float(np.mean(values)) for name, values in rows.items()} | {
        "error of rule t": float(np.abs(rule_error).mean()),
        "error of d's t": float(np.abs(judged_error).mean()),
        "bias of d's t": float(judged_error.mean()),
        "correlation of errors": float(np.corrcoef(rule_error, judged_error)[0, 1]),
    }


def bracket_pairs(brackets: list[photos.Bracket]) -> list[Pair]:
    """Frames that the film curve can bring to the best of their bracket, with that."""
    return [
        (bracket.frames[i], bracket.frames[bracket.best])
        for bracket in brackets
        for i, t in enumerate(bracket.to_best)
        if 0.3 < abs(t) < 1.8
    ]


def triplet_files(folder: Path) -> list[dict[str, Path]]:
    scenes = sorted(p for p in folder.iterdir() if p.is_dir())
    return [{p.stem: p for p in photos.image_files(scene)} for scene in scenes]


# --- the tables ----------------------------------------------------------------------------------


def all_judges(clip: Clip, pool: photos.Pool, tower: Path) -> dict[str, judges.Judge]:
    good = [p.pixels for p in pool.chosen + pool.web]
    good += [b.frames[b.best] for b in pool.brackets]
    train = judges.re_exposed(good, 1, every=2)
    held = judges.re_exposed([p.pixels for p in pool.held_photos], 0)
    return {
        "clip-lite0": judges.clip_judge(clip, zero_shot(clip)),
        "mean luma": judges.fitted(judges.luma_features, train, held),
        "linear probe": judges.fitted(judges.Tower(tower), train, held),
    }


def print_table(rows: dict[str, dict[str, float]], first: str, digits: int = 3) -> None:
    """rows: one per judge, of the same figures; printed with judges as columns."""
    print(f"| {first} | " + " | ".join(rows) + " |\n" + "| --- " * (len(rows) + 1) + "|")
    for name in next(iter(rows.values())):
        print(f"| {name} | " + " | ".join(f"{r[name]:.{digits}f}" for r in rows.values()) + " |")
    print(flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=Path, action="append", required=True)
    parser.add_argument("--tower", type=Path, required=True)
    parser.add_argument("--good", type=Path, required=True)
    parser.add_argument("--triplets", type=Path, required=True)
    parser.add_argument("--weights", default="")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clip = load_clip(ClipSettings(weights=args.weights))
    pool = photos.load_pool(args.photos)
    named = all_judges(clip, pool, args.tower)
    images, ev = judges.re_exposed([photos.read(p) for p in photos.image_files(args.good)], 7)
    files = triplet_files(args.triplets)
    triplets = [[photos.read(f[n]) for n in ("under", "ref", "over")] for f in files]
    scenes = [b.frames for b in pool.held_brackets]
    rows = {}
    for name, judge in named.items():
        start = time.process_time()
        logits = judge(images)
        seconds = time.process_time() - start
        rows[name] = judged(logits, ev) | {
            "order inside held-out scenes, Spearman": in_order(judge, scenes),
            "order inside triplets, Spearman": in_order(judge, triplets),
            "photos per second of one core": len(images) / seconds,
        }
    print(f"{len(images)} re-exposed photos, {len(scenes)} scenes, {len(triplets)} triplets\n")
    print_table(rows, "figure")
    luma = best_threshold(judges.luma_features(images)[:, 0].numpy(), ev)
    print(f"mean luma, one threshold in hindsight, never normal: {luma:.3f} right at 1 EV or more")
    for name, (mean, worst) in unseen(clip, judges.embeddings(clip, images), ev).items():
        print(f"ten unseen wordings, {name}: mean {mean:.3f}, worst {worst:.3f}")
    sets = {"held-out scenes": bracket_pairs(pool.held_brackets)}
    for side in ("under", "over"):
        sets[f"triplets {side}"] = [
            (photos.read(f[side], 512), photos.read(f["ref"], 512)) for f in files
        ]
    sets["triplets"] = sets["triplets under"] + sets["triplets over"]
    for judge_name in ("clip-lite0", "linear probe"):
        print(f"\nFilm curve at the strength where d of {judge_name} crosses 0, PSNR in dB\n")
        named_sets = {f"{n} ({len(p)})": psnr_row(named[judge_name], p) for n, p in sets.items()}
        print_table(named_sets, "chooser", digits=2)


if __name__ == "__main__":
    main()
