"""Batch-invariant attention on CPU, one arithmetic for prefill, chunked prefill and decode.

Computes: softmax(scale * q k^T, capped if asked, plus ALiBi's slope * position) v, per query head,
    in float32 (float64 for float64), rounded once; a sink is one more score without a value. A
    query that sees nothing gives 0.
Reduction order: keys in splits of `SPLIT`, counted from the row's own first token. Scores by `bmm`
    of fixed (head_dim, SPLIT); the maximum is exact in any order; each split's exponentials are
    summed, and multiplied with its values, by kernels of fixed (SPLIT, head_dim); splits are added
    in ascending order, after the sink. A hidden key counts as exactly 0, so whole hidden splits
    change no bit.
Depends on: the query, the row's own keys and values that it sees, head_dim, dtype, the CPU and
    torch's build. Never on batch, padding, neighbours, the cache's length or how many of the row's
    queries come at once.
Dtypes: float64, float32, bfloat16, float16.
Not claimed: equal results if the row itself holds infinite or NaN values after the query.
"""

from typing import NamedTuple

import torch

from ndcheck_kernels.cpu.pointwise import pointwise
from ndcheck_kernels.cpu.products import bmm
from ndcheck_kernels.cpu.reductions import sum_rows
from ndcheck_kernels.ops.attention import attention_op, register_sdpa
from ndcheck_kernels.scope.refusal import UnsupportedCallError
from ndcheck_kernels.scope.registry import implements

aten = torch.ops.aten

SPLIT = 128
# Scores held at a time: queries beyond that are computed in turns, which no result depends on.
_SCORES = 2**20
_NEVER = 2**31  # The first key of a query that sees none.


class Grid(NamedTuple):
    """Where each query's keys begin and end, [B, Q], in columns counted from the row's shift: its
    first token, or SPLITs later if none of the row's queries sees those; ``begin`` None is 0.

    ``used`` is (shift, first, stop) by row: the columns that any of its queries sees.
    """

    begin: torch.Tensor | None
    end: torch.Tensor
    used: list[tuple[int, int, int]]
    n_splits: int
    is_uniform: bool


@implements(attention_op, device="cpu")
def attention(  # noqa: PLR0913 - the op's own arguments
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    bias_dtype: torch.dtype | None = None,
    grid: Grid | None = None,
) -> torch.Tensor:
    """[B, H, Q, D] x [B, H_kv, KV, D] -> [B, H, Q, D_v]; the rest as in `ops.attention`.

    ``grid`` is the spans', where it is known: all layers of a pass have the same.
    """
    grid = make_grid(spans, query.shape[2]) if grid is None else grid
    batch, heads, queries, width = query.shape
    kv_heads, n_columns = key.shape[1], grid.n_splits * SPLIT
    out_shape = batch, heads, queries, value.shape[-1]
    if n_columns == 0 or 0 in out_shape:
        return query.new_zeros(out_shape)
    compute = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = (_on_grid(cache, grid, compute) for cache in (key, value))
    column, begin, end = torch.arange(n_columns), grid.begin, grid.end
    bias = None
    if slopes is not None:
        shifts = torch.tensor([[shift] for shift, _, _ in grid.used])
        positions = shifts - spans[:, :1, 0] + column
        bias = slopes[:, None] * positions[:, None]
        bias = bias.to(bias_dtype or bias.dtype).to(compute)
    turn = max(1, _SCORES // (batch * heads * n_columns))
    results = []
    for first in range(0, queries, turn):
        part = slice(first, first + turn)
        rows = query[:, :, part].to(compute) * scale
        rows = rows.reshape(batch * kv_heads, -1, width)
        hidden = column >= end[:, part, None]
        if begin is not None:
            hidden |= column < begin[:, part, None]
        result = _attend(rows, keys, values, hidden, heads // kv_heads, softcap, sinks, bias)
        results.append(result.view(batch, heads, -1, value.shape[-1]).to(query.dtype))
    return results[0] if len(results) == 1 else torch.cat(results, 2)


def _attend(
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor,
    group: int,
    softcap: float,
    sinks: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """rows [B * H_kv, group * Q, D]; keys, values [B * H_kv, splits * SPLIT, D]; hidden [B, Q,
    splits * SPLIT]; sinks [H]; bias [B, H, splits * SPLIT].
    """
    splits = [slice(s, s + SPLIT) for s in range(0, keys.shape[1], SPLIT)]
    parts = [bmm(rows, keys[:, s].transpose(1, 2)) for s in splits]
    scores = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    if softcap:
        scores = pointwise(aten.tanh.default, scores / softcap) * softcap
    batch, queries, columns = hidden.shape
    by_query = scores.view(batch, -1, group, queries, columns)
    if bias is not None:
        by_query += bias.view(batch, -1, group, 1, columns)
    by_query.masked_fill_(hidden[:, None, None], -torch.inf)
    # Finite also for a query that sees nothing, so that its weights are 0 and not NaN.
    top = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    total = rows.new_zeros(*rows.shape[:-1], 1)
    if sinks is not None:
        sink = sinks.to(scores.dtype).view(1, -1, group, 1).expand(batch, -1, group, queries)
        sink = sink.reshape(top.shape)
        top = torch.maximum(top, sink)
        total = pointwise(aten.exp.default, sink - top)
    weights = pointwise(aten.exp.default, scores.sub_(top))
    acc = rows.new_zeros(*rows.shape[:-1], values.shape[-1])
    for s in splits:
        part = weights[..., s].contiguous()
        acc += bmm(part, values[:, s])
        total += sum_rows(part.view(-1, SPLIT)).view_as(total)
    # The key with the top score counts 1, so only the total of nothing is below.
    return acc / total.clamp_(min=1)


def make_grid(spans: torch.Tensor, queries: int) -> Grid:
    """Of spans as `ops.attention` has them. Raises UnsupportedCallError for what it has not."""
    begin, end, used = _columns(spans, queries)
    n_splits = -(-max((stop for _, _, stop in used), default=0) // SPLIT)
    return Grid(begin, end, used, n_splits, all(row == used[0] for row in used))


def _columns(
    spans: torch.Tensor, queries: int
) -> tuple[torch.Tensor | None, torch.Tensor, list[tuple[int, int, int]]]:
    if spans.shape[-1] == 2:
        rows = spans[:, 0].tolist()
        stops = [max(end - start, 0) for start, end in rows]
        end = torch.tensor(stops)[:, None]
        if queries > 1:
            end = end - torch.arange(queries - 1, -1, -1)
        used = [(start, 0, stop) for (start, _), stop in zip(rows, stops, strict=True)]
        return None, end, used
    origins, begin, end = spans.long().unbind(-1)
    origin = origins[:, :1]
    if not bool((origins == origin).all()):
        raise UnsupportedCallError("queries of one row with different first tokens")
    sees = end > begin
    first = torch.where(sees, begin, _NEVER).amin(-1, keepdim=True)
    shift = torch.where(sees.any(-1, keepdim=True), first - (first - origin) % SPLIT, origin)
    begin, end = torch.where(sees, begin - shift, _NEVER), torch.where(sees, end - shift, 0)
    used = torch.stack([shift[:, 0], begin.amin(-1), end.amax(-1)], -1).tolist()
    return begin, end, [(shift, first, stop) for shift, first, stop in used]


def _on_grid(cache: torch.Tensor, grid: Grid, dtype: torch.dtype) -> torch.Tensor:
    """[B, H, KV, D] -> [B * H, splits * SPLIT, D]: each row's used keys, counted from its shift.

    Other columns are 0: a hidden key may hold anything, and 0 * NaN is not 0.
    """
    batch, heads, _, width = cache.shape
    shape = batch, heads, grid.n_splits * SPLIT, width
    if grid.is_uniform:
        shift, first, stop = grid.used[0]
        placed = cache.new_empty(shape, dtype=dtype)
        placed[:, :, :first] = 0
        placed[:, :, first:stop] = cache[:, :, first + shift : stop + shift]
        placed[:, :, stop:] = 0
        return placed.flatten(0, 1)
    placed = cache.new_zeros(shape, dtype=dtype)
    for i, (shift, first, stop) in enumerate(grid.used):
        placed[i, :, first:stop] = cache[i, :, first + shift : stop + shift]
    return placed.flatten(0, 1)


register_sdpa("cpu", attention)
