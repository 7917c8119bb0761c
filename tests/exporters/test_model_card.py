"""What the card says in words."""

from __future__ import annotations

from exporters.model_card import by_class, exits_cost_more, unlike_images


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


def test_images_that_are_not_alike_are_told() -> None:
    """By what chance can make of so many images, and not where the difference is too small to matter."""

    def report(fitting: int, before: float, tested: int, after: float) -> dict[str, object]:
        figures = {"fp32": {"top1_by_exit": [0.2, after]}, "int8": {"top1_by_exit": [0.2, 0.1]}}
        fitted = {"images": fitting, "top1": {"fp32": before, "int8": 0.9}}
        return {"fitted_on": fitted, "tested_on": {"images": tested}, "variants": figures}

    assert unlike_images(report(500, 0.82, 650, 0.78)) == ""
    assert unlike_images(report(50_000, 0.82, 50_000, 0.80)) == ""
    assert unlike_images(report(20, 1.0, 20, 1.0)) == ""
    for before, after in ((0.82, 0.60), (0.60, 0.82)):
        told = unlike_images(report(500, before, 650, after))
        assert f"right on {100 * before:.2f} % of the images to fit on and on {100 * after:.2f} % of the test images" in told
