from __future__ import annotations

import json

import pytest

from narrowcast.sizes import (
    TransformerShape,
    activation_bytes,
    cache_bytes,
    format_bytes,
    format_sizes,
    parse_count,
    transformer_shape,
)

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
}


def by_name(sizes):
    return {size["name"]: size for size in sizes}


def test_thirty_billion_parameters_as_in_the_issue(cli):
    answer = cli("size", "30B")
    assert answer.code == 0
    lines = {line.split()[0]: line for line in answer.out.splitlines() if line.strip()}
    assert "120 GB" in lines["fp32"]
    assert "15 GB" in lines["int4"] and "16.9 GB" in lines["int4"]
    assert "15.9 GB" in lines["mxfp4"]


@pytest.mark.parametrize(
    ("text", "count"),
    [("30B", 30 * 10**9), ("7b", 7 * 10**9), ("270M", 270 * 10**6), ("1.5e9", 1_500_000_000), ("12345", 12345),
     ("1.8T", 1_800_000_000_000), ("7_000_000", 7_000_000), ("22.7m", 22_700_000), ("2k", 2000), ("model", None),
     ("30 B", 30 * 10**9), ("B", None), ("-3", None), ("./7b", None)],
)  # fmt: skip
def test_counts_are_read_as_people_write_them(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["0", "0.1", "99999999999T"])
def test_counts_that_no_model_has_are_refused(refused, text):
    assert text in refused("size", text)


def test_group_scales_cost_two_bytes_each():
    sizes = {size.name: size for size in format_sizes([(1, 3200)], group=32)}
    assert sizes["int4"].codes == 1600
    assert sizes["int4"].total == 1600 + 100 * 2
    assert sizes["uint4"].total == 1600 + 100 * 3  # and a zero point of one byte
    assert sizes["mxfp4"].total == 1600 + 100
    assert sizes["fp16"].total == sizes["fp16"].codes == 6400


def test_learned_levels_are_counted_per_channel():
    sizes = {size.name: size for size in format_sizes([(10, 4096)], group=32)}
    assert sizes["codebook3"].codes == 10 * 1536
    assert sizes["codebook3"].total == 10 * (1536 + 8 * 2)


def test_a_short_last_group_has_a_scale_of_its_own():
    sizes = {size.name: size for size in format_sizes([(2, 172)], group=32)}
    assert sizes["int4"].total == 2 * (86 + 6 * 2)


def test_rows_end_on_a_byte_as_they_do_on_disk():
    sizes = {size.name: size for size in format_sizes([(10, 3)], group=32)}
    assert sizes["int3"].codes == 10 * 2


def test_a_file_is_sized_by_its_header(cli, weights):
    answer = cli("size", weights, "--json").json
    assert answer["parameters"] == 66
    assert answer["other_bytes"] == 6 * 4 + 8
    assert by_name(answer["formats"])["fp32"]["total"] == 66 * 4 + 8
    assert by_name(answer["formats"])["int8"]["codes"] == 60 + 6 * 4 + 8


@pytest.mark.parametrize(("value", "text"), [(120e9, "120 GB"), (16.875e9, "16.9 GB"), (512, "512 B"), (0, "0 B"),
                                              (999_600, "1 MB"), (1.07e6, "1.07 MB")])  # fmt: skip
def test_bytes_have_three_digits(value, text):
    assert format_bytes(value) == text


def test_grouped_query_attention_shrinks_the_cache():
    grouped = transformer_shape(LLAMA)
    full = transformer_shape({**LLAMA, "num_key_value_heads": 32})
    # Llama 3 8B: 2 * 32 layers * 8 heads * 128 * 2 bytes = 128 KiB per token in 16 bits
    assert cache_bytes(grouped, "fp16", batch=1, context=1) == 131072
    assert cache_bytes(full, "fp16", batch=3, context=7) == 4 * 131072 * 21


def test_cache_formats_count_their_scales():
    shape = transformer_shape(LLAMA)
    assert cache_bytes(shape, "int8", batch=1, context=1) == 131072 // 2 + 65536 // 32 * 2


def test_sliding_windows_bound_the_cache():
    shape = transformer_shape(
        {**LLAMA, "sliding_window": 1024, "layer_types": ["full_attention", "sliding_attention"] * 16}
    )
    assert (shape.cached_layers, shape.windowed_layers) == (16, 16)
    assert cache_bytes(shape, "fp16", batch=1, context=4096) == 4096 * (16 * 4096 + 16 * 1024)


def test_latent_attention_caches_its_latent_vector():
    shape = transformer_shape({**LLAMA, "kv_lora_rank": 512, "qk_rope_head_dim": 64})
    assert shape.cached_values == 576


def test_other_families_names_are_known():
    shape = transformer_shape({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024})
    assert (shape.hidden, shape.cached_layers, shape.cached_values, shape.intermediate) == (768, 12, 1536, 3072)


def test_activations_are_the_widest_layer():
    shape = TransformerShape(1, 0, 0, 8, 4, (4, 4), 1, 16, False, 0, None)
    # residual 4 + the feed-forward's normalised input 4 and two inner widths of 16, per token
    assert activation_bytes(shape, "fp32", batch=2, context=5) == 2 * 5 * (4 + 4 + 32) * 4


def test_a_configuration_brings_memory_at_work(cli, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA))
    memory = cli("size", "8B", "--config", config, "--batch", "2", "--context", "100", "--json").json["memory"]
    assert memory["cache"]["fp16"] == 131072 * 200
    assert memory["activations"]["fp32"] == 2 * memory["activations"]["bf16"]
    assert "key/value cache" in cli("size", "8B", "--config", config).out


def test_an_encoder_has_no_cache(cli, tmp_path):
    config = tmp_path / "config.json"
    bert = {"model_type": "bert", "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
    config.write_text(json.dumps(bert))
    assert cli("size", "22M", "--config", config, "--json").json["memory"]["cache"] == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}', ""])
def test_a_broken_configuration_is_refused(refused, tmp_path, text):
    config = tmp_path / "config.json"
    config.write_text(text)
    assert "config.json" in refused("size", "7B", "--config", config)


def test_a_configuration_without_a_transformer_says_what_is_missing(cli, tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"hidden_size": -4}')
    answer = cli("size", "7B", "--config", config)
    assert answer.code == 0
    assert "hidden_size" in answer.out


def test_what_is_neither_number_nor_model_is_refused(refused, here):
    assert "no-such-model" in refused("size", "no-such-model")
