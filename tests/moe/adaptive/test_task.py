"""The generated vowels: who says what how often, and that the clouds lie around the published averages."""

import torch

from turnout.moe.adaptive import VOWELS, vowel_task
from turnout.moe.adaptive.task import AVERAGE_HZ, SPEAKERS, TRAINING_SPEAKERS, one_hot


def hertz(task):
    return torch.cat([task.train_x_TD, task.test_x_TD]) * task.scale_D + task.center_D


def test_every_speaker_says_every_vowel_twice():
    task = vowel_task(0)
    assert sum(SPEAKERS) == 76  # 33 men, 28 women and 15 children, as in 1952
    assert task.train_x_TD.shape == (TRAINING_SPEAKERS * 8, 2)
    assert task.test_x_TD.shape == (26 * 8, 2)
    assert task.train_y_T.bincount().tolist() == [100] * 4
    assert task.test_y_T.bincount().tolist() == [52] * 4


def test_training_cases_are_scaled_and_held_out_ones_are_scaled_alike():
    task = vowel_task(1)
    torch.testing.assert_close(task.train_x_TD.mean(0), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(task.train_x_TD.std(0), torch.ones(2))
    assert task.test_x_TD.mean(0).abs().min() > 1e-4


def test_a_seed_fixes_the_task():
    first, again, other = vowel_task(5), vowel_task(5), vowel_task(6)
    assert torch.equal(first.train_x_TD, again.train_x_TD)
    assert torch.equal(first.test_x_TD, again.test_x_TD)
    assert not torch.equal(first.train_x_TD, other.train_x_TD)


def test_a_task_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(1)
    torch.manual_seed(0)
    vowel_task(3)
    assert torch.equal(torch.rand(1), want)


def test_the_clouds_lie_around_the_published_averages():
    tasks = [vowel_task(seed) for seed in range(40)]
    log_hz = torch.stack([hertz(task).log() for task in tasks])
    y = torch.cat([tasks[0].train_y_T, tasks[0].test_y_T])
    share = torch.tensor(SPEAKERS) / sum(SPEAKERS)
    for vowel in range(len(VOWELS)):
        want = (torch.tensor(AVERAGE_HZ[vowel]).log() * share[:, None]).sum(0)
        torch.testing.assert_close(log_hz[:, y == vowel].mean((0, 1)), want, atol=0.01, rtol=0)


def test_a_speaker_repeats_a_vowel_more_alike_than_others_say_it():
    log_hz = hertz(vowel_task(2)).log().view(76, 4, 2, 2)
    twice = (log_hz[:, :, 0] - log_hz[:, :, 1]).std(0) / 2**0.5
    torch.testing.assert_close(twice.mean(0), torch.tensor([0.070, 0.037]), rtol=0.2, atol=0)
    assert (log_hz[:, :, 0].std(0) > twice).all()


def test_a_target_is_one_at_its_vowel():
    assert one_hot(torch.tensor([2, 0])).tolist() == [[0, 0, 1, 0], [1, 0, 0, 0]]
