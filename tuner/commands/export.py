"""``tune export``: every trial as Optuna studies, in a file that optuna-dashboard opens."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.recorded import recorded_studies
from tilewright.tuner.commands.common import add_options, open_store, print_json
from tilewright.tuner.report.terminal import print_lines
from tilewright.tuner.search.export import export_studies


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("export", help="every trial as Optuna studies, for optuna-dashboard")
    parser.add_argument("file", type=Path, metavar="FILE", help="Optuna journal to make; must not exist yet")
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the file.

    Raises:
        TilewrightError: when there is no database or no trial in it, or the file exists or cannot be written.

    """
    with open_store(arguments) as store:
        studies = recorded_studies(store)
        if not studies:
            raise TilewrightError(f"{store.name} holds no trials to export; run: tune --arch native --op moe_gemm")
    export_studies(studies, arguments.file)
    names = [study.study_name for study in studies]
    trials = sum(len(study.get_trials(deepcopy=False)) for study in studies)
    if arguments.json:
        print_json({"file": str(arguments.file), "studies": names, "trials": trials})
    else:
        said = f"{len(names)} studies with {trials} trials in {arguments.file}; look at them with:"
        print_lines([said, f"  pip install optuna-dashboard && optuna-dashboard {arguments.file}"])
    return 0
