"""A Transformers model served by tuned kernels.

::

    from tilewright.runtime.transformers import disable, enable

    print(enable(model))     # its layers run on this machine's plans; the weights they replace are released
    model.generate(...)
    disable(model)           # as it was before

Needs Transformers 5 or newer (``pip install 'tilewright[transformers]'``); nothing else of tilewright does.
"""

from __future__ import annotations

from tilewright.runtime.process_memory import Memory
from tilewright.runtime.transformers.enabling import disable, enable
from tilewright.runtime.transformers.reports import Disabled, Enabled, LeftAlone, ServedLayer, ServedLinear

__all__ = ["Disabled", "Enabled", "LeftAlone", "Memory", "ServedLayer", "ServedLinear", "disable", "enable"]
