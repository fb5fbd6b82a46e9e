"""Predictions for image files and test images, and the confusion matrix: the model's own, and what is refused."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fmnist import checkpoint, data, images, models, plots
from fmnist.__main__ import main
from softxent import dispatch

DATASET = data.load("sample")


@pytest.fixture(autouse=True)
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint that knows something: each class's mean image, centred, as its template."""
    pixels = torch.tensor(DATASET.train_images).flatten(1).float() / 255
    labels = torch.tensor(DATASET.train_labels).long()
    means = torch.stack([pixels[labels == i].mean(0) for i in range(10)])
    model = models.softmax_regression()
    model.load_state_dict({"weight": means, "bias": -means.square().sum(1) / 2})
    checkpoint.save(tmp_path / "model.safetensors", "softmax", model, {})
    return tmp_path / "model.safetensors"


def predict(checkpoint: Path, *arguments: object) -> int:
    return main(["predict", "--checkpoint", str(checkpoint), "--data", "sample", *map(str, arguments)])


def expected(trained: Path, image: np.ndarray) -> list[tuple[str, float]]:
    _, model = checkpoint.load(trained)
    logits = model(torch.tensor(image).reshape(1, 784) / 255)
    p = torch.softmax(logits[0].double(), 0)
    return sorted(((data.LABELS[i], p[i].item()) for i in range(10)), key=lambda pair: -pair[1])


def printed(line: str) -> list[tuple[str, float]]:
    pairs = [part.rsplit(" ", 1) for part in line.split(": ", 1)[1].split(", ")]
    return [(name, float(value)) for name, value in pairs]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P"])
def test_a_file_has_the_models_probabilities_whatever_its_kind(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    Image.fromarray(DATASET.test_images[1]).convert(mode).save(tmp_path / "a.png")
    np.testing.assert_array_equal(images.read(tmp_path / "a.png"), DATASET.test_images[1])
    assert predict(trained, tmp_path / "a.png", "--top", 10) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith(f"{tmp_path / 'a.png'}: ")
    for (name, p), (expected_name, expected_p) in zip(
        printed(line), expected(trained, DATASET.test_images[1]), strict=True
    ):
        assert name == expected_name and abs(p - expected_p) < 6e-5


def test_without_files_the_first_test_images_are_named_with_their_labels(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(trained, "--number", 5) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 5
    for i, line in enumerate(lines):
        assert line.startswith(f"test image {i}, {data.LABELS[DATASET.test_labels[i]]}: ")
        assert printed(line)[0][0] == expected(trained, DATASET.test_images[i])[0][0]
        assert len(printed(line)) == 3


def test_the_folder_of_a_run_stands_for_its_checkpoint(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(trained) == predict(trained.parent) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]


def test_an_image_that_looks_inverted_is_said_to(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not any(images.looks_inverted(image) for image in DATASET.train_images)
    assert all(images.looks_inverted(255 - image) for image in DATASET.train_images)
    Image.fromarray(255 - DATASET.test_images[0]).save(tmp_path / "a.png")
    assert predict(trained, tmp_path / "a.png") == 0
    assert "looks inverted" in capsys.readouterr().out


def test_an_exported_test_image_is_the_image_and_gets_its_prediction(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "shirt.png"
    assert main(["show", "--data", "sample", "--export", str(path), "--start", "7"]) == 0
    assert f"test image 7 of the embedded sample, {data.LABELS[DATASET.test_labels[7]]}" in capsys.readouterr().out
    np.testing.assert_array_equal(images.read(path), DATASET.test_images[7])
    assert predict(trained, path) == 0
    assert printed(capsys.readouterr().out.splitlines()[-1])[0][0] == expected(trained, DATASET.test_images[7])[0][0]
    for options, message in (
        (["--export", str(path), "--count", "2"], "--export writes one image"),
        (["--export", str(tmp_path / "a.jpg")], "its name must end in .png"),
        (["--export", "/proc/a.png"], "cannot write /proc/a.png"),
        (["--text", "--enlarge", "2"], "--enlarge is for --export"),
    ):
        assert main(["show", "--data", "sample", *options]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("i", [0, 1, 5])
def test_a_photograph_becomes_the_image_that_the_data_set_would_have(tmp_path: Path, i: int) -> None:
    """A test image made a phone's photo: large, in colour, dark on white, with margins, and stored turned."""
    original = DATASET.test_images[i]
    rows, columns = np.nonzero(original > images.MARGIN)
    thing = original[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    large = Image.fromarray(255 - thing).resize((thing.shape[1] * 20, thing.shape[0] * 20), Image.Resampling.NEAREST)
    photo = Image.new("RGB", (900, 700), "white")
    photo.paste(Image.merge("RGB", [large] * 3), (130, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright: to be turned by a quarter before it is shown
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "photo.png", exif=exif)
    found, done = images.fit(tmp_path / "photo.png")
    assert done.startswith("700 x 900 made grey, inverted, cut to ") and "resized to " in done
    assert found.shape == (28, 28) and max(thing.shape) <= 28
    expected = np.asarray(Image.fromarray(thing).resize(found[tuple(_box(found))].T.shape, Image.Resampling.BOX))
    assert np.abs(found[tuple(_box(found))].astype(int) - expected).mean() < 12
    assert max(_extent(found)) == 28 and not images.looks_inverted(found)


def test_an_enlarged_export_is_taken_by_resize_and_a_sheet_of_several_images_is_said_to_be_one(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large, sheet = tmp_path / "large.png", tmp_path / "sheet.png"
    assert main(["show", "--data", "sample", "--export", str(large), "--start", "7", "--enlarge", "10"]) == 0
    np.testing.assert_array_equal(np.asarray(Image.open(large))[::10, 9::10], DATASET.test_images[7])
    assert main(["show", "--data", "sample", "--output", str(sheet)]) == 0
    assert predict(trained, large, sheet, "--resize") == 0
    of_large, of_sheet = capsys.readouterr().out.splitlines()[-2:]
    assert "(280 x 280 made grey, cut to " in of_large and "in parts" not in of_large
    assert ", in parts where the model knows one thing, resized to 28 x " in of_sheet


LAID = np.full((300, 400), 230, np.uint8)  # a T-shirt, darker than the table it lies on
LAID[60:100, 80:320] = LAID[100:260, 140:260] = 40
BRIGHT = {  # what is darker than the table comes out light
    "photo.jpg": lambda path: Image.fromarray(LAID).convert("RGB").save(path),
    "cmyk.jpg": lambda path: Image.fromarray(LAID).convert("CMYK").save(path),
    "turned.jpg": lambda path: Image.fromarray(LAID).transpose(Image.Transpose.ROTATE_90).save(path, exif=_turned()),
    "grey.png": lambda path: Image.fromarray(LAID).save(path),
    "palette.gif": lambda path: Image.fromarray(LAID).quantize(4).save(path),
    "deep.png": lambda path: Image.fromarray(LAID.astype(np.uint16) * 257).save(path),
    "deeper.tiff": lambda path: Image.fromarray(LAID.astype(np.int32) * 257).save(path),
    "float.tiff": lambda path: Image.fromarray((LAID / 255).astype(np.float32)).save(path),
    "dark_on_clear.png": lambda path: _on_clear(40).save(path),
    "light_on_clear.png": lambda path: _on_clear(215).save(path),
    "grey_on_clear.png": lambda path: _on_clear(40).convert("LA").save(path),
    "shadows.jpg": lambda path: _on_ground(np.linspace(190, 220, 400), 40).save(path),
    "white_on_grey.jpg": lambda path: _on_ground(np.linspace(110, 130, 400), 235).save(path),
    "white_on_black.jpg": lambda path: _on_ground(np.full(400, 20.0), 220).save(path),
    "black_on_dark.jpg": lambda path: _on_ground(np.full(400, 70.0), 12).save(path),
}


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _on_clear(level: int) -> Image.Image:
    levels = np.full((*LAID.shape, 4), level, np.uint8)
    levels[..., 3] = np.where(LAID == 40, 255, 0)
    return Image.fromarray(levels)


def _on_ground(row: np.ndarray, level: int) -> Image.Image:
    noise = np.random.default_rng(1).normal(0, 4, LAID.shape)
    return Image.fromarray((np.where(LAID == 40, level, row) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("name", BRIGHT)
def test_a_thing_is_light_on_black_whatever_it_lies_on_and_its_file_is_made_of(tmp_path: Path, name: str) -> None:
    BRIGHT[name](tmp_path / name)
    found, done = images.fit(tmp_path / name)
    expected = np.zeros((28, 28), np.uint8)
    expected[2:7] = expected[2:26, 7:21] = 210
    inside = expected > 0
    assert found[~inside].mean() < 12 and np.median(found[~inside]) == 0, done
    assert 180 < np.median(found[inside]) < 250 and (found[inside] > 100).mean() > 0.9, done
    assert ("inverted" in done) == (name not in ("light_on_clear.png", "white_on_grey.jpg", "white_on_black.jpg"))
    assert "cut to 24" in done and "plain ground" not in done


def test_what_cannot_be_a_thing_on_a_plain_ground_is_said(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (600, 400), (250, 240, 230)).save(tmp_path / "blank.jpg")
    Image.new("L", (4000, 3)).save(tmp_path / "thin.png")
    Image.new("L", (600, 600)).save(tmp_path / "huge.png")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150_000)
    for name, message in (
        ("blank.jpg", "blank.jpg stands out from its edges: the thing must lie whole on a plain ground"),
        ("thin.png", "thin.png stands out from its edges"),
        ("huge.png", "huge.png has more pixels than Pillow takes: make it smaller"),
        ("phone.heic", "phone.heic is of a format that Pillow does not read: export it as JPEG"),
    ):
        assert predict(trained, tmp_path / name, "--resize") == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    Image.fromarray(np.linspace(0, 255, 300 * 400).reshape(300, 400).astype(np.uint8)).save(tmp_path / "busy.png")
    line = np.zeros((4, 3000), np.uint8)
    line[1:3, 10:-10] = 255
    Image.fromarray(line).save(tmp_path / "line.png")
    assert "no plain ground around it" in images.fit(tmp_path / "busy.png")[1]
    assert "resized to 28 x 1" in images.fit(tmp_path / "line.png")[1]


def _box(image: np.ndarray) -> list[slice]:
    return [slice(int(x.min()), int(x.max()) + 1) for x in np.nonzero(image > 0)]


def _extent(image: np.ndarray) -> list[int]:
    return [x.stop - x.start for x in _box(image)]


def test_a_photo_is_predicted_and_what_was_done_to_it_is_said(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = np.full((3000, 4000), 200, np.uint8)
    photo[500:1500, 1000:3000] = 60
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    Image.fromarray(DATASET.test_images[3]).save(tmp_path / "fits.png")
    assert predict(trained, tmp_path / "photo.jpg", tmp_path / "fits.png", "--resize") == 0
    of_photo, fits = capsys.readouterr().out.splitlines()[-2:]
    found = re.search(
        r"photo.jpg \(4000 x 3000 made grey, inverted, cut to (\d+) x (\d+), resized to 28 x 14\): ", of_photo
    )
    assert found and abs(int(found[1]) - 2000) < 20 and abs(int(found[2]) - 1000) < 20
    assert "(28 x 28 made grey): " in fits
    assert predict(trained, tmp_path / "fits.png") == 0
    assert printed(capsys.readouterr().out.splitlines()[-1]) == printed(fits), "an image that fits is left as it is"
    (tmp_path / "half.png").write_bytes((tmp_path / "fits.png").read_bytes()[:100])
    assert predict(trained, tmp_path / "half.png", "--resize") == 2
    assert "half.png is not an image, or not a whole one" in capsys.readouterr().err


def test_an_image_of_the_wrong_size_or_kind_is_one_line_and_exit_code_2(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grey = np.zeros((28, 28, 4), np.uint8)
    grey[..., 3] = 255
    transparent, green, blue = grey.copy(), grey.copy(), grey.copy()
    transparent[3, 3, 3] = 254
    green[9, 9, 1] = 1
    blue[9, 9, 2] = 1
    for name, image in (
        ("large", Image.new("L", (32, 28))),
        ("deep", Image.fromarray(np.zeros((28, 28), np.uint16))),
        ("transparent", Image.fromarray(transparent)),
        ("green", Image.fromarray(green)),
        ("blue", Image.fromarray(blue)),
        ("whole", Image.fromarray(DATASET.test_images[0])),
    ):
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:100])
    (tmp_path / "text.png").write_text("no image")
    for name, message in (
        ("large", "large.png is 32 x 28 pixels, not 28 x 28: --resize makes it so"),
        ("deep", "deep.png is an image of the kind 'I;16', not of 8 bit grey levels"),
        ("transparent", "transparent.png is transparent in places"),
        ("green", "green.png is in colour"),
        ("blue", "blue.png is in colour"),
        ("half", "half.png is not an image, or not a whole one"),
        ("text", "text.png is not an image, or not a whole one"),
        ("none", "none.png does not exist"),
        ("", "is not an image, or not a whole one"),
    ):
        path = tmp_path / f"{name}.png" if name else tmp_path
        assert predict(trained, tmp_path / "whole.png", path) == 2
        error = capsys.readouterr().err
        assert error.startswith("fmnist: ") and message in error and error.count("\n") == 1


def test_a_checkpoint_of_another_model_is_refused(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert predict(trained, "--model", "cnn") == 2
    assert "is a checkpoint of the model 'softmax', not of 'cnn'" in capsys.readouterr().err


def test_evaluate_prints_each_classs_accuracy_and_draws_the_confusion_matrix(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", "--checkpoint", str(trained), "--data", "sample"]
    assert main(evaluate) == 0
    out = capsys.readouterr().out
    guesses = np.array([data.LABELS.index(expected(trained, image)[0][0]) for image in DATASET.test_images])
    for i, label in enumerate(data.LABELS):
        mine = guesses[DATASET.test_labels == i]
        assert f"  {label:<12} {(mine == i).mean():.4f} of {len(mine)}" in out
    assert f"test accuracy {(guesses == DATASET.test_labels).mean():.4f}" in out
    assert not (tmp_path / "confusion.png").exists(), "that would be a run's, of its own test images"
    rows = [line.split()[-10:] for line in out.split("images by true class")[1].splitlines()[1:]]
    for i, row in enumerate(rows):
        assert [int(n) for n in row] == [(guesses[DATASET.test_labels == i] == j).sum() for j in range(10)]
    assert main([*evaluate, "--output", str(tmp_path / "other.svg")]) == 0
    drawn = (tmp_path / "other.svg").read_text()
    assert all(f"<!-- {label} -->" in drawn for label in data.LABELS)


def test_the_confusion_pictures_rows_are_the_true_classes_and_its_columns_the_predicted_ones(tmp_path: Path) -> None:
    plots.confusion(np.array([[2, 8], [0, 10]]), ["a", "b"], tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    places = dict(re.findall(r"<!-- (\d+) -->\s*<g[^>]*translate\(([\d.]+ [\d.]+)\)", drawn))
    x, y = ({n: float(place.split()[i]) for n, place in places.items() if n in ("2", "8", "10")} for i in (0, 1))
    assert x["2"] + 50 < x["8"] and abs(y["2"] - y["8"]) < 1
    assert y["2"] + 50 < y["10"] and abs(x["8"] - x["10"]) < 10, "downwards, in SVG"
