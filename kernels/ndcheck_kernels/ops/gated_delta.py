"""The op of the gated delta rule, whose state goes from token to token."""

from ndcheck_kernels.ops.library import declare

# query, key [B, T, H_k, D], value [B, T, H, D_v], decay [B, T, H] or, by channel, [B, T, H, D],
# beta [B, T, H] -> [B, T, H, D_v]; H_k divides H. The state [B, H, D, D_v], float32, moves on:
# S' = S e^decay, S = S' + k (beta (v - k S'))^T, and q S / sqrt(D) is the output, for every token.
# ``normalises``: q and k have unit length first, with 1e-6 beside the sum of their squares.
gated_delta_op = declare(
    "gated_delta_rule(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor beta, "
    "Tensor(a!) state, bool normalises) -> Tensor"
)
