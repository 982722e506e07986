from __future__ import annotations

import pytest

from narrowcast.demo import encoder, story


def test_the_digits_half_works_without_the_encoder(cli, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setattr(encoder, "find_encoder", lambda: (None, "not installed"))
    monkeypatch.setattr(story, "DIGITS_PRESETS", ("static-int8",))
    monkeypatch.setattr(story, "SECONDS", 0.05)
    answer = cli("demo", "--json")
    assert answer.code == 0, answer.err
    result = answer.json
    float_row, int8_row = result["rows"]
    assert float_row["score"] > 0.97
    assert int8_row["bytes"] < 0.35 * float_row["bytes"]
    low, high = int8_row["difference"][1:]
    assert low <= int8_row["difference"][0] <= high
    assert abs(int8_row["difference"][0]) < 0.02
    assert "not installed" in result["left_out"][0]


def test_without_any_model_the_demo_says_why(refused, monkeypatch):
    def missing(folder):
        raise ImportError("No module named 'sklearn'")

    monkeypatch.setattr(encoder, "find_encoder", lambda: (None, "not installed"))
    monkeypatch.setattr(story, "digits_subject", missing)
    message = refused("demo")
    assert "scikit-learn" in message and "not installed" in message
