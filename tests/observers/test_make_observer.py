from __future__ import annotations

import pytest

from narrowcast.errors import RecipeError
from narrowcast.observers import OBSERVERS, Best, Entropy, MovingAverage, Mse, Percentile, make_observer


def test_numbers_in_parentheses_reach_the_observer() -> None:
    percentile, average = make_observer("percentile(99.9)"), make_observer(" moving_average( 0.5 ) ")
    assert isinstance(percentile, Percentile) and percentile.percent == 99.9
    assert isinstance(average, MovingAverage) and average.momentum == 0.5


def test_observers_of_codes_learn_bits_and_symmetry() -> None:
    for name, kind in (("entropy", Entropy), ("mse", Mse)):
        observer = make_observer(name, bits=4, symmetric=True)
        assert isinstance(observer, kind)
        assert (observer.bits, observer.symmetric) == (4, True)


def test_defaults_apply_without_a_number() -> None:
    percentile = make_observer("percentile")
    assert isinstance(percentile, Percentile) and percentile.percent == 99.99
    assert isinstance(make_observer("moving_average()"), MovingAverage)


def test_best_is_a_list_of_observers_and_all_without_one() -> None:
    some, every = make_observer("best( minmax, percentile(99.9) )", bits=4), make_observer("best")
    assert isinstance(some, Best) and isinstance(every, Best)
    assert list(some.members) == ["minmax", "percentile(99.9)"] and some.bits == 4
    assert list(every.members) == list(OBSERVERS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("histogram", "'histogram' is not known; use one of minmax, moving_average, percentile, entropy, mse, best"),
        ("", "is not known"),
        ("percentile(99", "is not known"),
        (None, "is not known"),
        ("minmax(3)", "minmax takes no number; write 'minmax'"),
        ("mse(3)", "mse takes no number"),
        ("percentile(high)", "'high' is not a number"),
        ("percentile(101)", "above 50 and at most 100"),
        ("percentile(nan)", "above 50 and at most 100"),
        ("moving_average(1)", "at least 0 and below 1"),
        ("best(minmax)", "nothing to choose from; name two observers"),
        ("best(minmax,minmax)", "'minmax' is in it twice"),
        ("best(minmax,best)", "is a choice itself"),
        ("best(minmax,median)", "'median' is not known"),
        ("best(minmax,percentile(20))", "above 50 and at most 100"),
    ],
)
def test_a_wrong_text_is_refused_with_the_remedy(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        make_observer(text)
    assert message in str(error.value)
