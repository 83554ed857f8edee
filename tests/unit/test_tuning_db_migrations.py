"""Every schema version that was ever released is stored as a small database; each must keep every row when upgraded."""

import json
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from tuning_db_samples import DEVICE, SIGNATURE, artifact, failed_trial, kernel, plan, trial

from tilewright.codegen.numbers.layouts import RowLayout, WeightLayout
from tilewright.codegen.recipe.model import Argument, Guard, Launch, Recipe, TensorSpec
from tilewright.errors import TilewrightError
from tilewright.tuning_db import migrations
from tilewright.tuning_db.connection import open_sqlite
from tilewright.tuning_db.integrity import DamagedDatabase, seal
from tilewright.tuning_db.migrations import VERSION_TABLE, upgrade_database
from tilewright.tuning_db.models import Base
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.records import Outcome, PlanEntry
from tilewright.tuning_db.schema import APPLICATION_ID, SCHEMA_VERSION
from tilewright.tuning_db.store import Store

STORED = sorted((Path(__file__).parents[1] / "data" / "databases").glob("v*.db"))


def rows(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Every row of every table but Alembic's own."""
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        tables = connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name").fetchall()
        return {
            table: [dict(row) for row in connection.execute(f'SELECT * FROM "{table}" ORDER BY rowid')]
            for (table,) in tables
            if table != VERSION_TABLE
        }


def test_there_is_a_stored_database_of_every_version() -> None:
    assert [path.stem for path in STORED] == [f"v{version}" for version in range(1, SCHEMA_VERSION + 1)]
    versions = Path(migrations.__file__).parent / "versions"
    assert len(list(versions.glob("v[0-9]*.py"))) == SCHEMA_VERSION


@pytest.mark.parametrize("stored", STORED, ids=lambda path: path.stem)
def test_opening_an_old_database_keeps_every_row(stored: Path, tmp_path: Path) -> None:
    path = tmp_path / "copy.db"
    shutil.copyfile(stored, path)
    before = rows(path)
    assert all(before.values()), "a stored database has rows in every table"

    with Store.open(path, create=False) as store:
        assert store.check() == []
        (run,) = store.runs()
        failures = (failed_trial(run.id, each) for each in Outcome if each is not Outcome.OK)
        trials = enumerate((trial(run.id), *failures), start=1)
        assert store.trials() == [replace(each, id=number) for number, each in trials]
        stored_kernel = kernel(artifact(), artifact(b"a second object"))
        assert store.kernels() == [stored_kernel]
        stored_plan = plan(stored_kernel.key) if before["plans"][0].get("facts") else plan(stored_kernel.key, facts={})
        assert store.plans() == [stored_plan]
        assert store.devices() == [DEVICE]
    assert {table: len(found) for table, found in rows(path).items()} == {
        table: len(found) for table, found in before.items()
    }
    reader = Reader.open(path)
    assert reader.plans_for("moe_gemm", "signature-1") == (stored_plan,)
    assert reader.kernel(stored_kernel.key) == stored_kernel


RECIPE = Recipe(
    tensors=(TensorSpec("x", "fp32", ("tokens", 64), values="finite"), TensorSpec("w", "fp32", (4, 8, 64), "weight")),
    launches=(Launch("c" * 64, "run", (Argument("tensor", "x"), Argument("size", "tokens"))),),
    size_name="tokens",
    workspace_bytes="tokens * 4",
    guards=(Guard("tokens", 2),),
    weight_layout=WeightLayout(16, halves=2, run=8),
    format_version=2,
)


def recipe_of_format_1() -> dict[str, Any]:
    """``RECIPE`` as the first release wrote it: with the names of that time, and without what came later."""
    return {
        "tensors": [
            {"name": "x", "dtype": "fp32", "dims": ["tokens", 64], "role": "input", "values": "finite"},
            {"name": "w", "dtype": "fp32", "dims": [4, 8, 64], "role": "weight", "optional": False, "bound": ""},
        ],
        "launches": [
            {
                "artifact": "c" * 64,
                "entry": "run",
                "arguments": [{"kind": "tensor", "source": "x"}, {"kind": "size", "source": "tokens"}],
                "grid": [],
                "block": [],
                "cluster": [],
                "shared_memory_bytes": "0",
                "hidden_arguments": 0,
            }
        ],
        "dynamic_size": "tokens",
        "workspace_bytes": "tokens * 4",
        "workspace_zeroed": False,
        "guards": [{"expression": "tokens", "multiple": 2}],
        "weight_layout": {"columns": 16, "halves": 2, "run": 8, "dtype": "fp32", "scales": ""},
        "abi_version": 1,
        "format_version": 1,
    }


def kernel_of_version_4(**changes: Any) -> dict[str, Any]:
    sealed = {
        "key": "e" * 64,
        "op": "moe_gemm",
        "signature_key": "signature-1",
        "signature": SIGNATURE,
        "template": "cpu_blocked",
        "config": {"template": "cpu_blocked", "rows": 4, "split": None},
        "arch": "x86_64",
        "source": "// source",
        "recipe": recipe_of_format_1(),
        "toolchain": "clang",
        "facts": {"spills": 0},
        **changes,
    }
    enveloped = {name: {"version": 1, "value": sealed[name]} for name in ("recipe", "facts")}
    return {
        **sealed,
        **enveloped,
        "checked": "device",
        "created_at": 1.0,
        "seal": seal({**sealed, "artifacts": []}),
    }


def plan_of_version_4(**changes: Any) -> dict[str, Any]:
    probed = {"sizes": [3], "mended": [{"tokens": 3, "by": "torch"}], "slower": []}
    sealed = {
        "op": "gating",
        "signature_key": "signature-3",
        "signature": SIGNATURE,
        "device_key": DEVICE.key,
        "threads": 2,
        "model": "",
        "layout": "",
        "timing": "measured",
        "checked": "device",
        "precision": "int8",
        "error": 0.5,
        "facts": {"probed": probed},
    }
    entries = [{"max_tokens": 4, "kernel_key": None, "median_us": 1.5, "default_us": None, "tuned_tokens": 4}]
    facts = {"version": 1, "value": sealed["facts"]}
    found = {**sealed, "facts": facts, "batch_invariant": False, "created_at": 1.0}
    return {**found, "seal": seal({**sealed, "entries": entries}), **changes}


def insert(path: Path, table: str, row: dict[str, Any]) -> None:
    values = {name: json.dumps(value) if isinstance(value, dict | list) else value for name, value in row.items()}
    with closing(sqlite3.connect(path)) as connection, connection:
        names, marks = ", ".join(values), ", ".join("?" for _ in values)
        connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values()))


@pytest.fixture
def version_4(tmp_path: Path) -> Path:
    path = tmp_path / "version 4.db"
    shutil.copyfile(STORED[3], path)
    return path


def test_a_kernel_of_an_old_recipe_is_as_one_of_today(version_4: Path) -> None:
    insert(version_4, "kernels", kernel_of_version_4())
    with Store.open(version_4) as store:
        assert store.check() == []
    found = Reader.open(version_4).kernel("e" * 64)
    assert Recipe.from_dict(found.recipe) == RECIPE
    assert found.recipe.keys() == RECIPE.to_dict().keys()
    assert found.config == {"template": "cpu_blocked", "rows": 4}
    assert found.facts == {"spills": 0}


def test_a_layout_of_rows_keeps_its_kind(version_4: Path) -> None:
    layout = {"precision": "int8", "form": "rows"}
    insert(version_4, "kernels", kernel_of_version_4(recipe={**recipe_of_format_1(), "weight_layout": layout}))
    Store.open(version_4).close()
    assert Recipe.from_dict(Reader.open(version_4).kernel("e" * 64).recipe).weight_layout == RowLayout("int8")


def test_the_probes_of_an_old_plan_speak_of_sizes(version_4: Path) -> None:
    insert(version_4, "plans", {**plan_of_version_4(), "id": 7})
    entry = {"max_tokens": 4, "kernel_key": None, "median_us": 1.5, "default_us": None, "tuned_tokens": 4}
    insert(version_4, "plan_entries", {"plan_id": 7, "position": 0, **entry})
    with Store.open(version_4) as store:
        assert store.check() == []
    (found,) = Reader.open(version_4).plans_for("gating", "signature-3")
    assert found.entries == (PlanEntry(4, None, 1.5, None, 4),)
    assert found.facts["probed"] == {"sizes": [3], "mended": [{"size": 3, "by": "torch"}], "slower": []}


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE kernels SET source = source || ' ' WHERE key = 'eeee'",
        "UPDATE kernels SET recipe = replace(recipe, 'tokens * 4', 'tokens * 5') WHERE key = 'eeee'",
        "UPDATE kernels SET recipe = 'no json' WHERE key = 'eeee'",
        "UPDATE kernels SET config = '[]' WHERE key = 'eeee'",
        "UPDATE kernels SET facts = json_set(facts, '$.version', 2) WHERE key = 'eeee'",
        "UPDATE plan_entries SET max_tokens = 17 WHERE position = 0",
        "UPDATE plans SET facts = replace(facts, '1.25', '1.5')",
    ],
)
def test_what_was_damaged_before_is_refused_after(version_4: Path, damage: str) -> None:
    insert(version_4, "kernels", kernel_of_version_4(key="eeee"))
    with closing(sqlite3.connect(version_4)) as connection, connection:
        assert connection.execute(damage).rowcount == 1
    with Store.open(version_4) as store:
        assert len(store.check()) == 1
    with pytest.raises(DamagedDatabase):
        Reader.open(version_4).kernel("eeee") if "kernels" in damage else Reader.open(version_4).plans_for(
            "moe_gemm", "signature-1"
        )


def test_old_trials_lose_the_knobs_of_other_templates(version_4: Path) -> None:
    with closing(sqlite3.connect(version_4)) as connection, connection:
        connection.execute("UPDATE trials SET config = json_set(config, '$.split', NULL) WHERE id = 1")
        assert '"split":null' in connection.execute("SELECT config FROM trials WHERE id = 1").fetchone()[0]
    with Store.open(version_4) as store:
        assert store.trials(limit=1)[0].config == trial("").config


def test_the_migrations_make_the_models(tmp_path: Path) -> None:
    Store.open(tmp_path / "new.db").close()
    engine = create_engine(f"sqlite:///{tmp_path}/new.db")
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    engine.dispose()


def test_a_new_database_says_what_it_is(tmp_path: Path) -> None:
    Store.open(tmp_path / "new.db").close()
    with closing(sqlite3.connect(tmp_path / "new.db")) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert connection.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_migration_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "new.db"
    database = open_sqlite(path, create=True)

    def fail_after_upgrading(session: Session) -> None:
        upgrade_database(session.connection())
        assert session.execute(text("PRAGMA user_version")).scalar() == SCHEMA_VERSION
        raise RuntimeError("the machine went down")

    with pytest.raises(RuntimeError):
        database.write(fail_after_upgrading)
    database.close()
    assert rows(path) == {}
    with pytest.raises(TilewrightError, match="is empty"):
        Reader.open(path)
    with Store.open(path) as store:
        assert store.counts().trials == 0


def test_a_database_that_names_two_versions_of_itself_is_damaged(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "tuning.db"
    with Store.open(path):
        pass
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO tilewright_alembic_version VALUES ('0001')")
    with pytest.raises(TilewrightError, match=r"is damaged \(it names 2 versions of itself"):
        Store.open(path)
