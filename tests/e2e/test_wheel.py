"""The wheel, outside of the checkout: everything that runs is in it, with and without a C compiler to build it."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from tilewright import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SUFFIXES = {".py", ".typed", ".jinja", ".cpp"}

RENDER_ALL = """
from tilewright.codegen.hardware.archs import native_arch
from tilewright.codegen.ops.registry import OPS
from tilewright.codegen.rendering import render
from tilewright.codegen.routing.spec import RoutingSpec

for op in OPS.values():
    problem = dict(pair.split("=") for pair in op.problem_example.split(","))
    signature = op.parse_problem(problem, RoutingSpec.parse("balanced")).signature
    space = op.space(signature, native_arch())
    for name in space.parameters[0].values:
        config = next(config for config in space if config["template"] == name)
        print(len(render(op.template(config), signature, config, native_arch())))
"""

MAKE_DATABASE = """
import sys
from tilewright.tuning_db.reader import Reader
from tilewright.tuning_db.store import Store

with Store.open(sys.argv[1]) as store:
    assert store.check() == []
print(len(Reader.open(sys.argv[1]).plans_for("moe_gemm", "none")))
"""

SERVE = """
import torch
from tilewright.runtime import ServeOptions, grouped_gemm
from tilewright.runtime.calls.bind import IMPLEMENTATION

x, weight = torch.randn(3, 8), torch.randn(2, 4, 8)
out = grouped_gemm(x, weight, torch.tensor([0, 1, 3], dtype=torch.int32), options=ServeOptions(database="none.db"))
torch.testing.assert_close(out, torch.stack([weight[0] @ x[0], weight[1] @ x[1], weight[1] @ x[2]]))
print(IMPLEMENTATION)
"""


def _run(command: Sequence[str | Path], cwd: Path, **environment: str) -> str:
    merged = {**os.environ, **environment}
    done = subprocess.run(command, cwd=cwd, env=merged, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def _build(folder: Path, **environment: str) -> Path:
    """Build a wheel from a copy of the sources, so that nothing built before gets into it, and install it."""
    sources, installed = folder / "sources", folder / "installed"
    sources.mkdir(parents=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in (*PROJECT["tool"]["setuptools"]["package-dir"].values(), "src"):
        if not (sources / name).exists():
            shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    _run([*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", folder], sources, **environment)
    (wheel,) = folder.glob("*.whl")
    shutil.rmtree(sources)
    _run([*pip, "install", "--no-index", "--no-deps", "--target", installed, wheel], folder)
    return installed


class Installed:
    """A folder with the installed wheel, and Python that sees it and the dependencies but not the checkout."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.path = _build(folder, **environment)
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir(mode=0o700)
        (self.wheel,) = folder.glob("*.whl")
        self.names = set(zipfile.ZipFile(self.wheel).namelist())

    def python(self, *arguments: str | Path) -> str:
        # -S: an editable install of the checkout would otherwise fill in for whatever the wheel lacks.
        paths = [str(self.path), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
        environment = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONWARNINGS": "ignore"}
        return _run([sys.executable, "-S", *arguments], self.elsewhere, **environment)

    @property
    def has_extension(self) -> bool:
        return any(name.startswith("tilewright/runtime/_native.") for name in self.names)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("wheel"))


def test_it_holds_every_module_and_template_and_nothing_else(installed: Installed) -> None:
    expected = {
        f"{package.replace('.', '/')}/{path.relative_to(ROOT / folder)}"
        for package, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in SUFFIXES and path.is_file()
        if package != "tilewright" or path.parent == ROOT / folder
    }
    inside = {name for name in installed.names if ".dist-info/" not in name}
    extension = {name for name in inside if name.startswith("tilewright/runtime/_native.")}
    assert inside - extension == expected


def test_it_is_imported_from_where_it_was_installed(installed: Installed) -> None:
    code = "import tilewright, tilewright.tuner, tilewright.runtime.calls.extension as m; print(tilewright.__file__)"
    assert Path(installed.python("-c", code).strip()).is_relative_to(installed.path)


def test_the_command_runs(installed: Installed) -> None:
    assert installed.python(installed.path / "bin" / "tune", "--version").strip() == f"tilewright {__version__}"


def test_it_renders_every_template(installed: Installed) -> None:
    lengths = [int(line) for line in installed.python("-c", RENDER_ALL).split()]
    assert len(lengths) >= 2
    assert min(lengths) > 1000


def test_it_makes_and_reads_a_database(installed: Installed) -> None:
    database = installed.elsewhere / "new.db"
    assert installed.python("-c", MAKE_DATABASE, database).strip() == "0"
    assert database.stat().st_size > 0


def test_it_serves_with_the_extension(installed: Installed) -> None:
    if not installed.has_extension:
        pytest.skip("no C compiler built the extension here")
    assert installed.python("-c", SERVE).strip() == "native"


def test_it_serves_without_a_c_compiler(tmp_path: Path) -> None:
    bare = Installed(tmp_path / "bare", CC="false")
    assert not bare.has_extension
    assert bare.python("-c", SERVE).strip() == "pure"
