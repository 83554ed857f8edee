"""Runs what was prepared on the GPU that is here, part by part, and writes what was seen after each of them.

    bash benchmarks/gpu_session.sh --prepared prepared --out results
    bash benchmarks/gpu_session.sh --rehearse --prepared prepared-small --out results

A part is a process with a time limit of its own, so that one that crashes or hangs costs itself alone. A rehearsal runs
the same parts on the executing driver (tests/executing.py): it shows that the session would run, and measures nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TESTS = ROOT / "tests"
sys.path.insert(0, str(ROOT / "src"))
REHEARSED_SM_COUNT = 3


@dataclass(frozen=True)
class Part:
    """One thing that a session does."""

    name: str
    limit_s: int
    """After which it is ended; what it wrote until then is kept."""
    means: str


PARTS = (
    Part("load", 40, "every prepared cubin is loaded, and what the driver says of it compared with what was stored"),
    Part("conformance", 30, "answers of the driver to good and bad calls, to which the stand-in has to conform"),
    Part("reference", 100, "every template through the runtime, awkward sizes included, against references in fp64"),
    Part("host", 20, "nanoseconds of the CPU for a call, piece by piece"),
    Part("measure", 180, "`tune measure` on the prepared models, and how good the predictions were"),
    Part("race", 90, "the served plans against torch on the same tensors"),
)
"""In the order in which they are done: what is cheap and says most comes first. 460 seconds at most."""


def main() -> int:
    """Run; 0 when every part was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path, default=Path("prepared"), help="folder made by prepare.py")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-session"), help="folder for results (default gpu-session)"
    )
    parser.add_argument("--parts", help=f"only these of {','.join(part.name for part in PARTS)}")
    parser.add_argument("--rehearse", action="store_true", help="on the executing driver; nothing is measured")
    options = parser.parse_args()
    if not (options.prepared / "prepared.json").is_file():
        print(f"{options.prepared} was not prepared; run benchmarks/gpu_session/prepare.py", file=sys.stderr)
        return 2
    chosen = [part.name for part in PARTS] if options.parts is None else options.parts.split(",")
    if unknown := sorted({*chosen} - {part.name for part in PARTS}):
        print(f"there is no part {unknown[0]!r}; parts are {', '.join(part.name for part in PARTS)}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no part outlives its session
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-session-") as folder:
        # A copy: plans that are made here do not change what was prepared.
        prepared = Path(folder) / "prepared"
        shutil.copytree(options.prepared, prepared)
        prepared.chmod(0o700)
        with rehearsal(prepared) if options.rehearse else contextlib.nullcontext():
            session = Session(prepared, options.out, options.rehearse)
            for part in PARTS:
                if part.name in chosen:
                    session.run(part)
    return 0 if session.is_done else 1


class Session:
    """The parts that were run, written to ``session.json`` and ``session.txt`` after each."""

    def __init__(self, prepared: Path, out: Path, is_rehearsal: bool) -> None:
        self._prepared, self._out, self._is_rehearsal = prepared, out, is_rehearsal
        self._parts: list[dict[str, Any]] = []
        self._begin = time.monotonic()

    @property
    def is_done(self) -> bool:
        """Whether every part ended well."""
        return all(part["status"] == "done" for part in self._parts)

    def run(self, part: Part) -> None:
        """Run one part to its end or its limit."""
        print(
            f"[{time.monotonic() - self._begin:4.0f}s] {part.name}: {part.means} (at most {part.limit_s} s)", flush=True
        )
        path = self._prepared.parent / f"{part.name}.json"
        command = [sys.executable, str(HERE / "part.py"), part.name, str(self._prepared), str(path)]
        begin = time.monotonic()
        process = subprocess.Popen(
            [*command, *(["--rehearse"] if self._is_rehearsal else [])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            # The emulator stands in for a GPU some thousand times slower.
            said, _ = process.communicate(timeout=part.limit_s * (20 if self._is_rehearsal else 1))
            status = "done" if process.returncode == 0 else f"failed with status {process.returncode}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            status = "ended at its limit"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        found = json.loads(path.read_text()) if path.exists() else {}
        self._parts.append(
            {
                "part": part.name,
                "means": part.means,
                "status": status,
                "wall_s": round(time.monotonic() - begin, 1),
                "limit_s": part.limit_s,
                "result": found,
                "said": said[-4000:],
            }
        )
        print(
            f"        {status}{': ' + said.strip().splitlines()[-1] if status != 'done' and said.strip() else ''}",
            flush=True,
        )
        self._write()

    def _write(self) -> None:
        document = {
            "kind": "rehearsal on the executing driver: nothing ran on a GPU" if self._is_rehearsal else "session",
            "machine": platform.machine(),
            "python": platform.python_version(),
            "parts": self._parts,
        }
        draft = self._out / "session.json.part"
        draft.write_text(json.dumps(document, indent=1, allow_nan=True))
        draft.replace(self._out / "session.json")
        rows = [f"{each['part']:12} {each['status']:26} {each['wall_s']:7.1f} s" for each in self._parts]
        tables = [f"\n{each['part']}\n" + "\n".join(each["result"].get("table", [])) for each in self._parts]
        (self._out / "session.txt").write_text("\n".join([document["kind"], *rows, *tables]) + "\n")


@contextlib.contextmanager
def rehearsal(prepared: Path) -> Iterator[None]:
    """Have the executing driver in this process and its children, as a device for which everything was prepared."""
    sys.path.insert(0, str(TESTS))
    from executing import executing
    from standin_kernels import ENTRIES, SOURCE

    from tilewright.codegen.hardware.devices import device_key
    from tilewright.runtime.launchers.cuda.driver import find_driver

    told = json.loads((prepared / "prepared.json").read_text())
    with executing((told["arch"],), sm_count=REHEARSED_SM_COUNT) as driver:
        here = find_driver().device(0)
        key = device_key(here.name, here.capability, here.sm_count, here.memory_bytes)
        for path in [prepared / "models.db", *(prepared / "every").glob("*.db")]:
            driver.know_database(path)
            if path.name != "models.db":  # measured plans of its own are made of it
                give_plans(path, told["device"], key)
        for name, spec in ENTRIES.items():
            driver.know((prepared / f"conformance/{name}.{told['arch']}.cubin").read_bytes(), SOURCE, (spec,))
        yield
        driver.complaints.clear()  # the conformance record launches what must go wrong


def give_plans(path: Path, product: str, key: str) -> None:
    """Let what was planned for ``product`` serve the device ``key``, too; the runtime takes no other device's plans."""
    from tilewright.tuning_db.store import Store

    with Store.open(path, create=False) as store:
        (device,) = (each for each in store.devices() if each.key == product)
        store.put_device(replace(device, key=key))
        for plan in store.plans():
            store.put_plan(replace(plan, device_key=key))


if __name__ == "__main__":
    sys.exit(main())
