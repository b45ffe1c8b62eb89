"""The losses of the scores of N responses. s [B, N] scores, rank [B, N] 1 = best, 0 = no response here.

    best-of-N (the paper)   L = - sum_i t_i log softmax(s)_i        t = the best-ranked, sharing 1 evenly
    Plackett-Luce           L = - sum_i log  e^{s_i} / (e^{s_i} + sum_{j worse than i} e^{s_j})
    Bradley-Terry           L = - mean over pairs ranked i before j of  log sigmoid(s_i - s_j)

Of several best responses the paper's release picks one at random each time; the shared target is the mean of that. All
three losses are means over records, computed in at least float32.

See it: `pytest tests/test_loss.py` works each by hand.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _log_softmax(scores: Tensor, rank: Tensor) -> Tensor:
    """Over the responses that exist; -inf elsewhere."""
    if scores.shape != rank.shape or bool((rank.amax(-1) < 1).any()):
        raise ValueError(
            f"scores {tuple(scores.shape)}, ranks {tuple(rank.shape)}: every record needs a ranked response"
        )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores.masked_fill(rank == 0, -torch.inf).log_softmax(-1)


def best(rank: Tensor) -> Tensor:
    """bool [B, N]: the best-ranked responses of each record."""
    return rank == rank.masked_fill(rank == 0, torch.iinfo(rank.dtype).max).amin(-1, keepdim=True)


def best_of_n(scores: Tensor, rank: Tensor) -> Tensor:
    """Cross-entropy over the N scores against the best-ranked; ties share the target evenly. -> scalar"""
    target = best(rank)
    log_p = _log_softmax(scores, rank).masked_fill(~target, 0.0)  # -inf * 0 would be NaN
    return -(log_p.sum(-1) / target.sum(-1)).mean()


def plackett_luce(scores: Tensor, rank: Tensor) -> Tensor:
    """- log likelihood of the whole ranking, chosen best first; tied responses do not compete. -> scalar"""
    rivals = (rank[:, None, :] > rank[:, :, None]) | torch.eye(rank.shape[1], dtype=torch.bool, device=rank.device)
    log_p = _log_softmax(scores, rank)
    among = log_p[:, None, :].masked_fill(~rivals | (rank == 0)[:, None, :], -torch.inf)
    real = rank > 0
    per_choice = log_p.masked_fill(~real, 0.0) - among.masked_fill(~real[..., None], 0.0).logsumexp(-1)
    return -per_choice.masked_fill(~real, 0.0).sum(-1).mean()


def bradley_terry(scores: Tensor, rank: Tensor) -> Tensor:
    """- log sigmoid of the margin, mean over a record's ordered pairs; 0 for a record in which all are tied. -> scalar

    The loss of single-response reward models; with two responses that are not tied it equals `best_of_n`.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    before = (rank[:, :, None] < rank[:, None, :]) & (rank[:, :, None] > 0)
    margin = F.logsigmoid(scores[:, :, None] - scores[:, None, :]).masked_fill(~before, 0.0)
    return -(margin.sum((1, 2)) / before.sum((1, 2)).clamp_min(1)).mean()


LOSSES = {"best-of-n": best_of_n, "plackett-luce": plackett_luce, "bradley-terry": bradley_terry}
