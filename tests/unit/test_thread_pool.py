"""Threads of a parallel region: apart from each other, wherever the system had put them when it began."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.runtime.calls.extension import native_module

COMPILER = shutil.which(os.environ.get("CC", "cc"))
CORES = sorted(os.sched_getaffinity(0))

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C compiler to build a thread pool with"),
    pytest.mark.skipif(native_module() is None, reason="the extension was not built"),
    pytest.mark.skipif(len(CORES) < 2, reason="threads need two cores to be apart"),
]

# A pool in the place of GOMP_parallel, whose second thread begins on the core of the first, as the system may wake one.
POOL = r"""
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

static void (*body)(void *);
static void *data;
static cpu_set_t allowed;
static _Atomic int done, second_began;
int second_core, second_may_use, second_began_within_first;

static void *second(void *unused) {
    sched_setaffinity(0, sizeof allowed, &allowed);
    second_began = 1;
    body(data);
    second_core = sched_getcpu();
    cpu_set_t now;
    sched_getaffinity(0, sizeof now, &now);
    second_may_use = CPU_COUNT(&now);
    return unused;
}

void parallel(void (*given)(void *), void *argument, unsigned threads, unsigned flags) {
    pthread_t thread;
    body = given, data = argument;
    CPU_ZERO(&allowed);
    CPU_SET(FIRST, &allowed), CPU_SET(OTHER, &allowed);
    pthread_create(&thread, 0, second, 0);
    given(argument);
    second_began_within_first = second_began;
    pthread_join(thread, 0);
}

int team_size(void) { return 2; }
"""

RUN = """
import ctypes, json, os, sys
import numpy as np
from tilewright.codegen.numbers.layouts import WeightLayout
from tilewright.runtime.calls.extension import native_module
from tilewright.runtime.weights.packing import pack_array
path, first = sys.argv[1], int(sys.argv[2])
pool = ctypes.CDLL(path)
address = lambda name: ctypes.cast(getattr(pool, name), ctypes.c_void_p).value
native_module().set_pool(address("parallel"), address("team_size") if sys.argv[3] == "known" else 0)
os.sched_setaffinity(0, {first})
weight, packed = np.arange(32, dtype="f4").reshape(1, 8, 4), np.empty((1, 1, 4, 8), "f4")
pack_array(weight, WeightLayout(8), packed, 2)
assert (packed[0, 0] == weight[0].T).all()
print(json.dumps({name: ctypes.c_int.in_dll(pool, name).value
                  for name in ("second_core", "second_may_use", "second_began_within_first")}))
"""


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert COMPILER is not None
    folder = tmp_path_factory.mktemp("pool")
    source, built = folder / "pool.c", folder / "pool.so"
    source.write_text(POOL)
    cores = [f"-DFIRST={CORES[0]}", f"-DOTHER={CORES[1]}"]
    subprocess.run([COMPILER, "-shared", "-fPIC", "-pthread", *cores, str(source), "-o", str(built)], check=True)
    return built


def run_on(pool: Path, team_size: str) -> dict[str, int]:
    command = [sys.executable, "-c", RUN, str(pool), str(CORES[0]), team_size]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_a_thread_that_begins_on_the_core_of_another_gets_in_at_once_and_moves_away(pool: Path) -> None:
    found = run_on(pool, "known")
    assert found == {"second_core": CORES[1], "second_may_use": 2, "second_began_within_first": 1}


def test_a_pool_that_tells_no_team_size_is_called_as_it_is(pool: Path) -> None:
    assert run_on(pool, "unknown")["second_may_use"] == 2
