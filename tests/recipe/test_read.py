"""Reading a recipe: presets, aliases, files that are whole and files that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from narrowcast.errors import RecipeError
from narrowcast.recipe import ALIASES, PRESETS, Recipe, load_recipe

TOML = """
name = "mine"
fold_batchnorm = false
[[rule]]
layers = "encoder.layer.*.attention.*"
weight = "int4/group32/asym"
input = "int8/token"
method = { rtn = { range = "absmax" } }
[[rule]]
layers = "lm_head"
keep = "tied to the embedding"
"""


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_found_by_name(name: str) -> None:
    assert load_recipe(name) is PRESETS[name] and PRESETS[name].name == name


def test_the_presets_are_those_of_the_design() -> None:
    assert set(PRESETS) == {
        "weight-int8", "weight-int4", "dynamic-int8", "dynamic-int4", "static-int8", "fp16", "bf16",
    }  # fmt: skip


@pytest.mark.parametrize(("alias", "name"), [
    ("W8A16", "weight-int8"), ("W4A16", "weight-int4"), ("W8A8", "dynamic-int8"), ("W4A8", "dynamic-int4"),
    ("W8A8-static", "static-int8"), ("w8a8", "dynamic-int8"),
])  # fmt: skip
def test_names_of_other_tools_work(alias: str, name: str) -> None:
    assert load_recipe(alias) is PRESETS[name]
    assert set(ALIASES.values()) <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_written_as_a_file_and_read_back(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, "preset.json", json.dumps(PRESETS[name].to_dict()))
    assert load_recipe(path) == PRESETS[name]


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    from_toml = load_recipe(write(tmp_path, "recipe.toml", TOML))
    assert from_toml.name == "mine" and not from_toml.fold_batchnorm and len(from_toml.rules) == 2
    assert load_recipe(str(write(tmp_path, "recipe.JSON", json.dumps(from_toml.to_dict())))) == from_toml
    assert load_recipe(from_toml.to_dict()) == from_toml
    assert load_recipe(from_toml) is from_toml


def test_a_file_without_a_name_is_called_by_its_file_name(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, "small.toml", '[[rule]]\nweight = "int8"\n')).name == "small"


def test_what_is_no_preset_lists_those_there_are() -> None:
    with pytest.raises(RecipeError, match=r"'dynamic-int7' is neither a preset \(weight-int8, .* nor a .toml or .json"):
        load_recipe("dynamic-int7")


@pytest.mark.parametrize("thing", [None, 8, 3.5, ["weight-int8"], b"weight-int8"])
def test_other_things_are_no_recipe(thing: Any) -> None:
    with pytest.raises(RecipeError, match="a recipe is a preset name, a file, a mapping or a Recipe, got"):
        load_recipe(thing)


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_file_that_is_not_there_or_a_folder_is_refused(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot be read: No such file"):
        load_recipe(tmp_path / f"none.{suffix}")
    (tmp_path / f"folder.{suffix}").mkdir()
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / f"folder.{suffix}")


BAD_FILES: dict[str, bytes] = {
    "empty.json": b"",
    "empty.toml": b"",
    "truncated.json": b'{"rule": [{"weight": "in',
    "truncated.toml": b'[[rule]]\nweight = "in',
    "binary.json": bytes(range(256)),
    "binary.toml": b"\x00\x01\xff\xfe",
    "deep.json": b"[" * 100_000,
    "deep.toml": b"a = " + b"[" * 100_000,
    "list.json": b"[1, 2]",
    "number.json": b"7",
    "null.json": b"null",
    "types.json": b'{"rule": [{"weight": {"a": 1}}]}',
    "types.toml": b"rule = 3",
    "huge number.json": b'{"rule": [{"weight": ' + b"9" * 5000 + b"}]}",
    "nan.json": b'{"rule": [{"weight": "int8", "method": {"rtn": {"refinements": NaN}}}]}',
    "twice.toml": b'name = "a"\nname = "b"\n',
    "date.toml": b"[[rule]]\nweight = 2026-01-01\n",
    "surrogate.json": b'{"rule": [{"layers": "\\ud800", "weight": 3}]}',
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_broken_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=name.replace(" ", r"\ ")):
        load_recipe(write(tmp_path, name, BAD_FILES[name]))


def test_a_file_too_large_for_a_recipe_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(1 << 33)  # sparse: takes no disk
    with pytest.raises(RecipeError, match="larger than"):
        load_recipe(path)


def test_recipes_are_values() -> None:
    assert load_recipe("weight-int8") == Recipe.from_dict(load_recipe("weight-int8").to_dict())
