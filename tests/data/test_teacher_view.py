"""The pictures of the teacher: the student's own, their crop without the other changes, or another draw."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kdzoo.data import Dataset, open_dataset
from kdzoo.distiller import Batch
from kdzoo.recipe import Augmentation, Protocol

MakeTree = Callable[..., Path]
RECIPES = {
    "nothing": Augmentation(),
    "crop": Augmentation(crop=1, flip=True),
    "resized": Augmentation(resized_crop=(0.3, 1.0), flip=True),
}
RANDOM, NEVER = "rand-m9-mstd0.5-inc1", "rand-m9-p0"  # the second changes no picture, after the same draws
VIEWS = ("plain", "weak", "strong")


@pytest.fixture
def digits() -> Dataset:
    return open_dataset("digits", limit=64)


def batches(data: Dataset, recipe: Augmentation, view: str = "same", **more: object) -> Iterator[Batch]:
    protocol = Protocol(epochs=2, batch_size=16, augmentation=recipe, teacher_view=view)  # type: ignore[arg-type]
    return data.loader(protocol, seed=3, **more).batches()  # type: ignore[arg-type]


def seen(batch: Batch) -> torch.Tensor:
    """The teacher's pictures, which are its own."""
    assert batch.teacher_images is not None
    return batch.teacher_images


@pytest.mark.parametrize("more", [{}, {"rand_augment": RANDOM}, {"jitter": 0.4, "erasing": 0.5}, {"mixup": 0.8}])
@pytest.mark.parametrize("view", ["same", *VIEWS])
def test_what_the_teacher_sees_changes_no_picture_of_the_student(digits, view, more) -> None:
    recipe = replace(RECIPES["crop"], **more)
    for one, other in zip(batches(digits, recipe), batches(digits, recipe, view), strict=True):
        assert one.teacher_images is None
        assert (other.teacher_images is None) == (view == "same")
        for mine, yours in zip(one[:5], other[:5], strict=True):
            assert torch.equal(mine, yours)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_where_nothing_but_crop_and_mirror_changes_the_pictures_plain_ones_are_the_same(
    make_tree: MakeTree, recipe: Augmentation, streams: bool
) -> None:
    data = open_dataset(f"folder:{make_tree(sizes=[(16, 16), (20, 18)])}", stream=streams, image_size=16)
    for batch in batches(data, recipe, "plain"):
        assert torch.equal(seen(batch), batch.images)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("recipe", [RECIPES["crop"], RECIPES["resized"]], ids=["crop", "resized"])
@pytest.mark.parametrize("change", [{"jitter": 0.4}, {"erasing": 1.0}, {"rand_augment": RANDOM}])
def test_plain_pictures_are_those_of_the_student_before_colours_and_patches_change(
    make_tree: MakeTree, recipe: Augmentation, change: dict[str, object], streams: bool
) -> None:
    data = open_dataset(f"folder:{make_tree(sizes=[(16, 16)])}", stream=streams, image_size=16)
    unchanged = replace(recipe, rand_augment=NEVER) if "rand_augment" in change else recipe
    for batch, before in zip(
        batches(data, replace(recipe, **change), "plain"),  # type: ignore[arg-type]
        batches(data, unchanged),
        strict=True,
    ):
        assert torch.equal(seen(batch), before.images)
        assert not torch.equal(batch.images, before.images)


@pytest.mark.parametrize("view", ["weak", "strong"])
@pytest.mark.parametrize("recipe", [RECIPES["crop"], replace(RECIPES["resized"], rand_augment=RANDOM)])
def test_a_view_for_the_teacher_is_that_which_methods_are_given(digits, view, recipe) -> None:
    for one, other in zip(batches(digits, recipe, view), batches(digits, recipe, views=(view,)), strict=True):
        assert torch.equal(seen(one), other.views[view])
        assert not torch.equal(seen(one), one.images)
    both = next(batches(digits, recipe, view, views=(view,)))
    assert torch.equal(seen(both), both.views[view])


@pytest.mark.parametrize("view", VIEWS)
def test_the_teachers_pictures_are_mixed_as_the_students_are(digits, view) -> None:
    crop = replace(RECIPES["crop"], jitter=0.3)
    for mixed, apart in zip(
        batches(digits, replace(crop, mixup=0.8), view, views=("weak",)), batches(digits, crop, view), strict=True
    ):
        partner = mixed.partner
        assert partner is not None
        rows = (mixed.labels != mixed.labels[partner]).nonzero()[:, 0]
        share = mixed.targets[rows[0], mixed.labels[rows[0]]]
        for found, alone in ((mixed.images, apart.images), (seen(mixed), seen(apart))):
            torch.testing.assert_close(found, share * alone + (1 - share) * alone[partner])
        if view == "weak":
            assert torch.equal(mixed.views["weak"], seen(apart))  # which methods are given unmixed


def test_a_box_of_the_partner_lies_in_the_same_place_of_both_pictures(digits) -> None:
    crop = RECIPES["crop"]
    [cut, apart] = (next(batches(digits, recipe, "weak")) for recipe in (replace(crop, cutmix=1.0), crop))
    assert cut.partner is not None
    kept = [found == alone for found, alone in ((cut.images, apart.images), (seen(cut), seen(apart)))]
    taken = [found == alone[cut.partner] for found, alone in ((cut.images, apart.images), (seen(cut), seen(apart)))]
    box = [(~mask).any(0).any(0) for mask in kept]  # where a picture is not the own one is the partner's
    assert all((mask | other).all() for mask, other in zip(kept, taken, strict=True))
    assert box[0].any()
    assert not box[0].all()
    inside = box[0] | box[1]
    assert all(mask[:, :, inside].all() for mask in taken)


@pytest.mark.parametrize("recipe", [RECIPES["crop"], replace(RECIPES["crop"], rand_augment=RANDOM, mixup=0.8)])
@pytest.mark.parametrize("view", VIEWS)
def test_the_teachers_pictures_are_pure_in_seed_and_step_and_each_device_has_its_rows(digits, view, recipe) -> None:
    whole = list(batches(digits, recipe, view))
    protocol = Protocol(epochs=2, batch_size=16, augmentation=recipe, teacher_view=view)
    resumed = next(digits.loader(protocol, seed=3).batches(5))
    assert torch.equal(seen(resumed), seen(whole[5]))
    assert not torch.equal(seen(resumed), seen(whole[4]))
    for rank in range(2):
        share = next(digits.loader(protocol, seed=3, rank=rank, world=2).batches(5))
        rows = (share.index[:, None] == whole[5].index).int().argmax(dim=1)
        assert torch.equal(seen(share), seen(whole[5])[rows])
