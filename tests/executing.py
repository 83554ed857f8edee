"""A CUDA driver that carries out launches, on machines without a GPU: the stand-in, with the emulator behind it.

A launch is decoded from its parameter bytes, and the Triton source of the loaded cubin is run by the emulator on the
memory that the arguments point to: what the driver allocated, and the storages of posed tensors (tests/posing.py). So
what is shown is that a launch passes what its kernel takes, and that the kernel's source computes with it what it
should; nothing of the binary, and nothing of a device. Times are those of a clock of its own.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cuda_standin import StandIn, standin
from executing_emulator import Cost, Costed, LaunchServer, State
from executing_launches import DEVICES_VARIABLE, Devices, FaultKind, attach

from tilewright.codegen.backends.triton.entry import EntrySpec, triton_entries
from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.space import Config
from tilewright.runtime.launchers.cuda.driver import DRIVER_VARIABLE
from tilewright.tuning_db.store import Store


@dataclass(frozen=True)
class ExecutingDriver:
    """What tests tell the driver, and what it tells them."""

    standin: StandIn
    """What this process launched, byte for byte."""
    path: Path
    """Of the library, as ``$TILEWRIGHT_CUDA_DRIVER`` names it: another one each time, for who remembers devices."""
    state: State

    @property
    def costs(self) -> dict[str, Cost]:
        """Microseconds of a launch by its entry's name, or a function of it; without, they grow with grid and bytes."""
        return self.state.costs

    @property
    def executed(self) -> list[tuple[str, tuple[int, int, int]]]:
        """Entry and grid (in programs) of all launches, those of child processes among them."""
        return self.state.executed

    @property
    def complaints(self) -> list[str]:
        """What went wrong in launches, in a sentence each; a test that expects it takes it away."""
        return self.state.complaints

    def know(self, image: bytes, source: str, entries: Sequence[EntrySpec]) -> None:
        """Say which source a cubin was compiled from, and what its entries were specialised for."""
        self.state.know(hashlib.sha256(image[: self.standin.image_bytes(image)]).hexdigest(), source, entries)

    def know_database(self, url: str | os.PathLike[str]) -> None:
        """Say so of all GPU kernels of a tuning database."""
        with Store.open_read_only(url) as store:
            for kernel in store.kernels():
                if kernel.arch not in GPU_ARCHS:
                    continue
                op, config, arch = find_op(kernel.op), Config(kernel.config), GPU_ARCHS[kernel.arch]
                entries = op.template(config).entries
                assert entries is not None
                specs = triton_entries(entries(op.signature_from_dict(kernel.signature), config, arch))
                for checksum in kernel.artifacts:
                    artifact = store.artifact(checksum)
                    assert artifact is not None
                    self.know(artifact.data, kernel.source, specs)

    def fail(
        self,
        entry: str,
        kind: FaultKind,
        *,
        after: int = 0,
        times: int | None = None,
        when: Callable[[Costed], bool] | None = None,
    ) -> None:
        """Have launches of ``entry`` fail in any process.

        ``hang``: whatever waits for it waits for ever. ``illegal_access``: every later call of the process answers 700.
        ``out_of_memory``: the launch is refused. ``wrong_element``: one element that the kernel writes is off.
        ``crash``: the process ends by a signal.

        Args:
            entry: name of the function.
            kind: of the fault.
            after: launches of it that are right before.
            times: launches that fail; None: all from then on.
            when: which of its launches are meant: kernels of a template have the same entries; None: all.

        """
        self.state.fail(entry, kind, after, times, when)

    def mend(self) -> None:
        """Ask for no more faults."""
        self.state.faults.clear()


@contextmanager
def executing(
    archs: Sequence[str] = ("sm_90",),
    *,
    sm_count: int = 3,
    version: int = 13000,
    memory_bytes: int = 1 << 30,
    l2_bytes: int = 1 << 20,
    name: str = "",
) -> Iterator[ExecutingDriver]:
    """Have devices of ``archs`` in this process and its children, as ``$TILEWRIGHT_CUDA_DRIVER`` says.

    They all have so many multiprocessors, so much memory and L2 cache, and the product's ``name`` (empty: one that no
    product has).

    Raises:
        AssertionError: at the end, when a launch went wrong for which no fault had been asked.

    """
    library, server = standin(), _server()
    state = server.state = State()
    with tempfile.TemporaryDirectory(prefix="tilewright-devices-") as folder:
        described, path = Path(folder, "devices.json"), Path(folder, library.path.name)
        path.symlink_to(library.path)
        capabilities = tuple(int(name.removeprefix("sm_")) for name in archs)
        devices = Devices(str(path), capabilities, version, sm_count, memory_bytes, l2_bytes, name, server.address)
        devices.write(described)
        with _environment({DRIVER_VARIABLE: str(path), DEVICES_VARIABLE: str(described)}):
            attach()
            try:
                yield ExecutingDriver(library, path, state)
            except BaseException as error:
                for complaint in state.complaints:
                    error.add_note(f"a launch went wrong: {complaint}")
                raise
            finally:
                library.execute_with(None, None)
                library.begin([])
    assert not state.complaints, state.complaints


@functools.cache
def _server() -> LaunchServer:
    made = LaunchServer()
    atexit.register(made.close)
    return made


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
