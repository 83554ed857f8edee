"""Looking for damage: everything that is stored is read, and what is wrong is said."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.orm import Session

from tilewright.tuning_db import queries
from tilewright.tuning_db.connection import Database
from tilewright.tuning_db.integrity import DamagedDatabase
from tilewright.tuning_db.models import Artifact, Kernel


def examine(database: Database) -> list[str]:
    """Return one sentence for each thing that is wrong with a database; an empty list for a sound one."""
    findings = _Findings(database)
    if database.path is not None:
        for question in (_check_pages, _check_references):
            findings.sentences += [f"{database.path}: {sentence}" for sentence in findings.ask(question)]
    for checksum in findings.ask(_artifact_checksums):
        findings.ask(partial(queries.artifact, checksum=checksum))
    for key in findings.ask(_kernel_keys):
        findings.ask(partial(queries.kernel, key=key))
    findings.ask(queries.devices)
    findings.ask(queries.runs)
    findings.ask(partial(queries.plans, where={}))
    # One problem at a time, so that memory does not grow with the database.
    for problem in findings.ask(partial(queries.summary, where={})):
        where: queries.TrialFilter = {
            "problem_key": problem.problem_key,
            "device_key": problem.device_key,
            "threads": problem.threads,
        }
        findings.ask(partial(queries.trials, where=where, limit=None))
    return findings.sentences


class _Findings:
    """What was found so far; a question that meets damage is a finding, not the end."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.sentences: list[str] = []

    def ask(self, question: Callable[[Session], Any]) -> Any:
        try:
            return self._database.read(question)
        except DamagedDatabase as error:
            self.sentences.append(str(error))
            return ()


def _check_pages(session: Session) -> list[str]:
    findings = session.scalars(text("PRAGMA integrity_check"))
    return [f"its pages are damaged: {finding}" for finding in findings if finding != "ok"]


def _check_references(session: Session) -> list[str]:
    orphans = session.execute(text("PRAGMA foreign_key_check")).all()
    return [f"row {orphan[1]} of {orphan[0]} names a row of {orphan[2]} that is gone" for orphan in orphans]


def _artifact_checksums(session: Session) -> Sequence[str]:
    return session.scalars(select(Artifact.checksum)).all()


def _kernel_keys(session: Session) -> Sequence[str]:
    return session.scalars(select(Kernel.key)).all()
