"""Which Triton compiles, and what it assembles with; found without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
from functools import cache
from pathlib import Path

from tilewright.codegen.hardware.archs import GpuArch
from tilewright.errors import TilewrightError

_LEAST_VERSION = (3, 6)
_FIRST_BLACKWELL = 100


def toolchain(arch: GpuArch) -> str:
    """Compiler, assembler and target in one line: ``triton 3.7.1, ptxas 12.9.86 for sm_90a``.

    Raises:
        TilewrightError: when Triton or its assembler is missing, too old, or does not run.

    """
    triton = f"triton {_triton_version()}"
    if arch.family == "hip":
        return f"{triton} for {arch.binary_target}"
    return f"{triton}, ptxas {_ptxas_version(_ptxas(arch))} for {arch.binary_target}"


@cache
def triton_folder() -> Path:
    """Where the package lies.

    Raises:
        TilewrightError: when it is not installed.

    """
    found = importlib.util.find_spec("triton")
    if found is None or found.origin is None:
        raise TilewrightError("GPU kernels are compiled by Triton, which is not installed; pip install 'triton>=3.6'")
    return Path(found.origin).parent


def bundled_tool(name: str) -> Path:
    """A tool of NVIDIA's that comes with Triton: ``nvdisasm``, ``ptxas``.

    Raises:
        TilewrightError: when it is missing.

    """
    path = triton_folder() / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise TilewrightError(f"this Triton brings no {name} ({path} is missing); install the wheel from PyPI")
    return path


@cache
def _triton_version() -> str:
    folder = triton_folder()
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        found = re.search(r"__version__ = ['\"]([^'\"]+)", (folder / "__init__.py").read_text())
        version = found[1] if found else "0"
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < _LEAST_VERSION:
        raise TilewrightError(f"Triton {version} is too old to generate these kernels; pip install 'triton>=3.6'")
    return version


def _ptxas(arch: GpuArch) -> str:
    """As Triton chooses it: one of its own for Blackwell, another for the rest; both can be replaced."""
    blackwell = int(arch.triton_target[1]) >= _FIRST_BLACKWELL
    variable = "TRITON_PTXAS_BLACKWELL_PATH" if blackwell else "TRITON_PTXAS_PATH"
    return os.environ.get(variable) or str(bundled_tool("ptxas-blackwell" if blackwell else "ptxas"))


@cache
def _ptxas_version(path: str) -> str:
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TilewrightError(
            f"ptxas at {path} does not run ({error}); unset $TRITON_PTXAS_PATH and $TRITON_PTXAS_BLACKWELL_PATH, "
            "or set them to one that does"
        ) from error
    version = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    if done.returncode != 0 or version is None:
        raise TilewrightError(f"{path} is no ptxas: it does not tell a version; unset $TRITON_PTXAS_PATH")
    return version[1]
