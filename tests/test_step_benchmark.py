from __future__ import annotations

from benchmarks.step import TARGETS, ratios, steps


def test_each_arm_has_the_masks_that_its_name_says() -> None:
    arms = steps("cifar_resnet8", (16, 16), count=8)
    assert {arm for arm, step in arms.items() if "map_loss" in step()} == {"with_masks", "with_small_masks"}
    found = ratios(arms, turns=1)
    assert found.keys() == TARGETS.keys() and min(found.values()) > 0
