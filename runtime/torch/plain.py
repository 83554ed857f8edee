"""How plain torch runs here: what serves where no tuned kernel does must complete in a forked child, too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tilewright.runtime.launchers.openmp import forked


def spare_torch_threads() -> None:
    """In a forked child, keep torch on the calling thread: its pool did not survive the fork."""
    if forked() and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


@contextmanager
def plain_torch() -> Iterator[None]:
    """Torch that completes in a forked child, records nothing for autograd, and writes to outputs of either mode."""
    spare_torch_threads()
    with torch.inference_mode():
        yield
