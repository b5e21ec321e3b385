"""What every test shares: one thread, fixed seeds, and the real model and text of ``assets``."""

import random
from pathlib import Path

import pytest
import torch

import assets

# One thread per worker: pytest-xdist already uses the cores, and sums come out in one order.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python and torch before each test; a test may ask for the number to seed its own generator."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Folder of a real chat model with 135 million parameters."""
    return assets.smollm2()


@pytest.fixture(scope="session")
def wikipedia_calibration() -> Path:
    """Articles to calibrate on."""
    return assets.wikipedia("calibration")


@pytest.fixture(scope="session")
def wikipedia_heldout() -> Path:
    """Articles to measure on; none of them is among those to calibrate on."""
    return assets.wikipedia("heldout")
