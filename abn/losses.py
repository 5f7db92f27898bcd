"""What the network is told beside the labels: losses between its attention map and a person's mask.

A registry by name; all take maps and masks (b, 1, h, w) in 0..1 at the map's resolution and give one value a sample.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor


def l2_map_loss(maps: Float[Tensor, "b 1 h w"], masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b"]:
    """Root mean square of M' - M over the map, 0..1.

    Mitsuhara et al. (VISAPP 2021) take ||M' - M||_2, the root of the sum; ours does not grow with the map's size.
    """
    return ((maps - masks).square().mean(dim=(1, 2, 3)) + 1e-12).sqrt()


MAP_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l2": l2_map_loss}
