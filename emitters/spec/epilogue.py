"""The nodes of a grouped GEMM's epilogue: what it does with each value of the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from emitters.spec.dtypes import DType, Name


class EpilogueNode(Protocol):
    """An operation on the float32 values of a product, applied after the scales.

    A node is a frozen dataclass; emitters/device/epilogue/nodes.py says how to add one.
    """

    @property
    def kind(self) -> str:
        """The node's name in JSON."""

    @property
    def operand(self) -> str | None:
        """The kernel parameter of the tensor that the node reads, or None if it reads none.

        A node that reads a tensor also has a property `element`, the tensor's DType.
        """


@dataclass(frozen=True)
class Bias:
    """Adds bias[e, n]; the tensor is [E, N], of `dtype`."""

    dtype: DType
    kind: ClassVar[str] = "bias"
    operand: ClassVar[str] = "bias"

    @property
    def element(self) -> DType:
        return self.dtype


class ActivationFunction(Name):
    """A function of one column x or, if it is gated, of a gate column g and an up column u."""

    SWIGLU = "swiglu"  # silu(g) * u
    GEGLU = "geglu"  # gelu(g) * u
    REGLU = "reglu"  # relu(g) * u
    GEGLU_TANH = "geglu_tanh"  # gelu_tanh(g) * u
    SWIGLU_OAI = "swiglu_oai"  # g * sigmoid(alpha g) * (u + beta), g <= limit, |u| <= limit
    GELU = "gelu"  # x * (1 + erf(x / sqrt 2)) / 2
    GELU_TANH = "gelu_tanh"  # x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) / 2
    SILU = "silu"  # x * sigmoid(x)
    RELU = "relu"
    RELU2 = "relu2"  # relu(x) squared

    @property
    def gated(self) -> bool:
        return self in _GATED


_GATED = (
    ActivationFunction.SWIGLU,
    ActivationFunction.GEGLU,
    ActivationFunction.REGLU,
    ActivationFunction.GEGLU_TANH,
    ActivationFunction.SWIGLU_OAI,
)
NUMBERS = ("limit", "alpha", "beta")  # of SWIGLU_OAI: float32 parameters of its kernel's launch


@dataclass(frozen=True)
class Activation:
    """Applies a function to the columns; it must be the last node.

    A gated function turns N columns into N / 2. Of K-major weights, scale and bias the host tells
    the kernel where the gate and up columns of an output are.

    alternating: N-major weights, and their bias, have the columns gate, up, gate, up, ... instead
    of all gates, then all ups.

    stored: the kernel has a second output, h [rows, N] of the output's dtype: the columns before
    the activation, all gates, then all ups.
    """

    function: ActivationFunction
    alternating: bool = False
    stored: bool = False
    kind: ClassVar[str] = "activation"
    operand: ClassVar[None] = None

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the float32 launch parameters that the function takes."""
        return NUMBERS if self.function is ActivationFunction.SWIGLU_OAI else ()


@dataclass(frozen=True)
class ActivationGradient:
    """Makes of the gradient of an activation's result, the product, that of its input; the last
    node.

    For the product d, columns h before the activation and the row's weight w:

      grad_h = w * d * the activation's derivative at h     output = w * activation(h)

    grad_h [rows, 2 N or N] has the output's dtype and, like h, all gates, then all ups. The sum of
    d * activation(h) over the columns of a tile goes to share [T, choices, N tiles], float32, of
    the row's pair (token, choice), which is the one whose `inverse` is the row. Unlike in other
    products, no row of an expert may have an index of T or more.
    """

    function: ActivationFunction
    kind: ClassVar[str] = "activation_gradient"
    operand: ClassVar[None] = None

    @property
    def numbers(self) -> tuple[str, ...]:
        """The names of the float32 launch parameters that the function takes."""
        return Activation(self.function).numbers


NODES: dict[str, type] = {node.kind: node for node in (Bias, Activation, ActivationGradient)}


def make_epilogue(bias: DType | None, activation: Activation | None) -> tuple[EpilogueNode, ...]:
    """The epilogue's nodes, in order, of a product with this bias and activation, if any."""
    nodes: list[EpilogueNode] = [] if bias is None else [Bias(bias)]
    return (*nodes, activation) if activation is not None else tuple(nodes)
