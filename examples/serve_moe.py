"""Tokens per second of a mixture-of-experts model before and after one line: ``enable(model)``.

Tunes first where this machine has no plan for the model yet (some minutes)::

    python examples/serve_moe.py                        # a small Qwen3-MoE with random weights
    python examples/serve_moe.py --model FOLDER         # your own: config.json and safetensors
    python examples/serve_moe.py --max-error 0.01       # also weights in int8, where that stays within 1 %

Needs Transformers 5: ``pip install 'tilewright[transformers]'``.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tilewright.codegen.models.shapes import load_model
from tilewright.codegen.ops.registry import find_op
from tilewright.runtime import ServeOptions
from tilewright.runtime.serve.plans import is_planned
from tilewright.runtime.transformers import enable
from tilewright.tuner.cli import main as tune

SMALL = Path(__file__).parent / "small_qwen3_moe"
REPEATS = 5


def load(folder: Path) -> PreTrainedModel:
    """The model in ``folder``; with random weights where there are none."""
    if any(folder.glob("*.safetensors")):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()


def tune_unless_planned(options: argparse.Namespace, served: ServeOptions) -> None:
    """Tune the experts of the model for the sizes that are timed below."""
    signatures = find_op("moe_gemm").signatures(load_model(options.model))
    if all(is_planned(signature, served) for signature in signatures):
        return
    words = ["--arch", "native", "--op", "moe_gemm", "--model", str(options.model), "--time", options.time]
    words += ["--tokens", f"1,{options.prompt}"]
    words += ["--precision", "fp32,int8", "--max-error", str(options.max_error)] if options.max_error else []
    words += ["--db", str(options.db)] if options.db else []
    if tune(words) != 0:
        raise SystemExit("tuning found no right kernel for some size; see above")


def tokens_per_second(model: PreTrainedModel, prompt: torch.Tensor, new: int) -> tuple[float, float]:
    """Of the prompt and of ``new`` tokens after it: medians of several goes."""
    prefill, decode = [], []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        out = model(prompt, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        for _ in range(new):
            token = out.logits[:, -1:].argmax(dim=-1)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        prefill.append(prompt.shape[1] / (middle - begin))
        decode.append(new / (time.perf_counter() - middle))
    return statistics.median(prefill), statistics.median(decode)


def main() -> None:
    """Time the model as Transformers runs it, then as tilewright serves it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=SMALL, help="folder with config.json, and weights if you like")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=16, help="tokens to generate")
    parser.add_argument("--max-error", type=float, default=0.0, help="allowed by storing weights in fewer bits")
    parser.add_argument("--time", default="180s", help="for tuning")
    parser.add_argument("--db", help="database (default $TILEWRIGHT_DB, or the user's data folder)")
    options = parser.parse_args()

    model = load(options.model)
    prompt = torch.randint(0, model.config.get_text_config().vocab_size, (1, options.prompt))
    served = ServeOptions(database=options.db, max_error=options.max_error)
    tune_unless_planned(options, served)
    before = tokens_per_second(model, prompt, options.new)
    print(enable(model, options=served))
    after = tokens_per_second(model, prompt, options.new)
    for what, was, now in zip(("prefill", "decode"), before, after, strict=True):
        print(f"{what:8} {was:8.1f} tokens/s before, {now:8.1f} after: {now / was:.2f}x")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
