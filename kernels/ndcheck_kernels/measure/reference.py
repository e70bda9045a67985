"""What every op computes, in float64: the specification that kernels are measured against.

Torch only, and slow on purpose. Kernels never import it.
"""

import torch

Dims = int | tuple[int, ...] | None


def matmul_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a x b."""
    return a.double() @ b.double()


def linear_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x x weight^T + bias."""
    out = x.double() @ weight.double().t()
    return out if bias is None else out + bias.double()


def addmm_reference(
    bias: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    """beta * bias + alpha * (a x b), batched or not; beta = 0 ignores the bias."""
    product = alpha * matmul_reference(a, b)
    return product if beta == 0 else product + beta * bias.double()


def sum_reference(x: torch.Tensor, dim: Dims = None, keepdim: bool = False) -> torch.Tensor:
    """Sum over dims, all by default."""
    return x.double().sum(dim, keepdim=keepdim)


def mean_reference(x: torch.Tensor, dim: Dims = None, keepdim: bool = False) -> torch.Tensor:
    """Mean over dims, all by default."""
    return x.double().mean(dim, keepdim=keepdim)


def variance_reference(x: torch.Tensor, correction: float = 1) -> torch.Tensor:
    """sum((x - mean)**2) / (n - correction) over the last dim."""
    centred = x.double() - x.double().mean(-1, keepdim=True)
    return centred.square().sum(-1) / (x.shape[-1] - correction)


def vector_norm_reference(x: torch.Tensor, order: int = 2) -> torch.Tensor:
    """The root of sum(x**2), or sum(|x|), over the last dim."""
    x = x.double()
    return x.square().sum(-1).sqrt() if order == 2 else x.abs().sum(-1)


def cumsum_reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Running sum."""
    return x.double().cumsum(dim)


def softmax_reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """exp(x) / sum(exp(x))."""
    return x.double().softmax(dim)


def log_softmax_reference(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """log(softmax(x))."""
    return x.double().log_softmax(dim)


def logsumexp_reference(x: torch.Tensor, dim: Dims = -1, keepdim: bool = False) -> torch.Tensor:
    """log(sum(exp(x)))."""
    dims = tuple(range(x.dim())) if dim is None else dim
    return x.double().logsumexp(dims, keepdim=keepdim)


def layer_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim."""
    x = x.double()
    centred = x - x.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    out = out if weight is None else out * weight.double()
    return out if bias is None else out + bias.double()


def rms_norm_reference(
    x: torch.Tensor, weight: torch.Tensor | None = None, eps: float | None = 1e-6
) -> torch.Tensor:
    """x / sqrt(mean(x**2) + eps) * weight over the last dim.

    Without eps it is that of the dtype torch computes in, float32 (float64 for float64): on a CPU
    in decompositions.py (`_fused_rms_norm`), on CUDA in layer_norm_kernel.cu (the same).
    """
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
    x = x.double()
    out = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    return out if weight is None else out * weight.double()


def experts_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
) -> torch.Tensor:
    """Each token's weighted sum of silu(gate) * up through its own experts, concatenated layout.

    x [T, H], gate_up [E, 2I, H], down [E, H, I], index and weights [T, k].
    """
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, (chosen, shares) in enumerate(zip(index.tolist(), weights.double(), strict=True)):
        for expert, share in zip(chosen, shares, strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            hidden = torch.nn.functional.silu(gate) * up
            out[token] += share * (down[expert].double() @ hidden)
    return out


def gated_delta_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
) -> torch.Tensor:
    """o_t = S_t^T q_t with S_t = e^decay_t S_{t-1} + beta_t k_t (v_t - e^decay_t S_{t-1}^T k_t)^T.

    query, key [B, T, H, D], of unit length after this; value [B, T, H, D_v]; decay, beta [B, T, H].
    The query is divided by the square root of D (Yang, Kautz and Hatamizadeh 2025).
    """
    query, key = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (query, key))
    query = query / query.shape[-1] ** 0.5
    value, decay, beta = value.double(), decay.double(), beta.double()
    state = query.new_zeros(*query.shape[::2], query.shape[-1], value.shape[-1])
    out = []
    for t in range(query.shape[1]):
        state = state * decay[:, t, :, None, None].exp()
        error = value[:, t] - torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], error * beta[:, t, :, None])
        out.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(out, 1)


def selective_scan_reference(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor,
) -> torch.Tensor:
    """y_t = S_t C_t + D x_t with S_t = e^(dt_t A) S_{t-1} + dt_t x_t B_t^T (Dao and Gu 2024).

    Shapes as in `ops.selective_scan`; the state before the first token is zero.
    """
    heads, states = x.shape[2], B.shape[-1]
    x, dt, A, D = x.double(), dt.double(), A.double(), D.double()
    B, C = (t.double().repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    A = A.view(heads, -1).expand(heads, states)
    state = x.new_zeros(x.shape[0], *x.shape[2:], states)
    out = []
    for t in range(x.shape[1]):
        decay = (dt[:, t, :, None] * A).exp()[:, :, None]
        state = state * decay + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], B[:, t])
        out.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]) + D[:, None] * x[:, t])
    return torch.stack(out, 1)


def attention_reference(  # noqa: PLR0913 - the op's own arguments
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spans: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    bias_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """softmax(scale * q k^T, capped, plus slopes) v over each query's span; 0 where it is empty.

    [B, H, Q, D] x [B, H_kv, KV, D]; spans, sinks, slopes and bias_dtype as in `ops.attention`.
    """
    queries, group = query.shape[2], query.shape[1] // key.shape[1]
    if spans.shape[-1] == 2:
        begin, last = spans.unbind(-1)
        end = last - torch.arange(queries - 1, -1, -1, device=spans.device)
    else:
        _, begin, end = spans.unbind(-1)
    column = torch.arange(key.shape[2], device=spans.device)
    visible = (column >= begin[..., None]) & (column < end[..., None])  # [B, Q, KV]
    keys, values = (t.double().repeat_interleave(group, 1) for t in (key, value))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if slopes is not None:
        bias = slopes.double()[:, None] * (column - spans[:, :1, 0])[:, None]  # [B, H, KV]
        scores = scores + bias.to(bias_dtype or bias.dtype).double()[:, :, None]
    scores = scores.masked_fill(~visible[:, None], -torch.inf)
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    # An empty span gives NaN weights; a hidden value may hold anything.
    weights = weights.masked_fill(~visible[:, None], 0)
    return weights @ values.masked_fill(~visible.any(1)[:, None, :, None], 0)


def digest_reference(row: torch.Tensor) -> int:
    """The digest of `logits.read_logits` over one row [N], as a signed 64-bit integer."""
    narrow = row.element_size() == 2
    bits = row.contiguous().view(torch.int16 if narrow else torch.int32).tolist()
    words = []
    for salt in (0, 0x7F4A7C15):
        total = 0
        for i, value in enumerate(bits):
            h = (value & (0xFFFF if narrow else 0xFFFFFFFF)) ^ ((i * 0x9E3779B1 + salt) % 2**32)
            h = (h ^ (h >> 16)) * 0x85EBCA6B % 2**32
            h = (h ^ (h >> 13)) * 0xC2B2AE35 % 2**32
            total += h ^ (h >> 16)
        words.append(total % 2**32)
    digest = words[0] << 32 | words[1]
    return digest - 2**64 if digest >= 2**63 else digest
