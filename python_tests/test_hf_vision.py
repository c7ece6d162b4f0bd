"""Fine-tuning on images: folders, the Hub's form, processors, and a loss that falls on real handwritten digits."""

import functools
import json
import sys
import types

import pytest
import torch

from lozo_kernels.errors import InputError
from lozo_kernels.hf.data import image_sets as vision_data
from lozo_kernels.hf.data.load import load_data
from lozo_kernels.hf.finetune import finetune
from lozo_kernels.hf.models.checkpoint import open_checkpoint
from lozo_kernels.hf.objectives import ImageObjective, choose_objective
from lozo_kernels.hf.settings import Settings
from lozo_kernels.hf.tasks import TASKS

transformers = pytest.importorskip("transformers")
Image = pytest.importorskip("PIL.Image")


def vit(folder, side=8, channels=1, **more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 2}
    config = transformers.ViTConfig(**sizes, image_size=side, num_channels=channels, initializer_range=0.15, **more)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return str(folder)


def write(folder, counts, side=6, suffix="png"):
    """Images of noise, so many of each class."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(0, 256, (side, side, 3), dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / name / f"{i}.{suffix}")
    return folder


def settings(data, **more):
    return Settings(task="images", data_dir=str(data), **more)


def test_digits(tmp_path):
    """Real digits, three classes of them: LOZO teaches a tiny ViT with random weights to tell them apart, mostly."""
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    digits = datasets.load_digits()
    chosen = [pair for pair in zip(digits.images, digits.target, strict=True) if pair[1] < 3][:400]
    for i, (pixels, digit) in enumerate(chosen):
        folder = tmp_path / "data" / ("train" if i < 320 else "dev") / f"digit {digit}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / f"{i}.png")
    summary = finetune(
        settings(
            tmp_path / "data",
            model=vit(tmp_path / "model"),
            lr=1e-3,
            steps=150,
            interval=10,
            rank=4,
            batch_size=64,
            eval_every=150,
            output=str(tmp_path / "out"),
        ),
        quiet=True,
    )
    assert summary["objective"] == "image" and summary["stopped"] is None
    # Better than any guess that does not look: log 3 = 1.099.
    assert summary["loss_after"] < min(1.0, summary["loss_before"] - 0.1) and summary["accuracy_after"] > 0.5
    print(summary["loss_before"], summary["loss_after"], summary["accuracy_after"])
    tuned = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out" / "model")
    assert tuned.config.id2label[2] == "digit 2"
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out" / "model")
    assert processor.size["height"] == 8
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "AutoModelForImageClassification" in card


@pytest.mark.parametrize("method, placement", [("mezo-m", "inplace"), ("lozo", "probe"), ("ft-adamw", "inplace")])
def test_other_methods(tmp_path, method, placement):
    data = write(tmp_path / "data", {"a": 9, "b": 8})
    more = {"dtype": "bfloat16", "steps": 2, "eval_every": 2, "batch_size": 4, "output": str(tmp_path / "out")}
    model = vit(tmp_path / "model", channels=3)
    summary = finetune(settings(data, model=model, method=method, placement=placement, **more), quiet=True)
    assert summary["steps_done"] == 2 and summary["data"]["train_examples"] == 16


def test_folders(tmp_path):
    write(tmp_path / "train", {"cat": 3, "ant": 2, "bee": 1}, suffix="jpg")
    write(tmp_path / "val", {"bee": 2, "cat": 1})
    data = load_data(settings(tmp_path))
    assert data.task.labels == ("ant", "bee", "cat")
    assert [e.label for e in data.train] == [0, 0, 1, 2, 2, 2]
    assert [e.label for e in data.dev] == [1, 1, 2]  # by name, although this part lacks a class
    assert data.train[0].read().size == (6, 6)


def test_a_tenth_is_held_out(tmp_path):
    data = load_data(settings(write(tmp_path / "all", {"a": 12, "b": 11})))
    assert (len(data.train), len(data.dev)) == (21, 2)
    assert not {e.texts for e in data.train} & {e.texts for e in data.dev}


def test_few_shots(tmp_path):
    write(tmp_path / "train", {"a": 9, "b": 9})
    write(tmp_path / "test", {"a": 2, "b": 2})
    data = load_data(settings(tmp_path, k_shot=3, model=vit(tmp_path / "model")).resolved())
    assert sorted(e.label for e in data.train) == [0, 0, 0, 1, 1, 1] and len(data.dev) == 6


def test_pixels_are_those_of_the_processor(tmp_path):
    """With a processor of its own, the checkpoint's decides on size, mean and deviation."""
    model = vit(tmp_path / "model", side=10, channels=3)
    transformers.ViTImageProcessor(
        size={"height": 10, "width": 10}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], resample=0
    ).save_pretrained(model)
    checkpoint = open_checkpoint(settings(tmp_path, model=model))
    image = Image.new("RGB", (5, 5), (255, 0, 128))
    pixels = checkpoint.tokenizer([image])
    expected = [(1 - 0.1) / 0.5, (0 - 0.2) / 0.6, (128 / 255 - 0.3) / 0.7]
    assert pixels.shape == (1, 3, 10, 10)
    for channel, value in zip(pixels[0], expected, strict=True):
        assert torch.allclose(channel, torch.full((10, 10), value), atol=1e-5)


def test_grey_pixels_without_a_processor(tmp_path):
    checkpoint = open_checkpoint(settings(tmp_path, model=vit(tmp_path / "model")))
    pixels = checkpoint.tokenizer([Image.new("L", (8, 8), 255), Image.new("L", (8, 8), 0)])
    assert pixels.shape == (2, 1, 8, 8)
    assert torch.allclose(pixels[0], torch.tensor(1.0)) and torch.allclose(pixels[1], torch.tensor(-1.0))


def hub_set(columns, names, label):
    """A part of a data set as the library ``datasets`` gives it, as far as it is used."""
    part = types.SimpleNamespace(column_names=list(columns), features={label: types.SimpleNamespace(names=names)})
    count = len(columns[label])

    class Rows:
        column_names, features = part.column_names, part.features

        def __getitem__(self, key):
            return columns[key] if isinstance(key, str) else {name: columns[name][key] for name in columns}

        def __len__(self):
            return count

    return Rows()


@pytest.mark.parametrize("task, label", [("cifar100", "fine_label"), ("images", "label")])
def test_the_hub(monkeypatch, task, label):
    images = [Image.new("RGB", (4, 4), (i, 0, 0)) for i in range(3)]
    column = {"img": images, label: [1, 0, 1]}
    loaded = []

    def load(path, *_, **__):
        loaded.append(path)
        return {"train": hub_set(column, ["apple", "pear"], label), "test": hub_set(column, ["apple", "pear"], label)}

    fake = types.SimpleNamespace(load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    some = Settings(task=task, data_dir=None if task == "cifar100" else "owner/name")
    data = vision_data.load_images(some)
    assert loaded == ["uoft-cs/cifar100" if task == "cifar100" else "owner/name"]
    assert data.task.labels == ("apple", "pear") and [e.label for e in data.dev] == [1, 0, 1]
    assert data.train[2].read() is images[2] and data.source == f"the Hub: {loaded[0]}"


def test_names_of_the_hub_pass_the_settings(tmp_path):
    model = vit(tmp_path / "model")
    assert settings("owner/name", model=model).resolved().data_dir == "owner/name"
    with pytest.raises(InputError, match="there is no folder"):
        settings(tmp_path / "none", model=model).resolved()


def test_objective():
    assert choose_objective("auto", TASKS["images"], causal=False) == ImageObjective.name
    with pytest.raises(InputError, match="does not go with"):
        choose_objective("lm", TASKS["images"], causal=False)
    with pytest.raises(InputError, match="does not go with"):
        choose_objective("image", TASKS["sst2"], causal=False)


def empty_class(folder):
    write(folder, {"a": 2, "b": 1})
    (folder / "b" / "0.png").rename(folder / "b" / "0.gz")


@pytest.mark.parametrize(
    "make, message",
    [
        (empty_class, "no images"),
        (functools.partial(write, counts={"a": 2}), "two classes or more"),
        (lambda folder: write(folder / "train", {"a": 2, "b": 2}), "none of dev"),
        (
            lambda folder: [
                write(folder / part, names) for part, names in (("train", {"a": 1, "b": 1}), ("dev", {"a": 1, "c": 1}))
            ],
            "'c'",
        ),
    ],
)
def test_bad_folders(tmp_path, make, message):
    make(tmp_path / "data")
    with pytest.raises(InputError, match=message):
        load_data(settings(tmp_path / "data"))


def test_bad_files_and_models(tmp_path):
    data = write(tmp_path / "data", {"a": 2, "b": 2})
    (data / "a" / "0.png").write_text("not an image")
    with pytest.raises(InputError, match=r"0\.png: not an image"):
        vision_data.read_image(data / "a" / "0.png")
    with pytest.raises(InputError, match="needs --model"):
        open_checkpoint(settings(data))
    text = tmp_path / "text"
    text.mkdir()
    (text / "config.json").write_text(json.dumps({"model_type": "opt"}))
    with pytest.raises(InputError, match="do not classify images"):
        open_checkpoint(settings(data, model=str(text)))
