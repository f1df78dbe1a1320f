"""What every test needs: the scripts on the path, MuJoCo's warnings in Python instead of in a file."""

import os
import sys
import warnings
from pathlib import Path

# One thread here and in every process that a test starts, from before PyTorch is loaded: sums are then in one
# order, and runs can be compared bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

import mujoco
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # classic control draws its videos without a screen


@pytest.fixture(autouse=True, scope="session")
def quiet_mujoco():
    mujoco.set_mju_user_warning(warnings.warn)


@pytest.fixture(autouse=True)
def one_thread():
    """Again for every test, whatever the one before has set."""
    torch.set_num_threads(1)
