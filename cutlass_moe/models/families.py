"""The table of model families: how the config.json of each describes its MoE layer.

A new family is one entry of FAMILIES, and a file in tests/models/configs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from cutlass_moe.models import moe_layers
from cutlass_moe.models.moe_layers import Rule
from cutlass_moe.models.tensor_names import (
    BLOCK_SPARSE,
    ERNIE_BIAS,
    FEED_FORWARD,
    MIXER,
    MLP,
    ROUTER_BIAS,
    STEP,
    TensorNames,
)

Names = tuple[str, ...]  # of fields: the first with a value counts; dots lead into objects

SPARSEMIXER = "sparsemixer"
# hidden_act -> (gated, plain) as `grouped_matmul` calls them; it has not all of them.
ACTIVATIONS = {
    "silu": ("swiglu", "silu"),
    "swish": ("swiglu", "silu"),
    "swiglu": ("swiglu", "silu"),
    "gelu": ("geglu", "gelu"),
    "relu": ("reglu", "relu"),
    "relu2": ("reglu2", "relu2"),
    "gelu_new": ("geglu_tanh", "gelu_tanh"),
    "gelu_pytorch_tanh": ("geglu_tanh", "gelu_tanh"),
    "gelu_tanh": ("geglu_tanh", "gelu_tanh"),
}


@dataclass(frozen=True)
class Family:
    """Where the fields of a MoE layer are, and what the model's code does that no field says.

    types: values of model_type, or of architectures, which counts first.
    experts, top_k, inter, hidden: sizes; hidden is that of the experts' input and output.
    act: its activation by a key of ACTIVATIONS, else `default_act`; gated: whether a gate is
      multiplied with an up projection; activation: one that no field names.
    limit: of SwiGLU's gate before it is activated, and of its up: with `alpha_beta` the numbers of
      swiglu_oai; limit_after: of its gate when it is activated, which no kernel has.
    bias: whether the experts' projections have one.
    scoring: the router's, by a field, with `scores` for values that mean another, else by
      `default_scoring`, which may be one that `topk_router` has not.
    groups: of experts. identity: how many ids behind the experts mean the token itself.
    layers: the rule which layers have experts. shared, shared_inter: how many experts see every
      token, default one, and the width of one.
    needs: fields and the values they may have. notes: fields, or FIELD=VALUE, and what is not
      supported where they ask for something, in words with a {} for the value; always: the same of
      all such models.
    known: fields that change nothing here.
    tensors: their names in its checkpoints, or None where no reader has their layout.

    A field that speaks of experts, their router or their activation, and is not named by the entry,
    is told to the user as one that is not understood.
    """

    types: Names
    experts: Names = ("num_experts", "n_routed_experts", "num_local_experts")
    top_k: Names = ("num_experts_per_tok",)
    inter: Names = ("moe_intermediate_size",)
    hidden: Names = ("hidden_size",)
    act: Names = ("hidden_act",)
    default_act: str = "silu"
    gated: bool = True
    activation: str | None = None
    limit: Names = ()
    alpha_beta: tuple[float, float] = (1.0, 0.0)
    limit_after: Names = ()
    bias: bool = False
    scoring: Names = ("scoring_func", "score_function", "score_func")
    scores: Mapping[str, str] = field(default_factory=dict)
    default_scoring: str = "softmax"
    groups: Names = ("n_group",)
    identity: Names = ()
    layers: Rule = moe_layers.every
    shared: Names = ()
    shared_inter: Names = ()
    needs: Mapping[str, tuple[object, ...]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    always: Names = ()
    known: Names = ()
    tensors: TensorNames | None = MLP

    @property
    def names(self) -> set[str]:
        """Fields that the entry names."""
        sizes = (self.experts, self.top_k, self.inter, self.hidden)
        act = (self.act, self.limit, self.limit_after)
        router = (self.scoring, self.groups, self.identity, self.shared, self.shared_inter)
        named = {name for names in (*sizes, *act, *router, self.known) for name in names}
        return named | self.needs.keys() | {name.partition("=")[0] for name in self.notes}


_DEEPSEEK_GROUPS = {
    "topk_method": (None, "noaux_tc", "greedy", "group_limited_greedy"),
}
_STEP_KNOWN = ("norm_expert_weight", "use_moe", "use_moe_router_bias", "need_fp32_gate")

FAMILIES = (
    Family(("mixtral",), inter=("intermediate_size",), tensors=BLOCK_SPARSE),
    Family(
        ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe_text", "qwen3_5_moe")
        + ("qwen3_vl_moe_text", "qwen3_vl_moe"),
        layers=moe_layers.qwen,
        shared_inter=("shared_expert_intermediate_size",),
    ),
    Family(
        ("deepseek_v2",),
        experts=("n_routed_experts",),
        layers=moe_layers.after_dense("first_k_dense_replace"),
        shared=("n_shared_experts",),
        shared_inter=("moe_intermediate_size",),
        needs=_DEEPSEEK_GROUPS,
        notes={
            "topk_method=group_limited_greedy": "a token may choose from the groups of its best "
            "experts, by the best of each; topk_router goes by the sum of a group's best two"
        },
    ),
    Family(
        ("deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa"),
        experts=("n_routed_experts",),
        default_scoring="sigmoid",
        layers=moe_layers.after_dense("first_k_dense_replace"),
        shared=("n_shared_experts",),
        shared_inter=("moe_intermediate_size",),
        needs=_DEEPSEEK_GROUPS,
    ),
    Family(
        ("dots1",),
        experts=("n_routed_experts",),
        scores={"noaux_tc": "sigmoid"},  # the field holds what others call topk_method
        default_scoring="sigmoid",
        layers=moe_layers.after_dense("first_k_dense_replace"),
        shared=("n_shared_experts",),
        shared_inter=("moe_intermediate_size",),
    ),
    Family(
        ("deepseek_v4",),
        experts=("n_routed_experts",),
        limit=("swiglu_limit",),
        default_scoring="sqrtsoftplus",
        shared=("n_shared_experts",),
        shared_inter=("moe_intermediate_size",),
        needs=_DEEPSEEK_GROUPS,
        notes={
            "num_hash_layers": "the first {} layers take experts by a hash of the token's id, "
            "without a router's choice"
        },
        known=("expert_dtype",),  # read with the quantisation
        tensors=None,
    ),
    Family(
        ("BailingMoeV2ForCausalLM", "BailingMoeV2_5ForCausalLM", "bailing_moe_v2")
        + ("bailing_hybrid",),
        experts=("num_experts",),
        default_scoring="sigmoid",
        layers=moe_layers.after_dense("first_k_dense_replace"),
        shared=("num_shared_experts",),
        shared_inter=("moe_shared_expert_intermediate_size", "moe_intermediate_size"),
        needs=_DEEPSEEK_GROUPS,
        tensors=replace(MLP, correction_bias="mlp.gate.expert_bias"),
    ),
    Family(
        ("bailing_moe", "BailingMoeForCausalLM"),
        experts=("num_experts",),
        layers=moe_layers.after_dense("first_k_dense_replace"),
        shared=("num_shared_experts",),
        shared_inter=("moe_intermediate_size",),
    ),
    Family(
        ("afmoe",),
        experts=("num_experts",),
        default_scoring="sigmoid",
        groups=("n_group", "num_expert_groups"),
        layers=moe_layers.after_dense("num_dense_layers"),
        shared=("num_shared_experts",),
        shared_inter=("moe_intermediate_size",),
        known=("route_norm", "route_scale"),
        tensors=replace(MLP, router="mlp.router.gate", correction_bias="mlp.expert_bias"),
    ),
    Family(
        ("nemotron_h",),
        experts=("n_routed_experts",),
        hidden=("moe_latent_size", "hidden_size"),
        act=("mlp_hidden_act",),
        default_act="relu2",
        gated=False,
        default_scoring="sigmoid",
        layers=moe_layers.nemotron,
        shared_inter=("moe_shared_expert_intermediate_size",),
        needs={"mlp_bias": (None,), "n_shared_experts": (None, 1)},
        notes={
            "moe_latent_size": "its experts see {} columns: the projections of hidden to them and "
            "back are the caller's, the router and the shared expert see hidden itself"
        },
        known=("moe_shared_expert_overlap",),
        tensors=MIXER,
    ),
    Family(
        ("gpt_oss",),
        experts=("num_local_experts",),
        top_k=("num_experts_per_tok", "experts_per_token"),
        inter=("intermediate_size",),
        activation="swiglu_oai",
        limit=("swiglu_limit",),
        alpha_beta=(1.702, 1.0),
        bias=True,
        needs={"hidden_act": (None, "silu")},
        known=("experts_per_token",),
        tensors=replace(MLP, router="mlp.router", interleaved=True),
    ),
    Family(
        ("llama4_text", "llama4"),
        experts=("num_local_experts",),
        inter=("intermediate_size",),
        default_scoring="sigmoid",
        layers=moe_layers.llama4,
        shared_inter=("intermediate_size",),
        always=(
            "a router's weight is multiplied with the experts' input: multiply hidden, and give "
            "fused_moe weights of one",
        ),
        tensors=FEED_FORWARD,
    ),
    Family(
        ("minimax_m2",),
        inter=("intermediate_size",),
        default_scoring="sigmoid",
        shared_inter=("shared_intermediate_size",),
        known=("shared_moe_mode", "use_routing_bias"),
        tensors=BLOCK_SPARSE,
    ),
    Family(
        ("Grok1ForCausalLM",),  # its model_type is another model's
        experts=("num_local_experts",),
        inter=("moe_intermediate_size", "intermediate_size"),
        act=(),  # its code takes tanh's whatever hidden_act says
        default_act="gelu_tanh",
        shared=("residual_moe",),
        shared_inter=("intermediate_size",),
        notes={
            "router_logit_softcapping": "logits are {0} * tanh(logits / {0}) before the softmax, "
            "which topk_router does not do: give it those"
        },
        known=("hidden_act",),
        tensors=None,
    ),
    Family(
        ("phimoe",),
        experts=("num_local_experts",),
        inter=("intermediate_size",),
        default_scoring=SPARSEMIXER,
        known=("input_jitter_noise",),
        tensors=BLOCK_SPARSE,
    ),
    Family(
        ("ernie4_5_moe",),
        experts=("moe_num_experts",),
        top_k=("moe_k",),
        layers=moe_layers.ernie,
        shared=("moe_num_shared_experts",),
        shared_inter=("moe_intermediate_size",),
        needs={"use_bias": (None,), "moe_gate": (None, "topk", "topk_fused")},
        known=("moe_capacity", "moe_use_aux_free", "moe_norm_min"),
        tensors=replace(MLP, correction_bias=ERNIE_BIAS),
    ),
    Family(
        ("ernie4_5_moe_vl",),  # its lists hold a value for the text's experts, one for the images'
        experts=("moe_num_experts.0", "moe_num_experts"),
        top_k=("moe_k",),
        inter=("moe_intermediate_size.0", "moe_intermediate_size"),
        layers=moe_layers.ernie,
        shared=("moe_num_shared_experts",),
        shared_inter=("moe_intermediate_size.0", "moe_intermediate_size"),
        needs={"use_bias": (None,), "moe_gate": (None, "topk", "topk_fused")},
        notes={
            "moe_intermediate_size.1": "the experts of images, of inter {}, are a layer of their "
            "own, which is not among these: build --shapes takes it"
        },
        known=("moe_capacity", "moe_use_aux_free", "moe_norm_min"),
        tensors=replace(MLP, correction_bias=ERNIE_BIAS, more_experts=True),
    ),
    Family(
        ("hunyuan_v1_moe",),
        experts=("num_experts",),
        top_k=("moe_topk",),
        inter=("moe_intermediate_size", "intermediate_size"),
        layers=moe_layers.after_dense("moe_layer_num_skipped"),
        shared=("num_shared_expert",),
        shared_inter=("moe_intermediate_size", "intermediate_size"),
        needs={"mlp_bias": (None,), "group_limited_greedy": (None,)},
        known=("use_mixed_mlp_moe",),
        tensors=replace(MLP, router="mlp.gate.wg", shared="mlp.shared_mlp"),
    ),
    Family(
        ("jamba",),
        experts=("num_experts",),
        inter=("intermediate_size",),
        layers=moe_layers.periodic("expert_layer_period", "expert_layer_offset"),
        tensors=FEED_FORWARD,
    ),
    Family(("olmoe",), experts=("num_experts",), inter=("intermediate_size",)),
    Family(
        ("dbrx",),
        experts=("ffn_config.moe_num_experts",),
        top_k=("ffn_config.moe_top_k",),
        hidden=("d_model",),
        inter=("ffn_config.ffn_hidden_size",),
        act=("ffn_config.ffn_act_fn.name",),
        needs={"ffn_config.moe_normalize_expert_weights": (None, 1)},
        known=("ffn_config.model_type", "ffn_config.moe_jitter_eps", "ffn_config.moe_loss_weight")
        + ("ffn_config.ffn_act_fn",),
        tensors=None,
    ),
    Family(
        ("step3_text", "step3_vl"),
        experts=("moe_num_experts",),
        top_k=("moe_top_k",),
        layers=moe_layers.enumerated("moe_layers_enum"),
        shared_inter=("share_expert_dim",),
        known=_STEP_KNOWN,
        tensors=STEP,
    ),
    Family(
        ("step3p5", "step3p7"),
        experts=("moe_num_experts", "n_routed_experts"),
        top_k=("moe_top_k", "num_experts_per_tok"),
        limit_after=("swiglu_limits",),
        scoring=("moe_router_activation",),
        default_scoring="sigmoid",
        layers=moe_layers.enumerated("moe_layers_enum"),
        shared_inter=("share_expert_dim", "share_expert_dims"),
        needs={"moe_every_n_layer": (None, 1), "moe_layer_offset": (None, 0)},
        known=(*_STEP_KNOWN, "moe_router_scaling_factor", "swiglu_limits_shared"),
        tensors=STEP,
    ),
    Family(
        ("longcat_flash", "longcat_flash_ngram", "LongcatFlashNgramForCausalLM"),
        experts=("n_routed_experts",),
        top_k=("moe_topk",),
        inter=("expert_ffn_hidden_size",),
        identity=("zero_expert_num",),
        needs={"zero_expert_type": (None, "identity"), "router_bias": (None,)},
        notes={
            "zero_expert_num": "{} ids behind the experts' mean the token itself: fused_moe adds "
            "nothing for them, the token times their weights is the caller's"
        },
        known=("ffn_hidden_size",),  # of the dense layers
        tensors=replace(MLP, router="mlp.router.classifier", correction_bias=ROUTER_BIAS),
    ),
    Family(
        ("gemma4_text", "gemma4"),
        experts=("num_experts",),
        top_k=("top_k_experts",),
        act=("hidden_activation",),
        default_act="gelu_tanh",
        shared_inter=("intermediate_size",),
        needs={"enable_moe_block": (True,)},
        always=(
            "its router normalises hidden before the logits, and multiplies the weights with a "
            "number an expert: both are the caller's, around topk_router",
        ),
        tensors=replace(MLP, experts="experts", router="router.proj", shared="mlp."),
    ),
)
_BY_TYPE = {name: family for family in FAMILIES for name in family.types}
# Of a model that the table has not: what names of fields have in common.
OTHER = Family(
    (),
    inter=("moe_intermediate_size", "intermediate_size"),
    layers=moe_layers.after_dense("first_k_dense_replace"),
    shared=("n_shared_experts", "num_shared_experts"),
    shared_inter=("moe_intermediate_size",),
)


def find_family(names: list[str]) -> Family | None:
    """The family of the first of these that the table has."""
    return next((_BY_TYPE[name] for name in names if name in _BY_TYPE), None)
