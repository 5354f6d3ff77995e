"""Forms that are compared take turns, and no call finds the inputs of the one before it."""

import time

from turnout.launch.benches import timing


def test_forms_take_turns_and_inputs_follow_each_other():
    calls = []

    def form(name):
        def run(i):
            calls.append((name, i))
            time.sleep(0.003)

        return run

    found = timing.alternate({"a": form("a"), "b": form("b")}, rounds=3)
    assert [name for name, _ in calls] == ["a", "a", "b", "b", *"ababab"]
    assert [i for name, i in calls if name == "a"] == list(range(5))
    assert all(0.003 <= seconds < 0.1 for seconds in found.values())


def test_a_short_call_is_repeated_within_a_turn_and_a_long_one_is_measured_once(monkeypatch):
    counts = {"short": 0, "long": 0}

    def count(name, seconds):
        def run(i):
            counts[name] += 1
            time.sleep(seconds)

        return run

    monkeypatch.setattr(timing, "SLOW", 0.02)
    timing.alternate({"short": count("short", 0), "long": count("long", 0.03)}, rounds=2)
    assert counts["long"] == 2  # to see that it is long, and to measure it
    assert counts["short"] > 2 + 2
    assert counts["short"] <= 2 + 2 * timing.MOST
