"""Episodes of a run, steps of the engine and the table of a comparison, without Ray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from support.selection import color_encoder, color_recipe, color_store
from torch import Tensor, nn

from fmray.config.fewshot import EpisodeConfig, FewshotTrainConfig
from fmray.data.image_store import ImageStore
from fmray.train.engine import make_engine
from fmray.train.fewshot.comparison import ALL, SELECTED, Comparison
from fmray.train.fewshot.encoder import ImageReader, decode_all
from fmray.train.fewshot.select import CandidateTask, candidate_tasks
from fmray.train.fewshot.tasks import TrainingSet, read_ahead

EPISODES = EpisodeConfig(ways=3, shots=2, queries=4, tasks=10)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return color_store(tmp_path_factory.mktemp("colors"))


@pytest.fixture(scope="module")
def tasks(store: ImageStore) -> list[CandidateTask]:
    recipe = color_recipe(store, store.path.parent).recipe
    return candidate_tasks(store, recipe, recipe.target)


def test_episodes_are_of_one_task_and_labels_count_over_all_classes(store, tasks):
    training = TrainingSet(tasks, store, EPISODES, seed=3)
    assert training.num_classes == sum(len(np.unique(task.labels)) for task in tasks)
    tasks_used, class_of_label = set(), {}
    for index in range(10):
        support, query, labels = training.rows(index)
        rows = np.concatenate([support, query], axis=1)
        assert rows.shape == (3, 6) and len(np.unique(rows)) == 18
        [task_of_episode] = [task for task in tasks if np.isin(rows, task.rows).all()]
        tasks_used.add(task_of_episode.name)
        for label, of_class in zip(labels, rows, strict=True):
            in_task = np.isin(task_of_episode.rows, of_class)
            [class_index] = set(task_of_episode.labels[in_task])
            named = (task_of_episode.name, class_index)
            assert class_of_label.setdefault(int(label), named) == named
    assert tasks_used == {task.name for task in tasks}  # 10 episodes of 4 tasks that take turns
    assert len(set(class_of_label.values())) == len(class_of_label)
    rows, labels = training.used_rows()
    assert set(rows) == {
        int(row) for i in range(10) for part in training.rows(i)[:2] for row in part.flat
    }
    assert set(labels) == set(class_of_label)


def test_weighted_tasks_take_more_turns_evenly_spread_over_the_episodes(store, tasks):
    equal = TrainingSet(tasks, store, EPISODES, 3, {task.name: 2.0 for task in tasks})
    without = TrainingSet(tasks, store, EPISODES, seed=3)
    config = EPISODES.model_copy(update={"tasks": 42})
    heavy = TrainingSet(tasks, store, config, 3, {tasks[1].name: 4.0})  # of 4 tasks: 4 in 7
    for index in range(10):
        np.testing.assert_array_equal(equal.rows(index)[0], without.rows(index)[0])
    turns = [bool(np.isin(heavy.rows(index)[0], tasks[1].rows).all()) for index in range(42)]
    assert sum(turns) == 24
    assert all(abs(sum(turns[:n]) - 4 / 7 * n) < 1 for n in range(1, 43))
    for task in tasks:
        if task is not tasks[1]:
            assert sum(np.isin(heavy.rows(i)[0], task.rows).all() for i in range(42)) == 6


def test_every_epoch_uses_each_episode_once(store, tasks):
    training = TrainingSet(tasks, store, EPISODES, seed=3)
    steps = [training.order(step, 4) for step in range(10)]
    flat = [index for step in steps for index in step]
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    # the shares of two ranks cover a step
    for step in steps:
        assert sorted(step[0::2] + step[1::2]) == sorted(step)


def test_training_set_depends_on_the_rows_of_its_tasks_and_not_on_their_order(store, tasks):
    one, other = (
        TrainingSet(tasks, store, EPISODES, 3),
        TrainingSet(tasks[::-1], store, EPISODES, 3),
    )
    assert one.fingerprint == other.fingerprint
    for index in range(4):
        for a, b in zip(one.rows(index), other.rows(index), strict=True):
            np.testing.assert_array_equal(a, b)
    fewer = TrainingSet(tasks[1:], store, EPISODES, 3)
    first = tasks[0]
    cut = CandidateTask(first.name, first.rows[1:], first.labels[1:])
    changed = TrainingSet([cut, *tasks[1:]], store, EPISODES, 3)
    assert len({one.fingerprint, fewer.fingerprint, changed.fingerprint}) == 3


def test_error_names_the_task_that_is_too_small(store, tasks):
    config = EPISODES.model_copy(update={"ways": 7})
    with pytest.raises(
        ValueError, match=r"task crimson: 7 ways, but the train split has 6 classes"
    ):
        TrainingSet(tasks, store, config, 3)


def test_images_decoded_in_advance_and_on_access_are_equal(store, tasks):
    preprocess = color_encoder().preprocess
    decoded = decode_all(store, preprocess)
    assert decoded.shape == (store.num_rows, 3, 8, 8)
    training = TrainingSet(tasks, store, EPISODES, seed=3)
    for position, (one, other) in enumerate(
        zip(
            read_ahead(training, ImageReader(store, preprocess, decoded), [4, 0, 9]),
            read_ahead(training, ImageReader(store, preprocess), [4, 0, 9]),
            strict=True,
        )
    ):
        assert torch.equal(one.support, other.support) and torch.equal(one.query, other.query)
        wanted = training.rows([4, 0, 9][position])
        assert torch.equal(one.labels, torch.from_numpy(wanted[2]))
        np.testing.assert_array_equal(one.query.numpy(), decoded[wanted[1]])


class Quadratic(nn.Module):
    """Loss (w - x)^2 / 2 of an episode that is one number x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, number: Tensor) -> tuple[Tensor, Tensor]:
        return (self.weight - number) ** 2 / 2, torch.zeros(())


@pytest.mark.parametrize(("clip", "wanted"), [(0.0, 1 - 0.1 * -3), (0.5, 1 + 0.1 * 0.5)])
def test_step_follows_the_gradient_of_the_mean_over_episodes(clip: float, wanted: float) -> None:
    learner = Quadratic()
    config = FewshotTrainConfig(episodes_per_step=2, lr=0.1, momentum=0.0, gradient_clip=clip)
    engine = make_engine(learner, config, world_size=1)
    for number in (2.0, 6.0):  # gradient of the mean at w = 1: ((1 - 2) + (1 - 6)) / 2 = -3
        assert learner.weight.item() == 1.0
        loss, _ = engine(torch.tensor(number))
        engine.backward(loss)
        engine.step()
    assert learner.weight.item() == pytest.approx(wanted)
    assert engine.get_global_grad_norm() == pytest.approx(3.0)
    assert learner.weight.grad is None


def test_claims_of_the_table_match_the_paired_test() -> None:
    generator = np.random.default_rng(0)
    hard = generator.random(200)  # tasks differ far more than methods
    shift = {"quickdraw": 0.01, "birds": -0.01, "signs": 0.0}
    noise = {name: generator.normal(0, 0.02, 200) for name in shift}
    accuracies = {
        ALL: {(name, 1): hard for name in shift},
        SELECTED: {(name, 1): hard + shift[name] + noise[name] for name in shift},
    }
    result = Comparison(accuracies, {(name, 1): 5 for name in shift})
    [claim] = result.claims()
    assert (claim.above, claim.within, claim.below) == (1, 1, 1)
    mean = np.mean([shift[name] + noise[name].mean() for name in shift])
    assert claim.difference == pytest.approx(mean)
    for name in shift:
        wanted = stats.ttest_rel(accuracies[SELECTED][name, 1], hard).confidence_interval(0.95)
        interval = result.difference(SELECTED, ALL, (name, 1))
        assert (interval.low, interval.high) == pytest.approx((wanted.low, wanted.high))
    text = result.table()
    assert "1-shot: minus multitask/all, paired" in text and "birds 5-way" in text
    assert "above zero in 1 of 3 columns, undecided in 1, below in 1" in text
