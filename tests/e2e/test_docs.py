"""docs/add-a-template.md, followed to the letter in a copy of the tree; and links that lead somewhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.codegen.backends.cpp.builder import find_compiler
from tilewright.errors import TilewrightError

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [target for target in targets if "://" not in target and not (page.parent / target).exists()] == []


def _run(command: list[str], tree: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "TILEWRIGHT_CACHE": str(tree / "cache")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_adding_a_template(tmp_path: Path) -> None:
    try:
        find_compiler()
    except TilewrightError as error:
        pytest.skip(str(error))
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("codegen", "runtime", "src", "templates", "tests", "tuner", "tuning_db"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    page = (ROOT / "docs" / "add-a-template.md").read_text()
    (template,) = re.findall(r"```jinja\n(.*?)```", page, re.DOTALL)
    space, script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)

    (tmp_path / "templates/moe_gemm/cpu/chains.cpp.jinja").write_text(template)
    declaration = tmp_path / "codegen/ops/moe_gemm/cpu/templates.py"
    before, templates = declaration.read_text().split("TEMPLATES = (\n")
    declaration.write_text(f"{before}{space}\n\nTEMPLATES = (\n{entry}{templates}")

    contract = "tests/contract/test_template_contract.py"
    _run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", contract, "-k", "cpu_chains or up-none-53x77"],
        tmp_path,
    )
    raced = _run([sys.executable, "-c", script], tmp_path).splitlines()
    assert [line.split()[0] for line in raced] == ["ok"] * 13
    assert sum("cpu_chains" in line for line in raced) == 12


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_end_at_column_100(page: Path) -> None:
    lines = [line for line in page.read_text().splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100] == []
