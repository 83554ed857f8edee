"""What is declared in pyproject.toml is what lies on disk: a part that is left out vanishes from the wheel silently."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
MAPPED = {name: ROOT / path for name, path in SETUPTOOLS["package-dir"].items() if name != "tilewright"}


def test_every_package_is_declared() -> None:
    found = {"tilewright"} | {
        ".".join((name, *init.parent.relative_to(path).parts))
        for name, path in MAPPED.items()
        for init in path.rglob("__init__.py")
    }
    assert set(SETUPTOOLS["packages"]) == found


@pytest.mark.parametrize("name", MAPPED)
def test_every_directory_with_modules_is_a_package(name: str) -> None:
    without = {module.parent for module in MAPPED[name].rglob("*.py") if not (module.parent / "__init__.py").exists()}
    assert without == set()


@pytest.mark.parametrize("name", MAPPED)
def test_the_link_for_static_tools_leads_to_the_package(name: str) -> None:
    assert (ROOT / "src" / name.replace(".", "/")).resolve() == MAPPED[name].resolve()


@pytest.mark.parametrize(("field", "suffix"), [("sources", ".c"), ("depends", ".h")])
def test_the_extension_is_declared_whole(field: str, suffix: str) -> None:
    (extension,) = SETUPTOOLS["ext-modules"]
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "runtime").rglob(f"*{suffix}")}
    assert set(extension[field]) == found


def test_every_template_is_package_data() -> None:
    files = {path for path in MAPPED["tilewright.templates"].rglob("*") if path.suffix in (".jinja", ".cpp")}
    patterns = SETUPTOOLS["package-data"]["tilewright.templates"]
    assert files == {path for pattern in patterns for path in MAPPED["tilewright.templates"].glob(pattern)}
