"""Pages that say how something is added, followed to the letter in a copy of the tree; links and lines of all pages."""

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


RUFF = [sys.executable, "-m", "ruff"]
IMPORT_RULES = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def _pytest(tree: Path, paths: str, which: str) -> None:
    words = ["-q", "-p", "no:cacheprovider", "--quick", *paths.split(), "-k", which]
    assert " passed" in _run([sys.executable, "-m", "pytest", *words], tree)


def _run(command: list[str], tree: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "TILEWRIGHT_CACHE": str(tree / "cache")}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the tree, to be changed as a page says."""
    try:
        find_compiler()
    except TilewrightError as error:
        pytest.skip(str(error))
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("codegen", "runtime", "src", "templates", "tests", "tuner", "tuning_db"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_adding_a_template(tree: Path) -> None:
    page = (ROOT / "docs" / "add-a-template.md").read_text()
    (template,) = re.findall(r"```jinja\n(.*?)```", page, re.DOTALL)
    space, script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (entry,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)

    (tree / "templates/moe_gemm/cpu/chains.cpp.jinja").write_text(template)
    declaration = tree / "codegen/ops/moe_gemm/cpu/templates.py"
    before, templates = declaration.read_text().split("TEMPLATES = (\n")
    declaration.write_text(f"{before}{space}\n\nTEMPLATES = (\n{entry}{templates}")

    contract = "tests/contract/test_template_contract.py"
    _pytest(tree, contract, "cpu_chains or up-none-53x77")
    raced = _run([sys.executable, "-c", script], tree).splitlines()
    assert [line.split()[0] for line in raced] == ["ok"] * 13
    assert sum("cpu_chains" in line for line in raced) == 12


@pytest.mark.slow
def test_adding_an_op(tree: Path) -> None:
    page = (ROOT / "docs" / "add-an-op.md").read_text()
    saved = re.findall(r"Save\s+this\s+as\s+`([^`]+)`:\n\n```\w+\n(.*?)```", page, re.DOTALL)
    added = re.findall(r"Add\s+this\s+after\s+`([^`]+)`\s+in\s+`([^`]+)`.*?```text\n(.*?)```", page, re.DOTALL)
    assert (len(saved), len(added)) == (page.count("```") // 2 - 3, 3)
    for name, text in saved:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    for after, name, lines in added:
        before, rest = (tree / name).read_text().split(f"{after}\n")
        (tree / name).write_text(f"{before}{after}\n{lines}{rest}")

    _run([*RUFF, "check", *(name for name, _ in saved if name.endswith(".py"))], tree)
    _run([sys.executable, "-c", IMPORT_RULES], tree)
    _pytest(tree, "tests/contract/test_template_contract.py tests/contract/test_space_contract.py", "rms_norm")
    _pytest(tree, "tests/unit/test_layout.py tests/unit/test_imports.py", "")
    words = ["--arch", "native", "--op", "rms_norm", "--problem", "hidden=512", "--tokens", "1,9", "--trials", "3"]
    database = ["--db", str(tree / "tuning.db")]
    _run([sys.executable, "-m", "tilewright.tuner.cli", *words, "--time", "10s", *database], tree)
    assert "rms_norm" in _run([sys.executable, "-m", "tilewright.tuner.cli", "compare", *database], tree)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_lines_end_at_column_100(page: Path) -> None:
    lines = [line for line in page.read_text().splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 100] == []
