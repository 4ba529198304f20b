"""The strong view: RandAugment of batches is torchvision's, Cutout is a grey square, and positions decide the draws."""

import pytest
import torch
from torchvision.transforms import v2

from imagesets import randaugment
from imagesets.augment import Augmentation
from imagesets.randaugment import COUNT, GREY, OPERATIONS


def photos(count, size):
    """Return smooth made images (count, 3, size, size) uint8."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("size", [32, 33])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_torchvisions(name, size):
    images, theirs = photos(6, size), v2.RandAugment()
    magnitudes, signed = theirs._AUGMENTATION_SPACE[name]
    magnitudes = magnitudes(theirs.num_magnitude_bins, size, size)
    for sign in (0, 1):
        magnitude = 0.0 if magnitudes is None else float(magnitudes[theirs.magnitude]) * (2 * sign - 1 if signed else 1)
        expected = theirs._apply_image_or_video_transform(images, name, magnitude, theirs.interpolation, theirs._fill)
        number = torch.full((6,), list(OPERATIONS).index(name))
        found = randaugment.operate(images, number, torch.full((6,), sign))
        assert (found.int() - expected.int()).abs().max() <= 1  # a batch of another size may round otherwise
        assert torch.equal(found, images) == (name == "Identity")


def test_each_image_of_a_batch_has_its_own_operations():
    images = photos(len(OPERATIONS), 32)
    numbers, signs = torch.arange(len(OPERATIONS)), torch.arange(len(OPERATIONS)) % 2
    whole = randaugment.operate(images, numbers, signs)
    alone = [randaugment.operate(images[i : i + 1], numbers[i : i + 1], signs[i : i + 1]) for i in numbers]
    assert torch.equal(whole, torch.cat(alone))


def test_operations_and_signs_are_drawn_evenly():
    strong = Augmentation(4, True, True, cutout=True).on_device(32, 32)
    draws = strong.draw(28000, torch.Generator().manual_seed(0))
    assert draws.shape == (28000, 3 + 3 * COUNT)
    counts = draws[:, 3 : 3 + COUNT].flatten().bincount(minlength=14)
    assert (counts - 4000).abs().max() < 300
    assert (draws[:, 5:7].float().mean(0) - 0.5).abs().max() < 0.02
    assert draws[:, 7:].flatten().bincount(minlength=32).min() > 1500


def test_cutout_is_a_grey_square_cut_off_at_the_border():
    images, centres = torch.zeros(3, 3, 32, 32, dtype=torch.uint8), torch.tensor([[16, 10], [0, 31], [2, 16]])
    holes = (randaugment.cut_out(images, centres) == GREY).all(1)
    assert holes[0, 12:20, 6:14].all() and holes[0].sum() == 64
    assert holes[1, :4, 27:].all() and holes[1].sum() == 4 * 5 and holes[2].sum() == 6 * 8
    assert (randaugment.random_cut_out(images[0]) == GREY).any()
