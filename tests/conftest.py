"""What every test leaves as it found it."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _own_threads() -> Iterator[None]:
    """Benchmarks set PyTorch's threads, on which the last bit of a convolution depends."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
