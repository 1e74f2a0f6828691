"""The command line on toy models, for processes of their own."""

import torch
from toys import ToyClip, ToySegmenter

from evenlight import cli
from evenlight.pipeline import train
from evenlight.pipeline.models import Models

if __name__ == "__main__":
    torch.set_num_threads(1)
    train.load_models = lambda settings: Models(ToySegmenter(), ToyClip())
    cli.main()
