"""Data: the distributions of torchvision's transforms, the order of an epoch, its split over processes, the data sets."""

import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import batches
import datasets
import decoding
import distributed
import loading
from augment import CropFlip
from utils import UserError

CPU = torch.device("cpu")
STATISTICS = datasets.CIFAR100_STATISTICS


def world(rank=0, size=1):
    """Return the place of one process of `size`."""
    return distributed.World(rank, size, CPU)


def random_images(count, size=32, seed=0):
    """Return (count, 3, size, size) uint8 without a zero, which is the border's value."""
    return torch.randint(1, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def numbered_set(count, size=4):
    """Return images whose label is their number and whose pixels hold it."""
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, size, size).contiguous()
    return datasets.in_memory(images, numbers, map(str, range(count)), ((0.0,) * 3, (1.0,) * 3))


def train_batches(image_set, batch_size, world=world(), seed=0, limit=None):  # noqa: B008 - a tuple
    """Return training batches without padding, so that an image keeps its pixels."""
    return batches.DeviceBatches(image_set, batch_size, CropFlip(image_set.size, 0), world, seed, limit)


def test_crop_and_flip_are_torchvisions_for_every_draw():
    augment = CropFlip(32)
    draws = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    images = random_images(len(draws))
    padded = tv.pad(images, [4, 4, 4, 4])
    for image, (top, left, flip), found in zip(padded, draws.tolist(), augment.apply(images, draws), strict=True):
        expected = tv.crop(image, top, left, 32, 32)
        assert torch.equal(found, tv.horizontal_flip(expected) if flip else expected)


def test_draws_are_uniform_and_independent():
    count = 81 * 2 * 200
    draws = CropFlip(32).draw(count, torch.Generator().manual_seed(0))
    cells = (draws[:, 0] * 9 + draws[:, 1]) * 2 + draws[:, 2]
    seen = cells.bincount(minlength=162).double()
    chi_square = ((seen - 200) ** 2 / 200).sum().item()
    assert len(seen) == 162
    assert abs(chi_square - 161) < 5 * math.sqrt(2 * 161)


def test_torchvisions_transform_draws_from_the_same_range():
    """RandomCrop(32, padding=4) + RandomHorizontalFlip give, over many draws, the very set of images of CropFlip."""
    image = random_images(1, 8)
    draws = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2))
    ours = CropFlip(8, padding=1).apply(image.expand(len(draws), -1, -1, -1), draws)
    transform = v2.Compose([v2.RandomCrop(8, padding=1), v2.RandomHorizontalFlip()])
    torch.manual_seed(0)
    theirs = torch.cat([transform(image) for _ in range(300)])
    assert {x.numpy().tobytes() for x in ours} == {x.numpy().tobytes() for x in theirs}
    assert len({x.numpy().tobytes() for x in ours}) == 18


def test_no_flip_where_a_mirror_image_is_another_class():
    assert not CropFlip(32, flip=False).draw(100, torch.Generator())[:, 2].any()
    assert not datasets.load("digits", "", True).flip


def test_normalisation_is_torchvisions_and_the_border_is_black():
    images = random_images(6)
    found = batches.Normaliser(STATISTICS, CPU)(images)
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*STATISTICS)])
    torch.testing.assert_close(found, transform(images), rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)

    corner = CropFlip(32).apply(images, torch.zeros(6, 3, dtype=torch.int64))
    border = batches.Normaliser(STATISTICS, CPU)(corner)[:, :, :4, :]
    black = -torch.tensor(STATISTICS[0]) / torch.tensor(STATISTICS[1])
    torch.testing.assert_close(border, black.view(1, 3, 1, 1).expand_as(border))


def test_an_epochs_images_are_the_sets_augmented_by_its_draws():
    images = random_images(10, 8)
    made = datasets.in_memory(images, range(10), "abcdefghij", STATISTICS)
    augment = CropFlip(8, padding=1)
    found = list(batches.DeviceBatches(made, 4, augment, world(), 3).epoch(0))
    assert [len(labels) for _, labels in found] == [4, 4, 2]
    options = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2))
    for image, label in ((x, y) for xs, ys in found for x, y in zip(xs, ys, strict=True)):
        candidates = augment.apply(images[label].expand(18, -1, -1, -1), options)
        assert (batches.Normaliser(STATISTICS, CPU)(candidates) == image).flatten(1).all(1).any()


def labels_of(epoch):
    """Return the labels of an epoch's batches."""
    return [labels.tolist() for _, labels in epoch]


def test_order_is_seeded_and_differs_between_epochs_and_seeds():
    made = numbered_set(23)
    first = labels_of(train_batches(made, 5).epoch(0))
    assert first == labels_of(train_batches(made, 5).epoch(0))
    others = [labels_of(train_batches(made, 5).epoch(1)), labels_of(train_batches(made, 5, seed=1).epoch(0))]
    assert all(other != first for other in others) and others[0] != others[1]
    assert sorted(sum(first, [])) == list(range(23))
    assert sum(first, []) != list(range(23))


def test_epoch_entered_at_a_step_goes_on_as_the_whole_epoch():
    made = datasets.in_memory(random_images(23, 8), range(23), range(23), STATISTICS)
    data = batches.DeviceBatches(made, 5, CropFlip(8), world(), 0)
    whole = list(data.epoch(2))
    for start in range(len(whole) + 1):
        rest = list(data.epoch(2, start))
        assert len(rest) == len(whole) - start
        for (images, labels), (expected, numbers) in zip(rest, whole[start:], strict=True):
            assert torch.equal(images, expected) and torch.equal(labels, numbers)


def test_limit_of_batches(monkeypatch):
    assert len(train_batches(numbered_set(23), 5)) == 5
    assert (
        len(train_batches(numbered_set(23), 5, limit=2))
        == len(labels_of(train_batches(numbered_set(23), 5, limit=2).epoch(0)))
        == 2
    )
    monkeypatch.setattr(batches, "TEST_IMAGES", 5)
    for size in (1, 2, 3):  # as many images for any number of processes
        ranks = [batches.TestBatches(numbered_set(23), 4, world(rank, size), limit=2) for rank in range(size)]
        assert sum(len(share.labels) for share in ranks) == 10


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), each=st.integers(1, 6), sizes=st.lists(st.sampled_from([1, 2, 3]), min_size=2, max_size=2),
       data=st.data())  # fmt: skip
def test_ranks_share_an_epoch_whatever_their_number_from_any_step_on(count, each, sizes, data):
    batch_size = 6 * each
    steps = math.ceil(count / batch_size)
    change = data.draw(st.integers(0, steps))
    seen = []
    for step in range(steps):
        size = sizes[step >= change]
        shares = [batches.share_of_batch(step, batch_size, count, rank, size).tolist() for rank in range(size)]
        assert len({len(share) for share in shares}) == 1
        together = sum(shares, [])
        length = min(batch_size, count - step * batch_size)
        assert together[:length] == list(range(step * batch_size, step * batch_size + length))
        assert len(together) - length < size
        seen += together[:length]
    assert seen == list(range(count))


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_together_see_the_batches_of_one_process(size):
    made = numbered_set(23)
    alone = list(train_batches(made, 6).epoch(1))
    ranks = [list(train_batches(made, 6, world(rank, size)).epoch(1)) for rank in range(size)]
    for number, (images, labels) in enumerate(alone):
        together = [torch.cat(parts) for parts in zip(*(found[number] for found in ranks), strict=True)]
        assert torch.equal(together[0][: len(images)], images) and torch.equal(together[1][: len(labels)], labels)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_each_test_image_counts_once(size):
    made = numbered_set(23)
    ranks = [batches.TestBatches(made, 4, world(rank, size)) for rank in range(size)]
    found = [(images, labels) for share in ranks for images, labels in share]
    assert sorted(torch.cat([labels for _, labels in found]).tolist()) == list(range(23))
    for images, labels in found:
        assert torch.equal((images * 255).round().long()[:, 0, 0, 0], labels)
    assert sum(len(share.labels) for share in ranks) == 23


def test_batch_and_test_set_that_do_not_divide():
    with pytest.raises(UserError, match="--batch-size 5 does not divide among 2"):
        train_batches(numbered_set(9), 5, world(0, 2))
    with pytest.raises(UserError, match=r"fewer test images \(2\) than processes \(3\)"):
        batches.TestBatches(numbered_set(2), 5, world(0, 3))


def test_digits_split():
    train, test = (datasets.load("digits", "/nowhere", train) for train in (True, False))
    assert (len(train), len(test)) == (1437, 360)
    again = datasets.load("digits", "", True)
    assert torch.equal(train.labels, again.labels) and torch.equal(train.images(), again.images())
    whole = torch.from_numpy(load_digits().target).bincount()
    assert (train.labels.bincount() - 0.8 * whole).abs().max() < 1
    assert torch.equal(train.labels.bincount() + test.labels.bincount(), whole)
    assert train.images().shape == (1437, 3, 32, 32) and train.images().dtype == torch.uint8
    assert not {x.numpy().tobytes() for x in train.images()} & {x.numpy().tobytes() for x in test.images()}
    pixels = train.images().double() / 255
    torch.testing.assert_close(pixels.mean().item(), train.statistics[0][0], atol=5e-3, rtol=0)
    torch.testing.assert_close(pixels.std().item(), train.statistics[1][0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_few_shot_split_is_scikit_learns(ratio):
    labels = torch.from_numpy(np.random.RandomState(0).permutation(np.repeat(np.arange(100), 50)))
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=1 - ratio, random_state=0)
    expected = sorted(next(splitter.split(np.zeros(5000), labels.numpy()))[0].tolist())
    found = datasets.stratified_share(labels, ratio)
    assert found.tolist() == expected
    assert (labels[found].bincount() - 50 * ratio).abs().max() < 1
    assert datasets.stratified_share(labels, 1.0).tolist() == list(range(5000))


def test_share_too_small_to_be_stratified():
    with pytest.raises(UserError, match="stratified"):
        datasets.stratified_share(torch.arange(20) % 10, 0.1)


def test_validation_split_is_held_out_of_the_training_images():
    from argparse import Namespace

    args = Namespace(dataset="digits", data="", num_workers=0, val_split=0.2, few_ratio=None, batch_size=16, manual_seed=0,
                     limit_batches=None)  # fmt: skip
    data = loading.load(args, world())
    train, held_out = data.train.images, data.val.images
    assert len(train) + len(held_out) == 1437 and abs(len(held_out) - 287) <= 1
    assert not {x.numpy().tobytes() for x in train} & {x.numpy().tobytes() for x in held_out}
    assert data.test.total == 360 and (data.num_classes, data.size) == (10, 32)
    args.val_split = 1e-20
    with pytest.raises(UserError, match="--val-split 1e-20: holds out none of 1437 images"):
        loading.load(args, world())


@pytest.mark.parametrize(("side", "asked", "images"), [(8, 4, 256), (32, 300, 300), (96, 4, 28), (96, 64, 64)])
def test_test_batches_of_large_images_have_fewer(side, asked, images):
    """As many pixels as 256 images of CIFAR, but no fewer images than a training batch."""
    pixels, labels = torch.zeros(301, 3, side, side, dtype=torch.uint8), torch.zeros(301, dtype=torch.long)
    made = datasets.in_memory(pixels, labels, ["cat"], datasets.CIFAR100_STATISTICS)
    assert [len(found) for _, found in batches.TestBatches(made, asked, world())][0] == images


@pytest.mark.parametrize("limit", [None, 7, 10, 99])
def test_limited_test_images_are_spread_over_all_classes(limit):
    """Files lie class by class: the first ones alone would be of one class. Each image once, whatever the processes."""
    chosen = [batches.share_of_test(30, limit, world(rank, size)).tolist() for size in (1, 3) for rank in range(size)]
    assert sorted(sum(chosen[1:], [])) == chosen[0] == sorted(set(chosen[0])) and len(chosen[0]) == min(limit or 30, 30)
    counts = np.bincount(np.array(chosen[0]) // 10, minlength=3)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", ["a", "part"])
def test_a_folder_that_cannot_be_read_drops_no_images(name, tmp_path, monkeypatch):
    """A class folder or one within it: its images would be missing without a word."""
    (tmp_path / "a" / "part").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a" / "0.png")
    scan = os.scandir

    def refuse(folder):
        if Path(folder).name == name:
            raise PermissionError(13, "Permission denied", str(folder))
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"{name}: Permission denied"):
        datasets.class_folders(tmp_path)


def test_subset_of_a_subset():
    made = numbered_set(10).subset(torch.tensor([7, 3, 5])).subset(torch.tensor([2, 0]))
    assert made.labels.tolist() == [5, 7] and made.images()[:, 0, 0, 0].tolist() == [5, 7]


def write_images(folder, sizes, mode="RGB", suffix="png", seed=0):
    """Write one random image per size, (width, height), into a class folder."""
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.RandomState(seed)
    for number, (wide, high) in enumerate(sizes):
        shape = (high, wide, 3) if mode == "RGB" else (high, wide)
        pixels = Image.fromarray(random.randint(0, 256, shape, dtype=np.uint8), mode if mode == "L" else "RGB")
        pixels.save(folder / f"{number}.{suffix}")


@pytest.mark.parametrize("test", ["val_sorted", "val", "test"])
def test_image_folder(tmp_path, test):
    write_images(tmp_path / "train" / "cat", [(16, 16), (33, 17)])
    write_images(tmp_path / "train" / "dog", [(16, 20)], "L")
    write_images(tmp_path / test / "cat", [(8, 8)], suffix="JPEG")
    write_images(tmp_path / test / "dog", [(40, 16)], suffix="jpg")
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    train, held_out = (datasets.load("imagefolder", str(tmp_path), train, workers=2) for train in (True, False))
    assert train.classes == held_out.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 1] and held_out.labels.tolist() == [0, 1]
    assert train.images().shape == (3, 3, 16, 16) and held_out.images().shape == (2, 3, 16, 16)
    with Image.open(tmp_path / "train" / "cat" / "0.png") as file:
        assert torch.equal(train.images()[0], torch.from_numpy(np.array(file)).permute(2, 0, 1))
    grey = train.images()[2]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[0], grey[2])
    with Image.open(tmp_path / "train" / "dog" / "0.png") as file:
        assert torch.equal(grey[0], torch.from_numpy(np.array(file))[2:18])


@pytest.mark.parametrize("empty", [["val"], ["val_sorted", "val"]])
@pytest.mark.parametrize("hidden", [False, True])
def test_test_folder_without_classes_is_passed_over(tmp_path, empty, hidden):
    for name in empty:
        (tmp_path / name / (".ipynb_checkpoints" if hidden else "")).mkdir(parents=True)
    for folder in ("train", "test"):
        write_images(tmp_path / folder / "cat", [(8, 8)])
    assert len(datasets.load("imagefolder", str(tmp_path), False)) == 1
    shutil.rmtree(tmp_path / "train")  # weights can be tested without it
    assert datasets.load("imagefolder", str(tmp_path), False).classes == ["cat"]


def test_links_back_to_a_parent_folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name / "more").mkdir(parents=True)
        (tmp_path / name / "more" / "1.png").touch()
        for link in ("self", "again"):
            (tmp_path / name / link).symlink_to(tmp_path / name)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")  # leads nowhere, so it is no class
    assert [Path(path).relative_to(tmp_path).parts[0] for path, _ in datasets.class_folders(tmp_path)[1]] == ["cat", "dog"]


def test_every_format_is_found_and_hidden_files_are_not(tmp_path):
    """What torchvision's ImageFolder takes for an image, and GIF; not what macOS, Jupyter and the like leave behind."""
    for suffix in ("png", "PNG", "pgm", "tif", "tiff", "gif", "webp"):
        write_images(tmp_path / "cat" / suffix, [(16, 16)], "L", suffix)
    write_images(tmp_path / "cat" / ".ipynb_checkpoints", [(16, 16)])
    (tmp_path / "cat" / "png" / "._0.png").write_bytes(b"no image")
    names, samples = datasets.class_folders(tmp_path)
    assert names == ["cat"] and len(samples) == 7
    assert all(datasets.decode(path).shape == (3, 16, 16) for path, _ in samples)


def test_sixteen_bit_grey_keeps_its_shades(tmp_path):
    """Also where torchvision's decoder, which ImageNet's pipeline tries first, hands it over."""
    shades = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(shades).save(tmp_path / "a.png")
    for decode in (datasets.decode, decoding.decode):
        assert torch.equal(decode(tmp_path / "a.png"), torch.from_numpy((shades >> 8).astype(np.uint8)).expand(3, -1, -1))


def test_transparent_palettes_and_floating_point(tmp_path, recwarn):
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8), "P")
    image.putpalette(list(range(256)) * 3)
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    with Image.open(tmp_path / "a.png") as file:
        expected = file.convert("RGBA").convert("RGB")
    recwarn.clear()
    assert torch.equal(datasets.decode(tmp_path / "a.png"), torch.from_numpy(np.array(expected)).permute(2, 0, 1))
    assert not recwarn.list
    with pytest.raises(ValueError, match="floating-point"):
        datasets.to_rgb(Image.fromarray(np.zeros((8, 8), np.float32)))


def test_image_folder_of_unequal_sizes_and_of_tests_alone(tmp_path):
    """The usual size counts, not the first image's; weights can be tested without the training images."""
    write_images(tmp_path / "train" / "cat", [(2, 2), (16, 16), (16, 20), (20, 16), (64, 64)])
    write_images(tmp_path / "train" / ".thumbnails", [(2, 2)])
    write_images(tmp_path / "val" / "cat", [(8, 8), (8, 8)])
    train = datasets.load("imagefolder", str(tmp_path), True)
    assert train.classes == ["cat"] and train.size == datasets.load("imagefolder", str(tmp_path), False).size == 16
    shutil.rmtree(tmp_path / "train")
    assert datasets.load("imagefolder", str(tmp_path), False, size=16).images().shape[-1] == 16  # as the weights were trained
    alone = datasets.load("imagefolder", str(tmp_path), False)
    assert alone.classes == ["cat"] and alone.images().shape == (2, 3, 8, 8)


def test_large_images_are_shrunk_in_memory(tmp_path):
    write_images(tmp_path / "train" / "a", [(200, 300)])
    assert datasets.load("imagefolder", str(tmp_path), True).images().shape[-1] == datasets.LARGEST_IN_MEMORY


def break_nothing(root):
    """Leave out everything."""


def break_empty(root):
    (root / "train" / "cat").mkdir(parents=True)


def break_no_test(root):
    write_images(root / "train" / "cat", [(8, 8)])


def break_test_without_classes(root):
    write_images(root / "train" / "cat", [(8, 8)])
    (root / "val").mkdir()


def break_other_classes(root):
    write_images(root / "train" / "cat", [(8, 8)])
    write_images(root / "test" / "dog", [(8, 8)])


def break_empty_test(root):
    write_images(root / "train" / "cat", [(8, 8)])
    (root / "test" / "cat").mkdir(parents=True)


def break_first_image(root):
    (root / "train" / "cat").mkdir(parents=True)
    (root / "train" / "cat" / "0.png").write_bytes(b"not an image")


def break_by_size(root):
    write_images(root / "train" / "cat", [(7, 9)])
    write_images(root / "test" / "cat", [(7, 9)])


def break_by_truncation(root):
    write_images(root / "train" / "cat", [(8, 8), (64, 64)])
    write_images(root / "test" / "cat", [(8, 8)])
    path = root / "train" / "cat" / "1.png"
    path.write_bytes(path.read_bytes()[:2000])


def break_by_empty_file(root):
    write_images(root / "train" / "cat", [(8, 8)])
    write_images(root / "test" / "cat", [(8, 8), (8, 8)])
    (root / "test" / "cat" / "1.png").write_bytes(b"")


def break_by_bad_chunk(root):
    write_images(root / "train" / "cat", [(8, 8), (64, 64)])
    write_images(root / "test" / "cat", [(8, 8)])
    path = root / "train" / "cat" / "1.png"
    content = bytearray(path.read_bytes())
    content[30:60] = bytes(30)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (break_nothing, "put them at"),
        (break_empty, "cat: a class folder without images"),
        (break_no_test, "put them at"),
        (break_test_without_classes, "put them at"),
        (break_other_classes, "cat, dog"),
        (break_empty_test, "cat: a class folder without images"),
        (break_first_image, "0.png"),
        (break_by_size, "7 pixels a side; the networks need 8"),
        (break_by_truncation, "1.png"),
        (break_by_empty_file, "1.png"),
        (break_by_bad_chunk, "1.png"),
    ],
)
def test_image_folder_that_cannot_be_used(tmp_path, spoil, said):
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        for train in (True, False):
            datasets.load("imagefolder", str(tmp_path), train).images()
    assert said in str(error.value) and len(str(error.value).splitlines()) == 1
