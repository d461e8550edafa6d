"""Loading weights in one line: folders, both formats, torch.hub, another number of classes; bad files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hubconf
from parity_tests.helpers.paths import ROOT
from porting.parity.compared_weights import read_weight_file
from pytorch_model import ConfigError, EfficientDet, WeightsError, create_model, load_model
from pytorch_model.config import MODELS, model_config
from pytorch_model.efficientdet import CLASS_PREDICTOR
from pytorch_model.weights.files import read_weights, write_weights

MODEL = "efficientdet_lite0"


@pytest.fixture(scope="module")
def network() -> EfficientDet:
    torch.manual_seed(3)
    model = create_model(MODEL, num_classes=7, fpn_cell_repeats=1, box_class_repeats=1)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return model


@pytest.fixture(scope="module")
def full() -> EfficientDet:
    torch.manual_seed(3)
    return create_model(MODEL)


def same(a: EfficientDet, b: EfficientDet, but: tuple[str, ...] = ()) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][key]) for key, value in states[0].items() if key not in but
    )


# --- folders and files --------------------------------------------------------------------------------


def test_a_folder_round_trips(tmp_path: Path, network: EfficientDet) -> None:
    network.save_pretrained(tmp_path / "new" / "model", {"note": "hello", "step": "12"})
    assert sorted(p.name for p in (tmp_path / "new" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = EfficientDet.from_pretrained(tmp_path / "new" / "model")
    assert loaded.config == network.config
    assert same(loaded, network)
    assert not loaded.training
    assert all(p.requires_grad for p in loaded.parameters())
    assert read_weights(tmp_path / "new" / "model")[2] == {"note": "hello", "step": "12"}
    assert same(EfficientDet.from_pretrained(tmp_path / "new" / "model" / "model.safetensors"), network)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_files_of_both_formats_load(tmp_path: Path, network: EfficientDet, name: str) -> None:
    write_weights(tmp_path / name, network.state_dict(), network.config, {})
    assert same(EfficientDet.from_pretrained(tmp_path / name), network)


def test_a_file_of_tensors_gets_the_configuration_beside_it(tmp_path: Path, network: EfficientDet) -> None:
    network.save_pretrained(tmp_path)
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    assert same(load_model(tmp_path / "bare.pth"), network)
    (tmp_path / "model.safetensors").unlink()
    assert same(load_model(tmp_path), network)


def test_saving_again_replaces(tmp_path: Path, network: EfficientDet, full: EfficientDet) -> None:
    full.save_pretrained(tmp_path)
    network.save_pretrained(tmp_path)
    assert same(load_model(tmp_path), network)
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_of_the_disk_leaves_the_folder_unchanged(tmp_path: Path, network: EfficientDet) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(WeightsError, match="cannot write"):
        network.save_pretrained(tmp_path / "file")
    (tmp_path / "folder" / "model.safetensors").mkdir(parents=True)
    with pytest.raises(WeightsError, match="cannot write"):
        network.save_pretrained(tmp_path / "folder")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["model.safetensors"]


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        change(content)
        (folder / "config.json").write_text(json.dumps(content))

    return apply


def two_files(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "a.pth")
    (folder / "b.pth").touch()


def no_classes(content: dict[str, Any]) -> None:
    content["config"]["num_classes"] = 0


def other_config(content: dict[str, object]) -> None:
    content["config"] = model_config("efficientdet-lite1").to_dict()


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "is not a folder of weights: it needs config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "is not a folder of weights"),
    "two to choose from": (
        two_files,
        "is not a folder of weights",
    ),
    "other configuration": (edit(other_config), "does not have the configuration in .*config.json"),
    "not JSON": (lambda f: (f / "config.json").write_text("{"), "is not an EfficientDet configuration"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), "is not an EfficientDet configuration"),
    "not UTF-8": (lambda f: (f / "config.json").write_bytes(b"\xff"), "is not an EfficientDet configuration"),
    "no metadata": (edit(lambda c: c.pop("metadata")), "is not an EfficientDet configuration"),
    "bad field": (edit(no_classes), "num_classes is 0"),
    "damaged weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
        "damaged",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_rejected(fault: str, tmp_path: Path, network: EfficientDet) -> None:
    network.save_pretrained(tmp_path)
    spoil, message = BROKEN[fault]
    spoil(tmp_path)
    with pytest.raises(WeightsError, match=message):
        load_model(tmp_path)


def test_tensors_without_any_configuration_are_rejected(tmp_path: Path, network: EfficientDet) -> None:
    torch.save(network.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match=r"no EfficientDet configuration, and there is no config.json"):
        load_model(tmp_path / "bare.pth")


def test_metadata_that_is_not_text_becomes_text(tmp_path: Path, network: EfficientDet) -> None:
    config = json.dumps(network.config.to_dict())
    content = {"state_dict": network.state_dict(), "config": config, "metadata": {"step": 5, 1: None}}
    torch.save(content, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")[2] == {"step": "5", "1": "null"}
    torch.save({**content, "metadata": {"step": [[5]]}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="has metadata that is more than text"):
        read_weights(tmp_path / "w.pth")


def named_by_hash(folder: Path, network: EfficientDet) -> Path:
    """A file of tensors, named like a release file, with ``config.json`` beside it."""
    network.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(network.state_dict(), folder / "bare.pth")
    digest = hashlib.sha256((folder / "bare.pth").read_bytes()).hexdigest()
    return (folder / "bare.pth").rename(folder / f"lite0-{digest[:8]}.pth")


def test_a_release_is_compared_with_the_hash_in_its_name(tmp_path: Path, network: EfficientDet) -> None:
    path = named_by_hash(tmp_path, network)
    assert same(load_model(path), network)
    data = bytearray(path.read_bytes())
    value = network.state_dict()[CLASS_PREDICTOR[0]].numpy().tobytes()
    data[bytes(data).index(value) + 5] ^= 1
    path.write_bytes(data)
    refused = pytest.raises(
        WeightsError, match=rf"does not begin with the {path.stem[-8:]} in its name; download it again"
    )
    for read in (load_model, read_weight_file):
        with refused:
            read(path)
        with refused:
            read(tmp_path if read is load_model else path)
    with refused:
        hub(MODEL, weights=path)
    assert not same(load_model(path.rename(tmp_path / "mine.pth")), network)  # no digits to compare with


def test_only_a_file_of_tensors_is_compared_with_digits_in_its_name(
    tmp_path: Path, network: EfficientDet
) -> None:
    path = named_by_hash(tmp_path, network).rename(tmp_path / "lite0-20240131.pth")
    with pytest.raises(WeightsError, match="these digits mean something else, rename it"):
        load_model(path)
    for name in ("lite0_20240131.pth", "lite0-20240131-best.pth", "lite0-2024013.pth"):
        assert same(load_model(path.rename(tmp_path / name)), network)
        path = tmp_path / name
    write_weights(tmp_path / "ours-20240131.pth", network.state_dict(), network.config, {})
    assert same(load_model(tmp_path / "ours-20240131.pth"), network)  # it has its own digest


def test_a_model_from_a_state_dict_shares_its_tensors_and_dtype(network: EfficientDet) -> None:
    state_dict = {
        key: tensor.double() if tensor.is_floating_point() else tensor
        for key, tensor in network.state_dict().items()
    }
    model = EfficientDet.from_state_dict(state_dict, network.config)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert all(t.data_ptr() == state_dict[key].data_ptr() for key, t in model.state_dict().items())
    assert not model.training
    assert model(torch.zeros(1, 3, 128, 128, dtype=torch.float64))[0][0].dtype == torch.float64
    with pytest.raises(WeightsError, match=r"the state dict lacks tensor backbone.*it does not fit"):
        EfficientDet.from_state_dict({}, network.config)


# --- another number of classes ------------------------------------------------------------------------


def test_other_classes_reinitialise_the_predictor_and_keep_the_rest(
    tmp_path: Path, network: EfficientDet
) -> None:
    network.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = EfficientDet.from_pretrained(tmp_path, num_classes=20)
    assert loaded.config == network.config.replace(num_classes=20)
    assert same(loaded, network, but=CLASS_PREDICTOR)
    weight, bias = (loaded.state_dict()[key] for key in CLASS_PREDICTOR)
    assert weight.shape[0] == bias.shape[0] == 20 * network.config.num_anchors
    assert weight.std() > 0
    assert torch.allclose(bias.sigmoid(), torch.tensor(0.01))
    loaded(torch.zeros(1, 3, 128, 128))[0][0].sum().backward()  # it trains
    assert loaded.class_net.predict.pointwise.weight.grad is not None


def test_the_reinitialised_tensors_are_those_that_depend_on_the_classes() -> None:
    with torch.device("meta"):
        states = [EfficientDet(model_config(MODEL, num_classes=n)).state_dict() for n in (7, 8)]
    assert tuple(k for k in states[0] if states[0][k].shape != states[1][k].shape) == CLASS_PREDICTOR


def test_the_same_number_of_classes_keeps_everything(tmp_path: Path, network: EfficientDet) -> None:
    network.save_pretrained(tmp_path)
    assert same(load_model(tmp_path, num_classes=7), network)


def test_an_impossible_number_of_classes_is_rejected(tmp_path: Path, network: EfficientDet) -> None:
    network.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="num_classes is 0"):
        load_model(tmp_path, num_classes=0)
    with pytest.raises(ConfigError, match="num_classes is 0"):
        hub(MODEL, num_classes=0)


def test_half_precision_stays_half_with_other_classes(tmp_path: Path, network: EfficientDet) -> None:
    half = load_of(network).half()
    half.save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path, num_classes=3).parameters()} == {torch.float16}


def load_of(network: EfficientDet) -> EfficientDet:
    copy = EfficientDet(network.config)
    copy.load_state_dict(network.state_dict())
    return copy


# --- torch.hub ----------------------------------------------------------------------------------------


def hub(model: str, **arguments: object) -> EfficientDet:
    loaded = torch.hub.load(ROOT, model, source="local", **arguments)  # type: ignore[no-untyped-call]
    assert isinstance(loaded, EfficientDet)
    return loaded


def test_hub_shows_every_variant_and_nothing_else() -> None:
    shown = [n for n, value in vars(hubconf).items() if callable(value) and not n.startswith("_")]
    assert shown == [model.replace("-", "_") for model in MODELS]
    assert "num_classes" in str(vars(hubconf)["efficientdet_d7x"].__doc__)


def test_hub_builds_untrained_and_loads_every_kind_of_file(tmp_path: Path, full: EfficientDet) -> None:
    assert hub(MODEL).config == model_config(MODEL)
    assert hub(MODEL, num_classes=4).config.num_classes == 4
    full.save_pretrained(tmp_path / "folder")
    write_weights(tmp_path / "with.pth", full.state_dict(), full.config, {})
    torch.save(full.state_dict(), tmp_path / "bare.pth")
    for name in ("folder", "folder/model.safetensors", "with.pth", "bare.pth"):
        assert same(hub(MODEL, weights=str(tmp_path / name)), full), name
    changed = hub(MODEL, weights=tmp_path / "bare.pth", num_classes=2)
    assert same(changed, full, but=CLASS_PREDICTOR)
    assert changed.config.num_classes == 2


def test_hub_rejects_another_models_weights(tmp_path: Path, full: EfficientDet) -> None:
    full.save_pretrained(tmp_path / "folder")
    torch.save(full.state_dict(), tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match="holds efficientdet-lite0, not efficientdet-lite1"):
        hub("efficientdet_lite1", weights=tmp_path / "folder")
    with pytest.raises(WeightsError, match="it does not fit efficientdet-lite1"):
        hub("efficientdet_lite1", weights=tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match="no weight file"):
        hub(MODEL, weights=tmp_path / "absent.pth")


def test_hub_fetches_an_address_and_checks_its_hash(
    tmp_path: Path, full: EfficientDet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save(full.state_dict(), tmp_path / "bare.pth")
    digest = hashlib.sha256((tmp_path / "bare.pth").read_bytes()).hexdigest()
    good = tmp_path / f"efficientdet_lite0-{digest[:8]}.pth"
    shutil.copy(tmp_path / "bare.pth", good)
    assert same(hub(MODEL, weights=good.as_uri()), full)
    good.unlink()
    assert same(hub(MODEL, weights=good.as_uri()), full)  # kept from the first download
    (kept,) = (tmp_path / "home/hub/checkpoints").iterdir()
    data = bytearray(kept.read_bytes())
    data[bytes(data).index(full.state_dict()[CLASS_PREDICTOR[0]].numpy().tobytes()) + 5] ^= 1
    kept.write_bytes(data)
    with pytest.raises(WeightsError, match=rf"{kept.name} is damaged or misnamed: its SHA-256"):
        hub(MODEL, weights=good.as_uri())
    bad = tmp_path / "efficientdet_lite0-00000000.pth"
    shutil.copy(tmp_path / "bare.pth", bad)
    with pytest.raises(WeightsError, match="invalid hash value"):
        hub(MODEL, weights=bad.as_uri())
    with pytest.raises(WeightsError, match="cannot get weights"):
        hub(MODEL, weights=(tmp_path / "absent-12345678.pth").as_uri())
    longer = tmp_path / f"efficientdet_lite0-{'0' * 64}.pth"
    shutil.copy(tmp_path / "bare.pth", longer)
    with pytest.raises(WeightsError, match="invalid hash value"):
        hub(MODEL, weights=longer.as_uri())
    with pytest.raises(WeightsError, match=r"its name must end in \.pth; fetch the file by hand"):
        hub(MODEL, weights=(tmp_path / "network.pt").as_uri())


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit(77)",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Code(), "nothing in it was run"),
        ({"x": torch.zeros(1).expand(2_000_000_000)}, "describes 8000000000 bytes of tensors"),
        ({"x": torch.ones(3).to_sparse()}, "x is sparse"),
    ],
    ids=["code", "giant", "sparse"],
)
def test_hub_rejects_files_that_are_not_plain_state_dicts(
    content: object, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    torch.save(content, tmp_path / "bare.pth")
    with pytest.raises(WeightsError, match=message) as caught:
        hub(MODEL, weights=(tmp_path / "bare.pth").as_uri())
    assert "weights_only" not in str(caught.value)
