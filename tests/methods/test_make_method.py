from __future__ import annotations

import pytest

from narrowcast.errors import RecipeError
from narrowcast.methods import Rtn, make_method


def test_a_recipe_names_a_method_and_its_options() -> None:
    assert make_method("rtn") == Rtn()
    assert make_method({"rtn": {}}) == Rtn()
    assert make_method({"rtn": {"range": "absmax", "refinements": 0}}) == Rtn(range="absmax", refinements=0)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"rtm": {}}, "method 'rtm' is not known; use one of adaround, autoround, gptq, hqq, rtn"),
        ({"rtn": {"clip": 1}}, "method 'rtn' has no option 'clip'; its options are range, refinements"),
        ({"rtn": {"range": "max"}}, "range is 'max'; use 'auto', 'mse' or 'absmax'"),
        ({"rtn": 3}, "takes a table of options, got 3"),
        ({}, "must be one name"),
        ({"rtn": {}, "gptq": {}}, "must be one name"),
        (7, "must be one name"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_remedy(recipe: object, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_method(recipe)  # type: ignore[arg-type]
    assert message in str(error.value)
