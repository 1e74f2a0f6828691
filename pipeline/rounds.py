"""Rounds of pseudo-GT (method.md 4.4): a trained corrector proposes how a photo's regions differ.

The scorer judges the proposals on the cached ladder, so no image passes through CLIP or FastSAM.
The store keeps the proposer's fingerprint, not its weights: pseudo-GT of a round is fresh as long
as the record names that round, and only `evenlight regenerate -m` makes it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenlight.cache.errors import StoreError, UsageError
from evenlight.cache.files import read_json, sha256_file, sync_folder, write_json
from evenlight.cache.schema import fingerprint
from evenlight.cache.shards import OURS
from evenlight.cache.store import Store
from evenlight.pipeline.models import choose_device
from evenlight.pipeline.plan import recorded_plans
from evenlight.stages.corrector.checkpoint import load_corrector
from evenlight.stages.corrector.inputs import at_working_size
from evenlight.stages.corrector.network import Corrector, correct
from evenlight.stages.pixels import luma, resize, to_float
from evenlight.stages.priors import meter, tone
from evenlight.stages.settings import Settings

PROPOSER_READS = ("proto", "p3")  # besides what choosing pseudo-GT reads anyway
NUM_PIXELS = 4096  # of a region, about as many as its mean luma is taken from


@dataclass(frozen=True, kw_only=True)
class Round:
    """Which corrector took part in a store's pseudo-GT; both empty in round one."""

    proposer: str = ""  # sha256 of its corrector.safetensors
    run: str = ""  # the folder it lay in, for people


@dataclass(frozen=True, kw_only=True)
class Proposer:
    """A trained corrector with the tone head."""

    network: Corrector
    family: str  # its tone operator, and the ladder's
    size: int  # its working size, pixels
    round: Round

    @property
    def fingerprint(self) -> str:
        return self.round.proposer

    def moves(
        self, photo_HW3: np.ndarray, labels_HW: np.ndarray, cached: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """How much more strength each embedded region gets than the photo as a whole (R).

        The strengths are those that the corrector's output amounts to, since its residual says more
        about regions than its strength map (base: spread 0.06 over regions, the map alone 0.014).
        photo: uint8, true extent, sides multiples of 8.  labels: uint8 H,W.  cached: region_labels,
        and proto and p3 on their canvases.
        """
        height, width = labels_HW.shape
        proto, p3 = (
            torch.from_numpy(cached[name][:, : height // stride, : width // stride])[None].float()
            for name, stride in (("proto", 4), ("p3", 8))
        )
        inputs = at_working_size(photo_HW3, proto, p3, self.size)
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            correction = self.network(*(x.to(device) for x in inputs))
            output = correct(inputs[0].to(device), correction, self.family).clamp(0, 1).cpu()
        before = to_float(photo_HW3).flatten(2)
        after = luma(resize(output, height, width)).flatten()
        labels = torch.from_numpy(labels_HW).flatten()
        whole = self._amount(before, after)
        embedded = (labels == label for label in cached["region_labels"] if label)
        amounts = [self._amount(before[..., mask], after[mask]) for mask in embedded]
        # 0 is a region that no strength changes: nothing to propose
        return np.array([amount - whole if amount else 0.0 for amount in amounts])

    def _amount(self, before_13n: Tensor, after_n: Tensor) -> float:
        """Strength at which pixels get the mean luma that they have after the corrector."""
        step = max(1, len(after_n) // NUM_PIXELS)
        pixels, target = before_13n[..., None, ::step], float(after_n[::step].mean())
        return float(tone.rule_strength(pixels, self.family, target)[0])


def load_proposer(folder: Path, store: Store, settings: Settings) -> Proposer:
    """The corrector of a training run's folder, as a proposer for the store's photos.

    Raises UsageError where it has no strength map of the ladder's tone family, StoreError where it
    is damaged or learned from features of another segmenter than the store's.
    """
    network, info, _ = load_corrector(folder)
    if network.settings.head != "tone":
        raise UsageError(
            f"corrector {folder} has the {network.settings.head} head, only the tone head has "
            "strengths to propose: train with network.head=tone"
        )
    if network.settings.family != settings.ladder.family:
        raise UsageError(
            f"corrector {folder} speaks of strengths of the family {network.settings.family}, the "
            f"ladder of store {store.path} is of {settings.ladder.family}: train one on this store"
        )
    if not settings.pseudo_gt.regional:
        raise UsageError(
            "a corrector proposes how regions differ, and pseudo_gt.regional is false: set it to "
            "true, or regenerate without -m"
        )
    _refuse_other_features(folder, store, settings, info["priors"]["segmenter"])
    made = Round(proposer=sha256_file(folder / "corrector.safetensors"), run=str(folder.absolute()))
    network = network.to(choose_device(settings.run.device))
    return Proposer(
        network=network,
        family=settings.ladder.family,
        size=info["settings"]["train"]["size"],
        round=made,
    )


def chooser(prompts: str, proposer: str = "") -> str:
    """Fingerprint of what chooses pseudo-GT: the meter, the prompts, the proposer of the round."""
    return fingerprint(meter=meter.fingerprint(), prompts=prompts, proposer=proposer)


def recorded_round(store: Path) -> Round:
    """The round that a store's pseudo-GT is of, as `write_round` left it.  Raises StoreError."""
    file = _path(store)
    if not file.exists():
        return Round()
    try:
        return Round(**read_json(file))
    except StoreError as error:
        raise StoreError(f"{error}; 'evenlight regenerate -s {store}' writes it anew") from error


def write_round(store: Path, proposer: Proposer | None) -> None:
    """Record the proposer of the pseudo-GT that is about to be made; None is round one."""
    file = _path(store)
    if proposer is not None:
        write_json(file, asdict(proposer.round))
    elif file.exists():
        file.unlink()
        sync_folder(file.parent)


def _refuse_other_features(folder: Path, store: Store, settings: Settings, segmenter: str) -> None:
    for plan in recorded_plans(store, settings, {"regions": segmenter}):
        record = store.record(plan.unit)
        if record is None or not record.holds("regions", plan.fingerprints["regions"]):
            raise StoreError(
                f"regions of unit {plan.unit} of store {store.path} were not made with segmenter "
                f"{segmenter[:12]} and these settings, which corrector {folder} was trained with: "
                "run 'evenlight precompute' with that segmenter, or train on this store"
            )


def _path(store: Path) -> Path:
    return store / OURS / "round.json"
