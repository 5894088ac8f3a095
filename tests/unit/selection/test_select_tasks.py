"""Coverage and Algorithm 1 against scikit-learn's covariances, brute force and a worked example."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.covariance import OAS, LedoitWolf, empirical_covariance

from fmray.selection import TaskMoments, coverage, select_tasks, similarity

EXAMPLE = {"A": (4, 1), "B": (4, -2), "C": (0, 4), "D": (-4, 0)}


def unit_task(name: str, mean: tuple[float, float]) -> TaskMoments:
    """Return a task of four features in the plane, with covariance I."""
    corners = math.sqrt(2) * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    return TaskMoments.of(name, corners + mean)


def candidates(seed: int, d: int, sizes: tuple[int, ...]) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    scales = 0.5 + generator.random(d)
    return [generator.normal(size=(n, d)) * scales + generator.normal(size=d) + 1 for n in sizes]


def of(groups: list[np.ndarray]) -> list[TaskMoments]:
    return [TaskMoments.of(f"t{i}", group) for i, group in enumerate(groups)]


def test_worked_example():
    target = unit_task("target", (4, 0))
    tasks = [unit_task(name, mean) for name, mean in EXAMPLE.items()]
    result = select_tasks(target, tasks[::-1], 0.05, covariance="ml")
    assert result.names == ["A", "B"]
    assert result.order == ["A", "B", "C", "D"]
    assert result.coverage[:3] == pytest.approx([1, 13, 143 / 57], rel=1e-12)
    assert result.similarity == pytest.approx([4 / 17**0.5, 4 / 20**0.5, 0, -1])
    for threshold, names in ((0, ["A", "B"]), (11.9, ["A", "B"]), (12.1, ["A"])):
        assert select_tasks(target, tasks, threshold, "ml").names == names
    # weights by sample and by task are the same where all tasks have as many samples
    assert select_tasks(target, tasks, 0.05, "ml", "sample").coverage == pytest.approx(
        result.coverage
    )


@pytest.mark.parametrize(("kind", "oracle"), [("oas", OAS), ("ledoit_wolf", LedoitWolf)])
@pytest.mark.parametrize("sizes", [(9, 9, 9), (200, 200), (5, 40, 17), (3,)])
def test_covariances_match_scikit_learn(kind, oracle, sizes):
    groups = candidates(len(sizes), 12, sizes)
    target = np.random.default_rng(9).normal(size=(6, 12))
    pooled = np.concatenate(groups)
    difference = pooled.mean(axis=0) - target.mean(axis=0)
    distance = difference @ np.linalg.solve(oracle().fit(pooled).covariance_, difference)
    by_sample = coverage(of(groups), TaskMoments.of("0", target), kind, "sample")
    assert by_sample == pytest.approx(1 / distance, rel=1e-10)
    if len(set(sizes)) == 1:
        by_task = coverage(of(groups), TaskMoments.of("0", target), kind, "task")
        assert by_task == pytest.approx(by_sample, rel=1e-10)


@pytest.mark.parametrize("kind", ["ml", "diag"])
def test_plain_and_diagonal_covariance_of_tasks_of_unequal_size(kind):
    groups = candidates(3, 4, (30, 90, 11))
    target = np.random.default_rng(1).normal(size=(5, 4))
    means = np.array([group.mean(axis=0) for group in groups])
    mixture = np.mean([empirical_covariance(group) for group in groups], axis=0)
    mixture += empirical_covariance(means)  # variance between the tasks
    if kind == "diag":
        mixture = np.diag(np.diag(mixture))
    difference = means.mean(axis=0) - target.mean(axis=0)
    expected = 1 / (difference @ np.linalg.inv(mixture) @ difference)
    assert coverage(of(groups), TaskMoments.of("0", target), kind) == pytest.approx(expected)


def test_shrinkage_with_weights_by_task_uses_the_effective_sample_size():
    groups = candidates(5, 6, (10, 40))
    target = TaskMoments.of("0", np.ones((3, 6)) / 2)
    # Repeating each feature of the small task four times gives the same mixture. Kish's effective
    # sample size is 2^2 / (1 / 10 + 1 / 40) = 32.
    repeated = np.concatenate([np.repeat(groups[0], 4, axis=0), groups[1]])
    plain = empirical_covariance(repeated)
    d, variance, square = 6, np.trace(plain) / 6, (plain**2).sum()
    share = min(1, (square + (d * variance) ** 2) / (33 * (square - d * variance**2)))
    shrunk = (1 - share) * plain + share * variance * np.eye(6)
    difference = repeated.mean(axis=0) - target.mean
    expected = 1 / (difference @ np.linalg.solve(shrunk, difference))
    assert 0 < share < 1
    assert coverage(of(groups), target, "oas", "task") == pytest.approx(expected, rel=1e-10)


def brute_force(target: np.ndarray, groups: list[np.ndarray], threshold: float) -> list[int]:
    """Return the choice of Algorithm 1 from raw features, with scikit-learn and an inverse."""
    origin = target.mean(axis=0)
    means = [group.mean(axis=0) for group in groups]
    cosines = [m @ origin / np.linalg.norm(m) / np.linalg.norm(origin) for m in means]
    order = sorted(range(len(groups)), key=lambda i: -cosines[i])

    def covered(chosen: list[int]) -> float:
        pooled = np.concatenate([groups[i] for i in chosen])
        difference = pooled.mean(axis=0) - origin
        return 1 / (difference @ np.linalg.inv(OAS().fit(pooled).covariance_) @ difference)

    chosen = order[:1]
    for i in order[1:]:
        if covered([*chosen, i]) < (1 + threshold) * covered(chosen):
            break
        chosen.append(i)
    return chosen


@pytest.mark.parametrize("seed", range(12))
def test_selection_matches_brute_force(seed):
    groups = candidates(seed, 5, (20,) * 8)
    target = np.random.default_rng(100 + seed).normal(size=(15, 5)) + 1
    for threshold in (0.0, 0.05, 0.5):
        result = select_tasks(TaskMoments.of("0", target), of(groups), threshold)
        assert result.names == [f"t{i}" for i in brute_force(target, groups, threshold)]


def test_shrinkage_finds_the_tasks_with_fewer_samples_than_features_and_pinv_does_not():
    """Three tasks around the target and six far from it, 12 samples of 64 features each."""
    right = {"oas": 0, "ledoit_wolf": 0, "pinv": 0}
    for seed in range(25):
        generator = np.random.default_rng(seed)
        center = generator.normal(size=64)
        center *= 8 / np.linalg.norm(center)
        directions = np.linalg.qr(generator.normal(size=(64, 9)))[0].T
        # The mean of the three near tasks is the target's; each far task has its own direction.
        around = directions[:3] - directions[:3].mean(axis=0)
        means = [center + 4 * step for step in around] + [6 * step for step in directions[3:]]
        groups = [mean + generator.normal(size=(12, 64)) for mean in means]
        target = TaskMoments.of("0", center + generator.normal(size=(12, 64)))
        wanted = {"t0", "t1", "t2"}
        for kind in ("oas", "ledoit_wolf"):
            result = select_tasks(target, of(groups), 0.05, kind)
            right[kind] += set(result.names) == wanted
        order = [int(name[1:]) for name in result.order]
        curve = []
        for count in range(1, 10):
            pooled = np.concatenate([groups[i] for i in order[:count]])
            difference = pooled.mean(axis=0) - target.mean
            inverse = np.linalg.pinv(empirical_covariance(pooled))
            curve.append(1 / (difference @ inverse @ difference))
        chosen = 1
        while chosen < 9 and curve[chosen] >= 1.05 * curve[chosen - 1]:
            chosen += 1
        right["pinv"] += {f"t{i}" for i in order[:chosen]} == wanted
    assert right == {"oas": 25, "ledoit_wolf": 25, "pinv": 0}


def test_selection_stops_at_a_distance_of_zero():
    target = unit_task("target", (4, 0))
    tasks = [unit_task(str(i), (4, 0)) for i in range(5)]
    with np.errstate(all="raise"):
        result = select_tasks(target, tasks, 0.0, "ml")
    assert result.names == ["0"]
    assert result.coverage == [math.inf] * 5


def test_ties_are_broken_by_name_in_any_order_of_the_candidates():
    target = unit_task("target", (1, 1))
    # the same direction, with lengths that round differently
    tasks = [
        unit_task(name, (scale, scale)) for name, scale in zip("cab", (0.1, 7, 0.3), strict=True)
    ]
    for shuffled in (tasks, tasks[::-1]):
        assert select_tasks(target, shuffled, 0.1).order == ["a", "b", "c"]


def test_ml_is_affine_invariant():
    groups = candidates(2, 4, (30, 30))
    target = np.random.default_rng(3).normal(size=(20, 4))
    map_ = np.random.default_rng(4).normal(size=(4, 4))
    plain = coverage(of(groups), TaskMoments.of("0", target), "ml")
    mapped = coverage(
        of([g @ map_ + 5 for g in groups]), TaskMoments.of("0", target @ map_ + 5), "ml"
    )
    assert mapped == pytest.approx(plain, rel=1e-9)


def test_memory_mapped_scatters_give_the_same_selection(tmp_path):
    groups = candidates(1, 6, (12,) * 5)
    tasks, target = of(groups), TaskMoments.of("0", np.ones((4, 6)) + np.eye(4, 6))
    mapped = []
    for task in tasks:
        np.save(tmp_path / f"{task.name}.npy", task.scatter)
        scatter = np.load(tmp_path / f"{task.name}.npy", mmap_mode="r")
        mapped.append(
            TaskMoments(task.name, task.count, task.mean, scatter, mean_rest=task.mean_rest)
        )
    assert select_tasks(target, mapped, 0.05) == select_tasks(target, tasks, 0.05)


def good(name: str = "a", d: int = 3) -> TaskMoments:
    return TaskMoments.of(name, np.random.default_rng(len(name)).normal(size=(20, d)) + 2)


def few(n: int = 4) -> TaskMoments:
    return TaskMoments.of("few", np.random.default_rng(0).normal(size=(n, 4)) + 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: select_tasks(good(), [good(), good("b"), good()], 0.1),
            "two tasks are called 'a'",
        ),
        (lambda: coverage([good(), good()], good()), "two tasks are called 'a'"),
        (lambda: select_tasks(good(), [], 0.1), "no candidate tasks"),
        (lambda: coverage([], good()), "coverage needs at least one task"),
        (lambda: select_tasks(good(), [good()], -0.1), "threshold: .* not -0.1"),
        (lambda: select_tasks(good(), [good()], math.nan), "threshold: .* not nan"),
        (lambda: select_tasks(good(), [good()], 0.1, "pinv"), "covariance: one of oas, .*'pinv'"),
        (
            lambda: select_tasks(good(), [good()], 0.1, "ml", "size"),
            "weighting: one of task, sample",
        ),
        (lambda: similarity(good(), good(d=4)), "'a' has 4 features, target 'a' 3"),
        (
            lambda: similarity(good(), TaskMoments.of("zero", [[1, 2, 3], [-1, -2, -3]])),
            "'zero': its mean feature is zero",
        ),
        (
            lambda: select_tasks(TaskMoments.of("t", np.zeros((2, 3))), [good()], 0.1),
            "'t': its mean feature is zero",
        ),
        (lambda: coverage([few()], few(), "ml"), "4 samples with 4 features has no inverse"),
        (
            lambda: coverage(
                [TaskMoments.of("x", np.ones((9, 2)) * np.arange(9)[:, None])], few2(), "ml"
            ),
            "'ml' is ill-conditioned",
        ),
        (
            lambda: coverage(
                [TaskMoments.of("x", np.c_[np.arange(9), np.ones(9)])], few2(), "diag"
            ),
            "'diag': feature 1 does not vary",
        ),
        (lambda: coverage([TaskMoments.of("x", np.ones((3, 2)))], few2()), "do not vary"),
        (
            lambda: coverage([TaskMoments("x", 9, np.ones(2), np.eye(2))], few2(), "ledoit_wolf"),
            "'ledoit_wolf' needs the third- and fourth-order sums",
        ),
    ],
)
def test_bad_input_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def few2() -> TaskMoments:
    return TaskMoments.of("target", [[5.0, 3.0], [1.0, 2.0]])
