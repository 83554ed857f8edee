"""What is tried on a disk that is full: run in a process of its own, below the library of failing_disk.py.

``python full_disk_actions.py FOLDER ERROR ACTION:NUMBER,NUMBER...`` tries each action with each number of writes before
the disk fails with ERROR, and prints one JSON object for each.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path

from failing_disk import Disk
from tuning_db_samples import Filled, artifact, fill, kernel, plan, trial

from tilewright.errors import TilewrightError
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.store import Store

DATABASES = Path(__file__).parent / "data" / "databases"


@cache
def _filled(path: Path) -> Filled:
    """What the database at ``path``, which is made once, holds."""
    with Store.open(path) as store:
        filled = fill(store)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return filled


class Action:
    """Prepared on a sound disk, done on one that becomes full, judged on a sound one again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "tuning.db"
        self.done = False
        """Whether it was done to its end, which :meth:`judge` asks."""

    def prepare(self) -> None: ...

    def do(self) -> None: ...

    def judge(self) -> None:
        """Raise AssertionError where something was lost, or is there by half."""


class Make(Action):
    """A new database with one row of everything."""

    def do(self) -> None:
        with Store.open(self.path) as store:
            fill(store)

    def judge(self) -> None:
        with Store.open(self.path) as store:
            assert store.check() == []
            fill(store)


class Add(Action):
    """More of everything in a database; what was acknowledged stays."""

    filled: Filled
    acknowledged: list[int]

    def prepare(self) -> None:
        self.filled = _filled(self.folder.parent / "filled.db")
        shutil.copyfile(self.folder.parent / "filled.db", self.path)

    def do(self) -> None:
        self.acknowledged = []
        with Store.open(self.path) as store:
            for number in range(3):
                self.acknowledged += store.add_trials(
                    trial(self.filled.run.id, message="x" * 3000, seed=number) for _ in range(3)
                )
                built = artifact(bytes([number]) * 20_000)
                store.add_kernel(kernel(built, key=built.checksum), [built])
            store.put_plan(plan(self.filled.kernel.key, layout="rows"))

    def judge(self) -> None:
        with Store.open(self.path) as store:
            assert store.check() == []
            ids = [each.id for each in store.trials()]
            assert ids == [each.id for each in self.filled.trials] + self.acknowledged
            assert len(store.plans()) == 1
            assert (store.plans()[0] == self.filled.plan) != self.done or store.plans()[0].layout == "rows"
        with closing(sqlite3.connect(self.path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


class Upgrade(Action):
    """The schema of an old release."""

    def prepare(self) -> None:
        shutil.copyfile(DATABASES / "v1.db", self.path)

    def do(self) -> None:
        Store.open(self.path).close()

    def judge(self) -> None:
        with Store.open(self.path) as store:
            assert store.check() == []
            assert len(store.trials()) == 6
            assert len(store.plans()) == 1


class Read(Add):
    """As `tune show` and the runtime do; SQLite makes a file beside the database for it."""

    def do(self) -> None:
        with Store.open_read_only(self.path) as store:
            assert store.trials() == list(self.filled.trials)
        assert Reader.open(self.path).plans_for("moe_gemm", "signature-1") == (self.filled.plan,)

    def judge(self) -> None:
        self.acknowledged = []
        self.done = False
        super().judge()


class Pack(Add):
    """A pack of one plan."""

    def do(self) -> None:
        from tilewright.tuning_db.pack import write_pack

        with Store.open_read_only(self.path) as store:
            write_pack(store, store.plans(), self.folder / "served.pack")

    def judge(self) -> None:
        assert (self.folder / "served.pack").exists() == self.done
        assert not [path for path in self.folder.iterdir() if "partial" in path.name]
        if self.done:
            assert Reader.open(self.folder / "served.pack").plans_for("moe_gemm", "signature-1") == (self.filled.plan,)


class Export(Action):
    """Two studies as a journal."""

    def do(self) -> None:
        import optuna

        from tilewright.tuner.search.export import export_studies

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        studies = [optuna.create_study(study_name=name) for name in "ab"]
        for study in studies:
            study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        export_studies(studies, self.folder / "studies.log")

    def judge(self) -> None:
        names = [path.name for path in self.folder.iterdir()]
        assert names == (["studies.log"] if self.done else [])


class Study(Action):
    """The journal that a run is watched in."""

    def do(self) -> None:
        import optuna

        from tilewright.tuner.search.storage import open_storage, saying_where

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        open_storage.cache_clear()
        name = str(self.folder / "studies.log")
        with saying_where(name):
            study = optuna.create_study(storage=open_storage(name))
            for value in range(3):
                study.tell(study.ask({"x": optuna.distributions.IntDistribution(0, 9)}), value)

    def judge(self) -> None:
        self.do()


class Build(Action):
    """A kernel: source, compiler, linker and cache. A full disk is no fault of the kernel's."""

    def prepare(self) -> None:
        (self.folder / "tmp").mkdir()

    def do(self) -> None:
        from tilewright.codegen.backends.base import Source
        from tilewright.codegen.backends.cpp.builder import CppBuilder
        from tilewright.codegen.hardware.archs import native_arch

        os.environ["TMPDIR"] = str(self.folder / "tmp")
        builder = CppBuilder(native_arch(), directory=self.folder / "cache")  # type: ignore[arg-type]
        (build,) = builder.build_all([Source('extern "C" int entry() { return 7; }')])
        assert build.path is not None, build.message

    def judge(self) -> None:
        self.do()


class Temporary(Action):
    """Temporary files, where the folder for them is full."""

    def do(self) -> None:
        import tempfile

        from tilewright.codegen.backends.cpp.backend import CppBackend

        os.environ["TMPDIR"] = str(self.folder)
        tempfile.tempdir = None
        CppBackend().disassembly("host_so", Path(os.environ["FAILING_DISK_KERNEL"]).read_bytes())

    def judge(self) -> None:
        assert list(self.folder.iterdir()) == []


class Output(Add):
    """`tune show` with its output on the disk."""

    def prepare(self) -> None:
        super().prepare()
        with closing(sqlite3.connect(self.path)) as connection:
            connection.execute("DELETE FROM trials")  # their problems are none of a real op
            connection.commit()
        (self.folder / "shown").touch()

    def do(self) -> None:
        command = [sys.executable, "-m", "tilewright.tuner.cli", "show", "--json", "--db", str(self.path)]
        with (self.folder / "shown").open("w") as file:
            done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        if done.returncode:
            raise TilewrightError(done.stderr.strip())

    def judge(self) -> None:
        with Store.open(self.path) as store:
            assert store.check() == []
        assert not self.done or json.loads((self.folder / "shown").read_text())["plans"]


ACTIONS: dict[str, type[Action]] = {
    each.__name__: each for each in (Make, Add, Upgrade, Read, Pack, Export, Study, Build, Temporary, Output)
}


def attempt(make: Callable[[Path], Action], folder: Path, disk: Disk, writes: int, error: int) -> dict[str, object]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700, parents=True)
    action = make(folder)
    action.prepare()
    said, fault = "", ""
    disk.fail_after(writes, error)
    try:
        action.do()
    except TilewrightError as refused:
        said = str(refused)
    except BaseException as escaped:
        fault = repr(escaped)
    refused_writes = disk.mend()
    if not fault:
        try:
            action.done = not said
            action.judge()
        except BaseException as lost:
            fault = f"afterwards: {lost!r}"
    return {"writes": writes, "said": said, "fault": fault, "refused_writes": refused_writes}


def main() -> None:
    warnings.simplefilter("ignore")
    folder, error, *points = sys.argv[1:]
    disk = Disk()
    for point in points:
        name, _, numbers = point.partition(":")
        for number in map(int, numbers.split(",")):
            found = attempt(ACTIONS[name], Path(folder, name), disk, number, getattr(errno, error))
            print(json.dumps({"action": name, **found}), flush=True)


if __name__ == "__main__":
    main()
