"""transformers' models with our experts, on the CPU: tiny random ones of seven families.

A token that takes another expert because of a rounding moves its logits far: models are compared by
their median token, modules with the experts given.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

pytest.importorskip("transformers", reason="needs transformers")

import safetensors.torch as safetensors_torch
import transformers
from transformers.activations import ACT2FN
from transformers.integrations import finegrained_fp8
from transformers.integrations.moe import use_experts_implementation

import cutlass_moe as cm
from cutlass_moe.integrations import transformers as ours
from cutlass_moe.integrations.experts import find_activation
from cutlass_moe.operands import NAMED_DTYPES
from tests.integrations.tiny_models import (
    FAMILIES,
    HIDDEN,
    INTER,
    TOP_K,
    VOCAB,
    E,
    definition,
    experts_of,
    make,
    write_mxfp4,
)
from tests.support.checkpoints import QUANTIZATION

families = pytest.mark.parametrize("family", FAMILIES)
SHAPES = ["qwen3-moe", "gpt-oss", "nemotron-h"]  # one of each layout
ACTIVATIONS = {"gpt-oss": ("swiglu", 7.0, 1.702, 1.0), "nemotron-h": ("relu2", None, None, None)}
LIMITS = {None: 6e-3, "int8": 2e-2, "fp8": 7e-2, "mxfp4": 0.3}  # of a module, from float32
BLOCKS = {"hidden_size": 320, "moe_intermediate_size": 128}  # of several blocks of 128 x 128


@pytest.fixture(autouse=True)
def each_warning_anew() -> None:
    ours._warn_once.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Of tensors as small as these, more threads cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def routing(tokens: int, seed: int = 0, experts: int = E // 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids and weights; half of the experts get no token."""
    torch.manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN).bfloat16()
    ids = torch.rand(tokens, experts).topk(TOP_K, 1).indices
    return hidden, ids, torch.rand(tokens, TOP_K).bfloat16()


def eager(module: Any, *arguments: Tensor) -> Tensor:
    """What the model's own code computes, in float32."""
    wide = copy.deepcopy(module).float()
    hidden, ids, weights = arguments
    own = type(module).forward.__wrapped__
    return own(wide, hidden.float(), ids, weights.float())


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9))


def per_token(got: Tensor, want: Tensor) -> Tensor:
    got, want = got.double(), want.double()
    return ((got - want).norm(dim=-1) / want.norm(dim=-1)).flatten()


def tokens_of(batch: int = 2, length: int = 17) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


# Models


@families
def test_model(family: str, tmp_path: Path) -> None:
    """Selection, logits, greedy generation, saving and loading."""
    model = make(family)
    assert model.config._experts_implementation == "cutlass_moe"
    ids = tokens_of()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("error", message=".*experts.*")
        logits = model(ids).logits
        longer = model.generate(ids, max_new_tokens=4, do_sample=False)
    want = ACTIVATIONS.get(family, ("swiglu", None, None, None))
    assert all(tuple(experts._cutlass_moe.activation) == want for experts in experts_of(model))
    assert longer.shape == (2, 21)

    model.save_pretrained(tmp_path)
    assert "cutlass_moe" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, experts_implementation="cutlass_moe"
    )
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, logits)

    model.set_experts_implementation("eager")
    with torch.no_grad():
        assert per_token(logits, model(ids).logits).median() <= 2e-2
        right = model(longer).logits[:, 16:-1]
    chosen = right.gather(2, longer[:, 17:, None])[..., 0]
    spread = right.float().std(dim=-1)
    assert (right.max(dim=-1).values - chosen <= 0.1 * spread).float().mean() >= 0.75


@families
@pytest.mark.parametrize("quant", LIMITS)
def test_module(family: str, quant: str | None) -> None:
    model = make(family)
    before = copy.deepcopy(experts_of(model)[0])
    if quant:
        ours.quantize_(model, quant)
        assert not any(p.requires_grad for p in experts_of(model)[0].parameters())
    experts = experts_of(model)[0]
    for tokens in (0, 1, 333):
        hidden, ids, weights = routing(tokens)
        with torch.no_grad():
            out = experts(hidden, ids, weights)
        assert out.shape == hidden.shape and out.dtype == hidden.dtype
        if tokens:
            few = 1.6 if tokens == 1 else 1  # of rows: their errors scatter
            assert relative(out, eager(before, hidden, ids, weights)) <= few * LIMITS[quant]


@pytest.mark.parametrize("family", SHAPES)
def test_ids_of_other_ranks_add_nothing(family: str) -> None:
    experts = experts_of(make(family))[0]
    hidden, ids, weights = routing(40)
    elsewhere = torch.rand(40, TOP_K) < 0.5
    with torch.no_grad():
        got = experts(hidden, ids.masked_fill(elsewhere, E), weights.masked_fill(elsewhere, 0))
        want = experts(hidden, ids, weights.masked_fill(elsewhere, 0))
        assert not experts(hidden, torch.full_like(ids, E), weights).any()
    assert relative(got, want) <= 1e-3


def test_float32_hidden_with_narrower_weights() -> None:
    """As under autocast, and after a norm that is kept in float32."""
    experts = experts_of(make("qwen3-moe"))[0]
    hidden, ids, weights = routing(20)
    with torch.no_grad():
        out = experts(hidden.float(), ids, weights)
        assert torch.equal(out, experts(hidden, ids, weights).float())


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("called", [True, False], ids=["called", "not_called"])
def test_compiled(family: str, called: bool) -> None:
    """A module that was not called before has no known gate, and takes the way that needs none."""
    experts = experts_of(make(family))[0]
    arguments = routing(21)
    torch.compiler.reset()
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = eager(experts, *arguments)
        if called:
            assert torch.equal(experts(*arguments), compiled(*arguments))
        assert relative(compiled(*arguments), want) <= 1.5 * LIMITS[None]


def test_a_model_compiled() -> None:
    model = ours.prepare_(make("qwen3-moe", num_hidden_layers=1))
    ids = tokens_of()
    torch.compiler.reset()
    with torch.no_grad():
        want = model(ids).logits
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids).logits
    assert per_token(got, want).median() <= 2e-2


# Gradients


@pytest.mark.parametrize("family", SHAPES)
def test_gradients(family: str) -> None:
    """By the ops that a GPU would run; close to transformers' own."""
    experts = experts_of(make(family))[0]
    arguments = routing(50)
    with torch.no_grad():
        experts(*arguments)  # moves gpt-oss's weights

    def gradients(implementation: str) -> list[Tensor]:
        experts.config._experts_implementation = implementation
        hidden, weights = (arguments[i].clone().requires_grad_() for i in (0, 2))
        out = experts(hidden, arguments[1], weights)
        generator = torch.Generator().manual_seed(1)
        grad = torch.randn(out.shape, generator=generator).to(out.dtype)
        return list(torch.autograd.grad(out, [hidden, weights, *experts.parameters()], grad))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = gradients("cutlass_moe")
    for mine, right in zip(got, gradients("grouped_mm"), strict=True):
        assert mine.dtype == right.dtype
        assert (mine - right).double().norm() <= 2e-2 * right.double().norm()


def _hyperbolic(self: Any, x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return torch.tanh(gate) * up


def test_gates_of_the_models_own_are_trained_between_products(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts = experts_of(make("qwen3-moe"))[0]
    monkeypatch.setattr(type(experts), "_apply_gate", _hyperbolic)
    hidden, ids, weights = routing(30)
    ids[::4] = E  # of another rank
    leaves = [hidden.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = experts(hidden, ids, weights)
    found = torch.autograd.grad(out.sum(), leaves)
    experts.config._experts_implementation = "grouped_mm"
    out = experts(hidden, ids.clamp(max=E - 1), weights.where(ids < E, 0))
    want = torch.autograd.grad(out.sum(), leaves)
    for mine, right in zip(found, want, strict=True):
        assert (mine - right).double().norm() <= 2e-2 * right.double().norm()


def test_norms_after_experts_are_trained_by_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    experts = experts_of(make("qwen3-moe"))[0]
    monkeypatch.setattr(experts, "has_post_expert_norm", True, raising=False)
    monkeypatch.setattr(experts, "post_expert_norm", nn.Identity(), raising=False)
    arguments = routing(3)
    with pytest.warns(UserWarning, match="or with a norm, and one may be asked for"):
        assert experts(*arguments).requires_grad
    monkeypatch.setenv("CUTLASS_MOE_STRICT", "1")
    assert experts.train()(*arguments).requires_grad
    with pytest.raises(RuntimeError, match="no kernel for these experts"):
        experts.eval()(*arguments)


# Storage


def test_weights_of_gpt_oss_move_once() -> None:
    experts = experts_of(make("gpt-oss"))[0]
    before = {name: tensor.clone() for name, tensor in experts.state_dict().items()}
    hidden, ids, weights = routing(5)
    want = eager(experts, hidden, ids, weights)
    with torch.inference_mode():
        experts(hidden, ids, weights)
        address = experts.gate_up_proj.data_ptr()
        experts(hidden, ids, weights)
    assert experts.gate_up_proj.stride(1) == experts.down_proj.stride(1) == 1
    assert experts.gate_up_proj.data_ptr() == address
    assert isinstance(experts.gate_up_proj, nn.Parameter)
    assert not experts.gate_up_proj.is_inference()
    for name, tensor in experts.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert relative(eager(experts, hidden, ids, weights), want) <= 1e-6


# Gates


def module(gate: Any, concatenated: bool = True, act: Any = functional.silu, **own: Any) -> Any:
    """As much of a module of experts as its gate needs."""
    found = SimpleNamespace(has_gate=gate is not None, is_concatenated=concatenated, act_fn=act)
    vars(found).update(own)
    if gate is not None:
        found._apply_gate = lambda x: gate(found, x)
    return found


def halves(self: Any, x: Tensor) -> Any:
    return x.chunk(2, -1) if self.is_concatenated else (x[..., ::2], x[..., 1::2])


def plain(self: Any, x: Tensor) -> Tensor:
    gate, up = halves(self, x)
    return self.act_fn(gate) * up


def clamped(self: Any, x: Tensor) -> Tensor:
    gate, up = halves(self, x)
    gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
    return gate * torch.sigmoid(gate * self.alpha) * (up + self.beta)


def late_clamp(self: Any, x: Tensor) -> Tensor:  # Step3.7
    gate, up = halves(self, x)
    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(-self.limit, self.limit)


def far_clamp(self: Any, x: Tensor) -> Tensor:
    gate, up = halves(self, x)
    return self.act_fn(gate) * up.clamp(-1e5, 1e5)


def wrong_halves(self: Any, x: Tensor) -> Tensor:
    gate, up = x[..., ::2], x[..., 1::2]
    return self.act_fn(gate) * up


def of_a_width(self: Any, x: Tensor) -> Tensor:
    return plain(self, x) * torch.ones(INTER)


OAI = {"limit": 7.0, "alpha": 1.702, "beta": 1.0}
GATES: dict[str, tuple[Any, tuple[Any, ...] | None]] = {
    "silu": (module(plain), ("swiglu",)),
    "interleaved": (module(plain, False), ("swiglu",)),
    "gelu": (module(plain, act=ACT2FN["gelu"]), ("geglu",)),
    "gelu_tanh": (module(plain, act=ACT2FN["gelu_pytorch_tanh"]), ("geglu_tanh",)),
    "relu": (module(plain, act=ACT2FN["relu"]), ("reglu",)),
    "oai": (module(clamped, False, **OAI), ("swiglu", 7.0, 1.702, 1.0)),
    "other_numbers": (
        module(clamped, swiglu_limit=10.0, limit=10.0, alpha=1.0, beta=0.0),
        ("swiglu", 10.0, 1.0, 0.0),
    ),
    "other_beta": (module(clamped, limit=7.0, alpha=1.702, beta=0.5), None),
    "numbers_of_nothing": (module(plain, **OAI), ("swiglu",)),
    "late_clamp": (module(late_clamp, limit=7.0), None),
    "far_clamp": (module(far_clamp), None),
    "quick_gelu": (module(plain, act=ACT2FN["quick_gelu"]), None),
    "clipped": (module(plain, act=ACT2FN["gelu_10"]), None),
    "wrong_halves": (module(wrong_halves), None),
    "of_a_width": (module(of_a_width), None),
    "random": (module(lambda self, x: functional.dropout(plain(self, x))), None),
    **{
        f"no_gate_{name}": (module(None, act=ACT2FN[act]), None if name is None else (name,))
        for act, name in (
            *(("silu", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu", "relu")),
            *(("relu2", "relu2"), ("relu6", None)),
        )
    },
}


@pytest.mark.parametrize(("experts", "want"), GATES.values(), ids=GATES.keys())
def test_gates(experts: Any, want: tuple[Any, ...] | None) -> None:
    found = find_activation(experts)
    assert (found and tuple(part for part in found if part is not None)) == want


@pytest.mark.parametrize("quant", LIMITS)
@pytest.mark.parametrize("family", SHAPES)
def test_a_gate_of_its_own(family: str, quant: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two products, with the module's own code between them; its norm, if it has one, behind."""
    model = make(family)
    experts = experts_of(model)[0]
    if experts.has_gate:
        monkeypatch.setattr(
            type(experts), "_apply_gate", lambda self, x: torch.tanh(halves(self, x)[0])
        )
    else:
        experts.act_fn = nn.Tanh()
    arguments = routing(60)
    elsewhere = arguments[1] == 1
    arguments[2][elsewhere] = 0
    want = definition(experts, *arguments)
    arguments[1][elsewhere] = E
    before = copy.deepcopy(experts)
    if quant:
        ours.quantize_(model, quant)
    called = []
    monkeypatch.setattr(cm, "combine", lambda *given, do=cm.combine: called.append(1) or do(*given))
    with torch.no_grad():
        assert relative(experts(*arguments), want) <= 1.5 * LIMITS[quant]
        assert called and experts._cutlass_moe.activation is None
        experts.has_post_expert_norm = before.has_post_expert_norm = True
        experts.post_expert_norm = before.post_expert_norm = nn.Tanh()
        assert relative(experts(*arguments), definition(before, *arguments)) <= (
            1.5 * LIMITS[quant]
        )


# Quantised


@pytest.mark.parametrize(
    ("family", "quant"),
    [
        *product(SHAPES, ["int8", "fp8"]),
        ("qwen3-moe", "fp8_block"),
        ("nemotron-h", "fp8_block"),
        ("gpt-oss", "mxfp4"),
        ("qwen3-moe", "int4_g32"),
        ("deepseek-v3", "int4_g128"),
    ],
)
def test_a_quantised_model(family: str, quant: str) -> None:
    model, ids = make(family), tokens_of()
    with torch.no_grad():
        want = model(ids).logits
    assert ours.quantize_(model, quant) is model
    with torch.no_grad():
        got = model(ids).logits
    assert per_token(got, want).median() <= {"int8": 0.05, "fp8": 0.15}.get(quant[:4], 0.4)

    other = ours.quantize_(make(family), quant)
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(ids).logits, got)


def test_an_inner_size_that_needs_padding() -> None:
    model = make("gpt-oss", intermediate_size=24)
    before = copy.deepcopy(experts_of(model)[0])
    ours.quantize_(model, "int8")
    experts = experts_of(model)[0]
    assert experts.down_proj.shape == (E, 32, HIDDEN)
    with torch.no_grad():
        got = experts(*routing(30))
    assert relative(got, eager(before, *routing(30))) <= LIMITS["int8"]


@pytest.mark.parametrize("quant", ["int8", "fp8"])
def test_gradients_past_quantised_experts(quant: str) -> None:
    """Of tokens and router weights, as adapters beside frozen experts need them."""
    model = make("qwen3-moe")
    before = copy.deepcopy(experts_of(model)[0])
    ours.quantize_(model, quant)
    hidden, ids, weights = routing(30)
    leaves = [hidden.requires_grad_(), weights.requires_grad_()]
    found = torch.autograd.grad(experts_of(model)[0](hidden, ids, weights).sum(), leaves)
    want = torch.autograd.grad(eager(before, hidden, ids, weights).sum(), leaves)
    for mine, right in zip(found, want, strict=True):
        assert relative(mine, right) <= 2 * LIMITS[quant]


def test_what_quantised_experts_refuse() -> None:
    model = ours.quantize_(make("qwen3-moe"), "fp8")
    hidden, ids, weights = routing(4)
    blocks = ours.quantize_(make("qwen3-moe"), "fp8_block")
    packed = ours.quantize_(make("qwen3-moe"), "mxfp4")
    with pytest.raises(RuntimeError, match="quantised to fp8_block; kernels have no gradient"):
        experts_of(blocks)[0](hidden.requires_grad_(), ids, weights)
    with pytest.raises(RuntimeError, match="quantised to mxfp4; kernels have no gradient"):
        experts_of(packed)[0](hidden, ids, weights)
    hidden.requires_grad_(False)
    with pytest.raises(NotImplementedError, match="saved before quantize_"):
        model.save_pretrained("nowhere")
    with pytest.raises(ValueError, match="got one that is fp8 already"):
        ours.quantize_(model, "int8")
    with pytest.raises(RuntimeError, match="must have the fp8 weights .* got torch.bfloat16: cast"):
        experts_of(model.to(torch.bfloat16))[0](hidden.detach(), ids, weights)


def test_what_cannot_be_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="must be a transformers.PreTrainedModel"):
        ours.quantize_(nn.Linear(2, 2), "int8")
    model = make("qwen3-moe")
    with pytest.raises(ValueError, match="must be one of 'fp8', 'int8', .*'mxfp4', got 'fp4'"):
        ours.quantize_(model, "fp4")
    with pytest.raises(ValueError, match="N a multiple of 64"):
        ours.quantize_(make("gpt-oss", intermediate_size=24), "mxfp4")
    with pytest.raises(ValueError, match="ups must not be interleaved where scales are those of b"):
        ours.quantize_(make("gpt-oss"), "fp8_block")
    with pytest.raises(ValueError, match="must have gates or ups alone, got I = 80"):
        ours.quantize_(make("qwen3-moe", moe_intermediate_size=80), "fp8_block")
    with pytest.raises(ValueError, match="must be loaded, got some on the meta device"):
        ours.quantize_(make("qwen3-moe", device="meta"), "int8")
    experts_of(model)[0].down_proj.to_local = None  # as of a DTensor
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="5.24 or later for exper"):
        patch.setattr(transformers, "__version__", "5.23.1")
        ours.quantize_(model, "int8")
    dense = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=1,
        )  # fmt: skip
    )
    with pytest.raises(ValueError, match="must contain experts that are not quantised, got Llama"):
        ours.quantize_(dense, "int8")


# FP8 checkpoints as transformers holds them


def fp8_experts(
    block_size: tuple[int, int] | None, sizes: dict[str, int] | None = None, **options: Any
) -> tuple[Any, Any]:
    """FP8 experts, and the same in float32 by what their values stand for."""
    sizes = sizes or {}
    config = make("qwen3-moe", device="meta", **sizes).config
    config.hidden_act, config._experts_implementation = "silu", "cutlass_moe"

    class Experts(finegrained_fp8.FP8Experts):
        pass

    decorated = use_experts_implementation(
        experts_class=Experts, experts_interface=finegrained_fp8.ALL_FP8_EXPERTS_FUNCTIONS
    )
    experts = decorated(config=config, block_size=block_size, **options)
    wide = copy.deepcopy(experts_of(make("qwen3-moe", **sizes))[0]).float()
    torch.manual_seed(1)
    for name in ("gate_up_proj", "down_proj"):
        weight, scale = getattr(experts, name), getattr(experts, f"{name}_scale_inv")
        weight.data = (torch.randn(weight.shape) * 100).to(torch.float8_e4m3fn)
        scale.data = (torch.rand(scale.shape) + 0.5) * weight.shape[2] ** -0.5 / 100
        n, k = block_size or (-(-weight.shape[1] // scale.shape[1]), weight.shape[2])
        every = scale.repeat_interleave(n, 1).repeat_interleave(k, 2)
        getattr(wide, name).data = weight.float() * every[:, : weight.shape[1], : weight.shape[2]]
    return experts, wide


@pytest.mark.parametrize("block_size", [(1, HIDDEN), None], ids=["channel", "tensor"])
def test_fp8_experts_in_place(block_size: tuple[int, int] | None) -> None:
    experts, wide = fp8_experts(block_size)
    arguments = routing(100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = experts(*arguments)  # no gradient is lost: 8-bit weights have none
    assert relative(out, eager(wide, *arguments)) <= LIMITS["fp8"]


@pytest.mark.parametrize("gate", [nn.SiLU(), nn.Tanh()], ids=["fused", "two_products"])
def test_blocks_of_scales_in_place(gate: nn.Module) -> None:
    experts, wide = fp8_experts((128, 128), BLOCKS)
    assert experts.gate_up_proj_scale_inv.shape == (E, 2, 3)
    experts.act_fn = wide.act_fn = gate  # no kernel has tanh
    _, ids, weights = routing(100)
    hidden = torch.randn(100, BLOCKS["hidden_size"]).bfloat16()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = experts(hidden, ids, weights)
    assert (experts._cutlass_moe.activation is None) == isinstance(gate, nn.Tanh)
    assert relative(out, eager(wide, hidden, ids, weights)) <= LIMITS["fp8"]


@pytest.mark.parametrize(
    ("block_size", "options", "reason"),
    [
        ((16, 16), {}, "w13_scale must have shape"),
        ((128, 128), {}, "blocks of 128 rows must have gates or ups alone, got I = 32"),
        ((1, HIDDEN), {"activation_scheme": "static"}, "scales of their own, got static ones"),
    ],
    ids=["block", "joint-block", "static"],
)
def test_fp8_experts_that_fall_back(
    block_size: tuple[int, int],
    options: dict[str, Any],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    experts, _ = fp8_experts(block_size, **options)
    theirs = torch.ones(3, HIDDEN)
    monkeypatch.setattr(ours, "fp8_grouped_mm_experts_forward", lambda *given: theirs)
    with pytest.warns(UserWarning, match=reason):
        assert experts(*routing(3)) is theirs


@pytest.mark.parametrize("quant", ["int8", "fp8", "fp8_block"])
def test_block_scales_are_quantised_again(quant: str) -> None:
    experts, wide = fp8_experts((24, 48))  # which do not divide the sizes
    model = make("qwen3-moe")
    model.model.layers[0].mlp.experts = experts
    ours.quantize_(model, quant)
    arguments = routing(100)
    with torch.no_grad():
        out = experts(*arguments)
    limit = LIMITS[quant.partition("_")[0]]
    assert relative(out, eager(wide, *arguments)) <= 1.5 * limit


# Checkpoints


def write_8bit(directory: Path, model: Any, quant: str) -> None:
    """Saves a model as others publish it: every matrix of layers in 8 bits, with its scales."""
    model.save_pretrained(directory)
    (file,) = directory.glob("*.safetensors")
    tensors = safetensors_torch.load_file(file)
    for name, tensor in list(tensors.items()):
        if tensor.dim() == 2 and "layers" in name and not name.endswith(("gate.weight", "conv")):
            if quant.startswith("fp8_block"):
                rows, columns = (-(-size // 128) for size in tensor.shape)
                scale = torch.full((rows, columns), float(tensor.abs().max()) / 448)
                ending = "_scale" if quant.endswith("compressed") else "_scale_inv"
                tensors[f"{name}{ending}"] = scale
                tensors[name] = (tensor.float() / scale[0, 0]).to(torch.float8_e4m3fn)
            else:
                values, scale = cm.quantize_per_token(tensor, ours.QUANTS[quant])
                tensors |= {name: values, f"{name}_scale": scale[:, None].bfloat16()}
    safetensors_torch.save_file(tensors, file)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = QUANTIZATION[quant]
    (directory / "config.json").write_text(json.dumps(config))


def test_gpt_oss_keeps_its_bits(tmp_path: Path) -> None:
    ids = tokens_of()
    write_mxfp4(tmp_path, make("gpt-oss"))
    loaded = ours.load_quantized(tmp_path, device="cpu").eval()
    # without triton kernels, transformers dequantises to bfloat16: the same numbers
    wide = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=transformers.Mxfp4Config(dequantize=True),
        dtype=torch.bfloat16, experts_implementation="eager",
    ).eval()  # fmt: skip
    for mine, theirs in zip(experts_of(loaded), experts_of(wide), strict=True):
        assert mine.down_proj.dtype == torch.uint8
        w13, w2 = (
            cm.dequantize_packed(w, k) for w, k in ((mine.gate_up_proj, 64), (mine.down_proj, 32))
        )
        rows = theirs.gate_up_proj.detach().transpose(1, 2).float()
        assert torch.equal(w13, torch.cat([rows[:, ::2], rows[:, 1::2]], 1))
        assert torch.equal(w2, theirs.down_proj.detach().transpose(1, 2).float())
    with torch.no_grad():
        want = wide(ids).logits
        assert per_token(loaded(ids).logits, want).median() <= 2e-2
        wide.set_experts_implementation("cutlass_moe")
        again = ours.quantize_(wide, "mxfp4")
        assert torch.equal(again(ids).logits, loaded(ids).logits)


@pytest.mark.parametrize(
    ("family", "stored", "quant"),
    [
        ("qwen3-moe", "int8", None),
        ("mixtral", "fp8", None),
        ("deepseek-v3", "fp8_block", "int8"),
        ("deepseek-v3", "fp8_block", None),
        ("qwen3-moe", "fp8_block_compressed", None),
        ("deepseek-v3", "bf16", "fp8"),
        ("nemotron-h", "bf16", "fp8_block"),
        ("qwen3-moe", "bf16", "int4_g32"),
        ("gpt-oss", "bf16", "mxfp4"),
    ],
)
def test_load_quantized(family: str, stored: str, quant: str | None, tmp_path: Path) -> None:
    model, ids = make(family), tokens_of()
    if stored == "bf16":
        model.save_pretrained(tmp_path)
    else:
        write_8bit(tmp_path, model, stored)
    loaded = ours.load_quantized(tmp_path, quant, device="cpu").eval()
    assert type(loaded) is type(model)
    assert loaded.config._experts_implementation == "cutlass_moe"
    assert not any(tensor.is_meta for tensor in loaded.state_dict().values())
    name = quant or stored.removesuffix("_compressed")
    assert experts_of(loaded)[0].down_proj.dtype == NAMED_DTYPES.get(name, torch.uint8)
    with torch.no_grad():
        error = per_token(loaded(ids).logits, model(ids).logits).median()
    limit = 0.05 if "int8" in (stored, quant) and stored != "fp8_block" else 0.2
    assert error <= (limit if name in NAMED_DTYPES else 0.4)
    with pytest.raises(NotImplementedError, match="saved before"):
        loaded.save_pretrained(tmp_path)


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="None or one of 'fp8', 'int8', .* got 'bf16'"):
        ours.load_quantized(tmp_path, "bf16")
    make("qwen3-moe").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="one of 'fp8', 'int8', .* for experts stored as bf16"):
        ours.load_quantized(tmp_path, device="cpu")
    make("gpt-oss").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Experts: gates and ups must not be interleaved"):
        ours.load_quantized(tmp_path, "fp8_block", device="cpu")


# Versions


@pytest.mark.parametrize(("version", "message"), [("5.16.2", "5.17 or later, got 5.16.2")])
def test_an_old_transformers(version: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(ImportError, match=message):
        ours._register()


def test_a_new_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "__version__", "6.1.0")
    with pytest.warns(UserWarning, match="6.1.0 is newer than those tested"):
        ours._register()
