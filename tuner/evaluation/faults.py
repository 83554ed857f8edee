"""What a kernel does that ends its evaluation, and nobody else's."""

from __future__ import annotations

from tilewright.tuner.evaluation.outcome import Evaluation
from tilewright.tuning_db.records import Outcome

CRASHES_TO_BLAME = 2
"""A first crash may be what an earlier kernel, or another process, did to the worker."""


class KernelFaultError(Exception):
    """A kernel, or the worker that ran it, failed.

    ``program`` is the call to blame: None when the worker died while it ran no kernel. ``error`` is that of a wrong
    result, relative to the reference.
    """

    def __init__(self, outcome: Outcome, reason: str, program: object | None, error: float | None = None) -> None:
        super().__init__(reason)
        self.outcome = outcome
        self.program = program
        self.error = error


def failed(kernel_key: str, fault: KernelFaultError, when: str) -> Evaluation:
    """Evaluation of a kernel that did not get through; ``when`` says where that was."""
    return Evaluation(kernel_key, fault.outcome, f"{fault} ({when})", fault.error)
