"""A whole Transformers model, before and after enable(model), against Transformers' own experts implementations.

pytest benchmarks/bench_transformers.py --benchmark-json out.json

Random Qwen3-MoE in fp32. Decode: one token after a prompt of 128 that lies in the cache. Prefill: a prompt of 512, of
whose logits only the last are made, as generate() does. All models share the weights that they were built from.
"""

import copy
import json
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from interleave import Race, race, record, recorded_time
from peers import limited_to
from summary import POINTS, Point
from tuned import database, ensure_tuned_model

from tilewright.codegen.hardware.cores import usable_cores
from tilewright.runtime import ServeOptions

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")

from tilewright.runtime.transformers import enable  # noqa: E402

CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 768,
    "moe_intermediate_size": 768,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": False,
}
PROMPT, PREFILL = 128, 512
PEERS = ("eager", "batched_mm", "grouped_mm")
OURS = {"tilewright": 0.0, "tilewright int8": 0.012}
"""Ours, and the ``max_error`` of each: of one stage, SwiGLU's rounded factors included."""
EXACT, ROUNDED = 1e-5, 0.1
"""Relative error of logits. Rounded weights now and then make a token choose another expert, for a random router hardly
prefers one."""
THREADS = tuple(dict.fromkeys((1, min(2, usable_cores()))))
TOKENS = 8
"""Different ones that are decoded in turn, so that experts change."""
BUDGET_S = float(os.environ.get("TILEWRIGHT_BENCH_RACE_S", "60"))


@cache
def base_model():
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    return model.requires_grad_(requires_grad=False)


def sharing_copy():
    """A model of its own on the weights of the base model."""
    model = base_model()
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def plan_for(threads: int) -> Path:
    folder = database().parent / "qwen3_moe"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    more = ("--precision", "fp32,int8", "--max-error", str(max(OURS.values())))
    return ensure_tuned_model(folder, (1, PREFILL), threads, op="all", more=more)


@cache
def models(threads: int) -> dict:
    path = plan_for(threads)
    made = {}
    for name in PEERS:
        made[name] = sharing_copy()
        made[name].set_experts_implementation(name)
    for name, max_error in OURS.items():
        made[name] = sharing_copy()
        report = enable(made[name], options=ServeOptions(database=path, max_error=max_error, threads=threads))
        print(f"\n{name}, {threads} threads: {report}")
        assert len(report.layers) == CONFIG["num_hidden_layers"], report
    return made


def decode_calls(model) -> list:
    """One call per token; each leaves the cache as it found it."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, CONFIG["vocab_size"], (1, PROMPT), generator=generator)
    tokens = torch.randint(0, CONFIG["vocab_size"], (TOKENS, 1, 1), generator=generator)
    kept = model(prompt, use_cache=True).past_key_values

    def call_for(token):
        def call():
            logits = model(token, past_key_values=kept, use_cache=True).logits
            kept.crop(-1)
            return logits

        return call

    return [call_for(token) for token in tokens]


def prefill_calls(model) -> list:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(0, CONFIG["vocab_size"], (1, PREFILL), generator=generator) for _ in range(2)]
    return [lambda prompt=prompt: model(prompt, use_cache=True, logits_to_keep=1).logits for prompt in prompts]


CALLS = {"decode": decode_calls, "prefill": prefill_calls}


def contenders(phase: str) -> tuple[str, ...]:
    """Without batched_mm in a prefill: it copies an expert's weights for every pick, 38 GB here."""
    peers = PEERS if phase == "decode" else tuple(name for name in PEERS if name != "batched_mm")
    return (*OURS, *peers)


@cache
def run_race(phase: str, threads: int) -> Race:
    with limited_to(threads), torch.inference_mode():
        calls = {name: CALLS[phase](models(threads)[name]) for name in contenders(phase)}
        expected = torch.cat([call() for call in calls["eager"]])
        for name, mine in calls.items():
            error = (torch.cat([call() for call in mine]) - expected).norm() / expected.norm()
            print(f"{phase}, {threads} threads: logits of {name} differ from eager by {error:.1e}")
            assert error <= ROUNDED if OURS.get(name) else error <= EXACT, name
        result = race(calls, control="tilewright", budget_s=BUDGET_S, min_rounds=7, lead_in_us=20_000.0)
    print(f"\n{phase}, {threads} threads\n{result.table('tilewright')}")
    best = result.fastest([name for name in contenders(phase) if name in PEERS])
    for name in OURS:
        POINTS.append(
            Point(
                table=f"Transformers, {name}",
                label=f"{phase}, {name}",
                threads=threads,
                ours_us=result.results[name].median_us,
                best_peer=best,
                speedup=result.ratio(best, name),
                noise=result.noise,
            )
        )
    return result


@pytest.mark.parametrize("contender", [*OURS, *PEERS])
@pytest.mark.parametrize("phase", CALLS)
@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.benchmark(timer=recorded_time)
def bench_transformers(benchmark, threads: int, phase: str, contender: str) -> None:
    if contender not in contenders(phase):
        pytest.skip("it copies the weights of every pick, which takes more memory than there is")
    benchmark.group = f"Qwen3-MoE {phase} threads={threads}"
    record(benchmark, run_race(phase, threads), contender)
