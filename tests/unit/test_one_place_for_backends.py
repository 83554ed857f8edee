"""Which backend or kind of device it has to do with is asked in one place: backends, targets and their registries."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = ("codegen", "templates", "tuner", "runtime", "tuning_db")
MAY_ASK = ("codegen/backends/", "codegen/hardware/", "tuner/targets/")
"""Folders that know what kinds there are; beside them, registries do."""

SPELLINGS = {
    "no device means a CPU": r"\bdevice is (?:not )?None\b",
    "no threads mean a GPU": r"\bthreads [=!]= 0\b",
    "the class of the arch": r"\bisinstance\([^)]*(?:\b[Aa]rch\b|\b(?:Cpu|Gpu)Arch\b)",
    "the family of the arch": r"\.family\b",
    "a recipe that only CPUs have": r"\brecipe\.panels\b",
}


def files() -> Iterator[Path]:
    for tree in TREES:
        for path in sorted((ROOT / tree).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.suffix in (".py", ".jinja") and not name.startswith(MAY_ASK) and path.name != "registry.py":
                yield path


def asked(text: str, spelling: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if re.search(spelling, line)]


@pytest.mark.parametrize("what", SPELLINGS)
def test_nothing_else_asks_what_kind_of_device_it_has_to_do_with(what: str) -> None:
    found = {path.relative_to(ROOT).as_posix(): asked(path.read_text(), SPELLINGS[what]) for path in files()}
    assert not {name: lines for name, lines in found.items() if lines}
    assert len(found) > 150  # the trees were read


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("no device means a CPU", "tune = measure if request.device is None else predict"),
        ("no threads mean a GPU", "if plan.threads == 0:"),
        ("the class of the arch", "if isinstance(arch, GpuArch):"),
        ("the class of the arch", "assert isinstance(self.request.arch, CpuArch)"),
        ("the family of the arch", 'stages = 3 if arch.family == "cuda" else 2'),
        ("the family of the arch", "here = [t for t in templates if device.arch.family in t.families]"),
        ("a recipe that only CPUs have", "layouts.add(kernel.recipe.panels)"),
    ],
)
def test_every_spelling_would_be_seen(what: str, line: str) -> None:
    assert asked(f"x = 1\n    {line}\n", SPELLINGS[what]) == [line]
