"""ggml's product over experts (``mul_mat_id``), with the libraries and headers of the wheel ``libggml-python``."""

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

_SHIM = Path(__file__).with_name("ggml_shim.c")


def _wheel_folder() -> Path | None:
    spec = importlib.util.find_spec("libggml")
    return Path(spec.origin).parent if spec and spec.origin else None


def _c_compiler() -> str | None:
    names = filter(None, [os.environ.get("CC"), "cc", "gcc", "clang", *(f"clang-{v}" for v in range(30, 11, -1))])
    return next(filter(None, map(shutil.which, names)), None)


def why_not() -> str:
    """Why ggml cannot run here; empty where it can."""
    if _wheel_folder() is None:
        return "the package libggml-python is not installed"
    return "" if _c_compiler() else "there is no C compiler"


@functools.cache
def _shim() -> ctypes.CDLL:
    wheel, compiler = _wheel_folder(), _c_compiler()
    if wheel is None or compiler is None:
        raise RuntimeError(f"ggml cannot run here: {why_not()}")
    libraries = wheel / "lib64"
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "ggml_shim.so"
        command = [compiler, "-O2", "-shared", "-fPIC", str(_SHIM), f"-I{wheel / 'include'}", f"-L{libraries}"]
        command += ["-lggml-cpu", "-lggml-base", f"-Wl,-rpath,{libraries}", "-o", str(library)]
        subprocess.run(command, check=True)
        shim = ctypes.CDLL(str(library))
    pointer, integer = ctypes.c_void_p, ctypes.c_int
    for name, returns, *takes in (
        ("experts_new", pointer, integer, integer, integer, pointer),
        ("experts_free", None, pointer),
        ("product_new", pointer, pointer, integer, integer, pointer, pointer, integer),
        ("product_run", integer, pointer),
        ("product_output", pointer, pointer),
        ("product_free", None, pointer),
    ):
        function = getattr(shim, name)
        function.restype, function.argtypes = returns, takes
    return shim


class GgmlExperts:
    """A copy of the weights [experts, out, in] fp32 in ggml's memory."""

    def __init__(self, w: Tensor) -> None:
        shim = _shim()
        self._shape = tuple(w.shape)
        self._handle = shim.experts_new(*w.shape, w.contiguous().data_ptr())
        weakref.finalize(self, shim.experts_free, self._handle)

    def bind(self, x: Tensor, expert_ids: Tensor, threads: int) -> Callable[[], Tensor]:
        """Return a call that gives [tokens * top_k, out] for x [tokens, in] and expert_ids [tokens, top_k] int32."""
        return _Product(self, x, expert_ids, threads)

    def new_product(self, x: Tensor, expert_ids: Tensor, threads: int) -> tuple[int, Tensor]:
        """Return ggml's handle and a view of its output."""
        shim = _shim()
        tokens, top_k = expert_ids.shape
        x, expert_ids = x.contiguous(), expert_ids.contiguous()
        handle = shim.product_new(self._handle, tokens, top_k, x.data_ptr(), expert_ids.data_ptr(), threads)
        rows, width = tokens * top_k, self._shape[1]
        memory = (ctypes.c_float * (rows * width)).from_address(shim.product_output(handle))
        return handle, torch.frombuffer(memory, dtype=torch.float32).view(rows, width)


class _Product:
    """One prepared product; keeps its experts alive."""

    def __init__(self, experts: GgmlExperts, x: Tensor, expert_ids: Tensor, threads: int) -> None:
        self._experts = experts
        self._handle, self._output = experts.new_product(x, expert_ids, threads)
        self._run = _shim().product_run
        weakref.finalize(self, _shim().product_free, self._handle)

    def __call__(self) -> Tensor:
        if self._run(self._handle) != 0:
            raise RuntimeError("ggml failed to compute its graph")
        return self._output
