"""Databases, packs, caches and recipes as somebody with bad intentions would make them: drawn by number, each another.

``python crafted.py FOLDER FIRST COUNT`` draws COUNT of them, lets the runtime and the commands read each, and prints a
JSON object when it begins with one and when it is done. A crash or a hang so shows which one it was.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "e2e"))  # of the kernels

import torch
from naive_kernels import COMPILER

from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.errors import TilewrightError
from tilewright.runtime import ServeOptions, TilewrightWarning, prepare
from tilewright.runtime.notices import forget_warnings
from tilewright.tuner.cli import main as tune
from tilewright.tuning_db.integrity import seal, sha256_hex
from tilewright.tuning_db.store import Store

SIGNATURE = MoeGemmSignature(stage="plain", experts=3, n=6, k=5)
ENDLESS = "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) "

Draw = random.Random


# What is drawn from


def _evil_source(canary: Path) -> str:
    return (
        "#include <fcntl.h>\n"
        f'__attribute__((constructor)) void f(void) {{ open("{canary}", O_CREAT | O_RDWR, 0600); }}\n'
        "int tilewright_abi_version(void) { f(); return 1; }\n"
        "int tilewright_moe_gemm(void *h, void *a) { f(); return 0; }\n"
        "int sqlite3_extension_init(void *a, void *b, void *c) { f(); return 0; }\n"
    )


def make_evil(path: Path, canary: Path) -> bytes:
    """A library whose being loaded leaves a trace."""
    assert COMPILER is not None
    command = [COMPILER, "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(path)]
    subprocess.run(command, input=_evil_source(canary), text=True, check=True)
    return path.read_bytes()


def make_sound(folder: Path) -> Path:
    """A database of a small run of the tuner."""
    path = folder / "tuning.db"
    problem = ",".join(f"{name}={getattr(SIGNATURE, name)}" for name in ("stage", "experts", "n", "k"))
    options = ["--tokens", "2,8", "--trials", "3", "--time", "20", "--probes", "0", "--threads", "2", "--seed", "1"]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        command = ["--arch", "native", "--op", "moe_gemm", "--problem", problem, *options, "--db", str(path)]
        tune(command)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM plans").fetchone()[0] > 0, said.getvalue()
        connection.execute("PRAGMA journal_mode = DELETE")
    return path


HUGE = "9" * 400
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**62, 2**63 - 1, -(2**63), 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 1e308, -1e308, 5e-324, float("inf"), float("-inf"), float("nan")),
    *("", "x", "rows", "tokens", "threads", "workspace", "sm_count", "expert_offsets", "weight", "out", "fp32", "int8"),
    *("\x1b]0;owned\x07\x1b[2J", "a\nb\r\nc", "\0", "\ud800", "%s%n", "../../../etc/passwd", HUGE, "x" * 100_000),
    *("(" * 400 + "1" + ")" * 400, "-" * 900 + "1", "1 // 0", "rows * " * 100 + "1", "rows // (rows - rows)", "abort"),
    *("9223372036854775807 * rows", "rows - 100", "rows if rows else 1", "__import__('os').system('id')", "exit"),
    *([], {}, [[]], [0], [None], {"a": 1}, ["x"] * 50, list(range(1000)), {"x": {"y": {"z": []}}}),
)
CELLS: tuple[Any, ...] = (
    *(None, 0, -1, 1, 2**63 - 1, -(2**63), 1e308, float("inf"), float("-inf"), "", "x", b"", b"\xff" * 10, HUGE),
    *("\x1b]0;owned\x07", "a\nb", "x" * 1_000_000, "[" * 100_000, "{", "[NaN]", "{}", "[]", "null", f"[{HUGE}]"),
    *(
        '{"a": Infinity}',
        '{"a": 1e999}',
        '"\\ud800"',
        "measured",
        "none",
        "ok",
        "device",
        "native",
        "{" + '"a":{' * 5000,
    ),
)
TABLES = ("runs", "devices", "artifacts", "kernels", "kernel_artifacts", "trials", "plans", "plan_entries")
SCRIPTS = (
    "DROP TABLE {table}",
    "ALTER TABLE {table} RENAME TO was; CREATE VIEW {table} AS SELECT * FROM was, was AS b, was AS c, was AS d",
    "ALTER TABLE {table} RENAME TO was; CREATE VIEW {table} AS " + ENDLESS + "SELECT was.* FROM was, c",
    "ALTER TABLE {table} RENAME TO was; CREATE VIEW {table} AS SELECT was.*, load_extension('{evil}') FROM was",
    "ALTER TABLE {table} RENAME TO was; CREATE VIEW {table} AS SELECT *, hex(zeroblob(900000000)) FROM was",
    "CREATE VIEW v AS SELECT load_extension('{evil}')",
    "CREATE TRIGGER t AFTER INSERT ON {table} BEGIN SELECT load_extension('{evil}'); END",
    "CREATE TRIGGER t AFTER INSERT ON trials BEGIN INSERT INTO trials SELECT * FROM trials; END",
    "ALTER TABLE {table} ADD COLUMN more TEXT AS (hex(zeroblob(100000000)))",
    "ALTER TABLE {table} ADD COLUMN more TEXT",
    "CREATE INDEX more ON {table} (hex(zeroblob(100)))",
    "CREATE TABLE sqlite_like (x)",
    "CREATE VIRTUAL TABLE more USING fts5(x)",
    "PRAGMA application_id = 7",
    "PRAGMA user_version = 99",
    "PRAGMA user_version = 1",
    "PRAGMA user_version = -1",
    "UPDATE tilewright_alembic_version SET version_num = '\x1b[31m' || char(10) || hex(zeroblob(1000))",
    "DELETE FROM tilewright_alembic_version",
    "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = replace(sql, 'TEXT', 'TEXT CHECK (1)')",
    "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET rootpage = 1 WHERE name = '{table}'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET rootpage = 3 WHERE type = 'table'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET name = char(10) || name WHERE name = '{table}'",
    "PRAGMA writable_schema = ON; UPDATE sqlite_schema SET sql = 'CREATE TABLE {table} (' WHERE name = '{table}'",
    "PRAGMA writable_schema = ON; DELETE FROM sqlite_schema WHERE name = '{table}'",
    "PRAGMA foreign_keys = OFF; DELETE FROM {table}",
)


# How files are crafted


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON document, itself left out."""
    inner = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    return [here for key, value in inner for here in ((*path, key), *places(value, (*path, key)))]


def mutate(draw: Draw, document: Any) -> Any:
    """A document with one to three places changed, gone, doubled or new."""
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = places(document)
        if not found:
            return copy.deepcopy(draw.choice(VALUES))
        path = draw.choice(found)
        owner = document
        for step in path[:-1]:
            owner = owner[step]
        way = draw.random()
        if way < 0.1:
            del owner[path[-1]]
        elif way < 0.2 and isinstance(owner, list):
            owner.insert(0, owner[path[-1]])
        elif way < 0.25 and isinstance(owner, dict):
            owner[draw.choice(("more", "kind", ""))] = copy.deepcopy(draw.choice(VALUES))
        elif way < 0.3:
            owner[path[-1]] = [owner[path[-1]]] * draw.choice((2, 40, 300))
        else:
            owner[path[-1]] = copy.deepcopy(draw.choice(VALUES))
    return document


DOCUMENTS = {
    "kernels": ("signature", "config", "recipe", "facts"),
    "plans": ("signature", "facts"),
    "trials": ("problem", "config", "samples_us"),
    "devices": ("facts",),
    "runs": ("versions",),
}


def reseal(connection: sqlite3.Connection) -> None:
    """Make the seals those of what is there, where it can be sealed at all."""
    connection.row_factory = sqlite3.Row
    for table, key, unsealed in (("kernels", "key", ("checked", "created_at")), ("plans", "id", ("created_at", "id"))):
        for row in connection.execute(f"SELECT rowid AS at, * FROM {table}").fetchall():
            try:
                record = {n: v for n, v in dict(row).items() if n not in ("at", "seal", *unsealed)}
                record |= {name: json.loads(record[name]) for name in DOCUMENTS[table]}
                if table == "kernels":
                    found = connection.execute(
                        "SELECT checksum FROM kernel_artifacts WHERE kernel_key = ? ORDER BY position", (row[key],)
                    )
                    record["artifacts"] = [each[0] for each in found]
                else:
                    record["batch_invariant"] = bool(record["batch_invariant"])
                    entries = "SELECT * FROM plan_entries WHERE plan_id = ? ORDER BY position"
                    record["entries"] = [
                        {n: v for n, v in dict(each).items() if n not in ("plan_id", "position")}
                        for each in connection.execute(entries, (row["id"],))
                    ]
                sealed = seal(record)
            except (ValueError, TypeError, RecursionError, UnicodeEncodeError):
                continue
            connection.execute(f"UPDATE {table} SET seal = ? WHERE rowid = ?", (sealed, row["at"]))


def craft_schema(draw: Draw, path: Path, evil: Path) -> str:
    script = draw.choice(SCRIPTS).format(table=draw.choice(TABLES), evil=evil)
    with closing(sqlite3.connect(path)) as connection, contextlib.suppress(sqlite3.Error):
        connection.executescript(script)
        connection.commit()
    return script[:100]


def craft_cells(draw: Draw, path: Path, evil: Path) -> str:
    del evil
    said = []
    with closing(sqlite3.connect(path)) as connection:
        for _ in range(draw.choice((1, 1, 2, 5))):
            table = draw.choice(TABLES)
            column = draw.choice([row[1] for row in connection.execute(f"PRAGMA table_info({table})")])
            value = draw.choice(CELLS)
            with contextlib.suppress(sqlite3.Error, UnicodeEncodeError):
                rows = [row[0] for row in connection.execute(f"SELECT rowid FROM {table}")]
                connection.execute(f'UPDATE {table} SET "{column}" = ? WHERE rowid = ?', (value, draw.choice(rows)))
                said.append(f"{table}.{column} = {value!r:.40}")
        reseal(connection)
        connection.commit()
    return "; ".join(said)


def craft_documents(draw: Draw, path: Path, evil: Path, only: str = "") -> str:
    del evil
    table = "kernels" if only else draw.choice(sorted(DOCUMENTS))
    column = only or draw.choice(DOCUMENTS[table])
    with closing(sqlite3.connect(path)) as connection:
        for at, text in connection.execute(f"SELECT rowid, {column} FROM {table}").fetchall():
            changed = mutate(draw, json.loads(text))
            with contextlib.suppress(UnicodeEncodeError):
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (json.dumps(changed), at))
        reseal(connection)
        connection.commit()
    return f"{table}.{column}: {json.dumps(changed)[:60]}"


def craft_recipes(draw: Draw, path: Path, evil: Path) -> str:
    return craft_documents(draw, path, evil, only="recipe")


def craft_pages(draw: Draw, path: Path, evil: Path) -> str:
    del evil
    content = bytearray(path.read_bytes())
    way = draw.random()
    if way < 0.15:
        content = content[: draw.randrange(len(content))]
    elif way < 0.3:
        first, second = (draw.randrange(len(content) // 4096) * 4096 for _ in range(2))
        content[first : first + 4096] = content[second : second + 4096]
    elif way < 0.4:
        content[:100] = draw.randbytes(100)
    else:
        for _ in range(draw.choice((1, 4, 50))):
            at = draw.randrange(len(content)) if draw.random() < 0.7 else draw.randrange(200)
            content[at] = draw.choice((0, 1, 127, 255, draw.randrange(256)))
    path.write_bytes(content)
    if draw.random() < 0.2:
        path.with_name(path.name + draw.choice(("-wal", "-journal", "-shm"))).write_bytes(draw.randbytes(5000))
    return f"pages of {len(content)} bytes"


def craft_artifacts(draw: Draw, path: Path, evil: Path) -> str:
    """Bytes that fit their checksum and are no kernel of ours, or not for here, or whose recipe names other entries."""
    del evil
    with closing(sqlite3.connect(path)) as connection:
        was, data = connection.execute("SELECT checksum, data FROM artifacts LIMIT 1").fetchone()
        changed = bytearray(data)
        way = draw.randrange(7)
        if way == 0:
            changed = changed[: draw.randrange(len(changed))]
        elif way == 1:
            changed[18] = draw.randrange(256)
        elif way == 2:
            changed[4:7] = draw.randbytes(3)
        elif way == 3:
            changed = bytearray(draw.randbytes(draw.choice((0, 3, 64, 5000))))
        elif way == 4:
            changed[32:64] = draw.randbytes(32)
        entry = draw.choice(("abort", "exit", "unique_kernel", "_init", "printf", "naive ", "")) if way == 5 else ""
        now = sha256_hex(bytes(changed)) if draw.random() < 0.9 else draw.choice(("../../evil", "", "0" * 64))
        connection.execute("UPDATE artifacts SET data = ?, checksum = ? WHERE checksum = ?", (bytes(changed), now, was))
        connection.execute("UPDATE kernel_artifacts SET checksum = ? WHERE checksum = ?", (now, was))
        for old, new in ((was, now), *((('"entry":"tilewright_moe_gemm"', f'"entry":"{entry}"'),) if entry else ())):
            connection.execute("UPDATE kernels SET recipe = replace(recipe, ?, ?)", (old, new))
        reseal(connection)
        connection.commit()
    return f"artifact, way {way} {entry}"


def craft_strangers(draw: Draw, path: Path, evil: Path) -> str:
    """A sound database whose kernels leave a trace, of somebody else or open to others."""
    data = evil.read_bytes()
    now = sha256_hex(data)
    with closing(sqlite3.connect(path)) as connection:
        was = connection.execute("SELECT checksum FROM artifacts LIMIT 1").fetchone()[0]
        connection.execute("UPDATE artifacts SET data = ?, checksum = ? WHERE checksum = ?", (data, now, was))
        connection.execute("UPDATE kernel_artifacts SET checksum = ? WHERE checksum = ?", (now, was))
        connection.execute("UPDATE kernels SET recipe = replace(recipe, ?, ?)", (was, now))
        reseal(connection)
        connection.commit()
    if os.geteuid() == 0 and draw.random() < 0.5:
        os.chown(path, 65534, 65534)
        return "of another user"
    path.chmod(draw.choice((0o666, 0o662, 0o620)))
    return "open to others"


def craft_cache(draw: Draw, path: Path, evil: Path) -> str:
    """What lies in the caches where kernels are looked for, under the names that are looked for."""
    with closing(sqlite3.connect(path)) as connection:
        checksums = [row[0] for row in connection.execute("SELECT checksum FROM artifacts")]
    cache_folder = path.parent / "cache"
    for name in ("artifacts", "builds", "manifests", "triton"):
        folder = cache_folder / name
        folder.mkdir(parents=True, mode=draw.choice((0o700, 0o777)), exist_ok=True)
        for checksum in checksums:
            place = folder / f"{checksum}.so"
            match draw.randrange(5):
                case 0:
                    os.mkfifo(place)
                case 1:
                    place.symlink_to("/dev/zero")
                case 2:
                    place.mkdir()
                case 3:
                    place.write_bytes(draw.randbytes(100))
                case _:
                    place.write_bytes(evil.read_bytes())
    return "caches"


WAYS: tuple[Callable[[Draw, Path, Path], str], ...] = (
    *(craft_schema, craft_schema, craft_cells, craft_cells, craft_documents, craft_documents, craft_recipes),
    *(craft_recipes, craft_recipes, craft_pages, craft_pages, craft_artifacts, craft_strangers, craft_cache),
)


# Who reads them


def read_by_runtime(path: Path) -> list[str]:
    """Faults: whatever is raised, and results that neither torch nor the kernel gives."""
    weight = torch.ones(3, 6, 5)
    x = torch.arange(20, dtype=torch.float32).view(4, 5)
    offsets = torch.tensor([0, 2, 2, 4], dtype=torch.int32)
    expected = torch.cat([x[a:b] @ w.T for w, a, b in zip(weight, offsets, offsets[1:], strict=False)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forget_warnings()
        call = prepare(weight, stage="plain", options=ServeOptions(database=path, threads=2))
        for _ in range(2):
            out = call(x, offsets, torch.full((4, 6), torch.nan))
        str(call.explain())
    faults = [f"a warning of {each.category.__name__}" for each in caught if each.category is not TilewrightWarning]
    faults += [f"several lines: {each.message}" for each in caught if "\n" in str(each.message)]
    if not torch.allclose(out, expected, rtol=1e-4):
        faults.append("wrong numbers")
    return faults


def read_by_command(draw: Draw, path: Path) -> list[str]:
    """Faults of one command that reads."""
    key = draw.choice(("", "a", "0"))
    commands = (
        ["show"],
        ["show", "--json"],
        ["show", key or "f"],
        ["compare"],
        ["compare", "--json"],
        ["compare", key, key + "b"],
        ["pack", str(path.with_name("new.pack"))],
        ["export", str(path.with_name("new.log"))],
        ["cost", "--model", "mixtral-8x7b", "--arch", "x86_64_avx2", "--price", "1"],
        ["doctor"] if draw.random() < 0.02 else ["show"],
    )
    command = [*draw.choice(commands), "--db", str(path)]
    if command[0] == "doctor":
        command = ["doctor"]
        os.environ["TILEWRIGHT_DB"] = str(path)
    said, shown = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        code = tune(command)
    lines = [line for line in said.getvalue().splitlines() if line and not line.startswith("tune: warning: ")]
    faults = []
    if code not in (0, 1) or (code == 1 and command[0] != "doctor" and len(lines) != 1):
        faults.append(f"{command[0]}: code {code} and {len(lines)} lines: {said.getvalue()[:300]}")
    if "\x1b" in said.getvalue() + shown.getvalue() and "--source" not in command:
        faults.append(f"{command[0]}: an escape sequence")
    return faults


def read_by_writer(path: Path) -> list[str]:
    """Faults of what opens it to write."""
    with contextlib.suppress(TilewrightError), Store.open(path, create=False) as store:
        store.check()
    return []


@cache
def _sound(folder: Path) -> tuple[Path, Path, Path]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    canary, evil = folder / "canary", folder / "evil.so"
    make_evil(evil, canary)
    return make_sound(folder), evil, canary


def attempt(folder: Path, number: int) -> dict[str, Any]:
    """Craft number ``number``, and let it be read."""
    sound, evil, canary = _sound(folder)
    draw = random.Random(number)
    place = folder / "drawn"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(mode=0o700)
    path = Path(shutil.copy(sound, place / draw.choice(("tuning.db", "served.pack"))))
    path.chmod(0o600)
    os.environ["TILEWRIGHT_CACHE"] = str(place / "cache")
    way = draw.choice(WAYS)
    what = way(draw, path, evil)
    faults, times = [], {}
    readers: dict[str, Callable[[], list[str]]] = {
        "runtime": lambda: read_by_runtime(path),
        "command": lambda: read_by_command(draw, path),
        "writer": lambda: read_by_writer(path),
    }
    for name, read in readers.items():
        if name == "writer" and number % 4:
            continue
        begin = time.process_time()
        try:
            faults += [f"{name}: {fault}" for fault in read()]
        except BaseException as error:
            at = error.__traceback__
            while at and at.tb_next:
                at = at.tb_next
            where = f"{at.tb_frame.f_code.co_filename}:{at.tb_lineno}" if at else ""
            faults.append(f"{name}: {error!r:.300} at {where}")
        times[name] = time.process_time() - begin
        if canary.exists():
            faults.append(f"{name}: foreign code ran")
            canary.unlink()
    if max(times.values()) > 10:
        faults.append(f"it took {times}")
    return {"number": number, "way": way.__name__, "what": what, "faults": faults, "slowest_s": max(times.values())}


def main() -> None:
    folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(2)
    for number in range(first, first + count):
        print(json.dumps({"begins": number}), flush=True)
        print(json.dumps(attempt(folder, number)), flush=True)


if __name__ == "__main__":
    main()
