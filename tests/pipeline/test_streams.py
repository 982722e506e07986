"""Which calls of the model solving block after block keeps."""

from __future__ import annotations

import pytest

from narrowcast.pipeline import streams


def test_calls_are_kept_from_all_over_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_ROWS", 8)
    for total in range(1, 60):
        recording = streams.Recording()
        for number in range(total):
            recording.add(lambda number=number: streams.Call((number,), {}, 1))
        kept = [call.args[0] for call in recording.calls]
        assert recording.total == total
        assert kept == sorted(kept)
        assert len(kept) == min(total, 8) or (total > 8 and 4 <= len(kept) <= 8)
        gaps = [after - before for before, after in zip(kept, [*kept[1:], total], strict=True)]
        assert max(gaps) <= 2 * -(-total // 4)
