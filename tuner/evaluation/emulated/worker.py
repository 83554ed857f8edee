"""The worker process: runs one rendered source after another in the mended interpreter. It judges nothing.

A request names a source file, the files of its tensors, and the launches in order; what entries wrote goes back to the
files. A kernel that crashes or hangs takes this process with it, and costs the parent a restart.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

from tilewright.codegen.workers.child import connect, serve

_POISON = 0xFF
_DESCRIPTOR = re.compile(r"tensordesc<(\w+)\[(.*)\]>")


def _load(path: str) -> ModuleType:
    """The source as a module; its functions need their text, so it must be a file."""
    spec = importlib.util.spec_from_file_location(f"tilewright_emulated_{Path(path).stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Runner:
    """Runs requests; made after the interpreter was chosen by the environment."""

    def __init__(self) -> None:
        import torch

        from tilewright.tuner.evaluation.emulated import mending

        mending.install()
        torch.set_num_threads(1)
        self._torch, self._mending = torch, mending
        self._dtypes = {
            "fp32": torch.float32,
            "fp16": torch.float16,
            "bf16": torch.bfloat16,
            "fp8e4nv": torch.float8_e4m3fn,
            "fp8e5": torch.float8_e5m2,
            "fp8e4b8": torch.float8_e4m3fnuz,
            "i8": torch.int8,
            "u8": torch.uint8,
            "i32": torch.int32,
            "u32": torch.uint32,
            "i64": torch.int64,
        }

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        """Run all launches of ``request``; ``{"error": ...}`` says in one sentence why it could not be done."""
        memory = {name: self._buffer(each["path"], each["nbytes"]) for name, each in request["buffers"].items()}
        try:
            module = _load(request["source"])
            for launch in request["launches"]:
                arguments = [self._argument(memory, each) for each in launch["arguments"]]
                self._mending.MEMORY.extents = [
                    self._mending.Extent(
                        each["name"],
                        memory[each["buffer"]].data_ptr() + each["offset"],
                        each["nbytes"],
                        each["writable"],
                    )
                    for each in launch["extents"]
                ]
                if 0 not in launch["grid"]:
                    getattr(module, launch["entry"])[tuple(launch["grid"])](*arguments, **launch["constants"])
        except Exception as error:  # a candidate may raise anything, and what it was is its outcome
            return {"error": _root_cause(error)}
        for name, each in request["buffers"].items():
            if each["written"]:
                Path(each["path"]).write_bytes(memory[name].numpy()[: each["nbytes"]].tobytes())
        return {}

    def _buffer(self, path: str, nbytes: int) -> Any:
        """Bytes of a file; poison, where there is none to begin with."""
        buffer = self._torch.full((max(nbytes, 1),), _POISON, dtype=self._torch.uint8)
        if nbytes and Path(path).exists():
            data = bytearray(Path(path).read_bytes())
            buffer[:nbytes] = self._torch.frombuffer(data, dtype=self._torch.uint8)
        return buffer

    def _argument(self, memory: dict[str, Any], argument: dict[str, Any]) -> Any:
        """A size, or a tensor that begins where the argument's address is, or a descriptor of one."""
        if "value" in argument:
            return argument["value"]
        tail = memory[argument["buffer"]][argument["offset"] :]
        descriptor = _DESCRIPTOR.fullmatch(argument["type"])
        dtype = self._dtypes[descriptor[1] if descriptor else argument["type"].removeprefix("*")]
        tensor = tail[: tail.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        if descriptor is None:
            return tensor
        from triton.tools.tensor_descriptor import TensorDescriptor

        rows, columns = argument["shape"]
        return TensorDescriptor(tensor, [rows, columns], [columns, 1], [int(each) for each in descriptor[2].split(",")])


def _root_cause(error: BaseException) -> str:
    """The innermost cause: the interpreter wraps errors once for each function it is in."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def main() -> None:
    """Serve the parent until it closes the connection."""
    channel, _ = connect()
    runner = Runner()
    serve(channel, lambda request, _: runner.run(request))


if __name__ == "__main__":
    main()
