"""Names of torch's dtypes, as signatures have them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tilewright.runtime.calls.binding import TORCH_DTYPES

DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}
