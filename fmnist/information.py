"""Information (信息论): how surprising an outcome is, how uncertain a distribution is, how far one is from another.

A distribution is a sequence of probabilities over the same outcomes. Everything is in nats, the unit of the natural
logarithm, or with `base=2` in bits: a nat is 1 / ln 2 = 1.4427 bits.

The second note's lottery (彩票): no prize 70 %, second prize 20 %, first prize 10 %.

>>> P = [0.7, 0.2, 0.1]
>>> uniform = [1/3, 1/3, 1/3]

The first prize surprises most, and where all are equally likely none surprises more than another:

>>> [round(surprisal(p), 4) for p in P]
[0.3567, 1.6094, 2.3026]
>>> [round(surprisal(p), 4) for p in uniform]
[1.0986, 1.0986, 1.0986]

Entropy is the surprise to be expected: the lottery is less uncertain than three equal chances, and more than certainty:

>>> round(entropy(P), 4), round(entropy(P, base=2), 4)
(0.8018, 1.1568)
>>> round(entropy(uniform), 4), round(entropy(uniform, base=2), 4)
(1.0986, 1.585)
>>> entropy([1.0, 0.0, 0.0])
0.0

The outcomes are drawn from P, and someone believes Q. Their surprise to be expected is the cross-entropy: at least the
entropy, which is what knowing P would leave, and above it by the divergence, which is what believing Q costs:

>>> round(cross_entropy(P, uniform), 4)
1.0986
>>> round(kl_divergence(P, uniform), 4)
0.2968
>>> round(entropy(P) + kl_divergence(P, uniform), 4)
1.0986

Where the second note is to be read with care:

* It calls the cross-entropy "the difference between the entropies of P and Q". The difference of these entropies is
  another number, and it is the divergence that says how far Q is from P. Here the two agree, since against the uniform
  distribution KL(P || uniform) = H(uniform) - H(P); the other way round they do not:

  >>> round(entropy(uniform) - entropy(P), 4), round(kl_divergence(P, uniform), 4)
  (0.2968, 0.2968)
  >>> round(entropy(P) - entropy(uniform), 4), round(kl_divergence(uniform, P), 4)
  (-0.2968, 0.3243)

* It swaps the two roles: P is where the data come from, Q is the subjective belief. The sum weighs by P, and the order
  matters:

  >>> round(cross_entropy(uniform, P), 4)
  1.4229

* It takes 0.33 for 1/3. That is 1 % short of a distribution, and the figure moves with it:

  >>> round(-sum(p * math.log(0.33) for p in P), 4)
  1.1087

* Its last formula weighs by the logits o. It is the label distribution y that belongs there: with logits, which may be
  negative and sum to anything, the sum is no cross-entropy.

A label that is certain, a one-hot y, has no entropy. What is left of the cross-entropy is the surprisal of the right
class, `-log p_y`, which is the loss of a classifier (交叉熵损失函数):

>>> round(cross_entropy([0, 0, 1], [0.2, 0.2, 0.6]), 4), round(surprisal(0.6), 4)
(0.5108, 0.5108)

And it sees nothing of how the rest is shared out, where the squared error (平方损失) does. Both predictions of the
first note are right, the third class is the likeliest, and yet:

>>> round(squared_error([0, 0, 1], [0.2, 0.2, 0.6]), 2), round(squared_error([0, 0, 1], [0.0, 0.4, 0.6]), 2)
(0.12, 0.16)
>>> round(cross_entropy([0, 0, 1], [0.0, 0.4, 0.6]), 4)
0.5108

With several labels in one image the label is a distribution over them, and only the classes that are present count:

>>> cross_entropy([0.5, 0, 0.5, 0], [0.3, 0.3, 0.4, 0.0]) == cross_entropy([0.5, 0, 0.5, 0], [0.3, 0.0, 0.4, 0.3])
True
"""

import math
from collections.abc import Iterable, Sequence

Distribution = Sequence[float]


def surprisal(p: float, base: float = math.e) -> float:
    """Information content (信息量) of an outcome of probability `p`: log 1/p, infinite where p is 0.

    >>> surprisal(0.5, base=2), surprisal(1.0), surprisal(0.0)
    (1.0, 0.0, inf)
    """
    if not 0 <= p <= 1:
        raise ValueError(f"{p} is not a probability")
    return abs(math.log(p) / math.log(base)) if p > 0 else math.inf


def entropy(P: Distribution, base: float = math.e) -> float:
    """Entropy (熵) H[P] = sum_j P_j log 1/P_j, with 0 log 0 = 0: at most log n, for n equally likely outcomes."""
    return cross_entropy(P, P, base)


def cross_entropy(P: Distribution, Q: Distribution, base: float = math.e) -> float:
    """Cross-entropy (交叉熵) H(P, Q) = sum_j P_j log 1/Q_j = H[P] + KL(P || Q): infinite if Q excludes what P draws."""
    _check(P, Q)
    return sum(p * surprisal(q, base) for p, q in zip(P, Q, strict=True) if p > 0)


def kl_divergence(P: Distribution, Q: Distribution, base: float = math.e) -> float:
    """Kullback-Leibler divergence (相对熵) KL(P || Q) = sum_j P_j log P_j/Q_j: 0 where Q is P, and never below.

    >>> kl_divergence([0.5, 0.5], [0.5, 0.5]), kl_divergence([0.5, 0.5], [1.0, 0.0])
    (0.0, inf)
    """
    _check(P, Q)
    return sum(p * (surprisal(q, base) - surprisal(p, base)) for p, q in zip(P, Q, strict=True) if p > 0)


def squared_error(y: Distribution, p: Distribution) -> float:
    """Squared loss (平方损失) of a prediction p as the first note has it: |p - y|^2 / 2."""
    _check(y, p)
    return sum((b - a) ** 2 for a, b in zip(y, p, strict=True)) / 2


def likelihood(probabilities_of_labels: Iterable[float]) -> float:
    """How likely the model thinks all labels together (联合预测概率): their product.

    With loss, the mean of -log p, this is exp(-n loss). The least loss is the greatest likelihood (最大似然):

    >>> p = [0.6, 0.9, 0.3]
    >>> loss = sum(surprisal(p_i) for p_i in p) / 3
    >>> round(likelihood(p), 6), round(math.exp(-3 * loss), 6)
    (0.162, 0.162)
    """
    return math.prod(probabilities_of_labels)


def _check(*distributions: Distribution) -> None:
    for distribution in distributions:
        if min(distribution, default=-1) < 0 or not math.isclose(sum(distribution), 1, abs_tol=1e-6):
            raise ValueError(f"{list(distribution)} is not a distribution: its sum is {sum(distribution)}")
    if len({len(distribution) for distribution in distributions}) > 1:
        raise ValueError(f"distributions over different outcomes: {[len(d) for d in distributions]} of them")
