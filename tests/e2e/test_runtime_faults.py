"""What the runtime does when something is missing, damaged, untrusted or made elsewhere: right results, one warning."""

import errno
import itertools
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import warnings
from contextlib import closing
from dataclasses import asdict, replace

import pytest
import torch
from naive_kernels import build, needs_compiler, on_other_arch, store_plan
from patience import PATIENCE_S

from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.recipe.model import Guard, TensorSpec
from tilewright.errors import TilewrightError
from tilewright.runtime import PreparedGemm, ServeOptions, TilewrightWarning, prepare
from tilewright.runtime.notices import forget_warnings
from tilewright.runtime.serve.devices import Host
from tilewright.runtime.serve.plans import is_planned, resolve
from tilewright.tuning_db.store import Store

pytestmark = needs_compiler

SIGNATURE = MoeGemmSignature(stage="plain", experts=3, n=6, k=5)
OFFSETS = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
_salts = itertools.count(1)


@pytest.fixture(autouse=True)
def _own_places(tmp_path, monkeypatch):
    """Every test has its own cache and no database but the one it makes."""
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TILEWRIGHT_DB", str(tmp_path / "none.db"))
    forget_warnings()


@pytest.fixture
def weight():
    return torch.randn(3, 6, 5)


@pytest.fixture
def database(tmp_path):
    """A database whose kernel doubles its results, so that a test sees who computed them."""
    return store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, fresh_kernel())])


def fresh_kernel(**options):
    """A kernel whose bytes this process has never loaded."""
    return build(SIGNATURE, mark=2.0, salt=next(_salts), **options)


def compute(prepared: PreparedGemm, rows=4):
    x = torch.arange(rows * 5, dtype=torch.float32).reshape(rows, 5) / 7
    offsets = torch.tensor([0, min(2, rows), min(2, rows), rows], dtype=torch.int32)
    return x, offsets, prepared(x, offsets, torch.full((rows, 6), torch.nan))


def by_torch(x, weight, offsets):
    return torch.cat([x[a:b] @ w.T for w, a, b in zip(weight, offsets, offsets[1:], strict=False)])


def assert_served_by_torch(weight, database, said):
    """Right results from torch, and the warning ``said`` once however often the weight is prepared."""
    with pytest.warns(TilewrightWarning, match=said) as caught:
        first = prepare(weight, stage="plain", options=ServeOptions(database=database, threads=2))
    assert len(caught) == 1
    assert caught[0].filename == __file__
    for prepared in (first, prepare(weight, stage="plain", options=ServeOptions(database=database, threads=2))):
        x, offsets, out = compute(prepared)
        torch.testing.assert_close(out, by_torch(x, weight, offsets))
    assert SIGNATURE.describe() in str(caught[0].message)
    assert "torch: " in str(prepared.explain())
    assert prepared.memory_bytes == 0


def assert_served_by_kernel(weight, database):
    prepared = prepare(weight, stage="plain", options=ServeOptions(database=database, threads=2))
    x, offsets, out = compute(prepared)
    torch.testing.assert_close(out, 2 * by_torch(x, weight, offsets))
    return prepared


def edit(database, statement, *values):
    """Change the file behind the store's back, with everything in one file."""
    with closing(sqlite3.connect(database, isolation_level=None)) as connection:
        connection.execute(statement, values)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def with_timing(database, timing):
    """Make the database's only plan one whose times were not measured."""
    with Store.open(database) as store:
        (plan,) = store.plans()
        with closing(sqlite3.connect(database)) as connection, connection:
            connection.execute("DELETE FROM plan_entries")
            connection.execute("DELETE FROM plans")
        assert store.put_plan(replace(plan, timing=timing))
        return plan


def test_an_artifact_of_a_kind_that_nothing_launches_is_not_loaded(weight, database):
    edit(database, "UPDATE artifacts SET kind = 'hsaco'")
    assert_served_by_torch(weight, database, "nothing here launches 'hsaco' artifacts, only host_so, cubin")


def test_a_plan_that_was_only_predicted_for_this_machine_serves_nothing(weight, database):
    measured = with_timing(database, "predicted")
    assert not is_planned(SIGNATURE, ServeOptions(database=database))
    assert_served_by_torch(weight, database, "were predicted, and none was measured here; tune here")
    with Store.open(database) as store:
        # A predicted one that says to be faster changes nothing.
        faster = tuple(replace(entry, median_us=1.0) for entry in measured.entries)
        store.put_plan(replace(measured, timing="predicted", entries=faster))
        store.put_plan(measured)
    assert is_planned(SIGNATURE, ServeOptions(database=database))
    resolution = resolve(SIGNATURE, Host(), ServeOptions(threads=2, database=database))
    assert resolution.plan == measured
    assert resolution.kernels


def test_the_kernel_is_served_without_any_warning(weight, database):
    assert_served_by_kernel(weight, database)


def test_no_database(weight, tmp_path):
    assert_served_by_torch(weight, tmp_path / "absent.db", "there is no database .*absent.db; run `tune`")


def test_no_database_where_the_environment_says(weight):
    assert_served_by_torch(weight, None, "there is no database .*none.db")


def test_database_named_by_the_environment(weight, database, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_DB", f"sqlite:///{database}")
    assert_served_by_kernel(weight, None)


def test_database_on_a_server(weight):
    assert_served_by_torch(weight, "postgresql://host/db", "kernels are served from SQLite files")


def test_no_plan_for_this_signature(weight, tmp_path):
    other = replace(SIGNATURE, n=8)
    database = store_plan(tmp_path / "tuning.db", other, [(None, build(other))])
    assert_served_by_torch(weight, database, "holds no plan for it")


def test_plan_from_another_cpu(weight, tmp_path):
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, fresh_kernel())], device_key="x86_64/Other-9/1k")
    assert_served_by_torch(weight, database, r"made on other devices \(x86_64/Other-9/1k\)")


def test_kernel_for_another_arch(weight, tmp_path):
    elsewhere = on_other_arch(fresh_kernel(), "sm_90")
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, elsewhere)])
    assert_served_by_torch(weight, database, "was built for sm_90, which this CPU does not run")


def test_flipped_bit_in_an_artifact(weight, database):
    with closing(sqlite3.connect(database)) as connection:
        data = bytearray(connection.execute("SELECT data FROM artifacts").fetchone()[0])
    data[len(data) // 2] ^= 1
    edit(database, "UPDATE artifacts SET data = ?", bytes(data))
    assert_served_by_torch(weight, database, "artifact .* is damaged")


def test_artifact_that_is_gone(weight, database):
    edit(database, "PRAGMA foreign_keys = OFF")
    edit(database, "DELETE FROM artifacts")
    assert_served_by_torch(weight, database, "served by plain torch for sizes above 0: ")


@pytest.mark.parametrize("left", [0, 100, 4096 * 3 + 17])
def test_truncated_database(weight, database, left):
    edit(database, "SELECT 1")
    os.truncate(database, left)
    assert_served_by_torch(weight, database, "is empty|is damaged|is not a database")


def test_database_that_others_can_write(weight, database):
    database.chmod(0o666)
    assert_served_by_torch(weight, database, "can be written by others .*chmod go-w")


def test_database_of_a_newer_release(weight, database):
    edit(database, "PRAGMA user_version = 4711")
    assert_served_by_torch(weight, database, "written by a newer tilewright .* upgrade tilewright")


def test_kernel_that_speaks_another_abi(weight, tmp_path):
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, fresh_kernel(abi=2))])
    assert_served_by_torch(weight, database, "speaks ABI version 2, this tilewright 1")


MORE_TENSORS = [asdict(each) for each in (*SIGNATURE.tensors(), TensorSpec("more", "fp32", (1,)))]


def tampered(**changes):
    """A kernel whose recipe says something else than its code."""
    built = fresh_kernel()
    return replace(built, record=replace(built.record, recipe={**built.record.recipe, **changes}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"abi_version": 9}, "for ABI version 9"),
        ({"format_version": 9}, "has recipe format 9"),
        ({"tensors": MORE_TENSORS}, "takes other tensors"),
        ({"tensors": []}, "kernel .* cannot be called: .*picks by the size"),
        ({"size_name": "tokens"}, "kernel .* cannot be called: .*picks by the size"),
        ({"guards": [{"unknown": 1}]}, r"cannot be called: .*Recipe.guards\[0\]: the field 'expression' is missing"),
        ({"guards": [{"expression": "rows", "multiple": 0}]}, "wants 'rows' to be a multiple of 0"),
        ({"weight_layout": {"form": "rows", "precision": "int8", "nibbles": "none"}}, "is for GPUs; tune for this CPU"),
    ],
)
def test_recipe_that_this_release_does_not_know(weight, tmp_path, changes, said):
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, tampered(**changes))])
    assert_served_by_torch(weight, database, said)


@pytest.mark.parametrize("name", ["gone", "abort", "unique_kernel"])
def test_entry_that_is_no_function_of_the_artifact(weight, tmp_path, name):
    built = fresh_kernel()
    launches = [{**launch, "entry": name} for launch in built.record.recipe["launches"]]
    built = replace(built, record=replace(built.record, recipe={**built.record.recipe, "launches": launches}))
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, built)])
    assert_served_by_torch(weight, database, f"exports no '{name}'")


def test_only_the_damaged_kernels_sizes_go_to_torch(weight, tmp_path):
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(2, fresh_kernel(abi=2)), (None, fresh_kernel())])
    with pytest.warns(TilewrightWarning, match="for sizes 1 to 2: .*ABI version 2"):
        prepared = prepare(weight, stage="plain", options=ServeOptions(database=database))
    for rows, mark in ((1, 1), (2, 1), (3, 2)):
        x, offsets, out = compute(prepared, rows)
        torch.testing.assert_close(out, mark * by_torch(x, weight, offsets))


def test_kernel_of_another_layout_than_its_plan(weight, tmp_path):
    entries = [(2, fresh_kernel(layout=WeightLayout(8))), (None, fresh_kernel(layout=WeightLayout(16)))]
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, entries)
    with pytest.warns(TilewrightWarning, match="in another layout than the one of the plan"):
        prepared = prepare(weight, stage="plain", options=ServeOptions(database=database))
    for rows, mark in ((2, 2), (3, 1)):
        x, offsets, out = compute(prepared, rows)
        torch.testing.assert_close(out, mark * by_torch(x, weight, offsets))


@pytest.fixture
def no_memory_files(monkeypatch):
    """As with vm.memfd_noexec=2: kernels are loaded from the cache."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", refuse)


def test_without_a_cache_kernels_serve_from_memory(weight, database, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    assert_served_by_kernel(weight, database)


@pytest.mark.usefixtures("no_memory_files")
def test_cache_that_others_can_write(weight, database, tmp_path):
    (tmp_path / "cache" / "artifacts").mkdir(parents=True)
    (tmp_path / "cache" / "artifacts").chmod(0o777)
    assert_served_by_torch(weight, database, "artifacts can be written by others")


@pytest.mark.usefixtures("no_memory_files")
def test_a_folder_above_the_cache_that_others_can_write(weight, database, tmp_path, monkeypatch):
    above = tmp_path / "shared"
    above.mkdir()
    above.chmod(0o777)
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(above / "cache"))
    assert_served_by_torch(weight, database, "shared can be written by others")


@pytest.mark.usefixtures("no_memory_files")
def test_a_cache_made_under_any_umask_is_private(weight, database, tmp_path):
    before = os.umask(0)
    try:
        assert_served_by_kernel(weight, database)
    finally:
        os.umask(before)
    made = [tmp_path / "cache", *(tmp_path / "cache").rglob("*")]
    assert len(made) == 3
    assert all(path.stat().st_mode & 0o077 == 0 for path in made)


@pytest.mark.usefixtures("no_memory_files")
def test_cache_that_cannot_be_made(weight, database, tmp_path):
    (tmp_path / "cache").write_text("a file is in the way")
    assert_served_by_torch(weight, database, r"cannot be loaded from .*; set \$TILEWRIGHT_CACHE")


@pytest.mark.usefixtures("no_memory_files")
def test_damaged_cache_is_mended(weight, database, tmp_path):
    with closing(sqlite3.connect(database)) as connection:
        (checksum,) = connection.execute("SELECT checksum FROM artifacts").fetchone()
    directory = tmp_path / "cache" / "artifacts"
    directory.mkdir(parents=True, mode=0o700)
    (directory / f"{checksum}.so").write_bytes(b"torn")
    assert_served_by_kernel(weight, database)
    assert [path.name for path in directory.iterdir()] == [f"{checksum}.so"]


@pytest.mark.usefixtures("no_memory_files")
def test_extracted_files_are_private(weight, database, tmp_path):
    assert_served_by_kernel(weight, database)
    directory = tmp_path / "cache" / "artifacts"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert [path.stat().st_mode & 0o777 for path in directory.iterdir()] == [0o600]


def test_failed_guard(weight, tmp_path):
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, fresh_kernel(guards=(Guard("rows", 2),)))])
    prepared = assert_served_by_kernel(weight, database)
    with pytest.warns(TilewrightWarning, match="needs rows to be a multiple of 2") as caught:
        results = [compute(prepared, rows=3) for _ in range(2)]
    assert len(caught) == 1
    for x, offsets, out in results:
        torch.testing.assert_close(out, by_torch(x, weight, offsets))
    assert_served_by_kernel(weight, database)


def test_failed_guard_after_the_weight_was_let_go(tmp_path):
    kernel = fresh_kernel(guards=(Guard("rows", 2),), layout=WeightLayout(4))
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, kernel)])
    weight = torch.randn(3, 6, 5)
    prepared = prepare(weight, stage="plain", options=ServeOptions(database=database, keep_weights=False))
    kept = weight.clone()
    weight.zero_()
    with pytest.warns(TilewrightWarning):
        x, offsets, out = compute(prepared, rows=3)
    torch.testing.assert_close(out, by_torch(x, kept, offsets))


def test_strided_input(weight, database):
    prepared = assert_served_by_kernel(weight, database)
    x = torch.randn(5, 4).T
    with pytest.warns(TilewrightWarning):
        out = prepared(x, OFFSETS, torch.empty(4, 6))
    torch.testing.assert_close(out, by_torch(x, weight, OFFSETS))


def test_kernel_that_reports_a_failure(weight, tmp_path):
    database = store_plan(tmp_path / "tuning.db", SIGNATURE, [(None, fresh_kernel(fail=True))])
    prepared = prepare(weight, stage="plain", options=ServeOptions(database=database))
    with pytest.raises(TilewrightError, match="7"):
        compute(prepared)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: torch.zeros(4, 5, dtype=torch.float64)}, "x has dtype torch.float64|x .*float64"),
        ({0: torch.zeros(4, 9)}, "x .*shape"),
        ({0: torch.zeros(4, 5, device="meta")}, "x .*meta"),
        ({0: None}, "x .*None"),
        ({1: torch.tensor([0, 2, 2, 3], dtype=torch.int32)}, "expert_offsets"),
        ({1: torch.tensor([0, 3, 2, 4], dtype=torch.int32)}, "expert_offsets"),
        ({1: OFFSETS.long()}, "expert_offsets .*int64"),
        ({2: torch.zeros(3, 6)}, "out|rows"),
    ],
)
@pytest.mark.parametrize("with_kernel", [True, False])
def test_tensors_that_do_not_fit_are_named(weight, database, with_kernel, change, said):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TilewrightWarning)
        prepared = prepare(weight, stage="plain", options=ServeOptions(database=database if with_kernel else None))
    tensors = [torch.zeros(4, 5), OFFSETS, torch.zeros(4, 6)]
    for position, tensor in change.items():
        tensors[position] = tensor
    with pytest.raises(TilewrightError, match=said):
        prepared(*tensors)


def test_many_threads_prepare_and_call_at_once(weight, database):
    failures = []
    start = threading.Barrier(8)

    def work():
        try:
            start.wait()
            for _ in range(5):
                assert_served_by_kernel(weight, database)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def in_forked_child(work):
    """Run ``work`` in a forked child and return its exit status; a child that hangs is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:  # the child must not go on with the parent's tests
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def test_forked_child_completes_with_kernels_and_with_torch(weight, database):
    torch.randn(512, 512) @ torch.randn(512, 512)  # torch's pool is running
    prepared = assert_served_by_kernel(weight, database)
    large = torch.randn(2, 512, 512)
    with pytest.warns(TilewrightWarning, match="no plan"):
        plain = prepare(large, stage="plain", options=ServeOptions(database=database))
    offsets = torch.tensor([0, 256, 512], dtype=torch.int32)

    def work():
        compute(prepared)
        assert_served_by_kernel(weight, database)
        out = plain(torch.ones(512, 512), offsets, torch.empty(512, 512))
        assert torch.isfinite(out).all()

    assert in_forked_child(work) == 0


def test_fork_while_other_threads_prepare(weight, database):
    # What is asserted is that our locks survive the fork. No plain torch product runs beside it: torch's own locks do
    # not, so a child that needs one that another thread held would wait forever, whatever the runtime does.
    x, offsets, _ = compute(prepare(weight, stage="plain", options=ServeOptions(database=database, threads=2)))
    expected = (2 * by_torch(x, weight, offsets)).tolist()
    stop = threading.Event()

    def serve():
        prepared = prepare(weight, stage="plain", options=ServeOptions(database=database, threads=2))
        out = prepared(x, offsets, torch.empty(len(expected), len(expected[0])))
        assert out.tolist() == [pytest.approx(row, rel=1e-4, abs=1e-5) for row in expected]

    def prepare_forever():
        while not stop.is_set():
            serve()

    threads = [threading.Thread(target=prepare_forever) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        outcomes = [in_forked_child(serve) for _ in range(5)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert outcomes == [0] * 5


def test_served_where_no_compiler_is_installed(weight, database, tmp_path):
    torch.save(weight, tmp_path / "weight.pt")
    script = """
import sys, torch
import tilewright.runtime as runtime
weight = torch.load(sys.argv[1])
x, offsets = torch.ones(1, 5), torch.tensor([0, 1, 1, 1], dtype=torch.int32)
out = runtime.grouped_gemm(x, weight, offsets, options=runtime.ServeOptions(database=sys.argv[2]))
torch.testing.assert_close(out, 2 * x @ weight[0].T)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "CXX")} | {"PATH": ""}
    command = [sys.executable, "-W", "error", "-c", script, str(tmp_path / "weight.pt"), str(database)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
