"""Two kernels side by side: knobs, facts of binaries, predicted terms, source, intermediate forms, machine code."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from tilewright.codegen.backends.base import Source
from tilewright.codegen.backends.binaries.facts import EntryFacts
from tilewright.codegen.backends.registry import find_backend
from tilewright.codegen.hardware.archs import find_arch
from tilewright.codegen.hardware.devices import DEVICES
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.ops.template import Template
from tilewright.codegen.rendering import render
from tilewright.codegen.space import TEMPLATE, Config
from tilewright.errors import TilewrightError
from tilewright.tuner.prediction.predict import predict_config
from tilewright.tuner.report.text import format_us, table
from tilewright.tuning_db.records import ArtifactRecord, KernelRecord
from tilewright.tuning_db.store import Store

Pairs = dict[str, list[Any]]
"""By name: what the one has and what the other has."""


@dataclass(frozen=True)
class KernelComparison:
    """What sets two kernels apart."""

    a: KernelRecord
    b: KernelRecord
    knobs: Pairs
    facts: Pairs
    """Of GPU binaries, by entry and name."""
    terms_us: dict[str, Pairs]
    """Predicted, by problem; of those for which both were evaluated."""
    source: list[str]
    disassembly: list[str]
    forms: dict[str, list[str]] = field(default_factory=dict)
    """Differences of intermediate forms, by name."""

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "kernels": [self.a.key, self.b.key],
            "knobs": self.knobs,
            "facts": self.facts,
            "predicted_terms_us": self.terms_us,
            "source": self.source,
            "forms": self.forms,
            "disassembly": self.disassembly,
        }

    def lines(self) -> list[str]:
        """For people."""
        names = (self.a.key[:8], self.b.key[:8])
        lines = table(("knob", *names), _rows(self.knobs))
        if self.facts:
            lines += ["", *table(("fact", *names), _rows(self.facts))]
        for problem, terms in self.terms_us.items():
            rows = ((n, format_us(x), format_us(y)) for n, (x, y) in terms.items())
            lines += ["", f"predicted for {problem}", *table(("term", *names), rows)]
        for name, form in self.forms.items():
            lines += ["", f"{name}:" if form else f"{name}: the same", *form]
        return [*lines, "", *self.source, *self.disassembly]


def compare_kernels(
    store: Store, a: KernelRecord, b: KernelRecord, *, ir: bool = False, disassembly: bool = False
) -> KernelComparison:
    """Compare two kernels of the store.

    Args:
        store: that holds their bytes and trials.
        a: the one.
        b: the other.
        ir: whether to compare intermediate forms, too: GPU kernels are compiled again for that.
        disassembly: whether to compare machine code, too.

    Raises:
        TilewrightError: when a tool is missing, bytes are not there, or ``ir`` is asked for of CPU kernels.

    """
    knobs = _differing(_config(a), _config(b))
    forms: dict[str, list[str]] = {}
    if ir:
        old, new = _forms(a), _forms(b)
        forms = {name: _diff(old.get(name, ""), new.get(name, ""), a, b) for name in {**old, **new}}
    code = _diff(_disassemble(store, a), _disassemble(store, b), a, b) if disassembly else []
    return KernelComparison(
        a, b, knobs, _differing(_facts(a), _facts(b)), _terms(store, a, b), _diff(a.source, b.source, a, b), code, forms
    )


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> Pairs:
    names = sorted(old.keys() | new.keys())
    return {name: [old.get(name), new.get(name)] for name in names if old.get(name) != new.get(name)}


def _config(kernel: KernelRecord) -> Config:
    op = find_op(kernel.op)
    return op.read_config(kernel.config, op.signature_from_dict(kernel.signature), find_arch(kernel.arch))


def _rows(pairs: Pairs) -> list[tuple[str, ...]]:
    """Name and both values; "-" for what the one has alone."""
    return [(name, *("-" if value is None else str(value) for value in pair)) for name, pair in pairs.items()]


def _facts(kernel: KernelRecord) -> dict[str, Any]:
    """Facts of all entries, each by ``entry.name``."""
    found: dict[str, Any] = {"artifact_bytes": kernel.facts.get("artifact_bytes")}
    for entry in kernel.facts.get("entries", ()):
        for name, value in entry.items():
            nested = value if isinstance(value, dict) else {"": value}
            for inner, item in nested.items():
                found[".".join(filter(None, (entry["entry"], name, inner)))] = item
    return found


def _terms(store: Store, a: KernelRecord, b: KernelRecord) -> dict[str, Pairs]:
    """Predicted terms at every problem and device at which both were evaluated."""
    if a.signature_key != b.signature_key:
        return {}
    op = find_op(a.op)
    both: dict[str, Pairs] = {}
    others = {(trial.problem_key, trial.device_key) for trial in store.trials(kernel_key=b.key)}
    for trial in store.trials(kernel_key=a.key):
        if trial.device_key not in DEVICES or (trial.problem_key, trial.device_key) not in others:
            continue
        device = DEVICES[trial.device_key]
        problem = op.problem_from_dict(trial.problem)
        predictions = []
        for kernel in (a, b):
            config = _config(kernel)
            facts = [EntryFacts.from_dict(entry) for entry in kernel.facts["entries"]]
            predictions.append(predict_config(op.template(config), problem.signature, problem, config, device, facts))
        old, new = predictions
        terms = {name: [old.terms[name], new.terms[name]] for name in old.terms}
        both[f"{problem.title.strip()} on {device.name}"] = {**terms, "all": [old.us, new.us]}
    return both


def _forms(kernel: KernelRecord) -> dict[str, str]:
    """Intermediate forms of all entries, by ``entry form``."""
    arch = find_arch(kernel.arch)
    template = _template(kernel)
    backend = find_backend(template.language)
    if not (names := backend.forms(arch)) or template.entries is None:
        raise TilewrightError(f"kernel {kernel.key[:8]} is in {backend.language}, which has no intermediate forms")
    source = _rendered_again(kernel, template)
    found = {}
    with closing(backend.builder(arch)) as builder:
        if builder.toolchain != kernel.toolchain:
            raise TilewrightError(
                f"kernel {kernel.key[:8]} was made by {kernel.toolchain}, and here is {builder.toolchain}: "
                "its intermediate forms cannot be made again"
            )
        for index, entry in enumerate(source.entries):
            for name in names:
                # Where the source stood is no difference of the kernels.
                text = builder.form(source, index, name)
                found[f"{entry.entry} {name}"] = re.sub(r'"[^"]*/kernel\.py"|#loc\d*.*| loc\(#loc\d*\)', "", text)
    return found


def _template(kernel: KernelRecord) -> Template[Any]:
    """Of ours, the template that a stored kernel names."""
    op, arch = find_op(kernel.op), find_arch(kernel.arch)
    name = kernel.config.get(TEMPLATE)
    for template in op.templates_for(op.signature_from_dict(kernel.signature), arch):
        if template.name == name:
            return template
    raise TilewrightError(f"kernel {kernel.key[:8]} is of a template {name!r}, which is none of ours for {arch.name}")


def _rendered_again(kernel: KernelRecord, template: Template[Any]) -> Source:
    """A kernel's source as our own template makes it, which has to be the stored text.

    The stored text itself is never compiled: a Triton source is Python, which runs while it is compiled, and anybody
    may have written it.
    """
    arch = find_arch(kernel.arch)
    signature = find_op(kernel.op).signature_from_dict(kernel.signature)
    knobs = {name: value for name, value in _config(kernel).items() if name != TEMPLATE}
    with contextlib.suppress(TilewrightError):  # knobs that are none of ours
        # As our space holds them: values of stored knobs become text of what is rendered, too.
        config = template.config(signature, arch, knobs)
        text = render(template, signature, config, arch)
        if template.entries is not None and _code(text) == _code(kernel.source):
            return Source(text, template.entries(signature, config, arch))
    raise TilewrightError(
        f"the source of kernel {kernel.key[:8]} is not what this tilewright's template makes of its knobs, so that it "
        "is not compiled again: another release made it, or somebody changed it; tune the problem again"
    )


def _code(source: str) -> str:
    """Without the comments at its head, which name a release."""
    return re.sub(r"\A(#.*\n)+", "", source)


def _diff(old: str, new: str, a: KernelRecord, b: KernelRecord) -> list[str]:
    return list(difflib.unified_diff(old.splitlines(), new.splitlines(), a.key[:8], b.key[:8], lineterm=""))


def _disassemble(store: Store, kernel: KernelRecord) -> str:
    """Machine code of every launch as text; where nothing takes binaries apart, the last form before them."""
    backend = find_backend(_template(kernel).language)
    artifacts = [_artifact(store, kernel, checksum) for checksum in kernel.artifacts]
    texts = [backend.disassembly(artifact.kind, artifact.data) for artifact in artifacts]
    if None in texts:
        last = backend.forms(find_arch(kernel.arch))[-1]
        texts = [text for name, text in _forms(kernel).items() if name.endswith(f" {last}")]
    return "\n".join(filter(None, texts))


def _artifact(store: Store, kernel: KernelRecord, checksum: str) -> ArtifactRecord:
    artifact = store.artifact(checksum)
    if artifact is None:
        raise TilewrightError(f"the bytes of kernel {kernel.key} are not in the database; tune the problem again")
    return artifact
