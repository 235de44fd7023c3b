"""The router kernel: chooses each token's experts and their weights from logits."""

from __future__ import annotations

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, const_expr, range_constexpr

from emitters.device.dependent import launch_next, wait_for_previous
from emitters.device.memory import ELEMENT, VECTOR
from emitters.spec.layer_steps import StepConfig, TopkProblem
from emitters.templates.parameters import integer, pointer, several

_LARGEST = 3.4028234663852886e38
_SMALLEST = 1.1754943508222875e-38  # the smallest normal float32
_LOG2_E = 1.4426950408889634
_SIGN = 0x80000000
_MISSING = 0x007FFFFF  # the key of -infinity, given to NaN logits; all others are finite
_LAST, _NEXT_TO_LAST = -_LARGEST / 4, -_LARGEST / 8  # for NaN and -infinity, with finite sums


class Routing(NamedTuple):
    """The arguments of a router, as in `cutlass_moe.topk_router`.

    logits [T, E]; weights and ids [T, k], k at most 32. correction_bias may be null. scale and
    threshold: the bits of float32.
    """

    logits: cute.Pointer
    correction_bias: cute.Pointer
    weights: cute.Pointer
    ids: cute.Pointer
    num_tokens: Int32
    k: Int32
    topk_groups: Int32
    renormalize: Int32
    scale: Int32
    threshold: Int32


def routing_argument(problem: TopkProblem):
    element = ELEMENT[problem.logits]
    return several(
        pointer("logits", element, element.width // 8),
        pointer("correction_bias", Float32, 4),
        pointer("weights", Float32, 4),
        pointer("ids", Int32, 4),
        integer("num_tokens"),
        integer("k"),
        integer("topk_groups"),
        integer("renormalize"),
        integer("scale"),
        integer("threshold"),
        kind=Routing,
    )


@cute.jit
def _key(number: Float32) -> Uint32:
    """An unsigned key above 0, in the same order as the numbers."""
    bits = Uint32((number + 0.0).bitcast(Int32))  # -0 becomes 0
    key = bits ^ Uint32(_SIGN)
    if bits >= Uint32(_SIGN):
        key = bits ^ Uint32(0xFFFFFFFF)
    return key


@cute.jit
def _number(key: Uint32) -> Float32:
    """The inverse of `_key`."""
    bits = key ^ Uint32(0xFFFFFFFF)
    if key >= Uint32(_SIGN):
        bits = key ^ Uint32(_SIGN)
    return Int32(bits).bitcast(Float32)


@cute.jit
def sqrt_softplus(x: Float32) -> Float32:
    """Computes sqrt(log(1 + exp(x))).

    log(1 + p) of a small p, whose sum with 1 would lose bits, is p (1 - p / 2 + p^2 / 3).
    """
    power = cute.math.exp2(cute.math.absf(x) * -_LOG2_E, fastmath=True)
    rest = cute.math.log2(power + 1.0, fastmath=True) * (1 / _LOG2_E)
    if power < 0.0078125:
        rest = power * (1.0 - power * (0.5 - power * (1 / 3)))
    return cute.math.sqrt(cutlass.max(x, Float32(0.0)) + rest)


class TopkRouter:
    """Writes the kernel of `topk_router`: a warp chooses the experts of a token.

    Lane l has the experts l, 32 + l, 64 + l, ... Each has an integer key: the largest key is chosen
    next, of equal keys the lowest id. Key 0 means that the expert can't be chosen (any more).
    """

    smem_bytes, cluster = 0, 1

    def __init__(self, problem: TopkProblem, config: StepConfig):
        self.problem, self.threads = problem, config.threads
        self.experts = problem.num_experts
        self.per_lane = -(-self.experts // 32)
        self.group_size = self.experts // problem.num_groups

    def arguments(self):
        """The arguments of `__call__`, except grid and stream."""
        return (routing_argument(self.problem),)

    def tensor_maps(self):
        return ()

    @cute.jit
    def __call__(self, routing, grid, stream):
        """grid: so many CTAs that there is a warp per token."""
        self.kernel(routing).launch(grid=[grid, 1, 1], block=[self.threads, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, routing: Routing):
        wait_for_previous()
        launch_next()
        thread, _, _ = cute.arch.thread_idx()
        block, _, _ = cute.arch.block_idx()
        warp = cute.arch.make_warp_uniform(thread // 32)
        token = block * (self.threads // 32) + warp
        if token < routing.num_tokens:
            self.route_token(token, routing)

    @cute.jit
    def route_token(self, token: Int32, routing: Routing):
        """Chooses the experts of a token and writes them; by a whole warp."""
        logits, correction_bias, weights, ids, _, k, topk_groups, renormalize, scale, threshold = (
            routing
        )
        lane = cute.arch.lane_idx()
        scores, keys = self.load(logits + Int64(token) * self.experts)
        self.score(scores, keys)
        if const_expr(self.problem.num_groups > 1):
            self.choose_by_score(scores, keys, correction_bias)
            self.keep_groups(keys, topk_groups)
        elif correction_bias.toint() != 0:
            self.choose_by_score(scores, keys, correction_bias)
        chosen, weight = self.choose(scores, keys, k)
        if lane > 0 and weight < threshold.bitcast(Float32):
            chosen, weight = Int32(-1), Float32(0.0)
        if renormalize != 0:
            weight = weight / cutlass.max(cute.arch.warp_reduction_sum(weight), _SMALLEST)
        if lane < k:
            place = Int64(token) * k + lane
            one = cute.make_layout(1)
            cute.make_tensor(weights + place, one)[0] = weight * scale.bitcast(Float32)
            cute.make_tensor(ids + place, one)[0] = chosen

    @cute.jit
    def load(self, logits: cute.Pointer):
        """A token's logits, made finite, and their keys."""
        row, lane = cute.make_tensor(logits, cute.make_layout(self.experts)), cute.arch.lane_idx()
        values = cute.make_rmem_tensor((self.per_lane,), Float32)
        keys = cute.make_rmem_tensor((self.per_lane,), Uint32)
        for i in range_constexpr(self.per_lane):
            values[i] = Float32(0.0)
            if i * 32 + lane < self.experts:
                values[i] = Float32(row[i * 32 + lane])
        for i in range_constexpr(self.per_lane):
            keys[i] = Uint32(_MISSING)
            if values[i] == values[i]:
                values[i] = cutlass.min(cutlass.max(values[i], -_LARGEST), _LARGEST)
                keys[i] = _key(values[i])
            if i * 32 + lane >= self.experts:
                keys[i] = Uint32(0)
        return values, keys

    @cute.jit
    def score(self, scores: cute.Tensor, keys: cute.Tensor):
        """Replaces logits by scores; a NaN gets score 0."""
        top = Uint32(0)
        for i in range_constexpr(self.per_lane):
            if keys[i] > top:  # cutlass.max compares as signed numbers
                top = keys[i]
        largest = _number(cute.arch.warp_redux_sync(top, "max"))
        total = Float32(0.0)
        for i in range_constexpr(self.per_lane):
            score = Float32(0.0)
            if keys[i] > _MISSING:
                if const_expr(self.problem.scoring == "softmax"):
                    score = cute.math.exp2((scores[i] - largest) * _LOG2_E, fastmath=True)
                elif const_expr(self.problem.scoring == "sigmoid"):
                    score = 1.0 / (1.0 + cute.math.exp2(scores[i] * -_LOG2_E, fastmath=True))
                else:
                    score = sqrt_softplus(scores[i])
            scores[i] = score
            total += score
        if const_expr(self.problem.scoring == "softmax"):
            part = 1.0 / cutlass.max(cute.arch.warp_reduction_sum(total), _SMALLEST)
            for i in range_constexpr(self.per_lane):
                scores[i] = scores[i] * part

    @cute.jit
    def choose_by_score(self, scores: cute.Tensor, keys: cute.Tensor, bias: cute.Pointer):
        """Replaces keys by those of score + bias, or of the score if bias is null."""
        given = cute.make_tensor(bias, cute.make_layout(VECTOR))
        for i in range_constexpr(self.per_lane):
            expert = i * 32 + cute.arch.lane_idx()
            if keys[i] != 0:
                choice = Float32(_LAST)
                if keys[i] > _MISSING:
                    choice = scores[i]
                    if bias.toint() != 0:
                        choice += given[expert]
                    if choice < -_LARGEST:
                        choice = Float32(_NEXT_TO_LAST)
                    if choice != choice:
                        choice = Float32(_LAST)
                keys[i] = _key(cutlass.min(choice, _LARGEST))

    @cute.jit
    def best(self, keys: cute.Tensor, first: cutlass.Constexpr, end: cutlass.Constexpr):
        """The best of the experts [first, end), and its key."""
        own_key, own = Uint32(0), Uint32(end)
        for i in range_constexpr(first // 32, (end + 31) // 32):
            expert = i * 32 + cute.arch.lane_idx()
            better = keys[i] > own_key
            if const_expr(i * 32 < first):
                better = better and expert >= first
            if const_expr(i * 32 + 32 > end):
                better = better and expert < end
            if better:
                own_key, own = keys[i], Uint32(expert)
        key = cute.arch.warp_redux_sync(own_key, "max")
        if own_key != key:
            own = Uint32(end)
        return Int32(cute.arch.warp_redux_sync(own, "min")), key

    @cute.jit
    def keep_groups(self, keys: cute.Tensor, topk_groups: Int32):
        """Sets the keys of experts outside the best groups to 0.

        The best groups have the largest sum of their two best experts; ties go to the lower group.
        """
        lane, size = cute.arch.lane_idx(), self.group_size
        group_key = Uint32(0)  # the key of group number `lane`
        for group in range_constexpr(self.problem.num_groups):
            first = group * size
            expert, key = self.best(keys, first, first + size)
            total = _number(key)
            if const_expr(size > 1):
                others = cute.make_rmem_tensor((self.per_lane,), Uint32)
                for i in range_constexpr(first // 32, (first + size + 31) // 32):
                    others[i] = keys[i]
                    if expert == i * 32 + lane:
                        others[i] = Uint32(0)
                _, key = self.best(others, first, first + size)
                total += _number(key)
            if lane == group:
                group_key = _key(total)
        kept = Uint32(0)
        for _ in cutlass.range(topk_groups, unroll=1):
            key = cute.arch.warp_redux_sync(group_key, "max")
            group = Uint32(32)
            if group_key == key:
                group = Uint32(lane)
            group = cute.arch.warp_redux_sync(group, "min")
            kept = kept | Uint32(1) << group
            if lane == group:
                group_key = Uint32(0)
        for i in range_constexpr(self.per_lane):
            if (kept >> Uint32((i * 32 + lane) // size) & 1) == 0:
                keys[i] = Uint32(0)

    @cute.jit
    def choose(self, scores: cute.Tensor, keys: cute.Tensor, k: Int32):
        """The j-th choice and its score, in lane j; -1 and 0 from lane k on."""
        lane = cute.arch.lane_idx()
        chosen, weight = Int32(-1), Float32(0.0)
        for j in cutlass.range(k, unroll=1):
            expert, _ = self.best(keys, 0, self.experts)
            score = Float32(0.0)
            for i in range_constexpr(self.per_lane):
                if expert == i * 32 + lane:
                    score = scores[i]
                    keys[i] = Uint32(0)
            score = cute.arch.shuffle_sync(score, expert % 32)
            if lane == j:
                chosen, weight = expert, score
        return chosen, weight
