from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from narrowcast.cli.datasets import DataOptions, data_options, open_data
from narrowcast.data import Pairs, Texts
from narrowcast.errors import DataError


def batches(path, **options):
    return list(open_data(str(path), DataOptions(**options), model="nowhere"))


def test_images_and_labels_become_normalised_batches(tmp_path):
    images = np.full((5, 6, 7, 3), 51, np.uint8)
    np.savez(tmp_path / "d.npz", images=images, labels=np.arange(5, dtype=np.uint8), files=np.array([9] * 5))
    found = batches(tmp_path / "d.npz", batch_size=2, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 0.5))
    assert [len(x) for x, _ in found] == [2, 2, 1]
    first, labels = found[0]
    assert first.shape == (2, 3, 6, 7) and labels.dtype == torch.int64
    assert torch.allclose(first[0, :, 0, 0], torch.tensor([0.1, 0.0, -0.2]), atol=1e-6)


def test_limit_counts_samples_and_batches_can_be_read_twice(tmp_path):
    np.save(tmp_path / "d.npy", np.ones((10, 3)))
    data = open_data(str(tmp_path / "d.npy"), DataOptions(batch_size=4, limit=6), model="")
    assert [len(x) for x in data] == [len(x) for x in data] == [4, 2]
    assert next(iter(data)).dtype == torch.float32


def test_several_arrays_go_by_the_names_of_arguments(tmp_path):
    np.savez(tmp_path / "d.npz", input_ids=np.ones((3, 4), np.int32), attention_mask=np.ones((3, 4)), label=[0, 1, 2])
    (found,) = batches(tmp_path / "d.npz")
    assert set(found) == {"input_ids", "attention_mask", "labels"}
    assert found["input_ids"].dtype == torch.int64


@pytest.mark.parametrize(
    "arrays",
    [
        {"labels": np.arange(3)},
        {"x": np.zeros((0, 3))},
        {"x": np.array(5.0)},
        {"x": np.array(["a", "b"])},
        {"x": np.ones((3, 2)), "labels": np.ones(4)},
        {},
    ],
)
def test_archives_without_samples_are_refused(tmp_path, arrays):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=r"d\.npz"):
        batches(tmp_path / "d.npz")


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "d.npz", x=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="Python objects"):
        batches(tmp_path / "d.npz")


@pytest.mark.parametrize("name", ["none.npz", "notes.md", "empty"])
def test_what_is_no_data_is_refused(tmp_path, name):
    (tmp_path / "notes.md").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        batches(tmp_path / name)


@pytest.mark.parametrize(("mean", "std"), [("a", ""), ("", "0"), ("nan", ""), ("", "-1,1,1")])
def test_normalisation_is_numbers(mean, std):
    with pytest.raises(DataError, match="--"):
        data_options(1, None, None, mean, std, None)


def test_normalisation_fits_the_channels(tmp_path):
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 4, 4, 3), np.uint8))
    with pytest.raises(DataError, match="3 channels"):
        batches(tmp_path / "d.npz", mean=(0.5, 0.5))


def test_token_rows_of_equal_length_share_a_batch(tmp_path):
    rows = [{"input_ids": [1, 2]}, {"input_ids": [3, 4]}, {"input_ids": [5]}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [tuple(batch["input_ids"].shape) for batch in batches(tmp_path / "d.jsonl")] == [(2, 2), (1, 1)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "3",
        '{"a": "x"}',
        '{"a": [1]}\n{"b": [1]}',
        '{"sentence1": "a", "sentence2": "b"}',
        '{"a": [[1], [2, 3]]}',
    ],
)
def test_broken_lines_are_refused(tmp_path, text):
    (tmp_path / "d.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"d\.jsonl"):
        batches(tmp_path / "d.jsonl")


def test_texts_need_a_tokenizer(tmp_path):
    (tmp_path / "d.txt").write_text("hello\n")
    with pytest.raises(DataError, match="--tokenizer"):
        batches(tmp_path / "d.txt")
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no text"):
        batches(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(DataError, match="UTF-8"):
        batches(tmp_path / "latin.txt")


@pytest.fixture
def tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "tok").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "runs"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "tok")
    return tmp_path / "tok"


def test_texts_labelled_texts_and_pairs(tmp_path, tokenizer):
    options = DataOptions(tokenizer=tokenizer)
    (tmp_path / "d.txt").write_text("a dog\n\nruns\n")
    found = open_data(str(tmp_path / "d.txt"), options, model="")
    assert isinstance(found, Texts) and list(found.strings) == ["a dog", "runs"]
    (tmp_path / "l.jsonl").write_text('{"text": "a dog", "label": 1}\n{"text": "runs", "label": 0}')
    (batch,) = open_data(str(tmp_path / "l.jsonl"), options, model="")
    assert batch["labels"].tolist() == [1, 0] and batch["input_ids"].shape[0] == 2
    (tmp_path / "p.jsonl").write_text('{"sentence1": "a", "sentence2": "dog", "score": 3}')
    assert isinstance(open_data(str(tmp_path / "p.jsonl"), options, model=""), Pairs)


def test_folders_of_images_need_pillow_or_are_read(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    try:
        from PIL import Image
    except ImportError:
        with pytest.raises(DataError, match="Pillow"):
            batches(tmp_path)
        return
    with pytest.raises(DataError, match="cannot be read"):
        batches(tmp_path)
    Image.new("RGB", (20, 10), (255, 0, 0)).save(tmp_path / "cat" / "1.png")
    ((images, labels),) = batches(tmp_path, side=8)
    assert images.shape == (1, 3, 8, 8) and labels.tolist() == [0]
