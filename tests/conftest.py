import os
import tempfile
from pathlib import Path

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # threads waiting for each other cost more than they give on toy sizes
hypothesis.settings.register_profile("busy machine", deadline=None)
hypothesis.settings.load_profile("busy machine")


@pytest.fixture
def folder():
    """In memory where there is one: a trial writes a hundred files with fsync."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)
