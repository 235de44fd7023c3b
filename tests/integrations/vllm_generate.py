"""`python -m tests.integrations.vllm_generate DIR OUT [options]`: greedy tokens of vLLM.

Writes to OUT, as JSON, the experts' class and for each of a few prompts the tokens that were chosen
and the log probabilities of the best ones. Attention is Triton's, which needs nothing compiled.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tests.integrations.vllm_layers import prepare

LENGTHS = (1, 5, 33, 120)  # of the prompts
NEW, BEST = 12, 8  # tokens to choose, and those of whom log probabilities are given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("out", type=Path)
    parser.add_argument("--ours", action="store_true")
    parser.add_argument("--triton", action="store_true", help="not what vLLM chooses by itself")
    parser.add_argument("--graphs", action="store_true", help="decode by CUDA graphs")
    arguments = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""}
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # FlashInfer need not be there
    prepare("cuda")
    if arguments.ours:
        from cutlass_moe.integrations import plugins

        plugins.vllm()
    from vllm import LLM, SamplingParams

    graphs = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
    llm = LLM(
        arguments.directory,
        skip_tokenizer_init=True,
        attention_backend="TRITON_ATTN",
        max_model_len=256,
        max_num_seqs=8,
        # no memory profile, which fails while another process shares the GPU
        gpu_memory_utilization=0.05,
        kv_cache_memory_bytes=1 << 28,
        moe_backend="triton" if arguments.triton else "auto",
        **(graphs if arguments.graphs else {"enforce_eager": True}),
    )
    prompts = [{"prompt_token_ids": [(7 * i + n) % 100 + 2 for i in range(n)]} for n in LENGTHS]
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW, logprobs=BEST, detokenize=False, ignore_eos=True
    )
    found = [request.outputs[0] for request in llm.generate(prompts, sampling)]
    report = {
        "experts": experts_of(llm),
        "tokens": [list(one.token_ids) for one in found],
        "logprobs": [
            [{token: best.logprob for token, best in step.items()} for step in one.logprobs]
            for one in found
        ],
    }
    arguments.out.write_text(json.dumps(report))


def experts_of(llm: object) -> list[str]:
    """The classes of experts that the layers of the model run."""

    def names(model: object) -> list[str]:
        kernels = [
            getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            for module in model.modules()  # type: ignore[attr-defined]
        ]
        return [type(kernel.fused_experts).__name__ for kernel in kernels if kernel is not None]

    return llm.apply_model(names)[0]  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
