"""What a CUDA driver answers to calls good and bad (calls.json): a record, to which the stand-in has to conform.

Needs the driver, Python's standard library and a folder that tests/standin_kernels.py prepared::

    python run.py FOLDER --out record.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import signal
import subprocess
import sys
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p
from pathlib import Path
from typing import Any

CALLS = json.loads(Path(__file__).with_name("calls.json").read_text())
_VERSION = 12040
_MAJOR, _MINOR = 75, 76
_MAX_DYNAMIC_SMEM, _NON_PORTABLE_CLUSTER = 8, 14
_CLUSTER_DIMENSION = 4
_DISABLE_TIMING = 2
_BUFFER_BYTES = 1 << 20
_LIMIT_S = 20
"""For one call, after which its process is ended."""
_MAP: dict[str, Any] = {
    "rank": 2,
    "type": 9,
    "shape": [64, 128],
    "strides": [128],
    "box": [64, 64],
    "steps": [1, 1],
    "swizzle": 3,
    "off": 0,
    "misplaced": 0,
}
"""What a tensor map is made of unless a call says otherwise: bf16 [128, 64], the fastest dimension first."""


class _Attribute(ctypes.Structure):
    _fields_ = (("id", c_uint), ("padding", c_char * 4), ("value", c_uint * 16))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared_memory_bytes", c_uint),
        ("stream", c_void_p),
        ("attributes", POINTER(_Attribute)),
        ("attribute_count", c_uint),
    )


class Session:
    """One process's use of a driver; what one step makes, later ones name."""

    def __init__(self, library: str, folder: Path) -> None:
        self._library = ctypes.CDLL(library)
        self._folder = folder
        self._kernels = json.loads((folder / "kernels.json").read_text())
        self._made: dict[str, Any] = {}
        self._functions: dict[str, c_void_p] = {}
        self._require("cuInit", 0)
        device, major, minor, context = c_int(), c_int(), c_int(), c_void_p()
        self._require("cuDeviceGet", byref(device), 0)
        self._require("cuDeviceGetAttribute", byref(major), _MAJOR, device)
        self._require("cuDeviceGetAttribute", byref(minor), _MINOR, device)
        self._require("cuDevicePrimaryCtxRetain", byref(context), device)
        self._require("cuCtxSetCurrent", context)
        name, version = ctypes.create_string_buffer(256), c_int()
        self._require("cuDeviceGetName", name, 256, device)
        self._require("cuDriverGetVersion", byref(version))
        self.context, self.capability = context, 10 * major.value + minor.value
        self.device, self.version = name.value.decode(), version.value
        self._buffer = c_uint64()
        self._require("cuMemAlloc_v2", byref(self._buffer), c_size_t(_BUFFER_BYTES))

    def answer(self, steps: list[dict[str, Any]]) -> str:
        """What the driver says to the last of ``steps``, by its name; those before have to succeed, or may fail."""
        self._made.clear()
        code = 0
        for position, step in enumerate(steps):
            arguments = {name: value for name, value in step.items() if name not in ("do", "fails")}
            code = getattr(self, f"_do_{step['do']}")(**arguments)
            if code and position + 1 < len(steps) and not step.get("fails"):
                raise RuntimeError(f"step {position + 1} of {steps} failed: {self.name(code)}")
        self._end_captures()
        return "nothing found" if code is None else self.name(code)

    def _end_captures(self) -> None:
        if stream := self._made.get("stream"):
            self._call("cuStreamEndCapture", stream, byref(c_void_p()))

    def name(self, code: int) -> str:
        """A ``CUresult`` by its name."""
        text = c_char_p()
        self._library.cuGetErrorName(code, byref(text))
        return (text.value or b"unknown").decode()

    def _call(self, name: str, *arguments: Any) -> int:
        code: int = getattr(self._library, name)(*arguments)
        return code

    def _require(self, name: str, *arguments: Any) -> None:
        if code := self._call(name, *arguments):
            raise RuntimeError(f"{name}: {self.name(code)}")

    def _arch(self) -> str:
        return f"sm_{self.capability}"

    def _do_load(self, kernel: str, arch: str = "", damage: str = "", context: bool = True) -> int:
        image = bytearray((self._folder / f"{kernel}.{arch or self._arch()}.cubin").read_bytes())
        if damage == "zeros":
            image = bytearray(len(image))
        elif damage == "magic":
            image[1:4] = b"elf"
        elif damage == "machine":
            image[18:20] = (62).to_bytes(2, "little")
        module = c_void_p()
        if not context:
            self._require("cuCtxSetCurrent", None)
        try:
            code = self._call("cuModuleLoadData", byref(module), bytes(image))
        finally:
            self._require("cuCtxSetCurrent", self.context)
        self._made["module"] = module
        return code

    def _do_function(self, kernel: str, entry: str = "") -> int:
        function = c_void_p()
        name = entry or self._kernels[f"{kernel}.{self._arch()}"]["entry"]
        code = self._call("cuModuleGetFunction", byref(function), self._made["module"], name.encode())
        self._functions[kernel] = function
        return code

    def _loaded(self, kernel: str) -> c_void_p:
        """A function of its own for every call, so that no attribute outlives one."""
        if self._do_load(kernel) or self._do_function(kernel):
            raise RuntimeError(f"{kernel} cannot be loaded")
        return self._functions[kernel]

    def _function(self, kernel: str) -> c_void_p:
        if kernel not in self._made:
            self._made[kernel] = self._loaded(kernel)
        function: c_void_p = self._made[kernel]
        return function

    def _do_parameter(self, kernel: str, index: int) -> int:
        offset, size = c_size_t(), c_size_t()
        return self._call("cuFuncGetParamInfo", self._function(kernel), c_size_t(index), byref(offset), byref(size))

    def _do_raise(self, kernel: str, nbytes: int) -> int:
        return self._call("cuFuncSetAttribute", self._function(kernel), _MAX_DYNAMIC_SMEM, nbytes)

    def _do_allow_clusters(self, kernel: str) -> int:
        return self._call("cuFuncSetAttribute", self._function(kernel), _NON_PORTABLE_CLUSTER, 1)

    def _do_launch(
        self,
        kernel: str,
        grid: tuple[int, int, int] = (2, 1, 1),
        block: tuple[int, int, int] | None = None,
        cluster: tuple[int, int, int] | None = None,
        smem: int | None = None,
        stream: str = "",
        pointer: int | None = None,
        context: bool = True,
    ) -> int:
        function, told = self._function(kernel), self._kernels[f"{kernel}.{self._arch()}"]
        address = self._buffer.value if pointer is None else pointer
        cells = [c_uint64(address if kind == "pointer" else 0) for kind in told["parameters"]]
        if pointer is not None:
            cells[2].value = 128  # elements that are read there
        cells += [c_uint64(0), c_uint64(0)]
        asked = cluster or ((told["cluster"], 1, 1) if told["cluster"] > 1 else None)
        attributes = (_Attribute * 1)()
        if asked:
            attributes[0].id = _CLUSTER_DIMENSION
            attributes[0].value[:3] = asked
        config = _Config(
            tuple(grid),
            tuple(block or (told["threads"], 1, 1)),
            told["shared_memory_bytes"] if smem is None else smem,
            self._made[stream].value if stream else None,
            attributes,
            1 if asked else 0,
        )
        pointers = (c_void_p * len(cells))(*map(ctypes.addressof, cells))
        if not context:
            self._require("cuCtxSetCurrent", None)
        try:
            return self._call("cuLaunchKernelEx", byref(config), function, pointers, None)
        finally:
            self._call("cuCtxSetCurrent", self.context)

    def _do_map(self, **changes: Any) -> int:
        wanted = {**_MAP, **changes}
        memory = ctypes.create_string_buffer(256)
        place = -(-ctypes.addressof(memory) // 64) * 64 + wanted["misplaced"]
        rank = len(wanted["shape"])
        return self._call(
            "cuTensorMapEncodeTiled",
            c_void_p(place),
            wanted["type"],
            wanted["rank"],
            c_void_p(self._buffer.value + wanted["off"]),
            (c_uint64 * rank)(*wanted["shape"]),
            (c_uint64 * max(1, rank - 1))(*wanted["strides"]),
            (c_uint * rank)(*wanted["box"]),
            (c_uint * rank)(*wanted["steps"]),
            0,
            wanted["swizzle"],
            2,
            0,
        )

    def _do_alloc(self, nbytes: int, name: str = "memory") -> int:
        self._made[name] = c_uint64()
        return self._call("cuMemAlloc_v2", byref(self._made[name]), c_size_t(nbytes))

    def _do_free(self, name: str = "memory", off: int = 0) -> int:
        return self._call("cuMemFree_v2", c_uint64(self._made[name].value + off))

    def _do_put(self, nbytes: int, address: int | None = None) -> int:
        to = self._buffer.value if address is None else address
        return self._call("cuMemcpyHtoD_v2", c_uint64(to), bytes(nbytes), c_size_t(nbytes))

    def _do_fill(self, nbytes: int, address: int | None = None) -> int:
        to = self._buffer.value if address is None else address
        return self._call("cuMemsetD8_v2", c_uint64(to), 0, c_size_t(nbytes))

    def _do_stream(self, name: str = "stream") -> int:
        self._made[name] = c_void_p()
        return self._call("cuStreamCreate", byref(self._made[name]), 1)

    def _do_wait(self, stream: str = "") -> int:
        return self._call("cuStreamSynchronize", self._made[stream] if stream else None)

    def _do_wait_all(self) -> int:
        return self._call("cuCtxSynchronize")

    def _do_begin(self, stream: str = "stream") -> int:
        return self._call("cuStreamBeginCapture_v2", self._made[stream] if stream else None, 0)

    def _do_end(self, stream: str = "stream") -> int:
        self._made["graph"] = c_void_p()
        return self._call("cuStreamEndCapture", self._made[stream], byref(self._made["graph"]))

    def _do_replay(self, stream: str = "stream") -> int:
        made = c_void_p()
        self._require("cuGraphInstantiateWithFlags", byref(made), self._made["graph"], c_uint64(0))
        return self._call("cuGraphLaunch", made, self._made[stream])

    def _do_event(self, name: str, timed: bool = True) -> int:
        self._made[name] = c_void_p()
        return self._call("cuEventCreate", byref(self._made[name]), 0 if timed else _DISABLE_TIMING)

    def _do_note(self, name: str) -> int:
        return self._call("cuEventRecord", self._made[name], None)

    def _do_elapsed(self) -> int:
        time_ms = ctypes.c_float()
        return self._call("cuEventElapsedTime", byref(time_ms), self._made["before"], self._made["after"])

    def _do_symbol(self, name: str, version: int = _VERSION) -> int | None:
        found = c_void_p()
        code = self._call("cuGetProcAddress_v2", name.encode(), byref(found), version, c_uint64(0), None)
        return code if code or found.value else None


def record(library: str, folder: Path) -> dict[str, Any]:
    """What the driver answers to every call, and who it is.

    Calls are made by child processes: one that ends its context has no other after it, and one that ends the process
    is answered by how it ended.

    Raises:
        RuntimeError: when there is no device to ask.

    """
    about: dict[str, Any] = {}
    answers: dict[str, str] = {}
    done = 0
    while done < len(CALLS):
        words = [sys.executable, __file__, str(folder), "--driver", library, "--from", str(done)]
        child = subprocess.run(words, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in child.stdout.splitlines()]
        if not lines:
            raise RuntimeError(child.stderr)
        about = lines.pop(0)
        answers |= {name: answer for name, answer in lines if answer is not None}
        done += len(lines)
        if child.returncode and done < len(CALLS):
            answers[CALLS[done]["call"]] = _how_it_ended(child)
            done += 1
    return {**about, "answers": answers}


def _how_it_ended(child: subprocess.CompletedProcess[str]) -> str:
    if child.returncode < 0:
        return f"ended by {signal.Signals(-child.returncode).name}"
    return child.stderr.strip().splitlines()[-1]


def _answer_from(first: int, library: str, folder: Path) -> None:
    """Make calls, from one on up to one that has to be the last of its process; a line for each."""
    session = Session(library, folder)
    about = {"device": session.device, "capability": session.capability, "driver_version": session.version}
    print(json.dumps(about), flush=True)
    for call in CALLS[first:]:
        signal.alarm(_LIMIT_S)
        asked = session.capability >= call.get("capability", 0)
        answer = session.answer(call["steps"]) if asked else None
        print(json.dumps([call["call"], answer]), flush=True)
        if asked and call.get("alone"):
            return


def main() -> None:
    """Write the record, and say which answers are not those that the documents lead to expect."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with cubins, from tests/standin_kernels.py")
    parser.add_argument("--driver", default="libcuda.so.1", help="the driver's library")
    parser.add_argument("--out", type=Path, help="file that the record is written to")
    parser.add_argument("--from", dest="first", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first is not None:
        _answer_from(options.first, options.driver, options.folder)
        return
    made = record(options.driver, options.folder)
    if options.out:
        options.out.write_text(json.dumps(made, indent=1) + "\n")
    expected = {call["call"]: call["expected"] for call in CALLS}
    others = {name: answer for name, answer in made["answers"].items() if answer != expected[name]}
    print(f"{made['device']}: {len(made['answers'])} calls, {len(others)} answered otherwise than expected")
    for name, answer in others.items():
        print(f"{name}: {answer}, not {expected[name]}")


if __name__ == "__main__":
    main()
