"""Information: what its definitions promise, and that the fused op's loss is the same quantity."""

import doctest
import math

import pytest
import torch

from fmnist import information
from fmnist.information import cross_entropy, entropy, kl_divergence, likelihood, surprisal
from softxent import fused_softmax_xent


def distributions(n: int, n_outcomes: int) -> list[list[float]]:
    generator = torch.Generator().manual_seed(n_outcomes)
    rows: list[list[float]] = torch.randn(n, n_outcomes, generator=generator, dtype=torch.float64).softmax(1).tolist()
    return rows


def test_the_notes_examples_run_as_they_are_written() -> None:
    found = doctest.testmod(information)
    assert found.failed == 0 and found.attempted >= 20


@pytest.mark.parametrize("n_outcomes", [2, 3, 10])
def test_cross_entropy_is_entropy_plus_divergence_and_never_below_entropy(n_outcomes: int) -> None:
    for P, Q in zip(distributions(20, n_outcomes), distributions(40, n_outcomes)[20:], strict=True):
        assert cross_entropy(P, Q) == pytest.approx(entropy(P) + kl_divergence(P, Q), rel=1e-12)
        assert kl_divergence(P, Q) > 0 and cross_entropy(P, Q) > entropy(P)
        assert cross_entropy(P, P) == entropy(P) and kl_divergence(P, P) == 0


def test_equal_chances_are_the_least_certain() -> None:
    for P in distributions(20, 3):
        assert entropy(P) < entropy([1 / 3] * 3) == pytest.approx(math.log(3))


def test_bits_are_nats_over_the_logarithm_of_2() -> None:
    P, Q = distributions(2, 5)
    for measure in (cross_entropy, kl_divergence):
        assert measure(P, Q, base=2) == pytest.approx(measure(P, Q) / math.log(2), rel=1e-12)
    assert surprisal(1 / 8, base=2) == pytest.approx(3)


def test_what_is_drawn_but_was_excluded_costs_infinitely_much_and_what_is_not_drawn_nothing() -> None:
    assert cross_entropy([0.5, 0.5], [1, 0]) == kl_divergence([0.5, 0.5], [1, 0]) == math.inf
    assert cross_entropy([1, 0], [0.5, 0.5]) == math.log(2)
    assert cross_entropy([1, 0], [1, 0]) == 0


def test_the_likelihood_of_all_labels_is_the_exponential_of_the_loss() -> None:
    """exp(-n loss) = prod_i p_i, by the op's loss in float64 and by the probabilities themselves."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 10, generator=generator, dtype=torch.float64)
    labels = torch.randint(10, (50,), generator=generator)
    p = logits.softmax(1)[torch.arange(50), labels]
    loss = fused_softmax_xent(logits, labels).item()
    assert math.exp(-50 * loss) == pytest.approx(p.prod().item(), rel=1e-12)
    assert likelihood(p.tolist()) == pytest.approx(p.prod().item(), rel=1e-12)


def test_the_least_loss_is_the_greatest_likelihood() -> None:
    candidates = distributions(30, 4)
    losses = [sum(surprisal(p) for p in candidate) / 4 for candidate in candidates]
    likelihoods = [likelihood(candidate) for candidate in candidates]
    assert losses.index(min(losses)) == likelihoods.index(max(likelihoods))


def test_the_ops_loss_is_the_cross_entropy_of_these_definitions() -> None:
    """Class indices, the one-hot codes of the same classes, and distributions over classes as targets."""
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    predictions = logits.softmax(1).tolist()
    labels = torch.tensor([0, 1, 2, 3, 1, 0])
    one_hot = torch.eye(4, dtype=torch.float64)[labels]
    surprisals = [surprisal(p[y]) for p, y in zip(predictions, labels.tolist(), strict=True)]
    for target in (labels, one_hot):
        losses = fused_softmax_xent(logits, target, reduction="none").tolist()
        assert losses == pytest.approx(surprisals, rel=1e-12)
    soft = distributions(6, 4)
    losses = fused_softmax_xent(logits, torch.tensor(soft, dtype=torch.float64), reduction="none").tolist()
    expected = [cross_entropy(y, p) for y, p in zip(soft, predictions, strict=True)]
    assert losses == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bad", [[0.5, 0.4], [1.5, -0.5], [], [0.7, 0.2, 0.2]])
def test_what_is_no_distribution_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="not a distribution"):
        entropy(bad)


def test_distributions_over_different_outcomes_are_refused() -> None:
    with pytest.raises(ValueError, match="different outcomes"):
        cross_entropy([0.5, 0.5], [0.5, 0.25, 0.25])
    with pytest.raises(ValueError, match="not a probability"):
        surprisal(1.5)
