"""vLLM: experts that its choice of kernels takes for layers which our kernels run.

vLLM 0.33 chooses, for each layer, a backend and a class of experts. Two functions of each module
that chooses are replaced: one puts the Triton backend first where ours supports a layer, the other
names our class before Triton's. So weights keep the format of the Triton backend, and what ours
does not support gets what it would get without this package. Of the backends of gpt-oss's MXFP4 the
one for XPUs leaves weights as they are loaded, so ours takes its place on a GPU. For INT4 of
compressed-tensors the method that calls the choice is asked, which alone knows the groups. Versions
with a registry of FP8 experts get our class through that, selected by `--moe-backend cutlass_moe`.

README.md in this folder says what is supported and how to see it.
"""

from __future__ import annotations

import functools
from typing import Any

import vllm.model_executor.layers.fused_moe.modular_kernel as mk
from vllm.model_executor.layers.fused_moe.all2all_utils import maybe_make_prepare_finalize
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonWNA16Experts
from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, mxfp4, unquantized
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as wna16,
)
from vllm.platforms import current_platform

from cutlass_moe.integrations import plugins, serving
from cutlass_moe.integrations.vllm_experts import ENGINE, INT8, NAME, CutlassMoeExperts, Scheme


@functools.cache
def register() -> None:
    """Offers our class to vLLM; twice is the same as once."""
    if plugins.is_tested("vllm"):
        for oracle, triton, scheme in (
            (fp8, fp8.Fp8MoeBackend.TRITON, None),
            (int8, int8.Int8MoeBackend.TRITON, INT8),
            (unquantized, unquantized.UnquantizedMoeBackend.TRITON, (None, None)),
        ):
            _offer(oracle, triton, scheme)
        _offer_mxfp4()
        _offer_int4()
    else:
        from vllm.model_executor.layers.fused_moe.oracle.fp8_registry import (
            register_fp8_moe_backend,
        )

        ours = CutlassMoeExperts
        register_fp8_moe_backend(NAME, f"{ours.__module__}.{ours.__name__}")


def _offer(oracle: Any, triton: Any, scheme: Scheme | None) -> None:
    """Replaces the two functions of a module that chooses. scheme: all its layers', if it is one.

    They are looked up in the module at each call, so that those who import what chooses by name get
    ours too.
    """
    backends, classes = oracle._get_priority_backends, oracle.backend_to_kernel_cls

    @functools.wraps(backends)
    def priorities(moe_config: FusedMoEConfig, *asked: Any, **named: Any) -> list[Any]:
        found = backends(moe_config, *asked, **named)
        weight_key, activation_key = scheme or (asked or tuple(named.values()))
        supported, _ = CutlassMoeExperts.is_supported_config(
            CutlassMoeExperts,
            moe_config,
            weight_key,
            activation_key,
            mk.FusedMoEActivationFormat.Standard,
        )
        return [triton, *(one for one in found if one != triton)] if supported else found

    @functools.wraps(classes)
    def with_ours(backend: Any) -> list[type[mk.FusedMoEExperts]]:
        return [CutlassMoeExperts, *classes(backend)] if backend == triton else classes(backend)

    oracle._get_priority_backends, oracle.backend_to_kernel_cls = priorities, with_ours


def _offer_mxfp4() -> None:
    """As `_offer`, for gpt-oss: the choice names backends without a layer's config."""
    backends, classes = mxfp4._get_priority_backends_for_gpt_oss, mxfp4.backend_to_kernel_cls
    raw = mxfp4.Mxfp4MoeBackend.XPU  # leaves weights and scales as they are loaded

    @functools.wraps(backends)
    def priorities() -> list[Any]:
        found = backends()
        return found if current_platform.is_xpu() else [raw, *(b for b in found if b != raw)]

    @functools.wraps(classes)
    def with_ours(backend: Any) -> list[type[mk.FusedMoEExperts]]:
        if backend != raw or current_platform.is_xpu():
            return classes(backend)
        return [CutlassMoeExperts]

    mxfp4._get_priority_backends_for_gpt_oss = priorities
    mxfp4.backend_to_kernel_cls = with_ours


def _offer_int4() -> None:
    """As `_offer`, for compressed-tensors: weights come as the Triton backend takes them."""
    choice, method = wna16.select_wna16_moe_backend, wna16.CompressedTensorsWNA16MoEMethod
    set_up = method._setup_kernel

    @functools.wraps(choice)
    def with_ours(
        config: FusedMoEConfig, weight_key: Any, quant_config: Any, **named: Any
    ) -> tuple[Any, type[mk.FusedMoEExperts]]:
        group, order = quant_config.group_size, quant_config.actorder
        standard = mk.FusedMoEActivationFormat.Standard
        asked = (CutlassMoeExperts, config, weight_key, None, standard)
        if group not in (32, 128) or order == "group":
            serving.refuse(ENGINE, f"groups must be 32 or 128 neighbours, got {group}, {order}")
        elif CutlassMoeExperts.is_supported_config(*asked)[0]:
            return wna16.WNA16MoEBackend.TRITON, CutlassMoeExperts
        return choice(config, weight_key, quant_config, **named)

    @functools.wraps(set_up)
    def with_packed(self: Any, layer: Any) -> None:
        if self.experts_cls is CutlassMoeExperts:
            quant, tables = self.get_fused_moe_quant_config(layer), layer._expert_routing_tables()
            experts = CutlassMoeExperts(self.moe, quant)
            if experts.experts is not None:
                experts.process_weights_after_loading(layer)
                prepare = maybe_make_prepare_finalize(self.moe, quant, tables, True, False)
                self.moe_quant_config = quant
                self.moe_kernel = mk.FusedMoEKernel(prepare, experts)
                return
            self.experts_cls = TritonWNA16Experts
        set_up(self, layer)

    wna16.select_wna16_moe_backend, method._setup_kernel = with_ours, with_packed
