"""What an op declares. Everything else (CLI, tuner, tests, benchmarks) derives from this one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Literal, TypeVar

from numpy.typing import NDArray

from tilewright.codegen.hardware.archs import Arch
from tilewright.codegen.models.model_shape import ModelShape
from tilewright.codegen.models.parts import LeftOut
from tilewright.codegen.numbers.precisions import LOSSLESS, PRECISIONS
from tilewright.codegen.ops.fields import described, help_of, read
from tilewright.codegen.ops.implementation import Implementation
from tilewright.codegen.ops.problem import Problem
from tilewright.codegen.ops.signature import Signature
from tilewright.codegen.ops.template import Template
from tilewright.codegen.recipe.model import TensorSpec, packable
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import TEMPLATE, Config, Space, Value
from tilewright.errors import TilewrightError

Phase = Literal["decode", "prefill"]
Arrays = dict[str, NDArray[Any]]
"""Tensors of one call by name; optional ones that are absent are left out."""

NOT_ASKED_FOR = "it is none of what was asked for"
"""Why something is left out that could be tuned."""
SERVED_DTYPE = "bf16"
"""That models are served in where nothing else is said, and kernels do not compute in fp32."""

S = TypeVar("S", bound=Signature)
P = TypeVar("P", bound=Problem)


@dataclass(frozen=True)
class Workload:
    """What a problem has to do at the least, for shares of the roofline."""

    flops: float
    min_bytes: float


class OpDeclaration(ABC, Generic[S, P]):
    """One op, declared once."""

    name: ClassVar[str]
    implementations: ClassVar[tuple[Implementation, ...]]
    """One for each language; their order is that of templates."""
    signature_type: ClassVar[type[Any]]
    """The op's :class:`Signature`."""
    problem_type: ClassVar[type[Any]]
    """The op's :class:`Problem`."""
    served_by: ClassVar[tuple[str, ...]]
    """What of ``tilewright.runtime`` serves it, for hints."""
    needed_for: ClassVar[str] = "layers that call it"
    """What of a model calls it, in words."""
    sizes_help: ClassVar[str] = "tokens of a call (1,4,16,64,256)"
    """What ``--tokens`` counts, and which sizes are tuned where it is not given; for the command line."""

    @property
    def templates(self) -> tuple[Template[Any], ...]:
        """Those of all implementations."""
        return tuple(template for each in self.implementations for template in each.templates)

    def _leading(self, arch: Arch) -> Implementation:
        """The implementation that says where tuning for ``arch`` begins.

        Raises:
            TilewrightError: when there is none.

        """
        for each in self.implementations:
            if each.default is not None and any(arch.among(template.families) for template in each.templates):
                return each
        raise TilewrightError(f"{self.name} has no template for {arch.name}")

    @abstractmethod
    def signatures(self, model: ModelShape) -> tuple[S, ...]:
        """Signatures that ``model`` calls this op with, in the order in which a layer calls them."""

    def signatures_on(self, model: ModelShape, arch: Arch) -> tuple[S, ...]:
        """:meth:`signatures` as they are served on ``arch``, each with its dtypes of :meth:`on`."""
        return tuple(self.on(signature, arch) for signature in self.signatures(model))

    def further_signatures(self, model: ModelShape) -> tuple[S, ...]:
        """Signatures that ``model`` can be served with beside those that name the op; tuned where all ops are."""
        del model
        return ()

    def ladder(self, signature: S, arch: Arch) -> tuple[int, ...]:
        """Dynamic sizes to tune on ``arch`` where the user names none."""
        del signature
        return self._leading(arch).sizes

    @abstractmethod
    def calls_per_pass(self, signature: S, model: ModelShape, phase: Phase) -> float:
        """How often one forward pass of ``model`` calls ``signature``.

        A pass is one token for each of some sequences (``decode``), or all tokens of a prompt (``prefill``).
        """

    def declared(self, signature: S) -> S:
        """``signature`` as the op declares it for a model, whatever dtypes :meth:`on` gave it."""
        dtypes = [field.name for field in fields(signature) if field.name.endswith("_dtype")]
        changes: dict[str, Any] = dict.fromkeys(dtypes, LOSSLESS)
        return replace(signature, **changes)

    def left_out(self, tuned: Sequence[S], model: ModelShape) -> tuple[LeftOut, ...]:
        """What this op could compute in a pass of ``model``, but is none of its signatures ``tuned``."""
        return () if tuned or self.why_without(model) else (LeftOut(self.name, NOT_ASKED_FOR),)

    def why_without(self, model: ModelShape) -> str | None:
        """Why ``model`` calls this op nowhere, in a sentence; None where it does."""
        try:
            if self.signatures(model):
                return None
        except TilewrightError:
            return None  # of sizes that no kernel has
        return model.why_without(self.name) or f"{model.name} has no {self.needed_for}"

    def signature_from_dict(self, fields: Mapping[str, Any]) -> S:
        """Signature from its JSON form.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        signature: S = self.signature_type.from_dict(fields)
        return signature

    @abstractmethod
    def problem(self, signature: S, tokens: int, routing: RoutingSpec, model: ModelShape | None = None) -> P:
        """Problem of ``tokens`` tokens; under expert parallelism ``model`` says over how many experts they are routed.

        Raises:
            TilewrightError: for an impossible size.

        """

    def problem_from_dict(self, fields: Mapping[str, Any]) -> P:
        """Problem from its JSON form, as trials keep it.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        problem: P = self.problem_type.from_dict(fields)
        return problem

    def parse_problem(self, fields: Mapping[str, str], routing: RoutingSpec) -> P:
        """Problem from ``--problem key=value,...``.

        Raises:
            TilewrightError: for a missing, unknown or impossible field.

        """
        sizes: dict[str, Any] = dict(self.problem_type.given)
        sizes |= read(self.problem_type, {name: text for name, text in fields.items() if name in sizes})
        own = {name: text for name, text in fields.items() if name not in sizes}
        if unknown := sorted(own.keys() - described(self.signature_type).keys()):
            raise TilewrightError(
                f"{self.name} has no field {unknown[0]!r}; --problem takes "
                f"{', '.join((*sizes, *described(self.signature_type)))}, and --problem help says what they mean"
            )
        problem = self.problem(self.signature_type.parse(own), sizes.pop(self.problem_type.size_field), routing)
        return replace(problem, **sizes)

    def problem_help(self) -> str:
        """What ``--problem`` takes: each field with its possible values, its default and its meaning."""
        own, kind = described(self.problem_type), self.signature_type
        lines = [f"--problem for {self.name} takes key=value,...; for example: {self.problem_example}"]
        lines += [help_of(own[name], default) for name, default in self.problem_type.given.items()]
        lines += [help_of(each, kind.assumed.get(name, each.default)) for name, each in described(kind).items()]
        return "\n".join(lines)

    @property
    def problem_example(self) -> str:
        """A text that :meth:`parse_problem` understands, for messages."""
        example: str = self.signature_type.example
        return example

    def tensors(self, signature: S) -> tuple[TensorSpec, ...]:
        """Tensors of a call, in the order in which callers pass them."""
        return signature.tensors()

    @abstractmethod
    def weights(self, signature: S, seed: int) -> Arrays:
        """Realistic weight and bias tensors as the op declares them, not packed; the same for the same seed."""

    @abstractmethod
    def inputs(self, problem: P, seed: int) -> Arrays:
        """Realistic tensors of the other inputs; the same for the same seed."""

    @abstractmethod
    def input_bytes(self, problem: P) -> int:
        """Memory of the largest of :meth:`inputs`, known before they are drawn: nobody draws what cannot be held."""

    def rounded_inputs(self, signature: S, inputs: Arrays, precision: str) -> Arrays:  # noqa: ARG002
        """``inputs`` with the values that kernels of ``precision`` compute with, where it rounds activations, too."""
        return inputs

    @abstractmethod
    def reference(self, signature: S, weights: Arrays, inputs: Arrays) -> Arrays:
        """Every output by name, in the shape of its tensor: floats in float64, integers as they must be."""

    @abstractmethod
    def tolerance(self, signature: S) -> float:
        """Largest allowed relative error of a float output: max |out - reference| / max |reference|."""

    @abstractmethod
    def workload(self, problem: P, inputs: Arrays) -> Workload:
        """Useful flops and the least bytes that must move from and to memory."""

    @abstractmethod
    def awkward_problems(self, signature: S) -> tuple[P, ...]:
        """Small problems of this signature's kind that a kernel must get right before it is timed."""

    def default_config(self, signature: S, arch: Arch) -> Config:
        """The config that a careful engineer would write down without tuning; always a candidate."""
        return self._default(signature, arch, None)

    def default_for(self, problem: P, arch: Arch) -> Config:
        """The same for one problem, where practice chooses by its size; of one weight layout for all sizes."""
        signature: Any = problem.signature
        return self._default(signature, arch, problem.size)

    def _default(self, signature: S, arch: Arch, size: int | None) -> Config:
        default = self._leading(arch).default
        assert default is not None
        template, knobs = default(signature, arch, size)
        return self.config(template, signature, arch, knobs)

    def starting_configs(self, signature: S, arch: Arch, precisions: Sequence[str] = (LOSSLESS,)) -> tuple[Config, ...]:
        """Configs that have won elsewhere, the likeliest first: a search tries them before it knows anything.

        Some of each of ``precisions``, so that every one has been tried at every size, however few the trials.

        Raises:
            TilewrightError: when one of them is not in its template's space, with what the nearest config has.

        """
        starts = self._leading(arch).starting_configs(signature, arch, precisions)
        return tuple(self.config(template, signature, arch, knobs) for template, knobs in starts)

    def on(self, signature: S, arch: Arch) -> S:
        """``signature`` in bf16, where no template for ``arch`` computes in fp32 and no other dtype was asked for."""
        here = {dtype for template in self.templates_on(arch) for dtype in template.dtypes}
        dtypes = [field.name for field in fields(signature) if field.name.endswith("_dtype")]
        if LOSSLESS in here or SERVED_DTYPE not in here or any(getattr(signature, n) != LOSSLESS for n in dtypes):
            return signature
        changes: dict[str, Any] = dict.fromkeys(dtypes, SERVED_DTYPE)
        return replace(signature, **changes)

    def served_on(self, problem: P, arch: Arch) -> P:
        """``problem`` with its signature as :meth:`on` gives it."""
        signature: Any = problem.signature
        return replace(problem, signature=self.on(signature, arch))

    def sample(self, problem: P) -> P:
        """A smaller problem with reductions of the same length, on which precisions can be judged."""
        return problem

    def precisions(self, signature: S, arch: Arch | None = None) -> dict[str, str | None]:
        """Precisions that some template can read weights in; each with why this signature's cannot be stored so.

        With ``arch``, also those that no template for it can read are refused, in words.
        """
        weight = packable(self.tensors(signature))
        if weight is None:
            return {}
        templates = [template for template in self.templates if weight.dtype in template.dtypes]
        names = dict.fromkeys(name for template in templates for name in template.precisions)
        floats = {name for t in self.templates for name in t.dtypes} - {LOSSLESS}
        # bf16 says "as they are" of a signature in bf16, "rounded" of one in fp32, and nothing of one in fp16.
        other = floats - {weight.dtype} if weight.dtype != LOSSLESS else set()
        refusals = {name: PRECISIONS[name].refusal(int(weight.dims[2])) for name in names if name not in other}
        if arch is not None:
            here = self.templates_for(signature, arch)
            for name, refusal in refusals.items():
                reasons = [t.exclusion(name, arch) for t in here if name in t.precisions]
                if refusal is None and all(reasons):
                    why = next(iter(reasons), "no template for it reads them")
                    refusals[name] = f"weights in precision {name} are impossible on {arch.name}: {why}"
        return refusals

    def compute_dtype(self, signature: S) -> str:
        """Dtype of the activations that kernels compute with: that of the weights as they are declared."""
        return self.lossless(signature)

    def lossless(self, signature: S) -> str:
        """The precision in which the weights are stored as the op declares them."""
        weight = packable(self.tensors(signature))
        return weight.dtype if weight else LOSSLESS

    def templates_on(self, arch: Arch) -> tuple[Template[Any], ...]:
        """Templates that are for ``arch``, whatever they compute."""
        return tuple(template for template in self.templates if arch.among(template.families))

    def templates_for(self, signature: S, arch: Arch) -> tuple[Template[Any], ...]:
        """Templates for ``arch`` that can compute ``signature``."""
        dtype = self.compute_dtype(signature)
        return tuple(t for t in self.templates_on(arch) if dtype in t.dtypes and t.applies(signature, arch))

    def space(
        self, signature: S, arch: Arch, templates: Collection[str] = (), precisions: Sequence[str] = (LOSSLESS,)
    ) -> Space:
        """Every valid config of every template for ``arch``, the template's name being a parameter.

        ``templates`` restricts it to those, by their full names; parameters stay those of all. ``precisions`` are what
        weights may be stored in; a knob of the templates that know several. :data:`LOSSLESS` means :meth:`lossless`
        there.

        Raises:
            TilewrightError: when no template, or none of ``templates``, stores the signature's weights in one of
                ``precisions`` on ``arch``.

        """
        asked = dict.fromkeys(self.lossless(signature) if name == LOSSLESS else name for name in precisions)
        spaces, reasons = {}, []
        for template in self.templates_for(signature, arch):
            excluded = {name: template.exclusion(name, arch) for name in asked if name in template.precisions}
            reasons += [f"precision {name}: {reason}" for name, reason in excluded.items() if reason]
            known = tuple(
                name for name in asked if name in (template.precisions or (LOSSLESS,)) and not excluded.get(name)
            )
            if known:
                spaces[template.name] = (
                    template.space(signature, arch, known) if template.precisions else template.space(signature, arch)
                )
        if not spaces:
            self.require_template(signature, arch)
            why = reasons[0] if reasons else self._no_template(signature, arch, asked)
            raise self._impossible(arch, why)
        union = Space.union(spaces)
        if not templates:
            return union
        if not spaces.keys() & set(templates):
            raise TilewrightError(self._unusable(signature, arch, templates, tuple(asked)))
        return union.of_templates(templates)

    def _unusable(self, signature: S, arch: Arch, templates: Collection[str], asked: Collection[str]) -> str:
        """Why none of ``templates`` has a config, in one sentence."""
        mine, named = [t for t in self.templates if t.name in templates], ", ".join(templates)
        read = dict.fromkeys(name for t in mine for name in t.precisions)
        if read and read.keys().isdisjoint(asked):
            return f"{named} read no weights in {', '.join(asked)}; name one of these precisions: {', '.join(read)}"
        reasons = [t.exclusion(name, arch) for t in mine for name in asked if name in t.precisions]
        if why := next(filter(None, reasons), None):
            return f"{named} cannot be generated for {arch.name}: {why}"
        return f"{named} has no config for {signature.describe()} on {arch.name}"

    def require_template(self, signature: S, arch: Arch) -> None:
        """Nothing, where some template for ``arch`` computes ``signature``, in whatever precision.

        Raises:
            TilewrightError: where none does.

        """
        if not self.templates_for(signature, arch):
            raise self._impossible(arch, self._no_template(signature, arch, ()))

    def _impossible(self, arch: Arch, why: str) -> TilewrightError:
        return TilewrightError(f"{self.name} cannot be generated for {arch.name} so: {why}")

    def _no_template(self, signature: S, arch: Arch, precisions: Collection[str]) -> str:
        dtype = self.compute_dtype(signature)
        known = {each for t in self.templates_on(arch) for each in t.dtypes}
        if dtype not in known:
            return f"its templates for that compute in {' or '.join(sorted(known)) or 'nothing'}, not in {dtype}"
        stored = f" in {', '.join(precisions)}" if packable(self.tensors(signature)) else ""
        return f"no template computes {signature.describe()}{stored}"

    def template_names(self, asked: Iterable[str], arch: Arch) -> tuple[str, ...]:
        """Full names (``op/file``) of the templates that users call by it, or by ``file`` alone.

        Raises:
            TilewrightError: for one that the op does not have, or not for ``arch``.

        """
        full = {spelling: t.name for t in self.templates for spelling in (t.name, t.name.removeprefix(f"{self.name}/"))}
        here = [t.name for t in self.templates_on(arch)]
        known = ", ".join(name.removeprefix(f"{self.name}/") for name in here) or "none"
        for name in asked:
            if name not in full:
                raise TilewrightError(f"{self.name} has no template {name!r}; its templates for {arch.name}: {known}")
            if full[name] not in here:
                raise TilewrightError(
                    f"template {name!r} of {self.name} is not for {arch.name}; its templates for that: {known}"
                )
        return tuple(dict.fromkeys(full[name] for name in asked))

    def layout_key(self, signature: S, config: Config, arch: Arch) -> str:
        """Name of the weight layout that the config's kernel reads; empty where weights are not packed."""
        layout = self.template(config).layout(signature, config, arch)
        return layout.key if layout else ""

    def order_key(self, signature: S, config: Config, arch: Arch) -> str | None:
        """Name of the order in which the config's kernel adds up; see :attr:`Template.order`."""
        return self.template(config).order(signature, config, arch)

    def template(self, config: Config) -> Template[Any]:
        """Template that ``config`` belongs to."""
        return next(t for t in self.templates if t.name == config["template"])

    def config(self, template: str, signature: S, arch: Arch, knobs: Mapping[str, Value]) -> Config:
        """The config of ``template``, by its full name, that has ``knobs``; see :meth:`Template.config`."""
        return next(t for t in self.templates if t.name == template).config(signature, arch, knobs)

    def read_config(self, stored: Mapping[str, Value | None], signature: S, arch: Arch) -> Config:
        """The config that a database keeps; knobs that its template got since have their default.

        One of a template or precision that is no more is what it was.
        """
        named = Config({name: value for name, value in stored.items() if value is not None})
        precision = str(named.get("precision", LOSSLESS))
        for template in self.templates_for(signature, arch):
            if template.name == named.get(TEMPLATE) and precision in (template.precisions or (LOSSLESS,)):
                return template.own_space(signature, arch, precision).read(named)
        return named

    def label(self, config: Config) -> str:
        """``config`` in a few characters, for tables: its template and that template's telling knobs."""
        template = self.template(config)
        return " ".join([template.name.rpartition("/")[2], *(f"{knob}={config[knob]}" for knob in template.label)])
