"""A knob is added to a template: what was stored, and the kernels of all other templates, stay what they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tuning_db_samples import DEVICE, trial

from tilewright.codegen.backends.cpp.builder import Compiler, CppBuilder
from tilewright.codegen.hardware.archs import ARCHS
from tilewright.codegen.numbers.precisions import LOSSLESS
from tilewright.codegen.ops.moe_gemm.cpu.templates import BLOCKED, INTEGER, STREAM
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.ops.template import Template
from tilewright.codegen.rendering import render
from tilewright.codegen.space import Config, Parameter, Space, Value
from tilewright.errors import TilewrightError
from tilewright.tuner.campaign.standings import resumable
from tilewright.tuner.campaign.variants import VariantBuilder
from tilewright.tuning_db.records import TrialRecord
from tilewright.tuning_db.store import Store

OP = find_op("moe_gemm")
ARCH = ARCHS["x86_64_avx2"]
SIGNATURE = MoeGemmSignature(stage="up", experts=4, n=512, k=256, top_k=2, activation="swiglu")
PRECISIONS = (LOSSLESS, "int8g128_a8")
ALIAS = Parameter("alias", (True, False), "whether panels may overlap", default=False)


def template(name: str) -> Template[Any]:
    return next(each for each in OP.templates if each.name == name)


def add_knob(monkeypatch: pytest.MonkeyPatch, name: str, knob: Parameter) -> None:
    """Give a registered template one knob more, as an edit of its space would; its Jinja file does not ask for it."""
    own = template(name).space

    def wider(*arguments: Any) -> Space:
        space = own(*arguments)
        column = np.tile(np.arange(len(knob.values), dtype=np.int16), len(space))
        rows = np.repeat(space.indices, len(knob.values), axis=0)
        return Space((*space.parameters, knob), np.column_stack([rows, column]), space.removals)

    # A template is frozen, and known by its identity in several places.
    monkeypatch.setitem(template(name).__dict__, "space", wider)


def forbid(monkeypatch: pytest.MonkeyPatch, name: str, knob: str, value: Value) -> None:
    """Take the configs with one value of a knob out of a registered template's space."""
    own = template(name).space

    def narrower(*arguments: Any) -> Space:
        space = own(*arguments)
        column = [parameter.name for parameter in space.parameters].index(knob)
        return space.only(space.indices[:, column] != space.parameters[column].position[value])

    monkeypatch.setitem(template(name).__dict__, "space", narrower)


def make_builder(folder: Path, toolchain: str = "none") -> VariantBuilder:
    builder = CppBuilder(ARCH, Compiler("no-compiler", toolchain), folder)
    return VariantBuilder(OP, SIGNATURE, ARCH, {"cpp": builder})


def whole_space() -> Space:
    return OP.space(SIGNATURE, ARCH, precisions=PRECISIONS)


def starts() -> tuple[Config, ...]:
    return OP.starting_configs(SIGNATURE, ARCH, PRECISIONS)


def some_configs() -> list[Config]:
    """The default, the starting configs, and a few of every template."""
    space = whole_space()
    few = [config for name in (BLOCKED, STREAM, INTEGER) for config in list(space.of_templates([name]))[5::4001][:3]]
    return list(dict.fromkeys([OP.default_config(SIGNATURE, ARCH), *starts(), *few]))


def sources(configs: list[Config]) -> dict[Config, str]:
    return {config: render(OP.template(config), SIGNATURE, config, ARCH) for config in configs}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "tuning.db") as store:
        store.put_device(DEVICE)
        yield store


def store_trials(store: Store, builder: VariantBuilder, configs: list[Config], **none: None) -> list[TrialRecord]:
    run = store.start_run("tune", versions={}, host="here")
    made = [
        trial(run.id, template=c["template"], config={**none, **c}, kernel_key=builder.variant(c).key) for c in configs
    ]
    store.add_trials(made)
    return store.trials(problem_key="problem-16", device_key=DEVICE.key, threads=2)


def test_a_config_is_its_template_and_that_templates_own_knobs() -> None:
    for config in some_configs():
        own = template(config["template"]).own_space(SIGNATURE, ARCH, config["precision"])
        assert config.keys() == {"template", *(parameter.name for parameter in own.parameters)}
    assert {config["template"] for config in starts()} == {BLOCKED, STREAM, INTEGER}


def test_a_knob_of_one_template_leaves_keys_sources_and_starts_of_all_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    builder = make_builder(tmp_path)
    others = [config for config in some_configs() if config["template"] != STREAM]
    before = {config: builder.variant(config).key for config in others}, sources(others), starts()
    streams = len(whole_space().of_templates([STREAM]))
    add_knob(monkeypatch, STREAM, ALIAS)
    assert len(whole_space().of_templates([STREAM])) == 2 * streams
    assert [config for config in others if config not in whole_space()] == []
    assert {config: builder.variant(config).key for config in others} == before[0]
    assert sources(others) == before[1]
    assert OP.default_config(SIGNATURE, ARCH) == others[0]
    assert [c for c in starts() if c["template"] != STREAM] == [c for c in before[2] if c["template"] != STREAM]


def test_starts_of_its_own_template_have_the_knobs_default(monkeypatch: pytest.MonkeyPatch) -> None:
    before = starts()
    add_knob(monkeypatch, STREAM, ALIAS)
    at_default = [Config({**config, "alias": False}) if config["template"] == STREAM else config for config in before]
    assert list(starts()) == at_default
    assert [config for config in starts() if config not in whole_space()] == []


@pytest.mark.parametrize("none", [{}, {"alias": None, "colour": None}], ids=["own knobs", "padded with None"])
def test_trials_from_before_a_knob_are_in_the_space_and_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store, none: dict[str, None]
) -> None:
    builder, configs = make_builder(tmp_path), some_configs()
    known = store_trials(store, builder, configs, **none)
    add_knob(monkeypatch, STREAM, ALIAS)
    space = whole_space()
    resumed = resumable(known, space, builder)
    assert [each.kernel_key for each in resumed] == [each.kernel_key for each in known]
    for config, each in zip(configs, resumed, strict=True):
        assert each.config == ({**config, "alias": False} if config["template"] == STREAM else dict(config))
        assert Config(each.config) in space
        assert OP.read_config(each.config, SIGNATURE, ARCH) == Config(each.config)
        assert OP.read_config({**none, **config}, SIGNATURE, ARCH) == Config(each.config)


def test_trials_of_other_code_or_another_compiler_are_not_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store
) -> None:
    known = store_trials(store, make_builder(tmp_path), some_configs())
    assert resumable(known, whole_space(), make_builder(tmp_path, "newer")) == []
    context = template(STREAM).context
    monkeypatch.setitem(template(STREAM).__dict__, "context", lambda *of: {**context(*of), "entry": "renamed"})
    resumed = resumable(known, whole_space(), make_builder(tmp_path))
    assert [each.template for each in resumed] == [each.template for each in known if each.template != STREAM]
    assert len(resumed) < len(known)


def test_trials_outside_of_the_space_are_not_resumed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: Store
) -> None:
    builder = make_builder(tmp_path)
    known = store_trials(store, builder, some_configs())
    add_knob(monkeypatch, STREAM, Parameter("alias", (True, False), "its value in old configs is not known"))
    assert {each.template for each in resumable(known, whole_space(), builder)} == {BLOCKED, INTEGER}


def test_a_start_that_lacks_a_knob_without_default_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    add_knob(monkeypatch, STREAM, Parameter("alias", (True, False), "without a default"))
    with pytest.raises(TilewrightError, match=r"moe_gemm/cpu_stream, .*alias=True where this has 'nothing'"):
        starts()


def test_a_start_that_is_not_in_its_space_says_which_knob_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, STREAM, "block_rows", 2)
    with pytest.raises(TilewrightError, match=r"moe_gemm/cpu_stream, .*nearest config has block_rows=1 .* has 2\.$"):
        starts()


def test_a_default_that_is_not_in_its_space_says_which_knob_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, BLOCKED, "pack_x", value=True)
    with pytest.raises(
        TilewrightError, match=r"moe_gemm/cpu_blocked, .*nearest config has pack_x=False .* has True\.$"
    ):
        OP.default_config(SIGNATURE, ARCH)


def test_starts_that_are_wider_than_the_weights_are_left_out() -> None:
    narrow = MoeGemmSignature(stage="plain", experts=2, n=8, k=64)
    widths = {
        config["streams"] * config["chunk_groups"] * config["vectors"] * ARCH.lanes(4)
        for config in OP.starting_configs(narrow, ARCH)
    }
    assert widths == {16}


def test_a_stored_config_of_a_template_or_precision_that_is_no_more_is_shown_as_it_was() -> None:
    for old in ({"template": "moe_gemm/gone", "tile": 4}, {"template": STREAM, "precision": "int3"}):
        assert OP.read_config({**old, "streams": None}, SIGNATURE, ARCH) == Config(old)
