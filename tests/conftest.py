"""What every test needs: the scripts on the path, MuJoCo's warnings in Python instead of in a file."""

import os
import sys
import warnings
from pathlib import Path

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
    """As in the scripts; also keeps sums in one order, so that runs can be compared bit for bit."""
    torch.set_num_threads(1)
