from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from abn.backbones import make_parts
from abn.model import ABN, ModelConfig, load_model, resize_map, save_model


def make(backbone: str = "cifar_resnet8", mechanism: str = "residual", classes: int = 3, seed: int = 0) -> ABN:
    torch.manual_seed(seed)
    return ABN(ModelConfig(backbone, "none", mechanism), classes)  # type: ignore[arg-type]


def pictures(count: int = 4, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("backbone", "size", "map_size", "features"),
    [
        ("cifar_resnet8", (32, 32), (16, 16), 64),
        ("cifar_resnet20", (32, 32), (16, 16), 64),
        ("cifar_resnet20", (24, 40), (12, 20), 64),
        ("cifar_resnet20", (33, 17), (17, 9), 64),
        ("cifar_resnet44", (16, 16), (8, 8), 256),  # bottlenecks from 44 on
        ("resnet18", (224, 224), (14, 14), 512),
        ("resnet18", (64, 96), (4, 6), 512),
        ("resnet50", (64, 64), (4, 4), 2048),
    ],
)
def test_shapes(backbone: str, size: tuple[int, int], map_size: tuple[int, int], features: int) -> None:
    output = make(backbone, classes=5).eval()(pictures(2, *size))
    assert output.attention_logits.shape == output.logits.shape == (2, 5)
    assert output.attention_map.shape == (2, 1, *map_size)
    assert output.embedding.shape == (2, features)
    assert output.attention_map.min() >= 0
    assert output.attention_map.max() <= 1


def test_cifar_resnet20_has_the_parameters_of_worked_arithmetic() -> None:
    def block(inputs: int, width: int) -> int:
        shortcut = 0 if inputs == width else inputs * width + 2 * width
        return 9 * inputs * width + 9 * width * width + 4 * width + shortcut

    def stage(inputs: int, width: int) -> int:
        return block(inputs, width) + 2 * block(width, width)

    stem = 9 * 3 * 16 + 2 * 16
    plain = stem + stage(16, 16) + stage(16, 32) + stage(32, 64) + (64 * 10 + 10)
    assert plain == 272_474  # the usual ResNet-20 for CIFAR-10 with projection shortcuts
    head = 2 * 64 + 64 * 10 + 2 * 10  # batch norm, 1x1 convolution to the classes, batch norm
    maps = 10 * 10 + (9 * 10 + 2)  # 1x1 class head; 3x3 map head with its batch norm
    network = make("cifar_resnet20", classes=10)
    assert sum(parameter.numel() for parameter in network.parameters()) == plain + stage(32, 64) + head + maps


def test_the_depth_of_the_authors_code_counts_its_convolutions() -> None:
    network = make("cifar_resnet110")
    convolutions = [m for m in [*network.extractor.modules(), *network.stage.modules()] if hasattr(m, "kernel_size")]
    shortcuts = 3  # one a stage, whose width changes
    assert len(convolutions) - shortcuts == 1 + 3 * 18 * 3


@pytest.mark.parametrize("depth", [2, 7, 9, 21, 111])
def test_a_depth_that_is_none_is_refused(depth: int) -> None:
    with pytest.raises(ValueError, match=f"model.backbone is cifar_resnet{depth}; a depth is 6n"):
        make(f"cifar_resnet{depth}")


def test_an_unknown_backbone_is_refused_with_the_nearest_or_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"^model.backbone is 'resnet19'; did you mean resnet18\?$"):
        make("resnet19")
    with pytest.raises(ValueError, match="^model.backbone is 'perceptron'; known: cifar_resnet<depth>, resnet18"):
        make("perceptron")


def test_the_loss_of_each_branch_reaches_what_it_should() -> None:
    labels = torch.tensor([0, 1, 2, 0])

    def reached(attention: bool, perception: bool) -> dict[str, bool]:
        network = make()
        output = network(pictures())
        losses = [F.cross_entropy(output.attention_logits, labels)] * attention
        losses += [F.cross_entropy(output.logits, labels)] * perception
        sum(losses, torch.zeros(())).backward()
        return {
            name: any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in part.parameters())
            for name, part in network.named_children()
        }

    both = dict.fromkeys(("extractor", "attention_stage", "class_head", "map_head", "stage", "linear"), True)
    assert reached(attention=True, perception=True) == both
    assert reached(attention=True, perception=False) == {**both, "map_head": False, "stage": False, "linear": False}
    assert reached(attention=False, perception=True) == {**both, "class_head": False}


def test_a_given_map_takes_the_gradient_away_from_the_map_head() -> None:
    network = make()
    network(pictures(), torch.rand(4, 1, 8, 8)).logits.sum().backward()
    assert all(parameter.grad is None for parameter in network.map_head.parameters())


@pytest.mark.parametrize("mechanism", ["residual", "gate"])
def test_an_edited_map_changes_the_answer_and_its_own_map_does_not(mechanism: str) -> None:
    network, images = make(mechanism=mechanism).eval(), pictures()
    own = network(images)
    again = network(images, own.attention_map)
    torch.testing.assert_close(again.logits, own.logits)
    edited = own.attention_map.clone()
    edited[:, :, :4] = 0
    edited[:, :, 4:] = 1
    changed = network(images, edited)
    assert (changed.logits - own.logits).abs().amax(dim=1).min() > 1e-4
    assert torch.equal(changed.attention_logits, own.attention_logits)
    assert torch.equal(changed.attention_map, edited)


def test_a_map_of_any_size_can_be_given() -> None:
    network, images = make().eval(), pictures()
    even = torch.full((4, 1, 8, 8), 0.3)
    expected = network(images, even).logits
    for size in ((1, 1), (16, 16), (5, 300)):
        torch.testing.assert_close(network(images, torch.full((4, 1, *size), 0.3)).logits, expected)


def test_a_zero_map_hides_everything_under_gate_and_nothing_under_residual() -> None:
    nothing = torch.zeros(4, 1, 8, 8)
    gate, residual = make(mechanism="gate").eval(), make().eval()
    hidden = gate(pictures(seed=1), nothing).logits
    assert torch.equal(hidden, gate(pictures(seed=2), nothing).logits)
    assert torch.equal(hidden, hidden[:1].expand(4, -1))
    assert not torch.equal(residual(pictures(seed=1), nothing).logits, residual(pictures(seed=2), nothing).logits)


def test_a_shrunken_mask_is_the_mean_of_what_a_cell_covers() -> None:
    mask = torch.zeros(1, 1, 4, 4)
    mask[0, 0, :2, :2] = 1
    half = resize_map(mask, (2, 2))
    assert half.sum() == pytest.approx(1.0, abs=1e-6)
    assert half[0, 0, 0, 0] == half.max()
    assert torch.equal(resize_map(mask, (4, 4)), mask)


def test_a_resized_map_stays_from_0_to_1() -> None:
    maps = (pictures()[:, :1] > 0.5).float()
    for size in ((3, 5), (8, 8), (64, 31)):
        resized = resize_map(maps, size)
        assert resized.shape == (4, 1, *size)
        assert resized.min() >= 0
        assert resized.max() <= 1


@pytest.mark.parametrize("mechanism", ["residual", "gate"])
def test_a_saved_model_answers_the_same(tmp_path: Path, mechanism: str) -> None:
    config = ModelConfig("cifar_resnet8", "none", mechanism)  # type: ignore[arg-type]
    network = make(mechanism=mechanism)
    network(pictures())  # moves the running means
    save_model(tmp_path / "model.pt", network, config, ["a", "b", "c"], (16, 24))
    loaded = load_model(tmp_path / "model.pt")
    assert (loaded.classes, loaded.size) == (["a", "b", "c"], (16, 24))
    assert not loaded.network.training
    for ours, theirs in zip(network.eval()(pictures()), loaded.network(pictures()), strict=True):
        assert torch.equal(ours, theirs)


def test_the_same_model_gives_the_same_bytes_wherever_it_is_saved(tmp_path: Path) -> None:
    config = ModelConfig("cifar_resnet8", "none", "residual")
    for name in ("one.pt", "another/two.pt"):
        save_model(tmp_path / name, make(), config, ["a", "b", "c"], (16, 16))
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another/two.pt").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["one.pt"]


def test_other_files_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with pytest.raises(ValueError, match=r"model\.pt holds no model; run `dvc repro train`"):
        load_model(path)
    path.touch()
    with pytest.raises(ValueError, match="holds no model"):
        load_model(path)
    for content in (b"hello world", b"PK\x03\x04", b"\x80\x02}."):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model\.pt is not a file of tensors|is not a model saved by"):
            load_model(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"model\.pt is not a model saved by abn\.train"):
        load_model(path)


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("/nonexistent/trap"),))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state": Trap()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="is not a file of tensors"):
        load_model(tmp_path / "model.pt")


def test_weights_from_a_file_go_into_both_copies_of_the_last_stage(tmp_path: Path) -> None:
    import torchvision

    torch.manual_seed(1)
    network = torchvision.models.resnet18(weights=None)
    path = tmp_path / "weights.pt"
    torch.save(network.state_dict(), path)
    parts = make_parts("resnet18", str(path))
    for name, value in network.layer4.state_dict().items():
        assert torch.equal(parts.stage.state_dict()[name], value)
        assert torch.equal(parts.attention_stage.state_dict()[name], value)
    features = parts.extractor(pictures(1, 64, 64))
    torch.testing.assert_close(features, network.layer3(network.layer2(network.layer1(_stem(network)))))
    assert parts.attention_stage(features).shape[-2:] == features.shape[-2:]
    with torch.no_grad():
        next(parts.stage.parameters()).zero_()
    assert next(parts.attention_stage.parameters()).abs().sum() > 0  # copies, not one stage twice


def _stem(network: torch.nn.Module) -> torch.Tensor:
    x = pictures(1, 64, 64)
    for layer in (network.conv1, network.bn1, network.relu, network.maxpool):
        x = layer(x)  # type: ignore[operator]
    return x


def test_without_weights_the_two_copies_of_the_last_stage_differ() -> None:
    parts = make_parts("resnet18")
    assert not torch.equal(next(parts.stage.parameters()), next(parts.attention_stage.parameters()))


def test_weights_that_do_not_fit_are_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"linear": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"model\.weights .*weights\.pt does not fit resnet18") as refused:
        make_parts("resnet18", str(path))
    assert "\n" not in str(refused.value)
    path.write_bytes(b"hello world")
    with pytest.raises(ValueError, match=r"weights\.pt is not a file of tensors"):
        make_parts("resnet18", str(path))
    with pytest.raises(ValueError, match="model.weights is 'IMAGNET'; for resnet18: none, IMAGENET1K_V1, "):
        make_parts("resnet18", "IMAGNET")
    with pytest.raises(ValueError, match="model.weights is 'IMAGENET1K_V1', but cifar_resnet8 has none"):
        make_parts("cifar_resnet8", "IMAGENET1K_V1")
