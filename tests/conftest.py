import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))  # tests import their helpers by name
torch.set_num_threads(1)  # threads waiting for each other cost more than they give on toy sizes
