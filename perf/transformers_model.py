"""`python -m perf.transformers_model`: tokens a second in transformers, by experts' code.

The model is four layers of Qwen3-30B-A3B with random weights. Each implementation of its experts
runs in turns, in random order, in each of five rounds; medians are shown. Prefill and decode are
timed as a user's program runs them, eagerly, by the host's clock around a synchronised GPU. The
experts of one layer are also timed alone: by CUDA events with L2 flushed before each call, and as
a replayed CUDA graph where the implementation can be captured.

Images: `cutlass-moe build --model qwen3-30b --dtype bf16`, and fp8 and int8.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from cutlass_moe.integrations.experts import experts_of
from cutlass_moe.integrations.transformers import quantize_
from cutlass_moe.tune.timing import flush_buffer
from perf.timing import ROUNDS, capture, interleaved

Call = Callable[[], object]
Model = Any  # transformers has no types
OURS = ("bf16", "fp8", "int8")
THEIRS = ("grouped_mm", "batched_mm", "eager")
PREFILL = (4, 2048)
DECODE = (1, 16)  # sequences of one new token each
CONTEXT = 256  # tokens that a decoded sequence has before it
SECONDS = 2.0  # of each measurement
MOST_PAIRS = 4096  # of batched_mm, which copies an expert's weights for each: 19 MB


def make(layers: int) -> Model:
    """Qwen3-30B-A3B with so many layers, in bfloat16, on the GPU."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = transformers.Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        for experts in experts_of(model):
            for parameter in experts.parameters():
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def models(layers: int) -> dict[str, Model]:
    """The model by implementation; those that are not quantised share their weights."""
    dense = make(layers)
    found = {name: Selected(dense, name) for name in THEIRS}
    found["bf16"] = Selected(dense, "cutlass_moe")
    for quant in ("fp8", "int8"):
        found[quant] = Selected(quantize_(make(layers), quant), "cutlass_moe")
    return found


class Selected:
    """A model, and the implementation of its experts that is selected before it runs."""

    def __init__(self, model: Model, implementation: str) -> None:
        self.model, self.implementation = model, implementation

    def select(self) -> Model:
        self.model.config._experts_implementation = self.implementation
        return self.model

    def prefill(self, ids: Tensor) -> Call:
        return lambda: self.select()(ids, use_cache=False, logits_to_keep=1)

    def decode(self, sequences: int) -> Call:
        """One step of so many sequences, which starts anew from the same context each time."""
        generator = torch.Generator("cuda").manual_seed(sequences)
        size = (sequences, CONTEXT)
        ids = torch.randint(151936, size, device="cuda", generator=generator)
        model = self.select()
        if self.implementation == "batched_mm":  # its copies of the context's weights would not fit
            model.config._experts_implementation = "grouped_mm"
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values

        def step() -> None:
            self.select()(ids[:, -1:], past_key_values=cache, logits_to_keep=1)
            cache.crop(-1)

        return step

    def experts(self, tokens: int) -> Call:
        """The experts of the first layer, with a routing of their own for each token."""
        module = next(experts_of(self.model))
        generator = torch.Generator("cuda").manual_seed(tokens)
        scores = torch.rand(tokens, 128, device="cuda", generator=generator)
        weights, ids = scores.topk(8, 1)
        hidden = torch.randn(tokens, 2048, device="cuda", generator=generator).bfloat16()
        weights = (weights / weights.sum(1, keepdim=True)).bfloat16()

        def call() -> Tensor:
            self.select()
            return module(hidden, ids, weights)

        return call


def check(found: dict[str, Selected]) -> dict[str, float]:
    """Each implementation's relative difference from transformers' own loop over experts.

    Raises RuntimeError where one is larger than its arithmetic explains.
    """
    want = found["eager"].experts(512)().float()
    errors = {}
    for name, selected in found.items():
        errors[name] = float((selected.experts(512)().float() - want).norm() / want.norm())
        limit = {"fp8": 0.1, "int8": 0.04}.get(name, 0.02)
        if not errors[name] <= limit:
            raise RuntimeError(f"{name} must be within {limit} of eager, got {errors[name]}")
    return errors


def wall_us(calls: dict[str, Call]) -> dict[str, float]:
    """Microseconds of each call by the host's clock: medians over rounds in turns."""
    share = SECONDS / (ROUNDS * len(calls))
    repeats: dict[str, int] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        for _ in range(3):
            call()
        repeats[name] = max(1, min(100, int(share * 1e6 / _clock(call, 1))))
    order = random.Random(0)
    for _ in range(ROUNDS):
        for name in order.sample(list(calls), len(calls)):
            samples[name].append(_clock(calls[name], repeats[name]))
    return {name: statistics.median(found) for name, found in samples.items()}


def _clock(call: Call, repeats: int) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e6


def gpu_us(calls: dict[str, Call]) -> dict[str, float]:
    timings = interleaved(calls, SECONDS, flush_buffer())
    return {name: timing.us for name, timing in timings.items()}


def captured(calls: dict[str, Call]) -> dict[str, Call]:
    """Graphs of the calls that can be captured."""
    graphs = {}
    for name, call in calls.items():
        if name == "eager":
            continue  # it waits for the GPU
        call()
        graphs[name] = capture(call)
    return graphs


def served(found: dict[str, Selected], tokens: int) -> dict[str, Selected]:
    """Without batched_mm where its copies of weights would not fit."""
    fits = tokens * 8 <= MOST_PAIRS
    return {name: one for name, one in found.items() if fits or name != "batched_mm"}


@torch.no_grad()
def run(layers: int) -> dict[str, Any]:
    found = models(layers)
    report: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "layers": layers,
        "difference from eager": check(found),
    }
    ids = torch.randint(151936, PREFILL, device="cuda")
    cases: dict[str, tuple[int, Callable[[Selected], Call]]] = {
        f"prefill {PREFILL[0]} x {PREFILL[1]}": (ids.numel(), lambda one: one.prefill(ids)),
        **{
            f"decode {count}": (count, lambda one, count=count: one.decode(count))
            for count in DECODE
        },
    }
    for title, (tokens, make_call) in cases.items():
        those = served(found, tokens)
        us = wall_us({name: make_call(one) for name, one in those.items()})
        layer = {name: one.experts(tokens) for name, one in those.items()}
        report[title] = {
            "tokens/s of the model": {name: round(tokens / t * 1e6) for name, t in us.items()},
            "us of a layer's experts, host's clock": wall_us(layer),
            "us of a layer's experts, GPU": gpu_us(layer),
            "us of a layer's experts, graph": gpu_us(captured(layer)),
        }
    return report


def table(report: dict[str, Any]) -> str:
    """The report as Markdown; bold: what is best."""
    columns = [*OURS, *THEIRS]
    lines = [
        f"{report['gpu']}, torch {report['torch']}, transformers {report['transformers']}, "
        f"{report['layers']} layers of Qwen3-30B-A3B",
        "",
        "| | | " + " | ".join(columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]
    for title, rows in report.items():
        if not isinstance(rows, dict) or title.startswith("difference"):
            continue
        for row, values in rows.items():
            best = max if row.startswith("tokens") else min
            cells = []
            for name in columns:
                value = values.get(name)
                text = "" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
                cells.append(f"**{text}**" if value == best(values.values()) else text)
            lines.append(f"| {title} | {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--output", help="where to write the report as JSON")
    arguments = parser.parse_args()
    report = run(arguments.layers)
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(report, file, indent=1)
    print(table(report))


if __name__ == "__main__":
    main()
