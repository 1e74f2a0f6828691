import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests import their helpers by name
torch.set_num_threads(1)  # threads waiting for each other cost more than they give on toy sizes


@pytest.fixture
def folder():
    """In memory where there is one: a trial writes a hundred files with fsync."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)
