"""The centroid classifier against scikit-learn's nearest neighbours on the raw centroids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import KNeighborsClassifier

from fmray.fewshot import centroid_logits


@settings(max_examples=40, deadline=None)
@given(
    ways=st.integers(2, 8),
    shots=st.integers(1, 5),
    queries=st.integers(1, 10),
    features=st.integers(2, 20),
    seed=st.integers(0, 2**32 - 1),
)
def test_prediction_is_the_nearest_neighbour_among_raw_centroids(
    ways, shots, queries, features, seed
):
    generator = np.random.default_rng(seed)
    # norms differ tenfold, so that normalising before the mean would give other centroids
    support = generator.normal(size=(ways, shots, features))
    support *= generator.uniform(0.1, 10, (ways, shots, 1))
    query = generator.normal(size=(queries, features))
    logits = centroid_logits(torch.from_numpy(support), torch.from_numpy(query)).numpy()
    centroids = support.mean(1)
    np.testing.assert_allclose(logits, 10 * cosine_similarity(query, centroids), atol=1e-12)
    neighbours = KNeighborsClassifier(n_neighbors=1, metric="cosine", algorithm="brute")
    expected = neighbours.fit(centroids, np.arange(ways)).predict(query)
    assert (logits.argmax(1) == expected).all()


def test_centroid_is_the_mean_of_raw_features():
    support = torch.tensor([[[100.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
    query = torch.tensor([[0.6, 0.8]])
    # the long vector rules its centroid, which points along x; normalised first, it would be (1, 1)
    assert centroid_logits(support, query)[0].tolist() == pytest.approx(
        [10 * (0.6 * 100 + 0.8) / np.hypot(100, 1), 10 * 1.4 / np.sqrt(2)], rel=1e-5
    )


def test_leading_dimensions_and_half_precision_are_supported():
    generator = torch.Generator().manual_seed(0)
    support = torch.randn(4, 3, 2, 16, generator=generator)
    query = torch.randn(4, 5, 16, generator=generator)
    together = centroid_logits(support, query, temperature=3.0)
    for i in range(4):
        torch.testing.assert_close(together[i], centroid_logits(support[i], query[i], 3.0))
    half = centroid_logits(support.bfloat16(), query.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, 10 / 3 * together, atol=0.1, rtol=0)


def test_invalid_features_are_errors():
    good, query = torch.ones(3, 2, 4), torch.ones(5, 4)
    bad = good.clone()
    bad[1, 0, 2] = torch.nan
    for support, queries, message in (
        (bad, query, "support features must be finite"),
        (good, query * torch.inf, "query features must be finite"),
        (good, torch.ones(5, 3), "d = 4"),
        (torch.ones(3, 0, 4), query, "shots >= 1"),
        (torch.ones(3, 4), query, "shots, d"),
    ):
        with pytest.raises(ValueError, match=message):
            centroid_logits(support, queries)
