"""What importing a part of tilewright loads. The import linter does not count a package's ``__init__``; this does."""

import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import tilewright

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]
(RUNTIME,) = (contract for contract in CONTRACTS if contract.get("source_modules") == ["tilewright.runtime"])
FORBIDDEN: list[str] = RUNTIME["forbidden_modules"]
ALLOWED = {"numpy", "torch"}
"""Dependencies that the runtime may import; every other one is for tuning."""


def loaded_by(code: str) -> set[str]:
    """Modules that a new process has after ``code``."""
    program = f"import sys, json\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def forbidden_among(modules: set[str]) -> dict[str, str]:
    """Name of the contract by the module that it forbids."""
    return {
        module: pattern
        for module in sorted(modules)
        for pattern in FORBIDDEN
        if fnmatchcase(module, pattern) or fnmatchcase(module, f"{pattern}.*")
    }


def own_modules() -> set[str]:
    """Names of all modules of tilewright, without importing more than their packages."""
    return {"tilewright", *(found.name for found in pkgutil.walk_packages(tilewright.__path__, "tilewright."))}


@pytest.fixture(scope="module")
def bare() -> set[str]:
    """What torch loads by itself."""
    return loaded_by("import torch")


@pytest.mark.parametrize("package", ["tilewright.runtime", "tilewright.runtime.transformers"])
def test_importing_the_runtime_loads_nothing_that_only_tuning_needs(package: str, bare: set[str]) -> None:
    assert forbidden_among(loaded_by(f"import torch\nfrom {package} import *") - bare) == {}


def test_what_packs_and_loads_kernels_for_the_tuner_needs_no_torch() -> None:
    """It takes longer to import than all of the command line together."""
    loaded = loaded_by("import tilewright.tuner.commands.tune, tilewright.tuner.commands.doctor")
    assert "tilewright.runtime.weights.packing" in loaded
    assert "torch" not in loaded


def test_every_name_of_the_runtime_is_where_it_is_looked_for() -> None:
    runtime = importlib.import_module("tilewright.runtime")
    assert all(getattr(runtime, name).__name__ == name for name in runtime.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'expert'"):
        runtime.expert  # noqa: B018 - the name is what is asked for


def test_a_call_loads_nothing_that_only_tuning_needs(bare: set[str]) -> None:
    call = """
        import torch, warnings
        from tilewright.runtime import Gate, ServeOptions
        warnings.simplefilter("ignore")
        Gate.of(8, 2, options=ServeOptions(database="/nowhere/at/all.db"))(torch.randn(3, 8))
    """
    code = "\n".join(line.strip() for line in call.splitlines())
    assert forbidden_among(loaded_by(code) - bare) == {}


def test_what_tuning_loads_is_found_by_the_same_check(bare: set[str]) -> None:
    tuning = loaded_by(
        "import tilewright.tuner.cli, tilewright.tuner.commands.tune, tilewright.codegen.ops.gating.examples\n"
        "from tilewright.codegen.ops.registry import OPS\nlist(OPS.values())"
    )
    found = set(forbidden_among(tuning - bare).values())
    assert {"optuna", "jinja2", "sqlalchemy", "tilewright.codegen.backends", "tilewright.codegen.space"} <= found
    assert {name for name in FORBIDDEN if ".ops." in name} <= found


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract["name"])
def test_every_contract_names_modules_that_exist(contract: dict[str, list[str]]) -> None:
    named = [
        name.strip()
        for field in ("layers", "source_modules", "forbidden_modules", "ignore_imports")
        for entry in contract.get(field, [])
        for part in entry.split("|")
        for name in part.split("->")
    ]
    own = own_modules()
    assert named
    for name in named:
        if name.partition(".")[0] == "tilewright":
            assert any(fnmatchcase(module, name) for module in own), f"{name} is no module of tilewright"
        else:
            assert importlib.util.find_spec(name) is not None, f"{name} is no package that is installed"


def test_every_dependency_is_allowed_or_forbidden_to_the_runtime() -> None:
    declared = {name.split(">")[0].split("<")[0].split("=")[0].strip() for name in PROJECT["project"]["dependencies"]}
    outside = {name for name in FORBIDDEN if not name.startswith("tilewright")}
    assert declared == outside | ALLOWED
