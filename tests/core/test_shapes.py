"""Claims about the synthetic images: no kind is told by its color, position or amount of shape."""

import pytest
import torch

from support import shapes


@pytest.fixture(scope="module")
def drawn():
    labels = torch.arange(4000) % 10
    return shapes.draw(labels, torch.Generator().manual_seed(5)).float() / 255, labels


def test_images_are_determined_by_the_seed_alone(drawn):
    again = shapes.draw(torch.arange(4000) % 10, torch.Generator().manual_seed(5)).float() / 255
    assert torch.equal(drawn[0], again)


def test_the_splits_share_no_image(monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 1000, "test": 1000})
    train, test = (shapes.make(split)[0].flatten(1).float() for split in ("train", "test"))
    assert torch.cdist(train, test).min() > 100  # 24 x 24 x 3 pixels of 0..255


def test_no_kind_is_told_by_its_mean_color(drawn):
    """Each kind's mean color is the overall mean within 4.5 standard errors (30 comparisons)."""
    images, labels = drawn
    means = images.mean(dim=(2, 3))  # [n, 3]
    error = means.std(dim=0) / 400**0.5
    for kind in range(10):
        assert ((means[labels == kind].mean(dim=0) - means.mean(dim=0)).abs() < 4.5 * error).all()


def test_every_kind_has_the_same_mean_image(drawn):
    """So a linear classifier has nothing but chance alignments to go by.

    No pixel is off by 5.5 standard errors (17,280 pixels).
    """
    images, labels = drawn
    means = torch.stack([images[labels == kind].mean(dim=0) for kind in range(10)])  # [10, C, H, W]
    assert ((means - images.mean(dim=0)).abs() < 5.5 * images.std(dim=0) / 400**0.5).all()


def test_all_kinds_have_about_the_same_area():
    line = torch.linspace(-2.5, 2.5, 500)
    v, u = torch.meshgrid(line, line, indexing="ij")
    areas = torch.stack([(outline(u, v) < 0).float().mean() * 25 for outline in shapes.KINDS])
    assert areas.min() > 2.7 and areas.max() < 3.3  # the disc has pi


def test_ten_kinds_ten_names():
    _, labels, names = shapes.make("test", chunk=shapes.COUNT["test"])
    assert len(set(names)) == 10 and labels.bincount().tolist() == [500] * 10
