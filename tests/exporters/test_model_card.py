"""What the card says in words."""

from __future__ import annotations

from exporters.model_card import by_class, exits_cost_more


def test_of_many_classes_only_the_weakest_are_named() -> None:
    """A thousand figures are no text; ten are."""
    labels = [f"class {number}" for number in range(1000)]
    many = {"top1_by_class": {str(number): 1 - number / 1000 for number in range(0, 1000, 2)}}
    few = {"top1_by_class": {"3": 0.5, "1": 0.25}}

    assert by_class(few, labels) == "class 3 50.00 %, class 1 25.00 %"
    text = by_class(many, labels)
    assert text.startswith("the 20 weakest of 500: class 998 0.20 %, class 996 0.40 %, ")
    assert text.count("%") == 20


def test_exits_that_cost_surely_more_than_allowed_are_told() -> None:
    """Beyond the interval, by variant; what may be chance is not told."""

    def variant(lost: float, within: float) -> dict[str, object]:
        return {"operating_point": {"loss_against_full_depth": {"top1": lost, "within": within}}}

    assert exits_cost_more({"fp32": variant(0.02, 0.011), "int8": variant(0.009, 0.001)}, 0.01) == ""
    told = exits_cost_more({"fp32": variant(0.1096, 0.0185), "int8": variant(0.009, 0.001)}, 0.01)
    assert "more than the 1 points allowed on the fitting images (fp32 10.96 ± 1.85 points)" in told
    assert "int8" not in told
