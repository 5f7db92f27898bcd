"""Masks for the pictures that nobody corrected, learned from the masks of those that people did.

Small U-Nets (Ronneberger et al., MICCAI 2015) are shown a picture and told its class, and draw what a person would
mark. They are trained anew, in seconds, before each training of the network: what is told of a few pictures so reaches
all of them. They know nothing but the corrections and what pretrained weights, if there are any, see.
Each is taught by a part of the corrections and judged by the rest (cross-fitting), so that every correction tells once
how far to trust the masks drawn; a drawn mask is their mean.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from abn.context import binarised, in_another_context, overlap, with_surroundings
from abn.data import DataConfig, Pictures, augment, in_order, still_marked
from abn.manifest import MANY_MASKS
from abn.pyramid import Pyramid
from abn.stage import progress

# Each cycle of steps begins with the learning rate anew (SGDR, Loshchilov and Hutter, ICLR 2017), and only where the
# one before did not teach enough: a digit is learned in the first, a scratch on a metal tile takes both.
CYCLES = (250, 500)
BATCH_SIZE, LEARNING_RATE, WIDTH, LEVELS = 8, 4e-3, 8, 3
AT_ONCE = 256  # pictures
LARGEST = 64  # pixels: larger pictures are annotated at this size; steps are worth more than pixels in the same time
FOLDS = 3  # annotators; each is judged by every third correction, which the other two learn from
FEWEST = 50  # steps of each, however small the data
FAIR = 0.7  # an overlap with masks of people from which on the drawn ones are used like theirs


class Annotator(nn.Module):
    """Picture and class -> logits of the mask, at the picture's size. What a pyramid sees of the picture is added where
    the resolution is the same."""

    def __init__(self, classes: int, pyramid: Pyramid | None = None) -> None:
        super().__init__()
        widths = [WIDTH << level for level in range(LEVELS + 1)]
        self.down = nn.ModuleList(_block(i, o) for i, o in zip([3, *widths], widths, strict=False))
        self.pyramid, steps = pyramid, pyramid.steps if pyramid else []
        self.levels = [min(round(math.log2(stride)), LEVELS) for _, stride in steps]
        self.join = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, channels), nn.Conv2d(channels, widths[level], 1, bias=False))
            for level, (channels, _) in zip(self.levels, steps, strict=True)
        )
        self.told = nn.Embedding(classes, widths[-1])
        nn.init.zeros_(self.told.weight)
        self.up = nn.ModuleList(_block(2 * o + o, o) for o in reversed(widths[:-1]))
        self.head = nn.Conv2d(WIDTH, 1, 1)
        self.usual = nn.Embedding(classes, 1)

    def features(self, images: Float[Tensor, "b 3 h w"]) -> list[Float[Tensor, "b _ _ _"]]:
        """What the pyramid sees of images, which no training changes: the same for all annotators that have it."""
        return self.pyramid(images) if self.pyramid else []

    def forward(
        self,
        images: Float[Tensor, "b 3 h w"],
        labels: Int[Tensor, "b"],
        features: Sequence[Float[Tensor, "b _ _ _"]] | None = None,
    ) -> Float[Tensor, "b 1 h w"]:
        """`features` are those of the images, where they are known already."""
        seen = self.features(images) if features is None else features
        x = 4 * (images - 0.5)
        skipped: list[Tensor] = []
        for down in self.down:
            x = down(F.max_pool2d(x, 2, ceil_mode=True) if skipped else x)
            for level, join, found in zip(self.levels, self.join, seen, strict=True):
                if level == len(skipped):
                    x = x + F.interpolate(join(found), size=x.shape[-2:], mode="bilinear", align_corners=False)
            skipped.append(x)
        x = x + self.told(labels)[:, :, None, None]
        for up, skip in zip(self.up, reversed(skipped[:-1]), strict=True):
            x = up(torch.cat([F.interpolate(x, size=skip.shape[-2:]), skip], dim=1))
        return self.head(x) + self.usual(labels)[:, :, None, None]


def _block(inputs: int, outputs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inputs, outputs):
        # Of groups and not of batches, so that a picture's mask does not depend on its company.
        layers += [nn.Conv2d(channels, outputs, 3, padding=1, bias=False), nn.GroupNorm(8, outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def annotate(
    pictures: Pictures,
    corrected: Sequence[int],
    classes: int,
    config: DataConfig,
    seed: int,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
    pyramid: Pyramid | None = None,
    most: int = FOLDS * sum(CYCLES),
) -> tuple[dict[int, UInt8[Tensor, "1 i j"]], dict[int, float]]:
    """Masks of the pictures that are not `corrected` (indices of those that are), and how far to trust each, 0..1.

    Masks are 0..255, at the pictures' size or, of larger pictures, at the annotator's. The trust is the mean overlap
    with masks of people that the annotator was not shown, over `FAIR`; of fewer corrections than `MANY_MASKS` none can
    be spared, and it is the overlap with those that it was shown. Small masks are compared as they are used, with what
    lies around them. Where it finds nothing there is no mask. `say` is told how far it has come. All annotators
    together take no more than `most` steps, but `FEWEST` each.

    `pyramid` is of the network's pretrained weights, if it has any. With it, and where pictures may be mirrored, a mask
    is the mean of the picture's and of its mirror image's, and where these overlap by less than `FAIR` it is not
    trusted at all: there `find_shortcuts` helps. A picture that is marked nearly whole is trusted as the others are on
    average: a class that is always shown in part, where others are seen whole, would be known by that.
    """
    generator = torch.Generator().manual_seed(seed)
    # A shift counts the pictures' pixels; one of two is kept, since moving makes many examples of few.
    config = replace(config, shift=max(round(config.shift * _scale(pictures.size)), min(config.shift, 2)))
    folds = _folds(sorted(corrected, key=lambda row: (int(pictures.labels[row]), row)))
    shown = [examples(pictures, taught, device) for taught, _ in folds]
    people = torch.cat([examples(pictures, judged, device)[2] for _, judged in folds])
    annotators = [_begun(classes, pyramid, *taught[1:], generator).to(device) for taught in shown]
    best, trust, left = annotators, 0.0, most // len(folds)
    for cycle in CYCLES:
        steps = min(cycle, max(left, FEWEST))
        say(f"learning to draw masks from those of {len(corrected)} pictures, {len(folds)} x {steps} steps")
        for annotator, taught in zip(annotators, shown, strict=True):
            _train(annotator, steps, *taught, config, generator)
        unseen: list[Tensor] = []
        for annotator, (_, judged) in zip(annotators, folds, strict=True):
            unseen += _masks([annotator], pictures, judged, device).values()
        reached = _trust(unseen, people)
        say(f"the masks drawn can be trusted by {reached:.2f}")
        if reached >= trust:  # careless masks are learned by heart when there is time
            best, trust = copy.deepcopy(annotators), reached
        left -= steps
        if trust == 1 or left < CYCLES[0]:
            break
    rest = pictures.all_but(corrected)
    found = _masks(best, pictures, rest, device)
    sure = dict.fromkeys(found, 1.0)
    if pyramid and config.flip and found:
        found, sure = _twice(found, _masks(best, pictures, rest, device, mirrored=True))
    # Copies, since what is a part of a batch's tensor is sent to other processes with all of it.
    drawn = {index: mask.clone() for index, mask in found.items() if (mask > 127).any()}
    return drawn, {index: trust * sure[index] for index in drawn}


def _folds(corrected: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The corrections, in the order of their classes, that each annotator learns from and those that it is judged by:
    of each class a part."""
    if len(corrected) < MANY_MASKS:
        return [(list(corrected), list(corrected))]
    parts = [list(corrected[fold::FOLDS]) for fold in range(FOLDS)]
    return [([row for row in corrected if row not in set(judged)], judged) for judged in parts]


def _twice(
    found: dict[int, UInt8[Tensor, "1 h w"]], mirrored: dict[int, UInt8[Tensor, "1 h w"]]
) -> tuple[dict[int, UInt8[Tensor, "1 h w"]], dict[int, float]]:
    """The means of the masks of pictures and of their mirror images, and how sure those are, by how they overlap."""
    names, whole = list(found), set[int]()
    masks, sure = dict[int, Tensor](), dict[int, float]()
    for part in in_order(len(names), AT_ONCE):
        rows = [names[i] for i in part]
        first, second = (torch.stack([drawn[row] for row in rows]).float() / 255 for drawn in (found, mirrored))
        alike = overlap(*(with_surroundings(binarised(drawn)) for drawn in (first, second))) >= FAIR
        means = (first + second) / 2
        masks |= dict(zip(rows, (255 * means).round().to(torch.uint8), strict=True))
        sure |= dict(zip(rows, alike.float().tolist(), strict=True))
        whole |= {row for row, mean in zip(rows, means, strict=True) if mean.mean() > 0.5}
    shapes = [sure[row] for row in names if row not in whole]
    if shapes:
        sure |= dict.fromkeys(whole, sum(shapes) / len(shapes))
    return masks, sure


def _begun(
    classes: int,
    pyramid: Pyramid | None,
    labels: Int[Tensor, "n"],
    masks: Float[Tensor, "n 1 h w"],
    generator: torch.Generator,
) -> Annotator:
    """An annotator that begins with what is right on average in each class, or in all where a class has no mask. Else
    of a class without an object, whose masks cover nearly all, it would have to be shown many to draw another one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=generator)))
        annotator = Annotator(classes, pyramid)
    assert annotator.head.bias is not None
    nn.init.zeros_(annotator.head.bias)
    shares, labels = masks.mean(dim=(1, 2, 3)).cpu(), labels.cpu()
    usual = shares.mean().repeat(classes)
    for label in labels.unique():
        usual[label] = shares[labels == label].mean()
    annotator.usual.weight.data = torch.logit(usual.clamp(0.01, 0.99))[:, None]
    return annotator


def _train(
    annotator: Annotator,
    steps: int,
    images: Float[Tensor, "n 3 h w"],
    labels: Int[Tensor, "n"],
    masks: Float[Tensor, "n 1 h w"],
    config: DataConfig,
    generator: torch.Generator,
) -> None:
    """Teaches the annotator to draw the masks of these pictures, in whatever context and light they are."""
    optimizer = torch.optim.AdamW(annotator.parameters(), weight_decay=0.01)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, 10 * (step + 1) / steps) * (1 + math.cos(math.pi * step / steps)) / 2
        rows = torch.randint(len(images), (BATCH_SIZE,), generator=generator)
        shown, wanted = augment(images[rows], masks[rows], config, generator)
        hard = binarised(wanted)
        elsewhere = in_another_context(shown, hard, generator)
        moved = torch.rand(BATCH_SIZE, generator=generator).to(images.device) < 0.5
        moved &= hard.flatten(1).any(dim=1)  # what was marked may have moved out of the picture
        shown = torch.where(moved.view(-1, 1, 1, 1), elsewhere, shown)
        logits = annotator(in_other_light(shown, generator), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        mask_loss(logits, wanted).backward()
        optimizer.step()
        progress("learning to propagate masks", step + 1, steps)


def _trust(drawn: Sequence[UInt8[Tensor, "1 h w"]], people: Float[Tensor, "n 1 h w"]) -> float:
    """How far to trust masks as `drawn`, 0..1, by those that people drew of the same pictures, in the same order."""
    found = torch.stack(list(drawn)).to(people.device) / 255
    both = (with_surroundings(binarised(masks)) for masks in (found, people))
    return min(1.0, overlap(*both).mean().item() / FAIR)


def mask_loss(logits: Float[Tensor, "b 1 h w"], masks: Float[Tensor, "b 1 h w"]) -> Float[Tensor, ""]:
    """Binary cross-entropy + 1 - Dice, at least 0. Dice is what keeps a mask of a few pixels from being given up, an
    idea of V-Net (Milletari et al., 3DV 2016); here (2 sum(p m) + 1) / (sum(p) + sum(m) + 1), which an empty mask
    that is left empty reaches too."""
    drawn = logits.sigmoid()
    both, either = (drawn * masks).sum(dim=(1, 2, 3)), (drawn + masks).sum(dim=(1, 2, 3))
    dice = (2 * both + 1) / (either + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + 1 - dice.mean()


@torch.no_grad()
def _masks(
    annotators: Sequence[Annotator],
    pictures: Pictures,
    rows: Sequence[int],
    device: torch.device,
    mirrored: bool = False,
) -> dict[int, UInt8[Tensor, "1 h w"]]:
    """What they draw on average in pictures or, for the same places, in their mirror images."""
    found: dict[int, Tensor] = {}
    for batch in in_order(len(rows), AT_ONCE):
        part = [rows[i] for i in batch]
        images, labels, _ = examples(pictures, part, device)
        seen = images.flip(-1) if mirrored else images
        features = annotators[0].features(seen)
        drawn = torch.stack([annotator(seen, labels, features).sigmoid() for annotator in annotators]).mean(dim=0)
        drawn = drawn.flip(-1) if mirrored else drawn
        found |= dict(zip(part, (255 * drawn).round().to(torch.uint8).cpu(), strict=True))
    return found


def examples(
    pictures: Pictures, rows: Sequence[int], device: torch.device
) -> tuple[Float[Tensor, "b 3 h w"], Int[Tensor, "b"], Float[Tensor, "b 1 h w"]]:
    """Pictures, labels and masks at the size that the annotator sees."""
    size = [max(1, round(side * _scale(pictures.size))) for side in pictures.size]

    def small(full: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
        return F.interpolate(full.to(device).float() / 255, size, mode="bilinear", antialias=True, align_corners=False)

    # In parts, so that memory does not hold all of them at their full size.
    images, labels, masks = [], [], []
    for part in in_order(len(rows), AT_ONCE):
        batch = pictures[[rows[i] for i in part]]
        images.append(small(batch.images))
        labels.append(batch.labels.to(device))
        masks.append(still_marked(small(batch.masks)))
    return torch.cat(images), torch.cat(labels), torch.cat(masks)


def affordable_steps(size: Sequence[int], seen: int) -> int:
    """As many steps as cost about what training on `seen` pictures of this (height, width) does, by the pixels."""
    return max(1, round(seen / BATCH_SIZE / _scale(size) ** 2))


def _scale(size: Sequence[int]) -> float:
    """Of the annotator's pixels to those of pictures of this (height, width)."""
    return min(1.0, LARGEST / max(size))


def in_other_light(images: Float[Tensor, "b 3 h w"], generator: torch.Generator) -> Float[Tensor, "b 3 h w"]:
    """Contrast by up to a fifth and brightness by up to 0.15, each channel on its own."""
    gain, offset = torch.rand(2, len(images), 3, 1, 1, generator=generator).to(images.device) - 0.5
    return ((images - 0.5) * (1 + 0.4 * gain) + 0.5 + 0.3 * offset).clamp(0, 1)
