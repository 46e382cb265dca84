import math

import numpy as np
import pytest

from mamba_pretrain.training.evaluation import Evaluation, unigram_loss


def test_perplexity_and_bits_per_byte():
    result = Evaluation(loss=math.log(8.0), n_tokens=10)
    assert result.perplexity == pytest.approx(8.0)
    assert result.bits_per_byte(3.0) == pytest.approx(1.0)
    assert result.bits_per_byte(None) is None
    assert Evaluation(math.log(256), 1).bits_per_byte(1.0) == pytest.approx(8.0)  # uniform over bytes
    assert Evaluation(loss=1e4, n_tokens=1).perplexity == math.inf


def test_unigram_loss_is_the_cross_entropy_with_the_smoothed_counts():
    counts = np.array([7, 0, 1])
    expected = -(2 * math.log(8 / 11) + math.log(1 / 11)) / 3
    assert unigram_loss(counts, np.array([0, 0, 1])) == pytest.approx(expected)
