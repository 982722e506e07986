"""Rule and Recipe: every key, what it takes, and errors that name rule, value and remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.core import QuantSpec
from narrowcast.errors import FormatError, RecipeError
from narrowcast.models import Layer, Site
from narrowcast.recipe import InputRule, Recipe, Rule


def layer(name: str, *types: str, role: str = "") -> Layer:
    sites = tuple(Site(name, "weight", kind) for kind in types or ("Linear",))
    return Layer(name, sites[0].type, (4, 4), sites, role)


def recipe(*rules: dict[str, Any], **keys: Any) -> Recipe:
    return Recipe.from_dict({"rule": list(rules), **keys})


def refused(match: str, *rules: Any, **keys: Any) -> None:
    with pytest.raises(RecipeError, match=match):
        recipe(*rules, **keys)


def test_every_key_of_a_rule_is_read() -> None:
    rule = Rule.from_dict({
        "layers": ["a.*", "b"], "type": "Linear", "role": "head", "weight": "int4/group32/asym",
        "input": "int8/token", "method": {"rtn": {"range": "absmax"}}, "optional": True,
    })  # fmt: skip
    assert rule.layers == ("a.*", "b") and rule.type == "Linear" and rule.role == "head" and rule.optional
    assert rule.weight == QuantSpec.parse("int4/group32/asym") and str(rule.input) == "int8/token"
    assert rule.method == {"rtn": {"range": "absmax"}}
    kept = Rule.from_dict({"layers": "lm_head", "keep": "tied to the embedding"})
    assert kept.layers == ("lm_head",) and kept.keep == "tied to the embedding" and kept.weight is None


def test_a_layer_matches_by_name_type_and_role_together() -> None:
    rule = Rule.from_dict({"layers": ["encoder.*.attention.*", "head"], "type": "Linear", "weight": "int8"})
    assert rule.matches(layer("encoder.0.attention.query")) and rule.matches(layer("head"))
    assert not rule.matches(layer("encoder.0.output")) and not rule.matches(layer("head", "Conv2d"))
    assert not rule.matches(layer("encoder_0.attention.query"))
    by_role = Rule.from_dict({"role": "embedding", "weight": "int8"})
    assert by_role.matches(layer("x", "Embedding", role="embedding")) and not by_role.matches(layer("x", role="head"))
    assert Rule.from_dict({"weight": "int8"}).matches(layer("anything", "GRU"))


def test_the_type_of_any_site_of_a_tied_weight_matches() -> None:
    tied = layer("table", "Embedding", "Linear")
    assert all(Rule.from_dict({"type": kind, "weight": "int8"}).matches(tied) for kind in ("Embedding", "Linear"))


def test_patterns_tell_upper_from_lower_case() -> None:
    assert not Rule.from_dict({"layers": "Encoder.*", "weight": "int8"}).matches(layer("encoder.0"))


@pytest.mark.parametrize(("rule", "message"), [
    ({"wieght": "int8"}, r"rule 1: key 'wieght' is not known; use layers, type"),
    ({}, "rule 1: needs exactly one of 'weight' .* and 'keep'"),
    ({"weight": "int8", "keep": "no"}, "exactly one of"),
    ({"weight": "int9"}, r"rule 1: weight: .*int9.* use one of"),
    ({"weight": "int8/token"}, "a weight has no tokens; use channel or group"),
    ({"weight": 8}, "rule 1: weight: .*text like"),
    ({"weight": None}, "rule 1: weight: .*text like"),
    ({"weight": "fp8_e4m3/asym"}, "no zero point"),
    ({"weight": "e8m0"}, "holds scales"),
    ({"weight": "int4/group0"}, "group size must be at least 1"),
    ({"weight": "int8", "input": "int4/token"}, "no kernel takes such activations"),
    ({"weight": "int8", "input": 8}, "input is a text like 'int8/token', got 8"),
    ({"weight": "int8", "input": "int8/token static:minmax"}, "has no static range"),
    ({"weight": "int8", "input": "uint8/tensor static:median"}, "observer 'median' is not known; use one of minmax"),
    ({"weight": "int8", "input": "uint8/tensor static:percentile(200)"}, "percentile"),
    ({"weight": "int8", "input": "uint8/tensor static:best(minmax)"}, "nothing to choose from"),
    ({"weight": "int8", "input": "uint8/channel static:best"}, "ranges per channel are observed by minmax"),
    ({"weight": "int8", "input": "uint8/channel static:mse"}, "ranges per channel are observed by minmax"),
    ({"weight": "int8", "input": "uint8/tensor or so"}, "expected '<format>', '<format> static:<observer>' or"),
    ({"weight": "int8", "input": "int8/token outliers:top(0%)"}, "not a percentage between 0.001 and 25"),
    ({"weight": "int8", "input": "int8/token outliers:top(1.2.3%)"}, "not a percentage between 0.001 and 25"),
    ({"weight": "int8", "input": "int8/token outliers:top(60%)"}, "use for example outliers:top"),
    ({"weight": "int8", "input": "int8/token outliers:0.5%"}, "expected '<format>'"),
    ({"weight": "int8", "input": "uint8/tensor static:minmax outliers:top(1%)"}, "ranges found at run time"),
    ({"weight": "int8", "input": "bf16 outliers:top(1%)"}, "ranges found at run time"),
    ({"weight": "int8", "input": ""}, "expected '<format>'"),
    ({"weight": "int8", "method": "gptqq"}, "rule 1: method 'gptqq' is not known; use one of"),
    ({"weight": "int8", "method": {"rtn": {"dampening": 1}}}, "no option 'dampening'; its options are range"),
    ({"weight": "int8", "method": {"rtn": 3}}, "takes a table of options, got 3"),
    ({"weight": "int8", "method": {"rtn": {}, "hqq": {}}}, "one name"),
    ({"weight": "int8", "method": 3}, "one name"),
    ({"weight": "int8", "method": {"rtn": {"range": "max"}}}, "'mse' or 'absmax'"),
    ({"weight": "int8", "layers": 3}, "layers"),
    ({"weight": "int8", "layers": ["a", 3]}, r"layers\[1\] is a text, got 3"),
    ({"weight": "int8", "layers": []}, "layers"),
    ({"weight": "int8", "type": ["Linear"]}, "type is a text"),
    ({"weight": "int8", "role": "tail"}, "role 'tail' is not known; use 'embedding', 'head' or 'tied'"),
    ({"weight": "int8", "role": None}, "role is a text"),
    ({"weight": "int8", "optional": "yes"}, "optional is true or false, got 'yes'"),
    ({"keep": ""}, "'keep' is a reason in words"),
    ({"keep": True}, "keep is a text, got True"),
    ({"keep": "small", "input": "int8/token"}, "goes with neither"),
    ({"keep": "small", "method": "rtn"}, "goes with neither"),
    ("weight-int8", "expected a table of keys, got str"),
])  # fmt: skip
def test_a_wrong_rule_is_refused_with_the_rule_and_the_remedy(rule: Any, message: str) -> None:
    refused(message, rule)


@pytest.mark.parametrize(("document", "message"), [
    ({}, r"has no \[\[rule\]\]"),
    ({"rule": []}, r"has no \[\[rule\]\]"),
    ({"rule": {"weight": "int8"}}, r"has no \[\[rule\]\]"),
    ({"rules": [{"weight": "int8"}]}, "key 'rules' is not known; use name, rule"),
    ({"rule": [{"weight": "int8"}], "fold_batchnorm": "no"}, "fold_batchnorm is true or false, got 'no'"),
    ({"rule": [{"weight": "int8"}], "correct_bias": 1}, "correct_bias is true or false, got 1"),
    ({"rule": [{"weight": "int8"}], "name": 3}, "name is a text"),
    ([], "expected a document"),
    (None, "expected a document"),
])  # fmt: skip
def test_a_wrong_document_is_refused(document: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_dict(document)


def test_errors_count_rules_from_one() -> None:
    refused("rule 2: ", {"weight": "int8"}, {"weight": "int7"})


def test_an_input_of_fp32_is_no_treatment() -> None:
    assert Rule.from_dict({"weight": "int8", "input": "fp32"}).input is None


def test_a_static_range_without_an_observer_has_the_default_one() -> None:
    assert (
        str(InputRule.parse("uint8/tensor"))
        == str(InputRule.parse("uint8/tensor static"))
        == "uint8/tensor static:minmax"
    )
    assert str(InputRule.parse(" uint8/tensor  static:percentile(99.9) ")) == "uint8/tensor static:percentile(99.9)"
    several = InputRule.parse("uint8/tensor static:best( minmax, percentile(99.9) )")
    assert several.observer == "best(minmax,percentile(99.9))" and InputRule.parse(str(several)) == several
    assert InputRule.parse("int8/token").observer == ""
    assert str(InputRule.parse(" int8/token   outliers:top(0.50%)")) == "int8/token outliers:top(0.5%)"
    counted = [InputRule.parse("int8/token outliers:top(0.5%)").outlier_count(width) for width in (64, 200, 201, 4096)]
    assert counted == [1, 1, 2, 21]
    assert InputRule.parse("int8/token").outlier_count(4096) == 0
    with pytest.raises(FormatError, match="no static range"):
        InputRule.parse("bf16 static")


RULES = st.one_of(
    st.fixed_dictionaries(
        {"weight": st.sampled_from(["int8", "int4/group32/asym", "nf4/group64/scale:int8", "bf16", "mxfp4"])},
        optional={
            "layers": st.lists(st.sampled_from(["a.*", "b", "[cd]?"]), min_size=1, max_size=2),
            "type": st.sampled_from(["Linear", "Conv2d"]), "role": st.sampled_from(["embedding", "head"]),
            "input": st.sampled_from([
                "int8/token", "uint8/token outliers:top(0.3%)", "bf16", "uint8/tensor static:percentile(99.9)",
                "uint8/channel",
            ]),
            "method": st.sampled_from(["rtn", {"rtn": {"range": "absmax"}}]), "optional": st.booleans(),
        },
    ),
    st.fixed_dictionaries({"keep": st.sampled_from(["small", "sensitive"])}, optional={"layers": st.just("a.*")}),
)  # fmt: skip


@given(rules=st.lists(RULES, min_size=1, max_size=4), fold=st.booleans(), name=st.sampled_from(["", "mine"]))
def test_a_recipe_survives_its_own_document(rules: list[dict[str, Any]], fold: bool, name: str) -> None:
    made = recipe(*rules, fold_batchnorm=fold, name=name)
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_a_recipe_does_not_change_when_its_document_does() -> None:
    options = {"range": "absmax"}
    document = {"rule": [{"weight": "int8", "method": {"rtn": options}}]}
    made = Recipe.from_dict(document)
    before = made.to_dict() == json.loads(json.dumps(made.to_dict()))
    options["range"] = "nonsense"
    assert before and made.rules[0].method == {"rtn": {"range": "absmax"}}
