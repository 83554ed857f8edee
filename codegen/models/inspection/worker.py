"""The child process: reads configs with the installed Transformers, and fetches nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from tilewright.codegen.workers.child import connect, serve
from tilewright.errors import TilewrightError

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
"""Environment of this process, from before Transformers is imported."""


def inspect(config: Mapping[str, Any]) -> dict[str, Any]:
    """``{"shape": fields of a ModelShape}``; ``{"unknown": why}`` without a class; ``{"error": why}`` otherwise."""
    try:
        import transformers

        if int(transformers.__version__.partition(".")[0]) < 5:
            return {"unknown": f"Transformers {transformers.__version__} is too old to be asked; install 5 or newer"}
        from tilewright.codegen.models.inspection.building import UnknownClassError, build
        from tilewright.codegen.models.inspection.reading import read_parts
        from tilewright.codegen.models.inspection.tracing import IMPLEMENTATION, trace
    except ImportError as error:
        return {"unknown": f"Transformers cannot be imported here ({error})"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.logging.set_verbosity_error()
        try:
            model, beside = build(config, IMPLEMENTATION)
            return {"shape": read_parts(trace(model), beside)}
        except UnknownClassError as error:
            return {"unknown": str(error)}
        except TilewrightError as error:
            return {"error": str(error)}


def main() -> None:
    """Serve the parent until it closes the connection."""
    channel, _ = connect()
    os.environ.update(OFFLINE)
    serve(channel, lambda request, _: inspect(request["config"]))


if __name__ == "__main__":
    main()
