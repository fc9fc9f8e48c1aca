import math

import torch
from torch.nn.functional import cosine_similarity

from trainers.nets.contrastive import class_means, contrastive_loss, cosines


def test_cosines_are_those_of_all_pairs():
    torch.manual_seed(0)
    one, other = torch.randn(3, 5), torch.randn(4, 5)
    torch.testing.assert_close(cosines(one, other), cosine_similarity(one[:, None], other[None], dim=-1))


def test_loss_of_two_orthogonal_pairs():
    # Own cosines 1, others 0: each row and each column is a softmax over (s, 0).
    loss = contrastive_loss(torch.eye(2), 3 * torch.eye(2), scale=2.0)
    assert math.isclose(loss.item(), math.log(1 + math.exp(-2)), rel_tol=1e-6)


def test_loss_looks_both_ways():
    # One image alike both texts, the other alike the second: rows (1, 1), (0, 1) and columns (1, 0), (1, 1) of cosines.
    one, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    half = math.sqrt(0.5)

    def entropy(own: float, rival: float) -> float:
        return math.log(1 + math.exp(rival - own))

    expected = (entropy(1, half) + entropy(half, 0) + entropy(1, 0) + entropy(half, half)) / 4
    assert math.isclose(contrastive_loss(one, other, 1.0).item(), expected, rel_tol=1e-6)


def test_class_means_average_directions():
    embedding = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, -1.0]])
    means = class_means(embedding, torch.tensor([0, 0, 2]), classes=3)
    assert means.tolist() == [[0.5, 0.5], [0.0, 0.0], [0.0, -1.0]]
