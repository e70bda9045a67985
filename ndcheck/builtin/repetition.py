"""Repeated n-grams: how much a text loops, and a loss that unlearns looping.

Small models trained on likelihood alone fall into loops under greedy decoding. The cure is
the sequence-level unlikelihood loss of Welleck et al., "Neural Text Generation with
Unlikelihood Training" (2019, arXiv:1908.04319).
"""

import torch
import torch.nn.functional as F


def find_repeats(tokens_B_T: torch.Tensor, n: int) -> torch.Tensor:
    """For each n-gram of each row: whether the same n-gram started earlier in that row."""
    n_windows = tokens_B_T.shape[1] - n + 1
    hashes_B_W = torch.zeros_like(tokens_B_T[:, :n_windows])
    for offset in range(n):  # the product wraps around; a rare collision does no harm
        hashes_B_W = hashes_B_W * 1_000_000_007 + tokens_B_T[:, offset : offset + n_windows]
    return (hashes_B_W[:, :, None] == hashes_B_W[:, None, :]).tril(-1).any(-1)


def repeated_share(tokens: list[int], n: int) -> float:
    """The share of a text's n-grams that it has already used: near 1 when it loops."""
    return find_repeats(torch.tensor([tokens]), n).float().mean().item()


def mask_repeats(tokens_B_T: torch.Tensor, n: int) -> torch.Tensor:
    """Which tokens belong to an n-gram that repeats an earlier one of their row."""
    repeats_B_W = find_repeats(tokens_B_T, n)
    mask_B_T = torch.zeros_like(tokens_B_T, dtype=torch.bool)
    for offset in range(n):
        mask_B_T[:, offset : offset + repeats_B_W.shape[1]] |= repeats_B_W
    return mask_B_T


def unlikelihood_loss(
    logits_B_T_V: torch.Tensor, tokens_B_T: torch.Tensor, n: int, prompt_length: int
) -> torch.Tensor:
    """-log(1 - p) of the generated tokens that repeat an n-gram, averaged over all generated."""
    log_p_B_T = -F.cross_entropy(
        logits_B_T_V[:, :-1].float().transpose(1, 2), tokens_B_T[:, 1:], reduction="none"
    )
    mask_B_T = mask_repeats(tokens_B_T, n)[:, 1:]
    mask_B_T[:, : prompt_length - 1] = False
    # A certain repeat has p = 1, where the loss is infinite: p is held below that.
    penalty_B_T = -torch.log1p(-log_p_B_T.exp().clamp(max=1 - 1e-4))
    return (penalty_B_T * mask_B_T).sum() / mask_B_T[:, prompt_length - 1 :].numel()
