"""How much too wide people paint, seen from many masks at once.

Whoever paints in a hurry paints over the edge, and what a mask holds beside its object it teaches. One mask does not
tell how wide it is, many do: the contours of the pictures lie at the rim of careful masks, and as far inside careless
ones as those are too wide.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

CLEARER = 1.2  # times the contour at the rim; less inside is no sign, boxes around objects have that much
AT_ONCE = 16  # pictures: large ones would fill the memory
LEFT = 0.25  # of each mask's area, at least
WHOLE = 0.9  # of a picture: what is marked from there on has no rim, its edge is that of what was left out


def rim_width(images: Float[Tensor, "b 3 h w"], masks: Float[Tensor, "b 1 h w"]) -> int:
    """By how many pixels the masks, 0 or 1 per pixel, are too wide; 0 unless that is clear.

    The depth in the mask at which the contours are strongest: the gradient there against its mean in that picture, the
    median of the masks. Looked for up to a quarter of the longer side and where at least half of the masks reach.
    The edge of the picture is no rim, and masks of more than `WHOLE` of a picture are not asked.
    """
    contours = torch.cat([_contours(some) for some in images.split(AT_ONCE)])
    contours = contours / contours.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
    share = masks.mean(dim=(1, 2, 3))
    has_rim = (share > 0) & (share <= WHOLE)
    contours, inner = contours[has_rim], masks[has_rim]
    strengths: list[float] = []
    for _ in range(max(masks.shape[-2:]) // 4):
        smaller = _less_a_pixel(inner, beyond_the_picture=1.0)
        ring = inner - smaller
        reaches = ring.any(dim=(1, 2, 3))
        if reaches.sum() < max(len(inner) / 2, 1):
            break
        mean = (contours * ring).sum(dim=(1, 2, 3)) / ring.sum(dim=(1, 2, 3)).clamp(min=1)
        strengths.append(mean[reaches].median().item())
        inner = smaller
    if not strengths or max(strengths) <= CLEARER * strengths[0]:
        return 0
    return strengths.index(max(strengths))


def without_rim(masks: Float[Tensor, "b 1 h w"], width: int) -> Float[Tensor, "b 1 h w"]:
    """Masks, 0..1, less a rim of `width` pixels, or as many as leave a quarter of each. Those of more than `WHOLE` of
    a picture stay. Its edge is a rim too: what was painted up to it may have been painted over what ends before it."""
    share = _marked(masks)
    for _ in range(width):
        smaller = _less_a_pixel(masks, beyond_the_picture=0.0)
        masks = torch.where((share <= WHOLE) & (_marked(smaller) >= LEFT * share), smaller, masks)
    return masks


def _marked(masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 1 1"]:
    """The share of the picture that is marked: what only one of several people painted is not."""
    return (masks > 0.5).float().mean(dim=(1, 2, 3), keepdim=True)


def _less_a_pixel(masks: Float[Tensor, "b 1 h w"], beyond_the_picture: float) -> Float[Tensor, "b 1 h w"]:
    """Erosion by a square of 3 pixels: each the least of its neighbours."""
    return -F.max_pool2d(F.pad(-masks, (1, 1, 1, 1), value=-beyond_the_picture), 3, stride=1)


def _contours(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Length of the gradient (Sobel) of the channel where it is longest."""
    count, channels, height, width = images.shape
    across = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]], device=images.device) / 8
    planes = F.pad(images.reshape(count * channels, 1, height, width), (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(planes, torch.stack([across, across.T])[:, None])
    return slopes.square().sum(dim=1).sqrt().view(images.shape).amax(dim=1, keepdim=True)
