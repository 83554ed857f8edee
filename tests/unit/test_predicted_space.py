"""Predictions of whole spaces: the same as one by one, and what a search makes of them."""

import random

import numpy as np
import optuna
import pytest

from tilewright.codegen.hardware.devices import DEVICES
from tilewright.codegen.ops.moe_gemm.signature import MoeGemmSignature
from tilewright.codegen.ops.registry import find_op
from tilewright.codegen.routing.spec import RoutingSpec
from tilewright.codegen.space import Space
from tilewright.tuner.prediction.predict import predict_config
from tilewright.tuner.prediction.space import predict_configs
from tilewright.tuner.search import Prior, config_of, distributions_of, make_sampler

OP = find_op("moe_gemm")
H100 = DEVICES["h100-sxm"]


def signature(stage: str) -> MoeGemmSignature:
    activation = "swiglu" if stage == "up" else "none"
    fields = {"experts": 8, "n": 512, "k": 1024, "top_k": 2, "x_dtype": "bf16", "activation": activation}
    return MoeGemmSignature.from_dict({"stage": stage, **fields})


@pytest.mark.parametrize("stage", ["up", "down"])
@pytest.mark.parametrize("precision", ["fp32", "int4g128", "fp8_e4m3_tensor"])
def test_a_space_is_predicted_as_its_configs_are(stage: str, precision: str) -> None:
    mine = signature(stage)
    problem = OP.problem(mine, 48, RoutingSpec.parse("balanced"))
    space = OP.space(mine, H100.arch, (), (precision,))
    configs = random.Random(0).sample(list(space), 24)
    assert {config["template"] for config in configs} == {config["template"] for config in space}
    together = predict_configs(OP, problem, configs, H100)
    alone = [predict_config(OP.template(c), mine, problem, c, H100).us for c in configs]
    assert together == pytest.approx(np.array(alone))


def test_what_is_read_or_computed_less_is_never_predicted_slower() -> None:
    mine = signature("up")
    config = OP.default_config(mine, H100.arch)
    template = OP.template(config)
    times = [
        predict_config(template, mine, OP.problem(mine, tokens, RoutingSpec.parse("balanced")), config, H100).us
        for tokens in (1, 8, 64, 512, 4096)
    ]
    assert times == sorted(times)


def test_a_search_that_knows_the_whole_space_begins_with_its_best() -> None:
    mine = signature("down")
    space: Space = OP.space(mine, H100.arch)
    configs = list(space)
    times = predict_configs(OP, OP.problem(mine, 8, RoutingSpec.parse("balanced")), configs, H100)
    prior = Prior("model", tuple(zip(configs, times.tolist(), strict=True)))
    study = optuna.create_study(sampler=make_sampler("gp", space, seed=0, budget=30, priors=[prior]))
    asked = []
    for _ in range(24):
        trial = study.ask(distributions_of(space.parameters))
        asked.append(config_of(space, trial.params))
        study.tell(trial, float(times[configs.index(asked[-1])]) * 1.3)
    best = set(np.argsort(times, kind="stable")[:4])
    assert {configs.index(config) for config in asked[:4]} == best
    later = np.median([times[configs.index(config)] for config in asked[-8:]])
    assert later < np.quantile(times, 0.1)
