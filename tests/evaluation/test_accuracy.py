"""Accuracy and loss against counts by hand, on every kind of source, and what is said of bad ones."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import secateur as sc
from channel_networks import Residual
from secateur.errors import DataError, MissingExtraError, NonFiniteError, UsageError
from secateur.evaluation import make_task
from secateur.observe.images import IMAGENET_MEAN, IMAGENET_STD, ImageSource, Preprocessing

SIZE = (6, 8)


class Brightest(nn.Module):
    """Tells which of three channels is the brightest: scores are the means over the pixels, times ``gain``."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return self.gain * x.mean(dim=(2, 3))


def picture(label: int, shade: int = 200, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A picture whose brightest channel is ``label``."""
    array = np.full((*size, 3), 50, dtype=np.uint8)
    array[..., label] = shade
    return array


LABELS = [0, 1, 2, 2, 1, 0, 2]


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    # the fourth label is wrong on purpose: six of seven are right
    y = np.array(LABELS)
    x = np.stack([picture(label) for label in LABELS])
    y[3] = 0
    np.savez(tmp_path / "shades.npz", x=x, y=y)
    return tmp_path / "shades.npz"


@pytest.fixture
def pil():
    return pytest.importorskip("PIL.Image")


def encoded(pil, array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    pil.fromarray(array).save(stream, format="png")
    return stream.getvalue()


def measured(source, models=None, **arguments):
    return sc.evaluate(models or [Brightest(), Brightest(-1.0)], tasks=[f"accuracy:{source}"], **arguments)


def test_accuracy_and_loss_are_those_by_hand(arrays):
    table = measured(f"{arrays}?mean=0&std=1&batch=3")
    accuracy, loss = table["accuracy:shades.npz"], table["loss:shades.npz"]
    # the darkest channels are two, of which the first counts: the label that is wrong for the other model
    assert accuracy.values == {"dense": 6 / 7, "pruned": 1 / 7}
    bright, dark = math.exp(200 / 255), math.exp(50 / 255)
    right, wrong = -math.log(bright / (bright + 2 * dark)), -math.log(dark / (bright + 2 * dark))
    assert loss.values["dense"] == pytest.approx((6 * right + wrong) / 7, rel=1e-6)
    assert accuracy.higher_is_better and not loss.higher_is_better
    assert accuracy.protocol == "shades.npz; 7 images; as they come; mean 0; std 1; batch 3" == loss.protocol


def test_the_mode_and_the_gradients_of_a_model_stay(arrays):
    module = Brightest().train()
    measured(arrays, [module])
    assert module.training and module.gain.grad is None and module.gain.requires_grad


def test_the_batch_size_changes_nothing(arrays):
    found = [measured(f"{arrays}?batch={n}")["loss:shades.npz"].values["dense"] for n in (1, 2, 64)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_a_limit_draws_by_seed(arrays):
    def drawn(seed, limit=4):
        images = ImageSource.parse(f"{arrays}?limit={limit}&batch=1", "accuracy").open(seed=seed)
        return [float(x.sum()) for x, _ in images]

    assert drawn(0) == drawn(0) and len(drawn(0)) == 4
    assert len({tuple(drawn(seed)) for seed in range(8)}) > 1
    assert len(drawn(0, limit=99)) == 7
    protocol = measured(f"{arrays}?limit=4", seed=3)["accuracy"].protocol
    assert "4 of 7 images drawn with seed 3" in protocol


def test_a_folder_has_one_class_per_sub_folder(tmp_path, pil):
    for number, label in enumerate(LABELS):
        folder = tmp_path / "photos" / "val" / "abc"[label]
        folder.mkdir(parents=True, exist_ok=True)
        pil.fromarray(picture(label)).save(folder / f"{number}.png")
    (tmp_path / "photos" / "val" / "a" / "notes.txt").write_text("not a picture")
    (tmp_path / "photos" / "val" / ".cache").mkdir()
    table = measured(f"{tmp_path / 'photos'}?size=6x8")
    assert table["accuracy:photos"].values == {"dense": 1.0, "pruned": 0.0}
    assert "split val; 7 images; 6x8" in table["accuracy:photos"].protocol
    assert (
        measured(tmp_path / "photos" / "val", example_inputs=(torch.zeros(1, 3, *SIZE),))["accuracy"].values["dense"]
        == 1
    )
    with pytest.raises(DataError, match="has no folder 'vla'; did you mean 'val'"):
        measured(f"{tmp_path / 'photos'}?split=vla")
    (tmp_path / "photos" / "val" / "a" / "0.png").write_bytes(b"torn")
    with pytest.raises(DataError, match=r"the image in a/0.png of photos can't be read") as caught:
        measured(f"{tmp_path / 'photos'}?size=6x8")
    assert "\n" not in str(caught.value)


def test_tables_are_read_with_their_columns(tmp_path, pil):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [{"bytes": encoded(pil, picture(label)), "path": None} for label in LABELS]
    (tmp_path / "set").mkdir()
    for name, begin, end in (("test-00000-of-00002", 0, 4), ("test-00001-of-00002", 4, 7)):
        columns = {"photo": cells[begin:end], "label": LABELS[begin:end]}
        parquet.write_table(arrow.table(columns), tmp_path / "set" / f"{name}.parquet")
    parquet.write_table(arrow.table({"photo": cells[:1], "label": [1]}), tmp_path / "set" / "train-0.parquet")
    settings = "image=photo&size=6x8"
    table = measured(f"{tmp_path / 'set'}?{settings}")
    assert table["accuracy:set"].values["dense"] == 1.0 and "split test; 7 images" in table["accuracy"].protocol
    assert measured(f"{tmp_path / 'set'}?{settings}&split=train")["accuracy"].values["dense"] == 0.0
    assert (
        "3 of 4 images"
        in measured(f"{tmp_path}/set/test-00000-of-00002.parquet?{settings}&limit=3")["accuracy"].protocol
    )
    with pytest.raises(
        DataError, match=r"has no column 'image'.* \(it has photo, label\); name it with \?image=COLUMN"
    ):
        measured(tmp_path / "set")
    with pytest.raises(DataError, match="has no split 'tset'; did you mean 'test'"):
        measured(f"{tmp_path / 'set'}?split=tset")


def test_a_saved_data_set_is_read(tmp_path, pil):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(pil, picture(label)), "path": None} for label in LABELS]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = datasets.Dataset.from_dict({"img": cells, "label": LABELS}, features=features)
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(tmp_path / "saved")
    table = measured(f"{tmp_path / 'saved'}?size=6x8")
    assert table["accuracy:saved"].values["dense"] == 1.0 and "split test; 3 images" in table["accuracy"].protocol
    rows.save_to_disk(tmp_path / "flat")
    assert "2 of 7 images" in measured(f"{tmp_path / 'flat'}?size=6x8&limit=2")["accuracy"].protocol


def test_a_data_set_by_name_is_streamed(monkeypatch, pil):
    datasets = pytest.importorskip("datasets")
    cells = [{"bytes": encoded(pil, picture(label)), "path": None} for label in LABELS]
    rows = datasets.Dataset.from_dict({"image": cells, "label": LABELS})
    asked = []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return rows.to_iterable_dataset()

    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation"])
    monkeypatch.setattr(datasets, "load_dataset", load)
    table = measured("owner/shades:small?size=6x8&limit=5")
    assert asked == [("owner/shades", "small", "validation", True)]
    assert table["accuracy:owner/shades:small"].values["dense"] == 1.0
    assert "split validation; 5 images drawn with seed 0" in table["accuracy"].protocol
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(OSError("no such\nset")))
    with pytest.raises(DataError, match="data set shades can't be loaded: no such"):
        measured("shades")


def test_grey_pictures_follow_the_example_inputs(tmp_path, pil):
    for label in (0, 1):
        (tmp_path / "grey" / str(label)).mkdir(parents=True)
        pil.fromarray(np.full((4, 4), 200 * label, dtype=np.uint8)).save(tmp_path / "grey" / str(label) / "one.png")
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    nn.init.constant_(net[1].weight[0], -1.0), nn.init.constant_(net[1].weight[1], 1.0)
    x = torch.zeros(1, 1, 4, 4)
    assert measured(f"{tmp_path / 'grey'}?mean=0.4&std=0.5", [net], example_inputs=(x,))["accuracy"].values == {
        "dense": 1.0
    }
    with pytest.raises(DataError, match=r"images have 1 channel.* and mean 3 numbers"):
        measured(tmp_path / "grey", [net], example_inputs=(x,))


# -- preparation -------------------------------------------------------------------------------------------------------


def test_bytes_are_scaled_and_normalised():
    x = Preprocessing()(picture(1), "here")
    expected = (np.array([50, 200, 50]) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    assert x.shape == (3, *SIZE) and x.dtype == torch.float32
    np.testing.assert_allclose(x[:, 0, 0], expected, rtol=1e-5)


def test_floats_are_taken_as_they_are_with_channels_first_or_last():
    plain = Preprocessing(mean=(0.0,), std=(1.0,))
    image = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    assert torch.equal(plain(image, "here"), torch.from_numpy(image))
    assert torch.equal(plain(image.transpose(1, 2, 0), "here"), torch.from_numpy(image))
    assert plain(image[0], "here").shape == (1, 5, 7)


def test_numbers_of_another_byte_order_are_the_same_numbers():
    plain = Preprocessing(mean=(0.0,), std=(1.0,))
    image = np.random.default_rng(0).standard_normal((3, 5, 7)).astype(np.float32)
    for order in "<>":
        assert torch.equal(plain(image.astype(f"{order}f4"), "here"), torch.from_numpy(image))


def test_the_centre_is_cut_out_of_the_resized_picture():
    plain = Preprocessing(size=(4, 4), crop=0.5, mean=(0.0,), std=(1.0,))
    image = np.zeros((8, 16, 3), dtype=np.uint8)
    image[2:6, 6:10] = 255  # the shorter side is 8 = 4 / 0.5 already, so that this is what is left
    assert bool((plain(image, "here") == 1).all())
    assert plain(np.zeros((9, 30, 3), dtype=np.uint8), "here").shape == (3, 4, 4)
    assert plain(np.zeros((3, 2, 3), dtype=np.uint8), "here").shape == (3, 4, 4)


def test_resizing_is_torchvisions():
    library = pytest.importorskip("torchvision.transforms.v2.functional")
    image = np.random.default_rng(0).integers(0, 256, (37, 61, 3)).astype(np.uint8)
    x = torch.from_numpy(image).permute(2, 0, 1).float() / 255
    theirs = library.center_crop(library.resize(x, [32], antialias=True), [28, 28])
    ours = Preprocessing(size=(28, 28), mean=(0.0,), std=(1.0,))(image, "here")
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# -- networks of fixed sizes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "digits.npz"
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (7, 3, 12, 12)).astype(np.uint8)
    np.savez(path, x_train=x[:1], y_train=np.zeros(1, int), x_test=x, y_test=np.arange(7) % 10)
    return path


def test_an_exported_graph_and_an_onnx_model_take_the_images_in_their_own_batches(digits, tmp_path):
    module, x = Residual().eval(), torch.zeros(4, 3, 12, 12)
    graph = torch.export.export(module, (x,)).module()
    torch.onnx.export(module, (x,), tmp_path / "net.onnx", dynamo=True, verbose=False)
    models = {"module": module, "graph": graph, "onnx": tmp_path / "net.onnx"}
    table = sc.evaluate(models, tasks=[f"accuracy:{digits}"])
    assert "split test; 7 images" in table["accuracy"].protocol
    first, *others = table["loss:digits.npz"].values.values()
    assert others == pytest.approx([first, first], rel=1e-5)
    assert len(set(table["accuracy"].values.values())) == 1


def test_a_model_of_transformers_answers_with_logits(digits):
    class Output(dict):
        logits = torch.eye(10)[:7]

    class Named(nn.Module):
        def forward(self, x):
            return Output()

    assert sc.evaluate(Named(), tasks=f"accuracy:{digits}")["accuracy"].values == {"dense": 1.0}


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("accuracy", "accuracy needs images"),
        ("accuracy:x.npz?limt=3", "accuracy has no setting 'limt'; did you mean 'limit'"),
        ("accuracy:x.npz?limit=0", "limit must be a whole number of at least 1, got '0'"),
        ("accuracy:x.npz?batch=many", "batch must be a whole number of at least 1, got 'many'"),
        ("accuracy:x.npz?size=3y4", "size must be pixels, as in 224 or 224x320, got '3y4'"),
        ("accuracy:x.npz?crop=1.5", "crop must be the fraction"),
        ("accuracy:x.npz?mean=nan", "mean must be numbers"),
        ("accuracy:x.npz?std=0.5,0", "std must be positive numbers"),
    ],
)
def test_bad_settings_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        make_task(text)


def refused(error, match, source, models=None, **arguments):
    with pytest.raises(error, match=match) as caught:
        measured(source, models, **arguments)
    assert "\n" not in str(caught.value)


def test_bad_data_is_refused_in_one_sentence(tmp_path, arrays):
    refused(DataError, "does not exist", tmp_path / "nowhere")
    refused(DataError, "is no folder, .npz or .parquet file", Path(__file__))
    (tmp_path / "torn.npz").write_bytes(arrays.read_bytes()[:100])
    refused(DataError, "can't be read as an .npz file", tmp_path / "torn.npz")
    (tmp_path / "empty").mkdir()
    refused(DataError, "holds no images", tmp_path / "empty")
    x, y = np.zeros((2, 4, 4, 3), dtype=np.uint8), np.zeros(2, dtype=int)
    for arrays_, match in (
        ({"x": x}, r"has no array 'y' \(it has x\)"),
        ({"x": x, "y": y[:1]}, r"must hold images .* got x \[2, 4, 4, 3\] and y \[1\]"),
        ({"x": x[:0], "y": y[:0]}, "holds no images"),
        ({"x": x, "y": y - 1}, "must be a class index from 0"),
        ({"x": x, "y": y + 0.5}, "must be a class index from 0"),
        ({"x": x, "y": y + 3}, "holds class 3, and model dense tells 3 classes apart"),
        ({"x": x.astype(int), "y": y}, "must be uint8"),
        ({"x": x.astype(bool), "y": y}, "must be uint8 .* got bool"),
        ({"x": x.astype(np.complex64), "y": y}, "must be uint8 .* got complex64"),
        ({"x": x.astype(str), "y": y}, "must be uint8 .* got <U"),
        ({"x": x.astype(object), "y": y}, "can't be read as an .npz file"),
    ):
        np.savez(tmp_path / "bad.npz", **arrays_)
        refused(DataError, match, tmp_path / "bad.npz")


def test_bad_models_are_refused_in_one_sentence(arrays):
    refused(NonFiniteError, "model dense gives scores that are NaN or inf", arrays, [Brightest(float("nan"))])
    refused(UsageError, "model dense doesn't run on images of 7x3x6x8", arrays, [nn.Conv2d(4, 1, 1)])
    refused(UsageError, "accuracy is of classifiers", arrays, [nn.Conv2d(3, 1, 1)])
    refused(UsageError, "can't evaluate a int", arrays, [3])


def test_what_isnt_installed_is_named(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    refused(
        MissingExtraError, r"needs torchvision, .*pip install 'secateur\[vision\]'", "torchvision:CIFAR10?root=data"
    )


def test_a_data_set_of_torchvision(monkeypatch):
    import sys
    import types

    class Shades:
        def __init__(self, root, train=True):
            if root == "nowhere":
                raise RuntimeError("Dataset not found.\nYou can use download=True")
            self.labels = LABELS[:2] if train else LABELS

        def __len__(self):
            return len(self.labels)

        def __getitem__(self, number):
            return picture(self.labels[number]), self.labels[number]

    library = types.SimpleNamespace(Shades=Shades, __all__=["Shades"])
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=library))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", library)
    table = measured("torchvision:Shades?root=data&size=6x8")
    assert (
        table["accuracy:torchvision:Shades"].values["dense"] == 1.0
        and "split test; 7 images" in table["accuracy"].protocol
    )
    assert "2 images" in measured("torchvision:Shades?root=data&split=train&size=6x8")["accuracy"].protocol
    refused(UsageError, "needs the folder that holds it", "torchvision:Shades")
    refused(UsageError, "has no data set 'Shade'; did you mean 'Shades'", "torchvision:Shade?root=data")
    refused(DataError, "can't be read from nowhere: Dataset not found", "torchvision:Shades?root=nowhere")
