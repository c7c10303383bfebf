"""The five numbers of the ADM evaluator, against stored numbers, closed forms and slow loops."""

import numpy as np
import pytest
import scipy.linalg
import torch

from evaluations.c2i import metrics
from evaluations.c2i.metrics import (
    StreamingStatistics,
    check_covariance,
    feature_statistics,
    frechet_distance,
    inception_score,
    manifold_radii,
    precision_recall,
)


@pytest.fixture
def stored(fixture):
    return fixture("metrics")


def random_features(count, size, seed=0):
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(count, size)) @ random.normal(size=(size, size))
    return (mixed + 3).astype(np.float32)


def distance_between(features1, features2, use_factors=True):
    mu1, sigma1, factor1 = feature_statistics(features1)
    mu2, sigma2, factor2 = feature_statistics(features2)
    return frechet_distance(mu1, sigma1, mu2, sigma2, *(factor1, factor2) if use_factors else ())


def test_fid_is_the_stored_one(stored):
    distance = distance_between(stored["A"].numpy(), stored["B"].numpy())
    assert distance == pytest.approx(stored["fid"], rel=1e-6)


def test_statistics_are_the_stored_ones(stored):
    mean, covariance, _ = feature_statistics(stored["A"].numpy())
    np.testing.assert_allclose(mean, stored["mu_a"], rtol=0, atol=1e-6)      # a float32 sum
    np.testing.assert_allclose(covariance, stored["sigma_a"], rtol=1e-9, atol=1e-11)


def test_inception_score_is_the_stored_one(stored):
    probabilities = stored["probs"].numpy()
    assert inception_score(probabilities, 500) == pytest.approx(stored["is_split500"], rel=1e-6)
    assert inception_score(probabilities) == pytest.approx(stored["is_split5000"], rel=1e-6)


def test_precision_and_recall_are_exactly_the_stored_ones(stored):
    assert precision_recall(stored["A"], stored["B"]) == (stored["precision"], stored["recall"])


def test_radii_are_the_stored_ones(stored):
    expected = stored["radii_a"][:, 0]
    torch.testing.assert_close(manifold_radii(stored["A"]), expected, rtol=1e-6, atol=0)


def test_streaming_statistics_do_not_depend_on_the_batches():
    features = random_features(50, 7).astype(np.float64) + 1e6      # the mean must cost no digits
    statistics = StreamingStatistics()
    for batch in np.split(features, [1, 4, 4, 30]):
        statistics.add(batch)
    np.testing.assert_allclose(statistics.mean, features.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance, np.cov(features, rowvar=False), rtol=1e-7)


def test_fid_of_diagonal_covariances_is_the_closed_form():
    random = np.random.default_rng(1)
    mu1, mu2, variances1, variances2 = random.uniform(1, 2, size=(4, 9))
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(variances1) - np.sqrt(variances2)) ** 2).sum()
    found = frechet_distance(mu1, np.diag(variances1), mu2, np.diag(variances2))
    assert found == pytest.approx(expected, rel=1e-12)


def test_fid_is_that_of_the_matrix_square_root():
    features1, features2 = random_features(60, 11), random_features(70, 11, seed=1)
    mu1, sigma1, _ = feature_statistics(features1)
    mu2, sigma2, _ = feature_statistics(features2)
    root = scipy.linalg.sqrtm(sigma1 @ sigma2).real
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(sigma1 + sigma2 - 2 * root)
    assert distance_between(features1, features2) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("count1, count2", [(13, 17), (13, 90), (90, 13), (40, 40)])
def test_fid_with_and_without_factors_agree(count1, count2):
    features1, features2 = random_features(count1, 40), random_features(count2, 40, seed=1)
    expected = distance_between(features1, features2, use_factors=False)
    assert distance_between(features1, features2) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("count", [23, 60, 61, 300])
def test_fid_of_features_with_themselves_is_zero(count):
    features = random_features(count, 60)
    assert abs(distance_between(features, features)) <= 1e-6


def test_fid_with_itself_is_zero_for_dead_features_and_repeated_pictures():
    features = random_features(100, 60).repeat(2, axis=0)
    features[:, 20:50] = 0
    assert abs(distance_between(features, features)) <= 1e-6
    assert abs(distance_between(features[:30], features[:30])) <= 1e-6


@pytest.mark.parametrize("count", [2, 23, 300])
def test_fid_of_stored_statistics_with_themselves_is_zero(count):
    features = random_features(count, 60)
    assert abs(distance_between(features, features, use_factors=False)) <= 1e-3


def test_fid_is_symmetric_for_a_singular_and_a_regular_covariance():
    few, many = random_features(10, 30), random_features(200, 30, seed=1)
    assert distance_between(few, many) == pytest.approx(distance_between(many, few), rel=1e-9)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused(bad):
    features = random_features(12, 5)
    features[3, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        feature_statistics(features)
    with pytest.raises(ValueError, match="finite"):
        precision_recall(torch.from_numpy(features), torch.ones(12, 5))
    with pytest.raises(ValueError, match="finite"):
        inception_score(features)
    with pytest.raises(ValueError, match="finite"):
        frechet_distance(features[3], np.eye(5), np.zeros(5), np.eye(5))


def test_a_covariance_of_one_picture_is_refused():
    with pytest.raises(ValueError, match="at least 2 images"):
        feature_statistics(random_features(1, 5))


@pytest.mark.parametrize("eigenvalues, is_covariance", [
    ((-1e-5, 0.5, 1), False),
    ((-2e-6, 0, 1), False),
    ((-1, -0.5, -0.1), False),
    ((-1, 0, 0), False),
    ((-1e-8, 0.5, 1), True),
    ((0, 0, 0), True),
    ((0, 0, 1e-30), True),
    ((1e-9, 2, 3), True),
])
@pytest.mark.parametrize("place", ["reference", "samples", "beside a factor"])
def test_a_matrix_that_is_no_covariance_is_refused(eigenvalues, is_covariance, place):
    axes = np.linalg.qr(np.random.default_rng(5).normal(size=(3, 3)))[0]
    sigma = axes * np.array(eigenvalues) @ axes.T
    zero = np.zeros(3)
    words = {"reference": (zero, sigma, zero, np.eye(3)), "samples": (zero, np.eye(3), zero, sigma),
             "beside a factor": (zero, sigma, zero, np.eye(3), None, np.eye(3))}[place]
    if is_covariance:
        assert frechet_distance(*words) > -1e-6
    else:
        message = "expected a covariance, found a matrix with eigenvalues"
        with pytest.raises(ValueError, match=message):
            frechet_distance(*words)


def test_a_matrix_that_is_not_symmetric_is_no_covariance():
    sigma = np.eye(3) + np.triu(np.ones((3, 3)), 1)             # Cholesky looks at one triangle
    with pytest.raises(ValueError, match="asymmetric"):
        check_covariance(sigma)


def test_a_negative_distance_is_refused():
    sigma = np.eye(3)
    factor = 2 * np.eye(3)                                      # not the covariance's
    with pytest.raises(ValueError, match="at least 0 up to rounding, got -18; the means"):
        frechet_distance(np.zeros(3), sigma, np.zeros(3), sigma, factor, factor)


def test_statistics_of_different_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(7,\), \(7, 7\) and \(8,\), \(8, 8\)"):
        frechet_distance(np.zeros(7), np.eye(7), np.zeros(8), np.eye(8))


def test_inception_score_of_certain_balanced_predictions_is_the_number_of_classes():
    assert inception_score(np.eye(6)[np.arange(30) % 6]) == pytest.approx(6)
    assert inception_score(np.full((30, 6), 1 / 6)) == pytest.approx(1)


def test_a_shorter_last_split_counts_equally():
    probabilities = np.random.default_rng(2).dirichlet(np.ones(5), size=11)
    splits = (probabilities[:4], probabilities[4:8], probabilities[8:])
    expected = np.mean([inception_score(split) for split in splits])
    assert inception_score(probabilities, split_size=4) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("rows", [5, 7, 2048])
def test_precision_and_recall_equal_the_slow_way_for_any_block(monkeypatch, rows):
    monkeypatch.setattr(metrics, "DISTANCE_ROWS", rows)
    reference = torch.from_numpy(random_features(33, 6, seed=3))
    samples = torch.from_numpy(random_features(26, 6, seed=4))

    def radii(features):
        return torch.stack([((features - features[row]) ** 2).sum(dim=1).sort().values[3]
                            for row in range(len(features))])

    def fraction_inside(inner, outer, outer_radii):
        inside = [(((outer - point) ** 2).sum(dim=1) <= outer_radii).any() for point in inner]
        return sum(inside).item() / len(inner)

    torch.testing.assert_close(manifold_radii(reference), radii(reference), rtol=1e-4, atol=0)
    precision, recall = precision_recall(reference, samples)
    assert precision == fraction_inside(samples, reference, radii(reference)) and 0 < precision < 1
    assert recall == fraction_inside(reference, samples, radii(samples)) and 0 < recall < 1


def test_precision_and_recall_of_equal_and_of_distant_sets():
    features = torch.from_numpy(random_features(20, 6))
    assert precision_recall(features, features.flip(0)) == (1, 1)
    assert precision_recall(features, features + 1000) == (0, 0)


def test_precision_and_recall_report_every_row():
    done = []
    precision_recall(torch.rand(9, 4), torch.rand(7, 4), advance=done.append)
    assert sum(done) == 2 * 9 + 7


def test_too_few_pictures_for_a_third_neighbour_are_refused():
    with pytest.raises(ValueError, match="more than 3 images"):
        precision_recall(torch.rand(3, 4), torch.rand(7, 4))
