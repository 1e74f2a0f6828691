"""The mean of the weights of correctors, as the one that ships, with the judge that ships.

    python -m recipes.base.mean OUT RUN RUN ...

They must have begun with one corrector (`train.start`), else their weights do not meet; the first
may be that one.  Settings and losses are those of the last.  Why: on brackets it is about as good
as the best of them for dark and for bright photos alike, which none of them is, and it costs no
more than one (Wortsman et al. 2022, "Model soups").
"""

import argparse
from pathlib import Path

import torch

from evenlight.cache.files import make_folder
from evenlight.pipeline import config
from evenlight.pipeline.models import load_models, priors_of
from evenlight.stages.corrector.checkpoint import load_corrector, save_corrector
from evenlight.stages.priors.judge import Judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    arguments = parser.parse_args()
    found = [load_corrector(run) for run in arguments.runs]
    network, info, _ = found[-1]
    weights = [one.state_dict() for one, _, _ in found]
    mean = {
        name: torch.stack([one[name].double() for one in weights]).mean(0) for name in weights[0]
    }
    network.load_state_dict({name: mean[name].to(x.dtype) for name, x in weights[0].items()})
    models = load_models(config.resolve(None, config.known(info["settings"])))
    judge = Judge.shipped(models.clip)
    about = {"priors": priors_of(models, judge.fingerprint), "figures": {"mean_of": len(found)}}
    tensors = {f"judge.{name}": tensor for name, tensor in judge.tensors.items()}
    make_folder(arguments.out)
    save_corrector(arguments.out, network, info | about, tensors)


if __name__ == "__main__":
    main()
