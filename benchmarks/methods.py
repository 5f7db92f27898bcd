"""Published methods against confounds, to measure ours beside them.

Each trains a network on pictures in memory, with the optimizer, the learning rate, the batches and the augmentation of
abn/train.py, so that arms differ in nothing but their objective. Hyperparameters are those of the papers, or are named
where we depart; nothing is tuned on the test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn import functional as F

from abn.context import binarised, in_another_context
from abn.data import Pictures, augment, epoch_batches, in_order
from abn.losses import energy_map_loss, input_gradients, rrr_loss
from abn.model import ABNOutput, resize_map
from abn.train import Settings, choose_device, learning_rate

AT_ONCE = 256  # pictures that are answered at once
UPWEIGHT = 20  # times that JTT shows what was misclassified; the paper tunes it between 4 and 100
IDENTIFY = 0.2  # of the epochs JTT trains its first network for; the paper: 60 of 300 on Waterbirds
DRO_STEP = 0.01  # eta of group DRO, as in the paper's code
VIEWS = 5000  # pictures in swapped backgrounds, at least, from which DFR learns the last layer


class PlainOutput(NamedTuple):
    """What a plain network gives; `ABNOutput` is its like."""

    logits: Float[Tensor, "b k"]
    features: Float[Tensor, "b c h w"] | None  # of the last convolution, where there is one
    embedding: Float[Tensor, "b d"]  # what the last linear layer sees


class PlainMlp(nn.Module):
    """The network of Ross et al., IJCAI 2017: hidden layers of 50 and 30. It sees the first colour channel of 28x28."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 30), nn.ReLU())
        self.linear = nn.Linear(30, classes)

    def forward(self, images: Float[Tensor, "b 3 28 28"]) -> PlainOutput:
        embedding = self.hidden(images[:, :1])
        return PlainOutput(self.linear(embedding), None, embedding)


class PlainCnn(nn.Module):
    """A LeNet for pictures of 28x28: two 5x5 convolutions of 16 and 32 channels, each with a pooling, a hidden layer of
    128 and a linear one."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        first = [nn.Conv2d(3, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        self.extractor = nn.Sequential(*first, nn.Conv2d(16, 32, 5, padding=2), nn.ReLU())
        self.hidden = nn.Sequential(nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 7 * 7, 128), nn.ReLU())
        self.linear = nn.Linear(128, classes)

    def forward(self, images: Float[Tensor, "b 3 28 28"]) -> PlainOutput:
        features = self.extractor((images - 0.5) / 0.25)
        embedding = self.hidden(features)
        return PlainOutput(self.linear(embedding), features, embedding)


@dataclass(frozen=True)
class Examples:
    """Training pictures in memory."""

    images: UInt8[Tensor, "n 3 h w"]
    labels: Int[Tensor, "n"]
    masks: UInt8[Tensor, "n 1 h w"]  # 255 where something may be evidence; what lies outside may not
    has_mask: Bool[Tensor, "n"]  # a person gave it
    trust: Float[Tensor, "n"]  # 0..1: 1 for a person's mask, less for a pseudo-mask, 0 without any
    groups: Int[Tensor, "n"]  # class x value of the confound, counted from 0; only group DRO looks at them

    @classmethod
    def of(cls, pictures: Pictures, groups: Int[np.ndarray, "n"]) -> Examples:
        """All pictures and their masks."""
        batch = pictures[list(range(len(pictures)))]
        return cls(batch.images, batch.labels, batch.masks, batch.has_mask, batch.trust, torch.from_numpy(groups))

    def __len__(self) -> int:
        return len(self.labels)


class Batch(NamedTuple):
    """A batch of `Examples` after augmentation, pictures and masks in 0..1."""

    images: Float[Tensor, "b 3 h w"]
    labels: Int[Tensor, "b"]
    masks: Float[Tensor, "b 1 h w"]
    has_mask: Bool[Tensor, "b"]
    trust: Float[Tensor, "b"]
    groups: Int[Tensor, "b"]


Objective = Callable[[nn.Module, Batch], Tensor]
Make = Callable[[], nn.Module]  # a new network


def fit(
    network: nn.Module, examples: Examples, settings: Settings, objective: Objective, pool: Sequence[int] = ()
) -> None:
    """Trains the network in place and leaves it in evaluation mode.

    `pool`: the rows to draw from, some of them several times; an epoch has as many steps as without it. Raises
    FloatingPointError where a loss is not finite.
    """
    config, rows = settings.train, list(pool) or list(range(len(examples)))
    optimizer = torch.optim.SGD(
        network.parameters(), config.learning_rate, config.momentum, weight_decay=config.weight_decay
    )
    device = choose_device(config.device)
    network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    steps = max(1, round(len(examples) / config.batch_size))
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch + 1)
        torch.manual_seed(config.seed * 1_000_003 + epoch + 1)  # of what an objective draws
        batches = epoch_batches(len(rows), [], config.batch_size, 0.0, generator)
        for step, drawn in zip(range(steps), batches, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, (epoch + step / steps) / config.epochs)
            batch = _batch(examples, [rows[i] for i in drawn], settings, generator)
            loss = objective(network, Batch(*(part.to(device) for part in batch)))
            if not loss.isfinite():
                raise FloatingPointError(f"loss {loss.item()} at epoch {epoch + 1}, step {step + 1}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    network.eval()


def _batch(examples: Examples, rows: Sequence[int], settings: Settings, generator: torch.Generator) -> Batch:
    chosen = torch.tensor(rows)
    images, masks = examples.images[chosen].float() / 255, examples.masks[chosen].float() / 255
    images, masks = augment(images, masks, settings.data, generator)
    images = images.contiguous(memory_format=torch.channels_last)
    given, trust = examples.has_mask[chosen], examples.trust[chosen]
    return Batch(images, examples.labels[chosen], masks, given, trust, examples.groups[chosen])


@torch.no_grad()
def answers(network: nn.Module, images: UInt8[Tensor, "n 3 h w"]) -> Int[np.ndarray, "n"]:
    """The class that the network, in evaluation mode, gives each picture."""
    device = next(network.parameters()).device
    parts = [network(images[rows].to(device).float() / 255).logits for rows in in_order(len(images), AT_ONCE)]
    return torch.cat(parts).argmax(dim=1).cpu().numpy()


# --- objectives


def class_losses(output: ABNOutput | PlainOutput, labels: Int[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Cross-entropy of each picture; of an attention branch network the sum of both branches'."""
    losses = F.cross_entropy(output.logits, labels, reduction="none")
    if isinstance(output, ABNOutput):
        losses = losses + F.cross_entropy(output.attention_logits, labels, reduction="none")
    return losses


def erm(network: nn.Module, batch: Batch) -> Tensor:
    """Empirical risk minimisation: the baseline."""
    return class_losses(network(batch.images), batch.labels).mean()


def rrr(weight: float) -> Objective:
    """Right for the right reasons (Ross et al., IJCAI 2017): the squared input gradient outside of the masks.

    The weight is lambda_1 of the paper for pictures in 0..1; the paper's own are of pixels in 0..255, so that a lambda
    of theirs is one of lambda / 255^2 here. Departure: SGD with momentum in place of Adam.
    """

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        images = batch.images.requires_grad_()
        output = network(images)
        penalties = rrr_loss(input_gradients(output.logits, images), batch.masks) * batch.has_mask
        return (class_losses(output, batch.labels) + weight * penalties).mean()

    return loss


def energy(weight: float = 1.0) -> Objective:
    """The energy loss (Rao et al., ICCV 2023): the share of the map outside of the masks.

    The map is the attention map, or a plain CNN's Grad-CAM of the label at its last convolution, as the paper has it of
    plain networks. The paper tunes the weight; here it is 1.
    """

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        output = network(batch.images)
        losses = class_losses(output, batch.labels).mean()
        if not batch.has_mask.any():
            return losses
        maps = _map_of(output, batch.labels)[batch.has_mask]
        distances = energy_map_loss(maps, resize_map(batch.masks[batch.has_mask], maps.shape[-2:]))
        return losses + weight * distances.mean()

    return loss


def _map_of(output: ABNOutput | PlainOutput, labels: Int[Tensor, "b"]) -> Float[Tensor, "b 1 h w"]:
    if isinstance(output, ABNOutput):
        return output.attention_map
    top = output.logits.gather(1, labels[:, None]).sum()
    assert output.features is not None, "an MLP has no map"
    (gradients,) = torch.autograd.grad(top, output.features, create_graph=True)
    maps = (gradients.mean(dim=(2, 3), keepdim=True) * output.features).sum(dim=1, keepdim=True).clamp(min=0)
    # To a maximum of 1: a map that is almost nothing would have slopes without bound.
    return maps / maps.detach().amax(dim=(2, 3), keepdim=True).clamp(min=1e-4)


def caipi(network: nn.Module, batch: Batch) -> Tensor:
    """CAIPI (Teso and Kersting, AIES 2019): each picture with a mask comes once more with what lies outside replaced by
    uniform noise, as in Schramowski et al., Nature Machine Intelligence 2020, who use one to five such counterexamples.
    Departure: the noise is drawn anew in each epoch, and nobody is asked in between.
    """
    images, masks = batch.images[batch.has_mask], binarised(batch.masks[batch.has_mask])
    noise = torch.rand_like(images[:, :1]).expand_as(images)
    shown = torch.cat([batch.images, masks * images + (1 - masks) * noise])
    return class_losses(network(shown), torch.cat([batch.labels, batch.labels[batch.has_mask]])).mean()


def background_swap(network: nn.Module, batch: Batch) -> Tensor:
    """What of ours needs no attention branch: pictures in the background of another one, as often as their masks are
    trusted (abn/context.py). The map loss, mask erasing and what hides spurious regions are not in it."""
    generator = torch.Generator().manual_seed(int(torch.randint(1 << 31, (1,))))
    marked = binarised(batch.masks)
    elsewhere = in_another_context(batch.images, marked, generator)
    moved = torch.rand(len(marked), generator=generator).to(batch.trust.device) < batch.trust
    moved &= marked.flatten(1).any(dim=1)
    images = torch.where(moved.view(-1, 1, 1, 1), elsewhere, batch.images)
    return class_losses(network(images), batch.labels).mean()


def group_dro(groups: int) -> Objective:
    """Group DRO (Sagawa et al., ICLR 2020): the groups' mean losses, weighed by exponentiated gradient ascent.

    It needs the value of the confound in each training picture. Where a confound is perfectly correlated with the
    class, groups are classes, and there is nothing to gain. Departure: batches are not drawn evenly from the groups.
    """
    weights = torch.full((groups,), 1 / groups)

    def loss(network: nn.Module, batch: Batch) -> Tensor:
        losses = class_losses(network(batch.images), batch.labels)
        counts = torch.bincount(batch.groups, minlength=groups)
        means = losses.new_zeros(groups).index_add(0, batch.groups, losses) / counts.clamp(min=1)
        weights.mul_((DRO_STEP * means.detach().cpu()).exp())
        weights.div_(weights.sum())
        return (weights.to(means.device) * means).sum()

    return loss


# --- methods of more than one training


def jtt(make: Make, examples: Examples, settings: Settings) -> nn.Module:
    """Just train twice (Liu et al., ICML 2021): a first network, trained briefly, tells which pictures are hard; the
    second is shown those `UPWEIGHT` times as often.

    Departures: the first network has a schedule of its own, `IDENTIFY` of the epochs long, and the second as many steps
    as every other arm. `UPWEIGHT` is not tuned.
    """
    first = make()
    epochs = max(1, round(IDENTIFY * settings.train.epochs))
    fit(first, examples, replace(settings, train=replace(settings.train, epochs=epochs)), erm)
    wrong = np.flatnonzero(answers(first, examples.images) != examples.labels.numpy()).tolist()
    second = make()
    fit(second, examples, settings, erm, [*range(len(examples)), *(wrong * (UPWEIGHT - 1))])
    return second


def dfr(network: nn.Module, examples: Examples, seed: int) -> None:
    """Deep feature reweighting (Kirichenko et al., ICLR 2023): the last layer of a trained network, in place, learned
    anew where the confound tells nothing, here on the pictures with a mask in the background of others.

    Each is shown so often that there are `VIEWS`. Departures: the paper takes held-out pictures with groups in balance,
    which nobody has under a perfect correlation, an l1 penalty that it tunes, and the mean of several fits.
    """
    generator, device = torch.Generator().manual_seed(seed), next(network.parameters()).device
    rows = examples.has_mask.nonzero()[:, 0]
    rows = rows.repeat(max(1, -(-VIEWS // max(1, len(rows)))))
    embeddings = []
    with torch.no_grad():
        for part in in_order(len(rows), AT_ONCE):
            chosen = rows[part]
            images, masks = (kept[chosen].to(device).float() / 255 for kept in (examples.images, examples.masks))
            shown = in_another_context(images, binarised(masks), generator)
            embeddings.append(network(shown).embedding.float().cpu())
    refit_last_layer(network, torch.cat(embeddings).numpy(), examples.labels[rows].numpy())


def refit_last_layer(network: nn.Module, embeddings: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"]) -> None:
    """`network.linear` as a logistic regression on standardised embeddings. A class that is not among the labels keeps
    no chance of being answered."""
    mean, std = embeddings.mean(axis=0), embeddings.std(axis=0) + 1e-6
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit((embeddings - mean) / std, labels)
    weight, bias = fitted.coef_ / std, fitted.intercept_ - (fitted.coef_ / std) @ mean
    if len(fitted.classes_) == 2:  # scikit-learn gives one row, of the second class
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    linear = network.linear
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.fill_(-1e4)
        linear.weight[fitted.classes_] = torch.from_numpy(weight).float()
        linear.bias[fitted.classes_] = torch.from_numpy(bias).float()
