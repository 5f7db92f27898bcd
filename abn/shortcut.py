"""What misleads: what lies outside of the masks of people, and yet tells the class.

A mask says what is evidence, and so what is not. A small network that sees one place of a picture at a time is asked
for the class where people marked nothing. Where it knows, something tells that ought not to: a stamp, a rim, a texture.
Hiding that leaves the evidence in a picture whose mask is careless, or drawn and doubted, and keeps a background that
tells the class out of what is shown around small masks. Where something misleads in other pictures is hidden as well:
else the hole that a mark leaves in an object would tell what the mark did.

Lineage: answers from local features, as in BagNet (Brendel and Bethge, ICLR 2019), here of what was left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from abn.annotator import AT_ONCE, examples, in_other_light
from abn.context import binarised, grown, is_small, with_surroundings
from abn.data import Pictures, in_order
from abn.stage import progress

STEPS, BATCH_SIZE, LEARNING_RATE, WIDTH = 1000, 4096, 5e-3, 64
SURE = 0.8  # of the picture's own class, from which on a place misleads
FEW = 3  # painted masks of a class, that chance does not tell it
ENOUGH, LIGHTS = 200, 4  # pictures to learn from at most, and in how many lights each
PLACES = 32  # along the longer side, at most
REACH = 2  # places to each side are seen from one: more would see the object from beside it
UNTOLD = -100  # of places that see what is marked from beside it nothing is learned
BESIDE = 1 / 16  # of the longer side is taken with a place that misleads: marks of two classes may end alike


def find_shortcuts(
    pictures: Pictures,
    corrected: Sequence[int],
    classes: int,
    seed: int,
    device: torch.device,
    say: Callable[[str], None] = lambda text: None,
) -> dict[int, UInt8[Tensor, "1 i j"]]:
    """Where something misleads, 255, else 0, in each of the pictures in which anything does, at no more than `PLACES`
    a side; it is learned from those that are `corrected`.

    A place misleads where the picture's own class is at least `SURE`; what lies `BESIDE` it is taken with it, unless it
    looks like evidence. A texture can mislead all over a picture. Only classes of which people painted at least `FEW`
    masks take part, `ENOUGH` in all, and with fewer than two of them nothing is found: to tell a class is to tell it
    from another. A map that was called fine does not say where an object ends, and is not learned from. `say` is told
    how far it has come.
    """
    generator = torch.Generator().manual_seed(seed)
    painted = [index for index in corrected if pictures.samples[index].painted]
    chosen = _chosen(pictures.labels[painted], generator)
    if not chosen:
        return {}
    say(f"looking for what misleads, by the masks of {len(chosen)} pictures")
    images, labels, masks = examples(pictures, [painted[i] for i in chosen], device)
    wanted = _wanted(labels, masks, classes)
    told = wanted != UNTOLD
    seen = torch.cat([_places(in_other_light(images, generator))[told] for _ in range(LIGHTS)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        judge = _taught(seen, wanted[told].repeat(LIGHTS), classes, generator)
    found: dict[int, Tensor] = {}
    for rows in in_order(len(pictures), AT_ONCE):
        images, labels, _ = examples(pictures, rows, device)
        with torch.no_grad():
            answers = judge(_places(images)).softmax(dim=-1).movedim(-1, 1)
        own, evidence = answers[torch.arange(len(rows)), labels][:, None], answers[:, classes:]
        misleads = own >= SURE
        beside = grown(misleads, by=round(BESIDE * max(own.shape[-2:]))) & (evidence < 0.5)
        for row, places in zip(rows, (misleads | beside).cpu(), strict=True):
            if places.any():
                found[row] = 255 * places.to(torch.uint8)
    say(f"{len(found)} of {len(pictures)} pictures show something that misleads; it is hidden")
    return found


def _chosen(labels: Int[Tensor, "n"], generator: torch.Generator) -> list[int]:
    """Which pictures to learn from, at random: none of classes with fewer than `FEW`, of others no more than three
    times as many as of the rarest, since what is seen in one picture of a class must not stand for all of it."""
    counts = labels.bincount()
    told = counts >= FEW
    if told.sum() < 2:
        return []
    most, taken = 3 * int(counts[told].min()), torch.zeros_like(counts)
    chosen = []
    for row in torch.randperm(len(labels), generator=generator).tolist():
        if told[labels[row]] and taken[labels[row]] < most:
            taken[labels[row]] += 1
            chosen.append(row)
    return chosen[:ENOUGH]


def _wanted(labels: Int[Tensor, "n"], masks: Float[Tensor, "n 1 h w"], classes: int) -> Int[Tensor, "n i j"]:
    """What is to be answered at each place: the class where people marked nothing, one answer more, `classes`, where
    they did, so that evidence is known as such; nothing is asked in between, from where the evidence can be seen. From
    beside what is small that is evidence, too: it is shown with its surroundings."""
    marked = binarised(masks)
    reached, inside = _at_places(with_surroundings(marked)) > 0, _at_places(marked) >= 0.5
    shapes = (marked.mean(dim=(1, 2, 3)) <= 0.5).nonzero()[:, 0]  # what lies beside others is all that there is
    reached[shapes] = grown(reached[shapes], by=REACH)
    small = is_small(marked).flatten()
    inside[small] = grown(_at_places(marked[small]) > 0, by=REACH)  # a thin line fills no place
    evidence = torch.where(inside[:, 0], classes, UNTOLD)
    return torch.where(reached[:, 0], evidence, labels[:, None, None])


def _places(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b i j c"]:
    """What is to be seen from each place: where it is, and the colours around it."""
    colours = _at_places(4 * (images - 0.5))
    height, width = colours.shape[-2:]
    around = F.unfold(F.pad(colours, (REACH,) * 4, mode="replicate"), 2 * REACH + 1).unflatten(-1, (height, width))
    where = torch.meshgrid(torch.linspace(-2, 2, height), torch.linspace(-2, 2, width), indexing="ij")
    here = torch.stack(where).to(images.device).expand(len(images), -1, -1, -1)
    return torch.cat([here, around], dim=1).movedim(1, -1)


def _taught(
    seen: Float[Tensor, "n c"], wanted: Int[Tensor, "n"], classes: int, generator: torch.Generator
) -> nn.Module:
    """Places -> logits of the classes and of evidence.

    How many places are of a class tells nothing of a single one: that is added to the logits in training and left out
    after (logit adjustment, Menon et al., ICLR 2021).
    """
    layers = (nn.Linear(seen.shape[1], WIDTH), nn.ReLU(), nn.Dropout(0.2), nn.Linear(WIDTH, classes + 1))
    judge = nn.Sequential(*layers).to(seen.device)
    frequent = torch.log(torch.bincount(wanted, minlength=classes + 1) / max(1, len(wanted)) + 1e-6)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.05)
    for step in range(STEPS if len(seen) else 0):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * step / STEPS)) / 2
        rows = torch.randint(len(seen), (BATCH_SIZE,), generator=generator).to(seen.device)
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(judge(seen[rows]) + frequent, wanted[rows]).backward()
        optimizer.step()
        progress("looking for spurious regions", step + 1, STEPS)
    return judge.eval()


def _at_places(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c i j"]:
    """The means of what lies at each place."""
    return F.avg_pool2d(x, math.ceil(max(x.shape[-2:]) / PLACES), ceil_mode=True)
