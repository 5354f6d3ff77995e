"""The scan leaves the model as it was, and shares from it hurt all layers alike."""

import pytest
import torch

from turnout import ConfigError, NonFiniteError
from turnout.moe.compress.scores import magnitude
from turnout.moe.compress.sensitivity import Scan, allocate, read_scan, scan
from turnout.moe.compress.sparsity import Sparsity


def model():
    draw = torch.Generator().manual_seed(0)
    return {
        layer: {"w": torch.randn(6, 8, generator=draw), "experts": torch.randn(2, 4, 8, generator=draw)}
        for layer in ("a", "b")
    }


def test_a_layer_alone_is_pruned_at_each_share_and_put_back_to_the_bit():
    layers, seen = model(), []
    before = {(layer, name): w.clone() for layer, each in layers.items() for name, w in each.items()}

    def measure():
        seen.append({(layer, name): w.clone() for layer, each in layers.items() for name, w in each.items()})
        return float(len(seen)) ** 2

    found = scan(layers, (0.25, 0.5), measure)
    assert found == Scan(1.0, (0.25, 0.5), {"a": (3.0, 8.0), "b": (15.0, 24.0)})
    for state, (pruned, share) in zip(seen, [("", 0), ("a", 0.25), ("a", 0.5), ("b", 0.25), ("b", 0.5)], strict=True):
        for (layer, name), w in state.items():
            wanted = before[layer, name]
            assert torch.equal(w, magnitude(wanted, Sparsity(share=share)) if layer == pruned else wanted)
    assert all(torch.equal(layers[layer][name], w) for (layer, name), w in before.items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_measure_that_fails_leaves_the_model_whole(value):
    layers, values = model(), [1.0, value]
    before = layers["a"]["w"].clone()
    with pytest.raises(NonFiniteError, match=r"the measure of a at 0.5 is"):
        scan(layers, (0.5,), lambda: values.pop(0))
    assert torch.equal(layers["a"]["w"], before)


def test_another_way_of_pruning_is_told_the_name_and_given_the_whole_matrix():
    layers, told = model(), []

    def prune(name, w, share):
        told.append((name, share, bool((w == 0).any())))
        return torch.zeros_like(w)

    scan(layers, (0.5, 1.0), lambda: 1.0, prune)
    assert told == [(n, s, False) for _ in "ab" for s in (0.5, 1.0) for n in ("w", "experts")]


def test_increases_are_equal_and_the_share_of_all_weights_is_the_one_asked():
    found = Scan(
        10.0, (0.25, 0.5, 0.75), {"first": (4.0, 8.0, 16.0), "deep": (0.5, 1.0, 2.0), "free": (0.1, 0.0, 0.05)}
    )
    sizes = {"first": 100, "deep": 300, "free": 100}
    shares = allocate(found, sizes, 0.5)
    assert sum(sizes[layer] * share for layer, share in shares.items()) / 500 == pytest.approx(0.5)
    assert shares["free"] == 0.75  # costs less than the others at the most that was measured
    assert shares["first"] / 0.25 * 4 == pytest.approx(1 + (shares["deep"] - 0.5) / 0.25)  # on first's and deep's lines
    assert shares["first"] < shares["deep"]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6])
def test_layers_that_cost_nothing_share_alike(share):
    found = Scan(10.0, (0.3, 0.6), {"a": (0.0, -0.1), "b": (-0.2, 0.0)})
    assert allocate(found, {"a": 10, "b": 30}, share) == pytest.approx({"a": share, "b": share})


@pytest.mark.parametrize("shares", [(), (0.5, 0.5), (0.0, 0.5), (0.5, 1.1), (0.6, 0.5)])
def test_shares_that_do_not_rise_are_refused(shares):
    with pytest.raises(ConfigError, match="shares"):
        scan({}, shares, lambda: 1.0)


def test_a_share_beyond_the_scan_is_refused():
    with pytest.raises(ConfigError, match=r"share \(0.8\) must lie in 0 to the scan's highest \(0.5\)"):
        allocate(Scan(1.0, (0.5,), {"a": (1.0,)}), {"a": 1}, 0.8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "does not read as a scan"),
        ('{"dense": 2.0, "shares": [0.5], "increases": {"0": []}}', "not an increase a share"),
        ('{"dense": 2.0, "shares": [0.5], "increases": {"0": [1.0], "1": [2.0]}}', "must be of a model with 1 layers"),
    ],
)
def test_a_file_that_is_no_scan_of_this_model_is_refused(tmp_path, text, message):
    (tmp_path / "scan.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_scan(tmp_path / "scan.json", 1)
