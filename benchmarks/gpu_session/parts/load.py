"""Loads every kernel that was prepared, and compares what the driver says of its entries with what was stored."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilewright.codegen.recipe.model import Recipe
from tilewright.errors import TilewrightError
from tilewright.runtime.launchers.cuda.driver import find_driver
from tilewright.runtime.launchers.cuda.launcher import CudaLauncher, load_kernels
from tilewright.tuning_db.store import Store

_LOCAL_BYTES, _REGISTERS, _STATIC_SMEM_BYTES = 3, 4, 1
"""``CUfunction_attribute``."""


def run(prepared: Path, tell: Callable[[dict[str, Any]], None], _repeats: int) -> None:
    """Every kernel of every prepared database, once."""
    driver = find_driver()
    device = driver.device(0)
    driver.load({"cuFuncGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_void_p)})
    kernels: list[dict[str, Any]] = []
    result: dict[str, Any] = {"device": device.name, "driver": driver.version_text, "kernels": kernels}
    for path in [prepared / "models.db", *sorted((prepared / "every").glob("*.db"))]:
        with Store.open_read_only(path) as store:
            for record in store.kernels():
                recipe = Recipe.from_dict(record.recipe)
                begin = time.perf_counter()
                try:
                    cubins = {
                        each: CudaLauncher().load(each, lambda each=each: store.artifact(each).data)
                        for each in record.artifacts
                    }
                    loaded = load_kernels(recipe, cubins, driver, device, toolchain=record.toolchain)
                except TilewrightError as error:
                    kernels.append({"kernel": record.key, "template": record.template, "error": str(error)})
                    continue
                entries = []
                for kernel in loaded:
                    with driver.current(device):
                        value = ctypes.c_int()
                        found = {}
                        for name, which in (("registers", _REGISTERS), ("local_bytes", _LOCAL_BYTES)):
                            driver.call("cuFuncGetAttribute", ctypes.byref(value), which, kernel.function)
                            found[name] = value.value
                    entries.append({"entry": kernel.entry, **found})
                kernels.append(
                    {
                        "kernel": record.key,
                        "template": record.template,
                        "load_us": round(1e6 * (time.perf_counter() - begin)),
                        "entries": entries,
                        "facts": record.facts,
                    }
                )
        tell(result)
    failed = [each for each in kernels if "error" in each]
    result["table"] = [
        f"{len(kernels)} kernels, {len(failed)} that were not loaded",
        *(each["error"] for each in failed),
    ]
    tell(result)
    if failed:
        raise SystemExit(f"{len(failed)} of {len(kernels)} kernels were not loaded: {failed[0]['error']}")
