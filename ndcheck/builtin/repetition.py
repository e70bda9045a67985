"""Repeated n-grams: how much a text loops, and which tokens would make it loop.

Small models trained on likelihood alone fall into loops under greedy decoding (Welleck et al.,
"Neural Text Generation with Unlikelihood Training", 2019, arXiv:1908.04319).
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


def complete_repeats(tokens_B_T: torch.Tensor, n: int) -> torch.Tensor:
    """Which tokens complete an n-gram that their row has already used."""
    return F.pad(find_repeats(tokens_B_T, n), (n - 1, 0))
