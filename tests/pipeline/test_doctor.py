"""The calibration doctor names what is wrong with data, with numbers, and says nothing about data that is fine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.data.statistics import RowHashes, ValueStatistics
from narrowcast.errors import DataError
from narrowcast.pipeline import examine
from narrowcast.report import Finding

WORDS = 400


class Reader(nn.Module):
    """A language model in miniature, with a mask that it ignores."""

    def __init__(self, padding: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 32, padding_idx=padding)
        self.up = nn.Linear(32, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(self.up(self.table(input_ids)).relu())


class Eye(nn.Module):
    """A convolution, its BatchNorm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))


def text(rows: int = 40, length: int = 24, seed: int = 0) -> Tensor:
    """Ids as frequent as words are: the n-th word 1 / n times as often as the first; id 0 is never met."""
    generator = torch.Generator().manual_seed(seed)
    share = 1.0 / torch.arange(1, WORDS)
    return 1 + torch.multinomial(share, rows * length, replacement=True, generator=generator).view(rows, length)


def pixels(count: int = 64, seed: int = 0) -> Tensor:
    """Smooth images [count, 3, 16, 16] of 8-bit pixels."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    return nn.functional.interpolate(coarse, size=16, mode="bicubic").clamp(0, 255).round()


def normalized(images: Tensor) -> Tensor:
    return (images / 255 - 0.5) / 0.25


@pytest.fixture(scope="module")
def eye() -> Eye:
    """Trained, as far as the norm goes, on normalized images."""
    torch.manual_seed(0)
    model = Eye()
    with torch.no_grad():
        for seed in range(40):
            model(normalized(pixels(seed=seed)))
    return model.eval()


@pytest.fixture(scope="module")
def reader() -> Reader:
    torch.manual_seed(0)
    return Reader().eval()


def found(model: nn.Module, data: Any, recipe: Any = "weight-int8") -> dict[str, Finding]:
    return {finding.topic: finding for finding in examine(model, recipe, data)}


def test_good_data_has_no_findings(reader: Reader, eye: Eye) -> None:
    assert not examine(reader, "weight-int8", text())
    assert not examine(eye, "static-int8", normalized(pixels(seed=99)))


def test_an_id_outside_the_vocabulary_is_an_error_that_names_it(reader: Reader) -> None:
    ids = text()
    ids[35, 7] = WORDS + 3
    with pytest.raises(DataError, match=r"batch 1: input 'input_ids' holds id 403 at \[3, 7\], but embedding 'table'"):
        nc.quantize(reader, "weight-int8", ids, progress=False)
    ids[35, 7] = -1
    with pytest.raises(DataError, match=r"holds id -1 at \[3, 7\].*ids 0 to 399"):
        nc.quantize(reader, "weight-int8", (batch for batch in ids.split(8)), progress=False)


def test_an_id_outside_the_vocabulary_of_the_first_batch_is_the_same_error(reader: Reader) -> None:
    ids = text()
    ids[0, 0] = WORDS
    with pytest.raises(DataError, match="batch 0: input 'input_ids' holds id 400 at"):
        nc.quantize(reader, "weight-int8", ids, progress=False)


def test_repeated_rows_are_counted(reader: Reader) -> None:
    ids = text()
    ids[20:30] = ids[:10]
    finding = found(reader, ids)["duplicates"]
    assert (finding.severity, finding.numbers) == ("warning", {"repeated": 10, "rows": 40})
    assert found(reader, ids[:1].repeat(40, 1))["duplicates"].severity == "severe"


def test_strict_refuses_severe_findings_and_only_these(reader: Reader) -> None:
    ids = text()
    ids[20:30] = ids[:10]
    report = nc.quantize(reader, "weight-int8", ids, strict=True, progress=False).report
    assert [finding.topic for finding in report.findings] == ["duplicates"]
    assert "10 of 40 rows repeat" in str(report)
    with pytest.raises(DataError, match=r"strict: the calibration data cannot be trusted.*39 of 40 rows repeat"):
        nc.quantize(reader, "weight-int8", ids[:1].repeat(40, 1), strict=True, progress=False)
    once = (row for row in ids[:1].repeat(40, 1).split(8))
    with pytest.raises(DataError, match="39 of 40 rows repeat"):
        nc.quantize(reader, "weight-int8", once, strict=True, progress=False)


def test_padding_is_known_from_the_mask_and_from_the_table() -> None:
    ids = text()
    ids[:, 12:] = 0
    mask = (ids > 0).long()
    masked = found(Reader().eval(), [{"input_ids": ids, "attention_mask": mask}])["padding"]
    assert (masked.severity, masked.numbers) == ("warning", {"padding": 480, "tokens": 480})
    assert found(Reader(padding=0).eval(), ids)["padding"].numbers == masked.numbers
    assert "padding" not in found(Reader().eval(), ids)  # id 0 could be a word
    assert "padding" not in found(Reader(padding=0).eval(), text())


@given(left=st.integers(0, 9), right=st.integers(0, 9), seed=st.integers(0, 50))
def test_rows_that_differ_in_padding_only_are_the_same(left: int, right: int, seed: int) -> None:
    row = text(1, 12, seed)
    hashes = RowHashes()
    hashes.update(row, None)
    padded = nn.functional.pad(row, (left, right))
    hashes.update(padded, nn.functional.pad(torch.ones_like(row), (left, right)).bool())
    assert (hashes.rows, hashes.repeated) == (2, 1)
    row[0, seed % 12] += 1
    hashes.update(row, None)
    assert (hashes.rows, hashes.repeated) == (3, 1)


@given(split=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
def test_duplicates_do_not_depend_on_the_batch_split(split: int, dtype: torch.dtype) -> None:
    values = torch.randn(40, 11, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[17], values[31] = values[3], values[3]
    hashes = RowHashes()
    for part in values.split(split):
        hashes.update(part, None)
    assert (hashes.rows, hashes.repeated) == (40, 2)


def test_rows_of_powers_of_two_do_not_collide() -> None:
    rows = 2.0 ** torch.randint(-3, 4, (20000, 16), generator=torch.Generator().manual_seed(0))
    hashes = RowHashes()
    hashes.update(rows, None)
    assert hashes.repeated == 20000 - rows.unique(dim=0).shape[0]


def test_random_ids_are_no_text(reader: Reader) -> None:
    drawn = torch.randint(0, WORDS, (40, 24), generator=torch.Generator().manual_seed(0))
    assert "drawn at random" in found(reader, drawn)["noise"].message


def test_random_numbers_are_no_images(eye: Eye) -> None:
    noise = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert "neighbouring pixels are unrelated" in found(eye, noise)["noise"].message


def test_constant_images_are_counted(eye: Eye) -> None:
    images = normalized(pixels())
    images[10:20] = images[10:20, :1, :1, :1]
    finding = found(eye, images)["constant"]
    assert (finding.severity, finding.numbers) == ("warning", {"constant": 10, "rows": 64})
    assert found(eye, torch.zeros(64, 3, 16, 16))["constant"].severity == "severe"


def test_pixels_that_were_not_normalized_are_told_by_the_first_batchnorm(eye: Eye) -> None:
    raw = found(eye, pixels())["range"]
    assert raw.severity == "severe" and raw.numbers["spread"] > 20
    assert "divide by 255 and normalize" in raw.remedy
    unit = found(eye, pixels() / 255)["range"]
    assert unit.severity == "warning" and unit.numbers["spread"] < 0.4
    assert "from 0 to 1" in unit.remedy


def test_a_model_trained_on_raw_pixels_is_content_with_them() -> None:
    torch.manual_seed(0)
    model = Eye()
    with torch.no_grad():
        for seed in range(40):
            model(pixels(seed=seed))
    assert not examine(model.eval(), "static-int8", pixels(seed=99))


def test_raw_pixels_without_a_norm_are_a_warning_unless_the_model_divides_them() -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x / 255).mean((2, 3))

    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)).eval()
    assert found(plain, pixels())["range"].severity == "warning"
    assert "range" not in found(Divides().eval(), pixels())
    assert "range" not in found(plain, normalized(pixels()))


def test_too_few_samples_for_a_range_or_a_mean_are_counted(eye: Eye) -> None:
    data = normalized(pixels(8))
    assert (
        "1 layer sees too few input vectors, 'head' about 8 of 32" in found(eye, data, "static-int8")["length"].message
    )
    assert found(eye, data, "weight-int8")["length"].numbers == {"layers": 1, "vectors": 8, "needed": 16}
    assert "length" not in found(eye, normalized(pixels(32)), "static-int8")


def test_a_method_that_needs_a_hessian_needs_as_many_vectors_as_channels(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    from narrowcast.methods import METHODS, Rtn

    class Curved(Rtn):
        needs = frozenset({"hessian"})

    monkeypatch.setitem(METHODS, "curved", Curved)
    recipe = {"rule": [{"type": "Linear", "weight": "int4/channel", "method": "curved"}]}
    finding = found(reader, text(2), recipe)["length"]
    assert finding.numbers == {"layers": 1, "vectors": 48, "needed": 64}  # head; the 32 of `up` are enough
    assert finding.severity == "warning"
    assert found(reader, text(1, 4), recipe)["length"].severity == "severe"


class Choice(nn.Module):
    """Two experts; which one works depends on the sign of the first feature."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        out = torch.zeros(len(x), 4)
        for index, expert in enumerate(self.experts):
            if bool((chosen == index).any()):
                out[chosen == index] = expert(x[chosen == index])
        return out


def test_experts_that_never_ran_are_named() -> None:
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).abs()
    report = nc.quantize(Choice().eval(), "weight-int8", data, progress=False).report
    assert [finding.topic for finding in report.findings] == ["unseen"]
    assert "1 experts or branches of 2 never ran: 'experts.0'" in report.findings[0].message


def test_channels_that_are_always_zero_are_a_warning_where_the_model_has_a_use_for_them() -> None:
    data = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    data[:, 5:] = 0
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    finding = nc.quantize(model, "weight-int8", data, progress=False).report.findings[0]
    assert (finding.topic, finding.severity) == ("unseen", "warning")
    assert "3 input channels of 1 layers were always zero, most in '0': 3 of 8" in finding.message
    with torch.no_grad():
        model[0].weight[:, 5:] *= 1e-3  # weights of dead channels decay
    assert nc.quantize(model, "weight-int8", data, progress=False).report.findings[0].severity == "note"


def test_data_that_runs_the_model_itself_is_said_not_to_be_examined(reader: Reader) -> None:
    report = nc.quantize(reader, "weight-int8", lambda model: model(text()), progress=False).report
    assert [finding.severity for finding in report.findings] == ["note"]
    assert "was not examined" in report.findings[0].message


def test_a_generator_is_examined_while_it_is_read(reader: Reader) -> None:
    ids = text()
    ids[20:30] = ids[:10]
    once = nc.quantize(reader, "weight-int8", (part for part in ids.split(8)), progress=False)
    often = nc.quantize(reader, "weight-int8", list(ids.split(8)), progress=False)
    assert once.report.findings == often.report.findings != []
    assert torch.equal(once.model(ids), often.model(ids))


def test_findings_survive_json(reader: Reader) -> None:
    report = nc.quantize(reader, "weight-int8", text()[:1].repeat(40, 1), progress=False).report
    assert nc.Report.from_dict(report.to_dict()).findings == report.findings != []


@given(split=st.integers(1, 64))
def test_value_statistics_do_not_depend_on_the_batch_split(split: int) -> None:
    images = normalized(pixels())
    whole, parts = ValueStatistics(), ValueStatistics()
    whole.update(images)
    for part in images.split(split):
        parts.update(part)
    assert (parts.low, parts.high, parts.whole, parts.rows, parts.constant, parts.pixels) == (
        whole.low, whole.high, whole.whole, whole.rows, whole.constant, whole.pixels,
    )  # fmt: skip
    assert parts.correlation() == pytest.approx(whole.correlation(), rel=1e-9)
