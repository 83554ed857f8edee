"""``tune pack``: one file with plans and their kernels, for deployment."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tilewright.errors import TilewrightError
from tilewright.tuner.commands.common import add_options, open_store, print_json
from tilewright.tuner.report.terminal import print_lines
from tilewright.tuning_db.pack import write_pack

_SIGNED = "the signature is in {}; with TILEWRIGHT_VERIFY_KEY=PUBLIC.pem nothing but packs of that key is served"


def add_parser(subparsers: Any) -> None:
    """Register the command."""
    parser = subparsers.add_parser("pack", help="one file with plans and their kernels, for deployment")
    parser.add_argument("file", type=Path, metavar="FILE", help="pack to make; must not exist yet")
    parser.add_argument("--model", metavar="NAME", help="only the plans that were made for this model")
    parser.add_argument("--op", metavar="OP", help="only the plans of this op")
    parser.add_argument("--sign", type=Path, metavar="PEM", help="private key (Ed25519) to sign it with")
    add_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Write the pack.

    Raises:
        TilewrightError: when there is no database or no such plan in it, or the pack exists or cannot be written.

    """
    with open_store(arguments) as store:
        plans = [
            plan for plan in store.plans() if arguments.model in (None, plan.model) and arguments.op in (None, plan.op)
        ]
        if not plans:
            known = sorted({f"{plan.op} of {plan.model or 'no model'}" for plan in store.plans()})
            raise TilewrightError(f"{store.name} holds no such plan; it holds: {', '.join(known) or 'none'}")
        pack = write_pack(store, plans, arguments.file, sign_key=arguments.sign)
    if arguments.json:
        document = {"file": str(pack.path), "plans": pack.plans, "kernels": pack.kernels, "bytes": pack.bytes}
        print_json({**document, "signature": None if pack.signature is None else str(pack.signature)})
    else:
        size = f"{pack.bytes / 1e6:.1f} MB"
        said = f"{pack.plans} plans with {pack.kernels} kernels, {size}, in {pack.path}; serve them by"
        signed = [] if pack.signature is None else [_SIGNED.format(pack.signature)]
        print_lines([said, f"  TILEWRIGHT_DB={pack.path}", *signed])
    return 0
