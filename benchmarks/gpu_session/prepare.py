"""Prepares what a GPU session needs, on a machine that has a compiler and Triton and need not have a GPU::

    python benchmarks/gpu_session/prepare.py PREPARED --device h200

* ``every/``: for every template a database with a plan for an example of its op: it is compared with the reference.
* ``models.db``: predicted plans of Mixtral-8x7B and Qwen3-30B-A3B, with the kernels predicted best: they are measured.
* ``conformance/``: cubins for the record of the driver's answers.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
from pathlib import Path

from tilewright.codegen.hardware.archs import GPU_ARCHS
from tilewright.codegen.hardware.devices import find_device
from tilewright.codegen.ops.examples import examples_of
from tilewright.codegen.ops.registry import OPS
from tilewright.codegen.ops.signature import Signature
from tilewright.tuner.cli import main as tune

MODELS = ("mixtral-8x7b", "qwen3-30b-a3b")
TOKENS = "1,8,64,256,1024,4096"


def main() -> int:
    """Prepare; 0 when all is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="h200", help="product that is prepared for (default h200)")
    parser.add_argument("--arch", default="sm_90", help="its arch (default sm_90)")
    parser.add_argument("--model", action="append", help=f"preset or config.json (default {', '.join(MODELS)})")
    parser.add_argument("--tokens", default=TOKENS, help=f"sizes that are measured (default {TOKENS})")
    parser.add_argument("--time", default="8m", help="for each model (default 8m)")
    parser.add_argument("--trials", default="24", help="for each problem of a model (default 24)")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    device = find_device(options.device, GPU_ARCHS[options.arch])
    where = ["--arch", options.arch, "--device", device.key, "--predict"]
    (folder / "every").mkdir(mode=0o700, exist_ok=True)
    for template, problem in templates(options.arch):
        op, _, name = template.partition("/")
        words = ["--op", op, "--template", name, "--problem", problem, "--tokens", "1,40"]
        effort = ["--trials", "2", "--probes", "0", "--time", "60s"]
        database = folder / "every" / f"{op}.{name}.db"
        if not database.exists() and tune([*where, *words, *effort, "--db", str(database)]):
            print(f"{template}: nothing was prepared", file=sys.stderr)
            return 1
    for model in options.model or MODELS:
        words = ["--op", "all", "--model", model, "--tokens", options.tokens, "--resume"]
        effort = ["--trials", options.trials, "--time", options.time]
        if tune([*where, *words, *effort, "--db", str(folder / "models.db")]):
            print(f"{model}: nothing was prepared", file=sys.stderr)
            return 1
    tests = Path(__file__).parents[2] / "tests"
    sys.path.insert(0, str(tests))
    runpy.run_path(str(tests / "standin_kernels.py"))["write"](folder / "conformance")
    (folder / "prepared.json").write_text(json.dumps({"arch": options.arch, "device": device.key}))
    size_mb = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    print(f"{folder} is prepared: {size_mb:.1f} MB")
    return 0


def templates(arch: str) -> list[tuple[str, str]]:
    """Every Triton template that kernels for ``arch`` are made from, with an example of its op that it applies to."""
    found = []
    for op in OPS.values():
        for template in op.templates:
            if template.language != "triton" or not GPU_ARCHS[arch].among(template.families):
                continue
            examples = examples_of(op.name).gpu_signatures
            if (
                example := next((each for each in examples if template.applies(each, GPU_ARCHS[arch])), None)
            ) is not None:
                found.append((template.name, as_problem(example)))
    return found


def as_problem(signature: Signature) -> str:
    """As ``--problem`` takes it."""
    fields = {name: value for name, value in signature.to_dict().items() if name != "op" and value not in ("", None)}
    return ",".join(f"{name}={str(value).lower()}" for name, value in fields.items())


if __name__ == "__main__":
    sys.exit(main())
