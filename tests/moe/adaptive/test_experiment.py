"""The experiment itself: eq. 1.3 makes one expert answer each vowel alone, eq. 1.1 does not.

The bounds have margin: over 20 seeds the log-likelihood's largest gate was at least 0.958 and its experts a case at
most 1.21; the cooperative's were at most 0.855 and at least 1.60.
"""

import io
import statistics

import pytest
import torch
from rich.console import Console

from turnout import ConfigError
from turnout.moe.adaptive import compare, linear_map, picture, train
from turnout.moe.adaptive.__main__ import main, table

SEEDS = range(5)


@pytest.fixture(scope="module")
def runs():
    return compare(SEEDS)


@pytest.fixture(scope="module")
def results(runs):
    return {objective: [run.measures for run in of_seeds] for objective, of_seeds in runs.items()}


@pytest.mark.parametrize("objective", ["log-likelihood", "competitive"])
def test_experts_that_answer_for_the_whole_target_specialise(results, objective):
    for found in results[objective]:
        assert found.largest_gate > 0.93
        assert found.experts_a_case < 1.3
        assert found.alone_error < 1.12 * found.blend_error
        assert found.alone_accuracy > found.blend_accuracy - 0.02
        assert found.experts_used >= 2  # specialised, not collapsed onto one expert
        assert found.information > 0.9  # the front vowels' expert and the back vowels'


def test_experts_that_fit_what_others_leave_do_not_specialise(results):
    for found in results["cooperative"]:
        assert found.largest_gate < 0.9
        assert found.experts_a_case > 1.45
        assert found.alone_error > 1.15 * found.blend_error
        assert found.alone_accuracy < found.blend_accuracy - 0.02
    lost = [found.blend_accuracy - found.alone_accuracy for found in results["cooperative"]]
    assert statistics.median(lost) > 0.06


def test_every_mixture_solves_what_one_linear_map_can_not(results):
    for seed, *of_objectives in zip(SEEDS, *results.values(), strict=True):
        plain = linear_map(seed).blend_accuracy
        assert plain < 0.65
        assert all(found.blend_accuracy > plain + 0.15 for found in of_objectives)


def test_the_objectives_start_from_the_same_mixture(runs):
    for of_seed in zip(*runs.values(), strict=True):
        assert len({run.curve[0] for run in of_seed}) == 1
        assert len({run.measures for run in of_seed}) == 3


def test_one_expert_is_trained_alike_by_cooperation_and_competition():
    first, second = (train(objective, seed=0, num_experts=1, epochs=50) for objective in ("cooperative", "competitive"))
    assert torch.equal(first.mixture.weight_EOD, second.mixture.weight_EOD)
    assert first.measures.experts_a_case == 1
    assert first.measures.blend_error == pytest.approx(linear_map(0).blend_error, rel=1e-3)


@pytest.mark.parametrize("objective", ["cooperative", "log-likelihood"])
def test_a_seed_fixes_the_whole_run(objective):
    first, again, other = (train(objective, seed, epochs=60) for seed in (7, 7, 8))
    assert first.curve == again.curve
    assert all(torch.equal(a, b) for a, b in zip(first.mixture.parameters(), again.mixture.parameters(), strict=True))
    assert first.curve != other.curve


@pytest.mark.parametrize(("epochs", "points"), [(0, 1), (50, 3), (60, 4)])
def test_a_curve_holds_the_start_every_25_epochs_and_the_end(epochs, points):
    assert len(train("competitive", 0, epochs=epochs).curve) == points


def test_an_unknown_objective_is_refused():
    with pytest.raises(ConfigError, match=r"objective \(loglik\).*cooperative"):
        train("loglik", 0)


def test_the_picture_is_a_png_with_all_panels(runs, tmp_path):
    path = picture(runs, [linear_map(seed) for seed in SEEDS], tmp_path / "adaptive.png")
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") > 1000  # its width in pixels


def test_the_table_gives_median_and_range_of_every_row_in_80_columns(results):
    rows = results | {"one linear map": [linear_map(seed) for seed in SEEDS]}
    console = Console(width=80, file=io.StringIO())
    console.print(table(rows))
    printed = console.file.getvalue()
    assert all(name in printed for name in rows)
    assert "…" not in printed  # nothing is cut
    alone = sorted(found.alone_error for found in results["cooperative"])
    assert f"{alone[2]:.2f}" in printed
    assert f"{alone[0]:.2f}–{alone[-1]:.2f}" in printed


@pytest.mark.parametrize("path", ["picture.jpg", "no/such/folder/picture.png"])
def test_a_picture_that_could_not_be_written_is_refused_before_training(path, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main([path])
    assert f"png ({path})" in capsys.readouterr().err


@pytest.mark.full
def test_the_program_prints_its_table_and_writes_its_picture(capsys, tmp_path):
    main([str(tmp_path / "adaptive.png")])
    printed = capsys.readouterr().out
    assert "log-likelihood" in printed
    assert (tmp_path / "adaptive.png").stat().st_size > 10_000
