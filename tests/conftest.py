"""Every test starts from the same random state, so that a failure can be repeated."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
