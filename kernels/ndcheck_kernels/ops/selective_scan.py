"""The selective scan of state-space layers: Mamba-2's, with one decay a head, and Mamba-1's.

With S the state of a head, for every token t of a row in order:

    S = exp(dt_t A) S + (dt_t x_t) B_t^T
    y_t = S C_t + D x_t

A pass over several tokens is that many passes over one, whatever model or cache called it: a state
depends on its row's own tokens, and a token that is padding (x = 0, and B = 0) leaves zeros zero.
"""

from ndcheck_kernels.ops.library import declare

# x [B, T, H, P]; dt [B, T, H] float32, positive; A [H] or [H, N] float32, negative; B and C
# [B, T, G, N] in the dtype of x, G of them shared by H / G heads each; D [H]. The state
# [B, H, P, N] float32 is read, and written when the last token has passed. Gives y, as x.
scan_op = declare(
    "selective_scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor(a!) state)"
    " -> Tensor"
)
