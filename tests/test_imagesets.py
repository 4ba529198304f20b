"""Image sets: augmentation as torchvision's, the order of an epoch, its split over processes, archives and folders."""

import math
import os
import pickle

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedShuffleSplit
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

import imagesets
from imagesets import in_memory
from imagesets.augment import CropFlip, ResizedCropFlip
from imagesets.images import ImageSet, Settings
from scripts import Payload
from utils import UserError, World

STATISTICS = imagesets.STATISTICS["cifar100"]


def random_images(count, size=32, seed=0):
    """Return (count, 3, size, size) uint8 without a zero, which is the border's value."""
    return torch.randint(1, 256, (count, 3, size, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def image_set(pixels, labels=None):
    """Return images whose labels are their numbers unless given."""
    labels = torch.arange(len(pixels)) if labels is None else labels
    return ImageSet(labels, [str(number) for number in range(len(pixels))], STATISTICS, pixels.shape[-1], pixels)


def train_batches(images, batch_size, rank=0, ranks=1, seed=0, limit=None, padding=0):
    """Return training batches, by default without padding, so that an image keeps its pixels."""
    settings = Settings(batch_size=batch_size, seed=seed, world=World(rank, ranks), limit=limit)
    return in_memory.TrainBatches(images, CropFlip(images.size, padding), settings)


def test_crop_and_flip_are_torchvisions_for_every_draw():
    draws = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    images = random_images(len(draws))
    padded = tv.pad(images, [4, 4, 4, 4])
    for image, (top, left, flip), found in zip(padded, draws.tolist(), CropFlip(32).apply(images, draws), strict=True):
        expected = tv.crop(image, top, left, 32, 32)
        assert torch.equal(found, tv.horizontal_flip(expected) if flip else expected)


def test_draws_are_uniform_and_independent():
    draws = CropFlip(32).draw(81 * 2 * 200, torch.Generator().manual_seed(0))
    seen = ((draws[:, 0] * 9 + draws[:, 1]) * 2 + draws[:, 2]).bincount(minlength=162).double()
    chi_square = ((seen - 200) ** 2 / 200).sum().item()
    assert len(seen) == 162 and abs(chi_square - 161) < 5 * math.sqrt(2 * 161)


@pytest.mark.parametrize("source", [32, 64, 96])
def test_resized_crops_and_flips_are_torchvisions(source):
    """Within PIL's two roundings (one of each pass) for small, large and whole boxes."""
    images, crops = random_images(40, source), ResizedCropFlip(source, 32)
    draws = crops.draw(40, torch.Generator().manual_seed(0))
    draws[:2, :4] = torch.tensor([[0, 0, source, source], [3, 1, 19, 23]])
    for image, (*box, flip), found in zip(images, draws.tolist(), crops.apply(images, draws), strict=True):
        expected = tv.pil_to_tensor(tv.resized_crop(tv.to_pil_image(image), *box, [32, 32])).float()
        assert ((expected.flip(2) if flip else expected) - found).abs().max() <= 1.001


def test_boxes_have_torchvisions_distribution():
    """Quantiles of corner, sides, area and ratio of 4,000 boxes each, in units of the image's side or area."""

    def quantiles(boxes):
        top, left, height, width = boxes.float().T / 96
        values = torch.stack([top, left, height, width, height * width, width / height])
        return values.quantile(torch.arange(0.1, 1, 0.1), dim=1)

    torch.manual_seed(0)
    image = torch.empty(3, 96, 96)
    wanted = [v2.RandomResizedCrop.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(4000)]
    found = ResizedCropFlip(96, 32).draw(4000, torch.Generator().manual_seed(0))[:, :4]
    assert (quantiles(found) - quantiles(torch.tensor(wanted))).abs().max() < 0.03


def test_normalisation_is_torchvisions_and_the_border_is_black():
    images = random_images(6)
    normalise = in_memory.Normaliser(STATISTICS, torch.device("cpu"))
    transform = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*STATISTICS)])
    found = normalise(images)
    torch.testing.assert_close(found, transform(images), rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    border = normalise(CropFlip(32).apply(images, torch.zeros(6, 3, dtype=torch.int64)))[:, :, :4, :]
    black = -torch.tensor(STATISTICS[0]) / torch.tensor(STATISTICS[1])
    torch.testing.assert_close(border, black.view(1, 3, 1, 1).expand_as(border))


def test_an_epoch_shows_every_image_once_augmented_under_its_number():
    images = random_images(10, 8)
    labels = torch.arange(10) % 3
    batches = train_batches(image_set(images, labels), 4, padding=1)
    found = list(batches.epoch(0))
    views = torch.cartesian_prod(torch.arange(3), torch.arange(3), torch.arange(2))
    assert [len(index) for _, _, index in found] == [4, 4, 2] and len(batches) == 3 and batches.num_images == 10
    assert sorted(torch.cat([index for _, _, index in found]).tolist()) == list(range(10))
    for image, label, number in (item for batch in found for item in zip(*batch, strict=True)):
        possible = CropFlip(8, 1).apply(images[number].expand(18, -1, -1, -1), views)
        assert (batches.normalise(possible) == image).flatten(1).all(1).any() and label == labels[number]


def test_order_is_seeded_and_differs_between_epochs_and_seeds():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        batches = train_batches(image_set(random_images(23, 4)), 5, seed=seed)
        orders.append(tuple(torch.cat([labels for _, labels, _ in batches.epoch(epoch)]).tolist()))
    assert orders[0] == orders[3] and sorted(orders[0]) == list(range(23))
    assert len({*orders, tuple(range(23))}) == 4


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_together_see_the_batches_of_one_process_from_any_step_on(ranks, start):
    images = image_set(random_images(23, 8))
    alone = list(train_batches(images, 6, padding=4).epoch(1))
    found = [list(train_batches(images, 6, rank, ranks, padding=4).epoch(1, start)) for rank in range(ranks)]
    for step, batch in enumerate(alone[start:]):
        together = [torch.cat(parts) for parts in zip(*(batches[step] for batches in found), strict=True)]
        assert all(torch.equal(part[: len(whole)], whole) for part, whole in zip(together, batch, strict=True))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_test_image_counts_once(ranks):
    whole, normalise = image_set(random_images(23, 4)), in_memory.Normaliser(STATISTICS, torch.device("cpu"))
    shares = [in_memory.TestBatches(whole, Settings(4, world=World(rank, ranks))) for rank in range(ranks)]
    found = [batch for share in shares for batch in share]
    assert sorted(torch.cat([labels for _, labels in found]).tolist()) == list(range(23))
    assert all(torch.equal(normalise(whole.pixels[labels]), images) for images, labels in found)
    assert {share.total for share in shares} == {23} and sum(map(len, shares)) == len(found)


def test_batches_that_do_not_divide_and_their_limit():
    images = image_set(random_images(9, 4))
    with pytest.raises(UserError):
        train_batches(images, 5, ranks=2)
    limited = train_batches(images, 3, limit=2)
    assert len(limited) == len(list(limited)) == 2


def test_digits_split():
    data = imagesets.load("digits")
    train, test = data.train, data.test
    assert (train.num_images, test.total, data.num_classes, data.size) == (1437, 360, 10, 32) and data.val is None
    whole = torch.from_numpy(load_digits().target).bincount()
    assert (train.labels.bincount() - 0.8 * whole).abs().max() < 1
    assert not {x.numpy().tobytes() for x in train.images} & {x.numpy().tobytes() for x in test.images}
    pixels = train.images.double() / 255
    torch.testing.assert_close(pixels.mean().item(), data.info["mean"][0], atol=5e-3, rtol=0)
    torch.testing.assert_close(pixels.std().item(), data.info["std"][0], atol=5e-3, rtol=0)
    assert not train.augmentation.draw(100, torch.Generator())[:, 2].any()  # a mirrored digit is another one, or none


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_few_shot_split_is_scikit_learns(ratio):
    labels = torch.from_numpy(np.random.RandomState(0).permutation(np.repeat(np.arange(100), 50)))
    images = image_set(torch.arange(5000).view(-1, 1, 1, 1), labels)
    splitter = StratifiedShuffleSplit(n_splits=1, test_size=1 - ratio, random_state=0)
    expected = sorted(next(splitter.split(np.zeros(5000), labels.numpy()))[0].tolist())
    kept, left = (part.pixels.flatten().tolist() for part in images.stratified(ratio))
    assert kept == expected and sorted(kept + left) == list(range(5000))
    assert len(images.stratified(1.0)[0]) == 5000


def test_held_out_and_few_training_images():
    data = imagesets.load("digits", val_split=0.2, few_ratio=0.5)
    whole = {x.numpy().tobytes() for x in imagesets.load("digits").train.images}
    parts = [{x.numpy().tobytes() for x in part.images} for part in (data.train, data.val)]
    assert abs(len(parts[1]) - 287) <= 1 and abs(len(parts[0]) - 575) <= 1 and data.info["images"] == len(parts[0])
    assert parts[0] | parts[1] <= whole and not parts[0] & parts[1]


READERS = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
KEYS = {"cifar10": ("labels", "label_names"), "cifar100": ("fine_labels", "fine_label_names")}


def write_cifar(root, name, as_bytes=False):
    """Write CIFAR's files with two random images each; return the pixels and labels of {split: ...}."""
    reader, draw, classes = READERS[name], np.random.RandomState(0), int(name[5:])
    folder, written = root / reader.base_folder, {}
    folder.mkdir(parents=True)
    convert = (lambda text: text.encode()) if as_bytes else str
    for split, files in (("train", reader.train_list), ("test", reader.test_list)):
        parts = [(draw.randint(0, 256, (2, 3072), np.uint8), draw.randint(0, classes, 2).tolist()) for _ in files]
        for (file, _), (pixels, labels) in zip(files, parts, strict=True):
            content = {convert("data"): pixels, convert(KEYS[name][0]): labels}
            (folder / file).write_bytes(pickle.dumps(content, protocol=2 + 2 * as_bytes))
        pixels, labels = zip(*parts, strict=True)
        written[split] = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, 32, 32), sum(labels, [])
    names = [convert(f"class{i}") for i in range(classes)]
    (folder / reader.meta["filename"]).write_bytes(pickle.dumps({convert(KEYS[name][1]): names}, protocol=2))
    return written


@pytest.mark.parametrize(("published", "as_bytes"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("name", READERS)
def test_cifar_as_published_and_with_other_contents(name, published, as_bytes, tmp_path, monkeypatch, capsys):
    """Torchvision reads the former; the latter is read here, also with bytes as keys, with one warning."""
    written = write_cifar(tmp_path, name, as_bytes)
    if published:
        monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    data = imagesets.load(name, tmp_path)
    for batches, (pixels, labels) in ((data.train, written["train"]), (data.test, written["test"])):
        assert torch.equal(batches.images, pixels) and batches.labels.tolist() == labels
    assert data.classes == [f"class{i}" for i in range(int(name[5:]))] and data.statistics == imagesets.STATISTICS[name]
    assert len(capsys.readouterr().err.splitlines()) == (not published)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", pickle.dumps({"data": np.zeros((1, 3072), np.uint8)})])
def test_a_damaged_cifar_file_is_named(content, tmp_path):
    write_cifar(tmp_path, "cifar10")
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        imagesets.load("cifar10", tmp_path)
    assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("protocol", [2, 5])
def test_no_code_of_a_pickle_is_executed(protocol, tmp_path):
    write_cifar(tmp_path, "cifar100")
    content = {"data": Payload(tmp_path / "executed"), "fine_labels": []}
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(UserError):
        imagesets.load("cifar100", tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10"])
def test_a_missing_archive_is_downloaded_or_one_line_says_where_to_unpack_it(name, tmp_path, monkeypatch):
    def no_network(url, *_, **__):
        asked.append(url)
        raise OSError("no route\nto host")

    asked, module = [], "stl10" if name == "stl10" else "cifar"
    monkeypatch.setattr(f"torchvision.datasets.{module}.download_and_extract_archive", no_network)
    with pytest.raises(UserError) as error:
        imagesets.load(name, tmp_path)
    folder = tmp_path / getattr(torchvision.datasets, name.upper()).base_folder
    assert asked[0] in str(error.value) and str(folder) in str(error.value) and len(str(error.value).splitlines()) == 1


def write_stl10(root):
    """Write 20 images of each split as STL-10's files; return the pixels and labels of {split: ...}."""
    folder, draw, written = root / "stl10_binary", np.random.RandomState(0), {}
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("".join(f"class{i}\n" for i in range(10)))
    for split in ("train", "test"):
        images, labels = draw.randint(0, 256, (20, 3, 96, 96), np.uint8), np.arange(20) % 10
        images.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")  # stored column by column
        (labels + 1).astype(np.uint8).tofile(folder / f"{split}_y.bin")
        written[split] = torch.from_numpy(images), labels.tolist()
    return written


def test_stl10(tmp_path, monkeypatch):
    written = write_stl10(tmp_path)
    with pytest.raises(UserError, match="damaged"):
        imagesets.load("stl10", tmp_path)
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda path, md5: os.path.isfile(path))
    data = imagesets.load("stl10", tmp_path)
    for batches, (pixels, labels) in ((data.train, written["train"]), (data.test, written["test"])):
        assert torch.equal(batches.images, pixels) and batches.labels.tolist() == labels
    assert data.num_classes == 10 and data.size == 96
