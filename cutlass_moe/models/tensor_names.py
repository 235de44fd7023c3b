"""How checkpoints name the tensors of a MoE layer: the forms that families share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorNames:
    """Names of one layer's tensors, which follow the layer's own, `model.layers.3.` for example.

    experts: of the module that holds the experts' tensors, in one of three layouts:
      {experts}.{e}.{projection}.weight        [N, K], of expert e
      {experts}.{projection}, or with .weight  [E, N, K] or, transposed, [E, K, N]
      {experts}.gate_up_proj, likewise         both of these projections, N = 2I
    projections: the names of gate, up and down. A model without a gate has the last two.
    interleaved: rows of gate_up_proj are gate, up, gate, up, ... instead of gates, then ups.
    router: of the linear layer from hidden to logits. correction_bias: of the whole tensor.
    shared: how the names of what every token sees begin.
    more_experts: higher numbers are experts of another layer.
    """

    experts: str = "mlp.experts"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    interleaved: bool = False
    router: str = "mlp.gate"
    correction_bias: str = "mlp.gate.e_score_correction_bias"
    shared: str = "mlp.shared_expert"  # shared_experts and shared_expert_gate too
    more_experts: bool = False


MLP = TensorNames()
ROUTER_BIAS = "mlp.router.e_score_correction_bias"
ERNIE_BIAS = "mlp.moe_statics.e_score_correction_bias"
BLOCK_SPARSE = TensorNames(
    "block_sparse_moe.experts",
    ("w1", "w3", "w2"),
    router="block_sparse_moe.gate",
    correction_bias="block_sparse_moe.e_score_correction_bias",
    shared="block_sparse_moe.shared_expert",
)
FEED_FORWARD = TensorNames(
    "feed_forward.experts", router="feed_forward.router", shared="feed_forward.shared_expert"
)
MIXER = TensorNames(
    "mixer.experts",
    router="mixer.gate",
    correction_bias="mixer.gate.e_score_correction_bias",
    shared="mixer.shared_expert",
)
STEP = TensorNames(
    "moe", router="moe.gate", correction_bias="moe.router_bias", shared="share_expert"
)
