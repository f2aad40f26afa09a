"""Claims about the synthetic images: no pixel and no mean tells the kind; masks are exact."""

import pytest
import torch
import torch.nn.functional as F

from support import shapes


@pytest.fixture(scope="module")
def drawn():
    labels = torch.arange(4000) % 10
    images, masks = shapes.draw(labels, torch.Generator().manual_seed(5))
    return images.float() / 255, labels, masks


def test_images_are_determined_by_the_seed_alone(drawn):
    again, _ = shapes.draw(torch.arange(4000) % 10, torch.Generator().manual_seed(5))
    assert torch.equal(drawn[0], again.float() / 255)


def test_the_splits_share_no_image(monkeypatch):
    monkeypatch.setattr("support.shapes.COUNT", {"train": 1000, "test": 1000})
    train, test = (shapes.make(split)[0].flatten(1).float() for split in ("train", "test"))
    assert torch.cdist(train, test).min() > 100  # 24 x 24 x 3 pixels of 0..255


def test_no_kind_is_told_by_its_mean_color(drawn):
    """Each kind's mean color is the overall mean within 4.5 standard errors (30 comparisons)."""
    images, labels, _ = drawn
    means = images.mean(dim=(2, 3))  # [n, 3]
    error = means.std(dim=0) / 400**0.5
    for kind in range(10):
        assert ((means[labels == kind].mean(dim=0) - means.mean(dim=0)).abs() < 4.5 * error).all()


def test_every_kind_has_the_same_mean_image(drawn):
    """So a linear classifier has nothing but chance alignments to go by.

    No pixel is off by 5.5 standard errors (17,280 pixels).
    """
    images, labels, _ = drawn
    means = torch.stack([images[labels == kind].mean(dim=0) for kind in range(10)])  # [10, C, H, W]
    assert ((means - images.mean(dim=0)).abs() < 5.5 * images.std(dim=0) / 400**0.5).all()


def test_the_mask_is_where_the_confetti_is(drawn):
    """On the shape dots are far from the ground's gray, off it near; the soft edge is left out."""
    images, _, masks = drawn
    contrast = (images - 0.5).abs().mean(dim=1)  # [n, H, W]
    grown = F.max_pool2d(masks[:, None].float(), 3, 1, 1)[:, 0]
    shrunk = 1 - F.max_pool2d(1 - masks[:, None].float(), 3, 1, 1)[:, 0]
    assert contrast[shrunk == 1].mean() > 0.4 and contrast[grown == 0].mean() < 0.1


def test_the_dial_is_the_share_of_dots_that_differ_between_images():
    """With detail 0 two discs show the same dots wherever both are; with 1 half of them agree by
    chance, and with .5 five eighths."""
    for detail, agree in ((0.0, 1.0), (0.5, 0.5 + 0.5**3), (1.0, 0.5)):
        images, masks = shapes.draw(torch.zeros(400, dtype=torch.int64),
                                    torch.Generator().manual_seed(0), detail=detail)
        bright = (images > 127)[:, :, 10:14, 10:14]  # which every disc covers
        assert masks[:, 10:14, 10:14].all()
        same = (bright[::2] == bright[1::2]).float().mean().item()
        assert same == pytest.approx(agree, abs=0.01)


def test_all_kinds_have_about_the_same_area():
    line = torch.linspace(-2.5, 2.5, 500)
    v, u = torch.meshgrid(line, line, indexing="ij")
    areas = torch.stack([(outline(u, v) < 0).float().mean() * 25 for outline in shapes.KINDS])
    assert areas.min() > 2.7 and areas.max() < 3.3  # the disc has pi


def test_ten_kinds_ten_names():
    _, labels, names, _ = shapes.make("test", chunk=shapes.COUNT["test"])
    assert len(set(names)) == 10 and labels.bincount().tolist() == [500] * 10
