"""Own folders of images: what is read, how it is resized and augmented, and what is said about it."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imagesets
import options
from imagesets import folders
from imagesets.augment import Augmentation
from scripts import log_lines, parsed, run
from utils import UserError

FAULTS = Path(__file__).resolve().parents[2] / "shared" / "faults"


def write_images(folder, sizes, mode="RGB", suffix="png", seed=0):
    """Write one random image per size, (width, height), into a class folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    kind, values = (np.uint16, 3000) if mode == "I;16" else (np.uint8, 256)
    for number, (wide, high) in enumerate(sizes):
        shape = (high, wide, 3) if mode == "RGB" else (high, wide)
        Image.fromarray(random.randint(0, values, shape, dtype=kind)).save(folder / f"{number}.{suffix}")


def pixels_of(path):
    """Return a file's pixels as (3, H, W)."""
    with Image.open(path) as file:
        return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("test", ["val_sorted", "val", "valid", "test"])
def test_image_folder(tmp_path, test):
    write_images(tmp_path / "train" / "cat", [(16, 16), (33, 17)])
    write_images(tmp_path / "train" / "dog", [(16, 20)], "L")
    (tmp_path / "val" / ".ipynb_checkpoints").mkdir(parents=True)  # holds no class, so another test folder is read
    write_images(tmp_path / test / "cat", [(8, 8)], suffix="JPEG")
    write_images(tmp_path / test / "dog", [(40, 16)], suffix="jpg")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "train" / "dog" / "._0.png").write_bytes(b"left by macOS")
    write_images(tmp_path / "train" / "dog" / ".thumbnails", [(16, 16)])
    data = imagesets.load("imagefolder", tmp_path, workers=2)
    assert data.classes == ["cat", "dog"] and data.info["images"] == 3 and data.test.total == 2 and data.size == 16
    assert data.train.labels.tolist() == [0, 0, 1] and data.test.labels.tolist() == [0, 1]
    assert torch.equal(data.train.images[0], pixels_of(tmp_path / "train" / "cat" / "0.png"))
    assert torch.equal(data.train.images[2], pixels_of(tmp_path / "train" / "dog" / "0.png")[:, 2:18])
    shutil.rmtree(tmp_path / "train")  # weights can be tested without it, at the size that they were trained at
    assert imagesets.load_test("imagefolder", tmp_path, size=12).images.shape == (2, 3, 12, 12)


def test_transparent_palettes(tmp_path, recwarn):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    image = image.convert("P")
    image.putpalette(list(range(256)) * 3)
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        image.save(tmp_path / split / "cat" / "0.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "val" / "cat" / "0.png") as file:
        expected = torch.from_numpy(np.array(file.convert("RGBA").convert("RGB"))).permute(2, 0, 1)
    recwarn.clear()
    assert torch.equal(imagesets.load_test("imagefolder", tmp_path).images[0], expected) and not recwarn.list


# Folders with an image each, and what the error names; in the last case one class has no image.
UNUSABLE = {"": "train", "val/cat": "train", "train/cat": "val", "train/dog val/cat": "dog"}
UNUSABLE |= {"train/cat train/dog/.hidden val/cat": "dog"}


@pytest.mark.parametrize(("places", "named"), UNUSABLE.items())
def test_image_folder_that_cannot_be_used(tmp_path, places, named):
    for place in places.split():
        write_images(tmp_path / place, [(8, 8)])
    with pytest.raises(UserError) as error:
        imagesets.load("imagefolder", tmp_path)
    assert named in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("keep", ["memory", "files"])
@pytest.mark.parametrize(("suffix", "left"), [("png", 5), ("jpg", 2000)])
def test_unreadable_images_end_a_run_or_are_left_out_named_and_counted_once(tmp_path, suffix, left, keep, capsys):
    """Something that is no image, and one that is cut off."""
    write_splits(tmp_path, [(128, 128)] * 2, suffix=suffix)
    bad = [tmp_path / split / "cat" / f"1.{suffix}" for split in ("train", "val")]
    for path in bad:
        path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(UserError, match=str(bad[0])):
        list(load(tmp_path, keep=keep).train)
    capsys.readouterr()
    data = load(tmp_path, keep=keep, skip_bad_images=True)
    assert data.size == 96
    assert data.info["images"] == {"memory": 3, "files": 4}[keep]  # those of files are counted before they are read
    for epoch in (0, 1):
        assert sum(len(labels) for _, labels, _ in data.train.epoch(epoch)) == 3
    assert [number for _, labels in data.test for number in labels.tolist()] == [0, 1, 1]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipped")]
    assert len(lines) == 4 and str(bad[0]) in lines[0] and "1 unreadable" in lines[1]


def load(root, **settings):
    """Return the data of an own folder."""
    return imagesets.load("imagefolder", root, workers=2, **settings)


def write_splits(root, *args, classes=("cat", "dog"), **kwargs):
    """Write images of the same kind into each class of a training and a test folder."""
    for split in ("train", "val"):
        for number, name in enumerate(classes):
            write_images(root / split / name, *args, seed=number + 10 * (split == "val"), **kwargs)


def test_what_is_no_image_by_its_content_is_left_out_and_counted_by_ending(tmp_path, capsys):
    """Whatever the endings: phones, browsers and converters write many, and some files have none."""
    write_splits(tmp_path, [(16, 16)] * 6, suffix="jpg")
    for number, ending in enumerate((".jfif", ".jpe", ".JPG ", ".npy", "")):
        path = tmp_path / "train" / "cat" / f"{number}.jpg"
        path.rename(path.with_name(f"{number}{ending}"))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("no image")
    np.save(tmp_path / "train" / "cat" / "a.npy", np.zeros(3))
    (tmp_path / "train" / "dog" / "0.jpg").unlink()
    assert load(tmp_path).info["images"] == 11
    said = capsys.readouterr().err
    expected = ("images: 11, classes: 2 (smallest dog 5, largest cat 6)", "1 .txt", "1 .npy", "16 x 16", "images: 12")
    assert all(text in said for text in expected)


@pytest.mark.parametrize("name", ["JPEG", "JPEG2000", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF", "AVIF", "HEIF"])
def test_formats_are_told_by_content(tmp_path, name):
    if name == "HEIF":
        pytest.importorskip("pillow_heif")
    write_splits(tmp_path, [(64, 64)])
    image = Image.new("RGB", (64, 64), (200, 30, 90))
    path = tmp_path / "train" / "cat" / "0.jpg"
    image.save(path, name)
    (tmp_path / "train" / "cat" / "0.png").unlink()
    found = load(tmp_path).train.images[0].float()
    assert (found - torch.tensor([200.0, 30, 90]).view(3, 1, 1)).abs().max() < 12


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_no_file_starts_ghostscript_or_takes_all_memory(tmp_path, keep, monkeypatch):
    write_splits(tmp_path, [(16, 16)] * 3)
    path = tmp_path / "train" / "dog" / "0.png"
    Image.new("RGB", (16, 16)).save(path, "EPS")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript"))
    with pytest.raises(UserError, match="unreadable image"):
        list(load(tmp_path, keep=keep).train)
    Image.new("RGB", (90, 90)).save(path, "JPEG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(UserError, match="unreadable image"):
        list(load(tmp_path, keep=keep).train)


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_dark_sixteen_bit_images_use_the_range_of_the_training_images(tmp_path, keep, capsys):
    values = np.linspace(30, 250, 256).astype(np.uint16).reshape(16, 16)
    for split, brighter in (("train", 0), ("val", 20)):
        (tmp_path / split / "cell").mkdir(parents=True)
        Image.fromarray(values + brighter).save(tmp_path / split / "cell" / "0.png")
    data = load(tmp_path, keep=keep, augment="none", mean=(0, 0, 0), std=(1, 1, 1))
    assert data.info["grey_range"] == (30, 250) and capsys.readouterr().err.count("16-bit grey") == 1
    expected = torch.from_numpy(values.astype(np.float32) - 30) / 220
    ((images, _, _),) = data.train
    torch.testing.assert_close(images[0, 0], expected, atol=3e-3, rtol=0)
    shutil.rmtree(tmp_path / "train")
    for test in (data.test, imagesets.load_test("imagefolder", tmp_path, workers=0, **imagesets.recorded(data.info))):
        ((images, _),) = test
        torch.testing.assert_close(images[0, 0], (expected + 20 / 220).clamp(max=1), atol=3e-3, rtol=0)


@pytest.mark.parametrize("keep", ["memory", "files"])
@pytest.mark.parametrize(("resize", "columns"), [("crop", (12, 20)), ("squash", (0, 32)), ("pad", (0, 32))])
def test_wide_images_are_cropped_squashed_or_padded(tmp_path, resize, columns, keep, capsys):
    """Pixels of column x are 8 x: so the columns that are left can be read off them."""
    wide = np.tile((np.arange(32) * 8).astype(np.uint8), (8, 1))
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.fromarray(wide).save(tmp_path / split / "cat" / "0.png")
    data = load(tmp_path, size=16, resize=resize, keep=keep, augment="none", mean=(0, 0, 0), std=(1, 1, 1))
    found = next(iter(data.train))[0][0, 0] * 255
    assert abs(found[8, 0] - 8 * columns[0]) < 12 and abs(found[8, -1] - 8 * (columns[1] - 1)) < 12
    assert (found[0] == 0).all() == (resize == "pad")
    assert torch.equal(next(iter(data.test))[0][0, 0] * 255, found)
    said = capsys.readouterr().err
    assert ("--resize" in said) == (resize == "crop") and "one class, cat" in said  # as of a folder one level too high


@pytest.mark.parametrize("keep", ["memory", "files"])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff"])
def test_photos_that_lie_on_their_side_are_put_upright(tmp_path, suffix, keep):
    write_splits(tmp_path, [(16, 16)])
    upright = Image.fromarray(np.repeat(np.repeat([[0, 255], [90, 180]], 8, 0), 8, 1).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "train" / "cat" / "0.png").unlink()
    upright.rotate(90).save(tmp_path / "train" / "cat" / f"0.{suffix}", exif=exif)
    data = load(tmp_path, keep=keep, augment="none", mean=(0, 0, 0), std=(1, 1, 1))
    images, _, index = next(iter(data.train))
    found = images[index == 0][0, 0] * 255
    assert (found[4:12:7, 4:12:7] - torch.tensor([[0.0, 255], [90, 180]])).abs().max() < 20


def test_augmentation_by_the_size_of_own_images_and_as_asked(tmp_path, capsys):
    def applied(**settings):
        found = load(tmp_path, **settings).info["augment"]
        assert found in capsys.readouterr().out
        return found

    write_splits(tmp_path, [(32, 32)] * 2)
    assert applied() == str(Augmentation(4, True)) and applied(size=64) == str(Augmentation(8, True))
    assert applied(size=96) == applied(augment="rrc") == str(Augmentation(None, True))
    assert applied(augment="none") == str(Augmentation(0, False))
    assert applied(augment="randaugment", flip=False) == str(Augmentation(4, False, True))
    assert imagesets.load("digits").info["augment"] == str(Augmentation(4, False))


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_arrows_stay_arrows_without_flips(tmp_path, keep):
    """A training image is black on its left half: it is never black on its right."""
    image = np.zeros((16, 16), np.uint8)
    image[:, 8:] = 255
    for split in ("train", "val"):
        (tmp_path / split / "right").mkdir(parents=True)
        for number in range(40):
            Image.fromarray(image).save(tmp_path / split / "right" / f"{number}.png")
    for flip, mirrored in ((True, True), (None, True), (False, False)):
        images, _, _ = next(iter(load(tmp_path, keep=keep, flip=flip, augment="crop").train))
        assert (images[:, 0, 8, 4] > images[:, 0, 8, 11]).any() == mirrored


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_randaugment_depends_on_the_position_alone(tmp_path, keep):
    write_splits(tmp_path, [(16, 16)] * 10)
    settings = {"keep": keep, "batch_size": 8}
    strong = load(tmp_path, augment="randaugment", **settings).train
    whole, rest = (list(strong.epoch(1, start)) for start in (0, 1))
    plain = list(load(tmp_path, **settings).train.epoch(1))
    assert len(rest) == len(whole) - 1 and torch.equal(whole[1][0], rest[0][0])
    assert torch.equal(whole[1][2], plain[1][2]) and not torch.equal(whole[1][0], plain[1][0])


def test_one_set_of_images_has_two_ways_to_keep_it(tmp_path, monkeypatch):
    write_splits(tmp_path, [(130, 140), (150, 128)])
    data = load(tmp_path, size=112)
    assert data.info["keep"] == "memory" and data.train.images.shape == (4, 3, 112, 112) and data.size == 112
    files = load(tmp_path, size=112, keep="files")
    assert all(torch.equal(a, b) for a, b in zip(next(iter(data.test)), next(iter(files.test)), strict=True))
    ((images, labels, index),) = files.train
    assert images.shape == (4, 3, 112, 112) and torch.equal(labels, index // 2)
    monkeypatch.setattr(folders, "MEMORY", 4 * 3 * 112**2 - 1)
    assert load(tmp_path, size=112).info["keep"] == "files"
    info = imagesets.load("imagenet", tmp_path, size=112, workers=0).info
    assert (info["keep"], info["augment"]) == ("files", str(Augmentation(None, True)))


def test_numbered_classes_are_ordered_by_a_list(tmp_path, capsys):
    write_splits(tmp_path, [(16, 16)], classes=["0", "1", "10", "2"])
    data = load(tmp_path)
    assert data.classes == ["0", "1", "10", "2"] and "--class-names" in capsys.readouterr().err
    names = ["0", "1", "2", "10"]
    ordered = load(tmp_path, class_names=names)
    assert ordered.classes == names
    assert ordered.train.labels.tolist() == ordered.test.labels.tolist() == [0, 1, 3, 2]
    assert "--class-names" not in capsys.readouterr().err
    with pytest.raises(UserError, match="check: 2"):
        load(tmp_path, class_names=["0", "1", "10"])
    test = imagesets.load_test("imagefolder", tmp_path, **imagesets.recorded(ordered.info))  # as the weights have them
    assert test.classes == names and test.labels.tolist() == [0, 1, 3, 2]
    assert imagesets.load_test("imagefolder", tmp_path, class_names=["a", "b", "c", "d"]).classes == data.classes


def test_a_share_of_the_images_is_the_test_if_there_is_none(tmp_path, capsys):
    for name in ("cat", "dog"):
        write_images(tmp_path / "train" / name, [(16, 16)] * 10, seed=len(name) + ord(name[0]))
    data = load(tmp_path, test_split=0.2, seed=5)
    test = imagesets.load_test("imagefolder", tmp_path, **imagesets.recorded(data.info))
    parts = [{image.numpy().tobytes() for image in part.images} for part in (data.train, data.test, test)]
    assert [len(part) for part in parts] == [16, 4, 4] and parts[1] == parts[2] and not parts[0] & parts[1]
    assert data.test.labels.bincount().tolist() == [2, 2] and data.info["test_split"] == 0.2
    for name in ("cat", "dog"):
        (tmp_path / "train" / name).rename(tmp_path / name)  # the classes need no folder of their own
    (tmp_path / "train").rmdir()
    assert load(tmp_path, test_split=0.2).info["images"] == 16
    assert "WARNING" not in capsys.readouterr().err.upper()
    (tmp_path / "cat" / "0.png").unlink()
    imagesets.load_test("imagefolder", tmp_path, **imagesets.recorded(data.info))
    assert "may have been trained on" in capsys.readouterr().err


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_normalisation_is_what_is_asked_for_or_measured(tmp_path, keep):
    write_splits(tmp_path, [(16, 16)] * 4)
    assert load(tmp_path).statistics == folders.STATISTICS
    data = load(tmp_path, keep=keep, mean="auto", augment="none")
    ((images, _, _),) = data.train
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-3, rtol=0)
    test = imagesets.load_test("imagefolder", tmp_path, **imagesets.recorded(data.info))
    assert test.statistics == data.test.statistics == data.statistics == (data.info["mean"], data.info["std"])


def parsed_data(root, *words):
    """Return the data that a training script's command line asks for."""
    flags = ("--dataset", "imagefolder", "--data", root, "--num-workers", 0, *words)
    return imagesets.load(**options.data_settings(parsed("train_baseline_cifar", *flags)))


def test_flags_decide_how_images_are_read(tmp_path):
    write_images(tmp_path / "cat", [(20, 16)] * 10)
    write_images(tmp_path / "dog", [(20, 16)] * 10, seed=1)
    (tmp_path / "names.txt").write_bytes(b"\xef\xbb\xbfdog\r\n\r\ncat\r\n")
    words = ("--image-size", 12, "--from-files", "--resize", "pad", "--augment", "rrc", "--no-flip")
    words += ("--test-split", 0.2, "--class-names", tmp_path / "names.txt", "--mean", 0.4, "--std", 0.1, 0.2, 0.3)
    data = parsed_data(tmp_path, *words)
    expected = {"class_names": ["dog", "cat"], "size": 12, "mean": (0.4,) * 3, "std": (0.1, 0.2, 0.3), "images": 16}
    expected |= {"augment": str(Augmentation(None, False)), "resize": "pad", "keep": "files", "test_split": 0.2}
    assert {name: data.info[name] for name in expected} == expected
    assert next(iter(data.train))[0].shape[2:] == (12, 12) and data.test.total == 4
    plain = parsed_data(tmp_path, "--test-split", 0.2)
    assert plain.info["keep"] == "memory" and plain.size == 16 and plain.statistics == folders.STATISTICS
    measured = parsed_data(tmp_path, "--test-split", 0.2, "--in-memory", "--mean", "auto")
    assert measured.statistics != folders.STATISTICS and measured.info["keep"] == "memory"


def test_a_resumed_run_keeps_its_images_where_they_were(tmp_path, monkeypatch):
    write_splits(tmp_path / "data", [(16, 16)] * 4)
    flags = ("--dataset", "imagefolder", "--data", tmp_path / "data", "--arch", "resnet8", "--num-workers", 0)
    flags = (*flags, "--checkpoint-dir", tmp_path, "--amp", "off", "--batch-size", 4)
    run("train_baseline_cifar", *flags, "--epochs", 1)
    monkeypatch.setattr(folders, "MEMORY", 1)  # a new run would read files
    run("train_baseline_cifar", *flags, "--epochs", 2, "--resume")
    (args,) = tmp_path.glob("train*/args.json")
    kept = json.loads(args.read_text())["image_set"]
    assert (kept["keep"], kept["augment"], kept["size"]) == ("memory", str(Augmentation(2, True)), 16)


@pytest.mark.parametrize("keep", ["memory", "files"])
def test_some_test_images_are_spread_over_all_classes(tmp_path, keep):
    write_splits(tmp_path, [(8, 8)] * 6, classes=("cat", "cow", "dog", "pig"))
    test = load(tmp_path, keep=keep, batch_size=5).test
    labels = torch.cat([labels for _, labels, *_ in test.some(8)])
    assert labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and sum(len(batch[1]) for batch in test) == 24
    assert sum(len(batch[1]) for batch in test.some(100)) == 24


def fault(name, root):
    """Unpack a folder of those that were once read wrongly; return it."""
    if not (FAULTS / f"{name}.tar.gz").exists():
        pytest.skip("needs ../shared/faults")
    with tarfile.open(FAULTS / f"{name}.tar.gz") as archive:
        archive.extractall(root, filter="data")
    return root / name


def test_the_folders_that_were_read_wrongly(tmp_path, capsys):
    mixed = load(fault("mixedext", tmp_path))
    assert mixed.info["images"] == 160 and mixed.test.total == 80
    assert "not images" not in capsys.readouterr().err
    dark = load(fault("png16", tmp_path))
    assert dark.info["grey_range"] == (21, 247) and dark.test.images.max() > 200
    load(fault("wide", tmp_path))
    assert "--resize" in capsys.readouterr().err
    load(fault("numeric", tmp_path))
    assert "--class-names" in capsys.readouterr().err
    assert load(fault("corrupt", tmp_path), skip_bad_images=True).info["images"] == 155


@pytest.mark.slow
@pytest.mark.parametrize(("name", "flags"), [("arrows", ()), ("wide", ("--resize", "squash"))])
def test_the_folders_that_could_not_be_learned(name, flags, tmp_path):
    """Mirrored arrows point elsewhere; the sides of the wide images hold what tells them apart."""
    recipe = ("--batch-size", 16, "--limit-batches", 8, "--epochs", 12, "--milestones", 8, 10, "--amp", "off")
    words = ("--dataset", "imagefolder", "--data", fault(name, tmp_path), "--checkpoint-dir", tmp_path, "--no-flip")
    run("train_baseline_cifar", "--arch", "resnet8", *words, *recipe, *flags)
    (folder,) = tmp_path.glob("train_*")
    assert log_lines(folder)[-1]["best/top1"] == 100
