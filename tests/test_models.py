from __future__ import annotations

import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import torchvision
from torch import Tensor, nn

from pipeline.errors import InvalidInput
from pipeline.workloads.models import input_channels, model_builder

pytestmark = pytest.mark.usefixtures("one_thread")


def build(model: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    options: dict[str, Any] = {"classes": 7, "channels": 3, "image_size": 32, "weights": None, **changes}
    built = model_builder(model, **options)
    torch.manual_seed(seed)
    return built()


def refusal(model: str, **changes: Any) -> str:
    with pytest.raises(InvalidInput) as caught:
        build(model, **changes)
    (problem,) = caught.value.problems
    return str(problem)


def save(state: Any, folder: Path) -> str:
    file = folder / "weights.pt"
    torch.save(state, file)
    return str(file)


def body(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fc.")}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of torch hub's that holds no weights yet."""
    before = torch.hub.get_dir()
    torch.hub.set_dir(tmp_path / "hub")
    checkpoints = tmp_path / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    yield checkpoints
    torch.hub.set_dir(before)


@pytest.mark.parametrize(("model", "parameters"), [("small_cnn", 94_762), ("resnet9", 6_573_120)])
def test_our_models_are_of_the_size_that_they_say(model: str, parameters: int) -> None:
    assert sum(p.numel() for p in build(model, classes=10).parameters()) == parameters


@pytest.mark.parametrize("model", ["small_cnn", "resnet9"])
@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (4, 8)])
def test_our_models_take_images_of_any_channels_and_sizes(model: str, channels: int, size: int) -> None:
    images = torch.zeros(2, channels, size, size)
    assert build(model, channels=channels, image_size=size)(images).shape == (2, 7)


@pytest.mark.parametrize(
    ("model", "size"),
    [("resnet18", 32), ("squeezenet1_1", 64), ("mnasnet0_5", 32), ("shufflenet_v2_x0_5", 64)],
)
def test_a_model_of_torchvisions_has_any_number_of_classes(model: str, size: int) -> None:
    assert build(model, image_size=size)(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_a_model_with_auxiliary_classifiers_is_built_without_them() -> None:
    outputs = build("googlenet", image_size=64).train()(torch.zeros(2, 3, 64, 64))
    assert isinstance(outputs, Tensor)


def test_models_of_torchvisions_see_three_channels() -> None:
    assert [input_channels(model, 1) for model in ("small_cnn", "resnet9", "resnet18")] == [1, 1, 3]


@pytest.mark.parametrize(("size", "kernel", "stride"), [(64, 3, 1), (65, 7, 2)])
def test_a_resnet_for_small_images_begins_without_shrinking_them(size: int, kernel: int, stride: int) -> None:
    model = build("resnet18", image_size=size)
    first = model.get_submodule("conv1")
    assert isinstance(first, nn.Conv2d)
    assert (first.kernel_size, first.stride) == ((kernel, kernel), (stride, stride))
    assert isinstance(model.get_submodule("maxpool"), nn.Identity) == (kernel == 3)


def test_fresh_weights_are_those_of_torchs_global_random_state() -> None:
    one, same, other = (build("resnet18", seed=seed).state_dict() for seed in (0, 0, 1))
    assert_equal(one, same)
    assert not torch.equal(one["layer4.1.conv2.weight"], other["layer4.1.conv2.weight"])


def test_trying_a_model_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model_builder("small_cnn", classes=2, channels=1, image_size=28, weights=None)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_of_as_many_classes_are_taken_whole(tmp_path: Path) -> None:
    saved = build("resnet9", seed=5).state_dict()
    assert_equal(build("resnet9", weights=save(saved, tmp_path)).state_dict(), saved)


def test_weights_of_other_classes_leave_a_last_layer_that_the_seed_decides(tmp_path: Path) -> None:
    saved = build("resnet18", seed=5, classes=10)
    weights = save(saved.state_dict(), tmp_path)
    one, same, other = (build("resnet18", seed=seed, weights=weights) for seed in (0, 0, 1))
    assert_equal(body(one), body(saved))
    assert_equal(body(other), body(saved))
    assert_equal(one.state_dict(), same.state_dict())
    assert one.get_parameter("fc.weight").shape == (7, 512)
    assert not torch.equal(one.get_parameter("fc.weight"), other.get_parameter("fc.weight"))


def test_weights_may_lack_the_last_layer(tmp_path: Path) -> None:
    saved = body(build("resnet9", seed=5))
    assert_equal(body(build("resnet9", weights=save(saved, tmp_path))), saved)


def test_a_last_layer_that_convolves_is_replaced_too(tmp_path: Path) -> None:
    saved = build("squeezenet1_1", seed=5, classes=10, image_size=64).state_dict()
    model = build("squeezenet1_1", weights=save(saved, tmp_path), image_size=64)
    assert torch.equal(model.get_parameter("features.0.weight"), saved["features.0.weight"])
    assert model.get_parameter("classifier.1.weight").shape[0] == 7


def test_weights_are_read_once(tmp_path: Path) -> None:
    weights = Path(save(build("small_cnn", seed=5).state_dict(), tmp_path))
    builder = model_builder("small_cnn", classes=7, channels=3, image_size=32, weights=str(weights))
    weights.unlink()
    assert_equal(builder().state_dict(), builder().state_dict())


def test_models_begin_with_weights_of_their_own(tmp_path: Path) -> None:
    weights = save(build("small_cnn", seed=5).state_dict(), tmp_path)
    builder = model_builder("small_cnn", classes=7, channels=3, image_size=32, weights=weights)
    with torch.no_grad():
        builder().get_parameter("conv1.conv.weight").zero_()
    assert builder().get_parameter("conv1.conv.weight").any()


@pytest.mark.parametrize("stem", [3, 7])
def test_weights_decide_how_a_resnet_begins(stem: int, tmp_path: Path) -> None:
    saved = build("resnet18", seed=5, image_size=32 if stem == 3 else 224)
    model = build("resnet18", weights=save(saved.state_dict(), tmp_path), image_size=224 if stem == 3 else 32)
    assert_equal(model.state_dict(), saved.state_dict())
    assert isinstance(model.get_submodule("maxpool"), nn.Identity) == (stem == 3)


@pytest.mark.parametrize("name", ["DEFAULT", "IMAGENET1K_V1"])
def test_weights_of_torchvisions_are_found_in_hubs_folder_by_name(name: str, hub: Path) -> None:
    saved = torchvision.models.mnasnet0_5(num_classes=1000)
    torch.save(saved.state_dict(), hub / Path(torchvision.models.MNASNet0_5_Weights.DEFAULT.url).name)
    model = build("mnasnet0_5", weights=name)
    assert torch.equal(model.get_parameter("layers.0.weight"), saved.get_parameter("layers.0.weight"))
    assert model.get_parameter("classifier.1.weight").shape[0] == 7


def test_weights_that_cannot_be_downloaded_say_which_file_to_put_where(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: Any, **__: Any) -> NoReturn:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", offline)
    assert refusal("resnet18", weights="DEFAULT") == (
        "workload.weights: IMAGENET1K_V1 of resnet18 cannot be read (<urlopen error no network>); put "
        f"https://download.pytorch.org/models/resnet18-f37072fd.pth into {hub}, or give the path of a state dict"
    )
    assert list(hub.iterdir()) == []


def test_a_broken_file_in_hubs_folder_is_refused(hub: Path) -> None:
    (hub / "resnet18-f37072fd.pth").write_bytes(b"half a file")
    assert refusal("resnet18", weights="DEFAULT").startswith(
        "workload.weights: IMAGENET1K_V1 of resnet18 cannot be read ("
    )


def test_an_unknown_name_of_weights_lists_the_known_ones() -> None:
    assert refusal("resnet50", weights="IMAGENET") == (
        "workload.weights: no file 'IMAGENET'; must be IMAGENET1K_V1 or IMAGENET1K_V2 or DEFAULT, or the path of a "
        "state dict"
    )
    for no_file in ("DEFAULT", "x" * 300, ""):
        assert refusal("resnet9", weights=no_file).endswith(f"no file '{no_file}'; must be the path of a state dict")


def test_a_file_that_torch_did_not_save_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    file.write_text("no weights")
    assert refusal("resnet9", weights=str(file)).startswith(
        f"workload.weights: {file} is no state dict that torch.save wrote ("
    )


def test_a_truncated_state_dict_is_refused(tmp_path: Path) -> None:
    file = Path(save(build("small_cnn").state_dict(), tmp_path))
    file.write_bytes(file.read_bytes()[:-2000])
    assert "is no state dict that torch.save wrote" in refusal("small_cnn", weights=str(file))


def test_a_file_that_runs_code_when_read_is_refused(tmp_path: Path) -> None:
    file = save(build("small_cnn"), tmp_path)
    assert "is no state dict that torch.save wrote (Weights only load failed" in refusal("small_cnn", weights=file)


def test_a_checkpoint_with_more_than_a_state_dict_is_refused(tmp_path: Path) -> None:
    file = save({"epoch": 3, "model": build("small_cnn").state_dict()}, tmp_path)
    assert refusal("small_cnn", weights=file) == (
        f"workload.weights: {file} holds a dict with epoch, model; must be a state dict, name to tensor"
    )


def test_weights_of_another_model_are_refused_with_what_does_not_fit(tmp_path: Path) -> None:
    file = save(build("resnet9").state_dict(), tmp_path)
    problem = refusal("small_cnn", weights=file)
    assert problem.startswith(
        f"workload.weights: {file} of small_cnn does not fit the model; missing: conv1.conv.weight, conv1.norm.weight, "
    )
    assert "unknown: prep.conv.weight, " in problem


def test_weights_of_another_shape_are_refused_with_both_shapes(tmp_path: Path) -> None:
    file = save(build("small_cnn", channels=1).state_dict(), tmp_path)
    assert refusal("small_cnn", weights=file).endswith(
        "does not fit the model; of another shape: conv1.conv.weight (32, 1, 3, 3) instead of (32, 3, 3, 3)"
    )


def test_an_unknown_model_names_the_nearest() -> None:
    assert refusal("resnt18") == "workload.model: unknown model 'resnt18'; did you mean resnet18?"


def test_a_model_that_cannot_take_such_images_is_refused() -> None:
    problem = refusal("squeezenet1_1", image_size=8)
    assert problem.startswith("workload.model: squeezenet1_1 cannot take images of 8×8 pixels (")
    assert problem.endswith("); use another model or size")


def test_pretrained_weights_for_inputs_on_another_scale_are_refused() -> None:
    assert refusal("googlenet", weights="DEFAULT") == (
        "workload.weights: must be absent with googlenet, whose pretrained weights are for inputs on another scale"
    )
