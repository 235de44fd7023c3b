"""What the package grouped_gemm calls its backend: the same products and rows, without gradients.

Here they run on the CPU too, and shapes and dtypes are checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cutlass_moe.ops.grouped_matmul import grouped_matmul_out
from cutlass_moe.ops.weight_grad import grouped_weight_grad

_EPSILON = 1e-8  # of a sum that a number is divided by, in `sinkhorn`


def gmm(
    a: Tensor,
    b: Tensor,
    batch_sizes: Tensor,
    trans_a: bool = False,
    trans_b: bool = False,
    c: Tensor | None = None,
) -> Tensor:
    """One matrix product for each group of rows, group i being the next batch_sizes[i] rows.

    a [M, K], bfloat16. batch_sizes int64 [E], on the CPU or on a's device, with the sum M.
      gmm(a, b [E, K, N])                -> [M, N]: rows a_i @ b[i]
      gmm(a, b [E, N, K], trans_b=True)  -> [M, N]: rows a_i @ b[i].T
      gmm(a, b [M, N], trans_a=True)     -> [E, K, N]: a_i.T @ b_i, zeros for an empty group
    c: where to write the result, contiguous and of its shape; default a new tensor. Returns it.

    The first two forms run on `cutlass_moe.grouped_matmul`, the third on
    `cutlass_moe.grouped_weight_grad`, and none waits for the device. The sum of batch_sizes is
    checked on the CPU only: further rows of the result are undefined, and the third form does not
    read further rows. b is read in place where it or its transpose is contiguous, in the third form
    where its rows are. Raises TypeError or ValueError, with what was expected and what came, for
    malformed arguments.
    """
    check_gmm(a, b, batch_sizes, trans_a, trans_b)
    if trans_a:
        shape = [len(batch_sizes), a.shape[1], b.shape[1]]
    else:
        shape = [a.shape[0], b.shape[1 if trans_b else 2]]
    if c is None:
        c = a.new_empty(shape)
    elif list(c.shape) != shape or c.dtype != a.dtype or not c.is_contiguous():
        got = f"{c.dtype} {list(c.shape)} with strides {c.stride()}"
        raise ValueError(f"c must be a contiguous {a.dtype} {shape}, got {got}")
    with torch.no_grad():
        offsets = batch_sizes.cumsum(0, dtype=torch.int32).to(a.device, non_blocking=True)
        if trans_a:
            grouped_weight_grad(a, b, offsets, out=c)
        else:
            weight = b if trans_b else b.transpose(1, 2)
            if not (weight.is_contiguous() or weight.transpose(1, 2).is_contiguous()):
                weight = weight.contiguous()
            grouped_matmul_out(c, a.contiguous(), weight, offsets=offsets)
    return c


def permute(
    input: Tensor,
    indices: Tensor,
    num_out_tokens: int,
    workspace: list[Tensor],
    max_expanded_token_num: int,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Rows of tokens in the order of their experts.

    input [T, H], of any dtype; indices int32 or int64 [T, k], on its device: the experts of a
    token. num_out_tokens: how many rows to keep, those of the first experts; 0: all T * k.
    workspace and max_expanded_token_num: not needed here, and returned as they came.

    Returns (rows [R, H], row_id_map int32 [k * T], workspace): pairs (token, choice) sorted by
    expert, stably in the order of the flattened indices, and in row_id_map[choice * T + token] the
    row of a pair, or -1 where it is none of those kept.
    """
    if input.dim() != 2 or indices.dim() != 2 or len(input) != len(indices):
        got = f"{list(input.shape)} and {list(indices.shape)}"
        raise ValueError(f"input must be [T, H] and indices [T, k], got {got}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be torch.int32 or torch.int64, got {indices.dtype}")
    tokens, top_k = indices.shape
    pairs = tokens * top_k
    kept = min(num_out_tokens, pairs) if num_out_tokens > 0 else pairs
    order = indices.flatten().sort(stable=True).indices  # pairs token * k + choice
    rows = torch.arange(pairs, dtype=torch.int32, device=input.device)
    row_of_pair = torch.empty_like(rows).scatter_(0, order, rows.where(rows < kept, -1))
    row_id_map = row_of_pair.view(tokens, top_k).T.flatten()
    return _take(input, order[:kept] // max(top_k, 1)), row_id_map, workspace


def unpermute(
    input: Tensor, row_id_map: Tensor, prob: Tensor, max_tokens: int, num_topK: int
) -> Tensor:
    """The inverse of `permute`: each token's rows, weighted and added up.

    input [R, H]; row_id_map int32 [k * T] as `permute` returns it; prob float32 [T, k], or empty:
    all ones. max_tokens, num_topK: T and k. Returns [T, H] of input's dtype, sums of float32; a
    token of which no row was kept is zero.
    """
    _check_map(row_id_map, max_tokens, num_topK)
    if prob.numel() and prob.shape != (max_tokens, num_topK):
        raise ValueError(f"prob must be [{max_tokens}, {num_topK}], got {list(prob.shape)}")
    out = torch.zeros(max_tokens, input.shape[1], dtype=torch.float32, device=input.device)
    for choice, rows in enumerate(row_id_map.view(num_topK, max_tokens)):
        there = (rows >= 0)[:, None]
        row = _take(input, rows.clamp(min=0)).float()
        out += row.where(there, 0) * (prob[:, choice, None].float() if prob.numel() else 1)
    return out.to(input.dtype)


def unpermute_bwd(
    input_bwd: Tensor, input_fwd: Tensor, row_id_map: Tensor, prob: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute`'s input and prob, from that of its result, input_bwd [T, H].

    input_fwd, row_id_map and prob: as they went in; prob None: k = 1, all ones. Returns ([R, H] of
    input_fwd's dtype, float32 [T, k]); a pair without a row has the gradient 0.
    """
    tokens = len(input_bwd)
    if prob is None:
        prob = torch.ones(tokens, 1, dtype=torch.float32, device=input_bwd.device)
    _check_map(row_id_map, tokens, prob.shape[1])
    grad = input_fwd.new_zeros(len(input_fwd) + 1, input_fwd.shape[1])  # the last: of no row
    grad_prob = torch.zeros_like(prob, dtype=torch.float32)
    wide = input_bwd.float()
    for choice, rows in enumerate(row_id_map.view(prob.shape[1], tokens)):
        there = rows >= 0
        row = _take(input_fwd, rows.clamp(min=0)).float()
        grad_prob[:, choice] = (row * wide).sum(1).where(there, 0)
        place = rows.where(there, len(input_fwd)).long()
        grad[place] = (wide * prob[:, choice, None]).to(grad.dtype)
    return grad[:-1], grad_prob


def sinkhorn(cost: Tensor, tol: float = 0.0001) -> Tensor:
    """Sinkhorn's scaling of exp(cost), in place: rows with equal sums and columns with equal sums.

    cost float32 [T, E], contiguous. In turn a factor for each row, and one for each column, are
    made that bring sums to 1 / T and 1 / E, until those of columns change by less than tol on
    average; the host waits for each turn. Returns cost.
    """
    if cost.dtype != torch.float32 or cost.dim() != 2 or not cost.is_contiguous():
        got = f"{cost.dtype} {list(cost.shape)} with strides {cost.stride()}"
        raise ValueError(f"cost must be a contiguous torch.float32 [T, E], got {got}")
    with torch.no_grad():
        rows, columns = cost.shape
        cost.exp_()
        of_columns = torch.ones(columns, device=cost.device)
        while True:
            of_rows = 1 / ((cost @ of_columns + _EPSILON) * rows)
            before = of_columns
            of_columns = 1 / ((of_rows @ cost + _EPSILON) * columns)
            if not float((of_columns - before).abs().sum()) > tol * columns:
                break
        return cost.mul_(of_columns).mul_(of_rows[:, None])


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """rows[index], also of dtypes that torch moves as bytes only."""
    if rows.dtype.itemsize == 1:
        return rows.view(torch.uint8)[index.long()].view(rows.dtype)
    return rows[index.long()]


def _check_map(row_id_map: Tensor, tokens: int, top_k: int) -> None:
    if row_id_map.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"row_id_map must be torch.int32, got {row_id_map.dtype}")
    if row_id_map.shape != (tokens * top_k,):
        expected = f"[{tokens * top_k}], k * T of {top_k} and {tokens}"
        raise ValueError(f"row_id_map must be {expected}, got {list(row_id_map.shape)}")


def check_gmm(a: Tensor, b: Tensor, batch_sizes: Tensor, trans_a: bool, trans_b: bool) -> None:
    """Raises TypeError or ValueError for arguments that `gmm` does not take."""
    if trans_a and trans_b:
        raise ValueError("at most one of trans_a and trans_b must be true, got both")
    for name, tensor in (("a", a), ("b", b)):
        if tensor.dtype != torch.bfloat16:
            raise TypeError(f"{name} must be torch.bfloat16, got {tensor.dtype}")
    if batch_sizes.dtype != torch.int64:
        raise TypeError(f"batch_sizes must be torch.int64, got {batch_sizes.dtype}")
    if batch_sizes.dim() != 1:
        raise ValueError(f"batch_sizes must be [E], got {list(batch_sizes.shape)}")
    if a.dim() != 2:
        raise ValueError(f"a must be [M, K], got {list(a.shape)}")
    experts, (rows, k) = len(batch_sizes), a.shape
    if trans_a:
        expected, fits = f"[{rows}, N]", b.dim() == 2 and len(b) == rows
    else:
        expected = f"[{experts}, N, {k}]" if trans_b else f"[{experts}, {k}, N]"
        inner = -1 if trans_b else -2
        fits = b.dim() == 3 and len(b) == experts and b.shape[inner] == k
    if not fits:
        raise ValueError(f"b must be {expected}, got {list(b.shape)}")
    if b.device != a.device:
        raise ValueError(f"b must be on {a.device}, got one on {b.device}")
    if batch_sizes.device.type == "cpu":
        total = int(batch_sizes.sum())
        if total != rows or (batch_sizes < 0).any():
            raise ValueError(
                f"batch_sizes must be at least 0 with the sum {rows}, a's rows, "
                f"got {batch_sizes.tolist()}"
            )
    elif batch_sizes.device != a.device:
        raise ValueError(
            f"batch_sizes must be on the CPU or {a.device}, got one on {batch_sizes.device}"
        )
