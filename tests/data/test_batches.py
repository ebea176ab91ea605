"""Training batches: pure in seed and step, with the targets and views asked for."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from kdzoo.data import Dataset, open_dataset
from kdzoo.data.sources import open_source
from kdzoo.distiller import Batch
from kdzoo.errors import UserError
from kdzoo.recipe import Augmentation, Protocol

RECIPES = {
    "nothing": Augmentation(),
    "crop": Augmentation(crop=1, flip=True),
    "resized": Augmentation(resized_crop=(0.3, 1.0), flip=True, jitter=0.4, erasing=0.5),
    "mixed": Augmentation(crop=1, mixup=0.8, cutmix=1.0),
    "pillow": Augmentation(crop=1, flip=True, rand_augment="rand-m9-mstd0.5-inc1", erasing=0.25),
}


@pytest.fixture
def digits() -> Dataset:
    return open_dataset("digits", limit=100)


def protocol(recipe: str = "nothing", **settings: object) -> Protocol:
    return Protocol(epochs=3, batch_size=16, augmentation=RECIPES[recipe], **settings)  # type: ignore[arg-type]


def same(one: Batch, other: Batch) -> bool:
    def tensors(batch: Batch) -> list[Tensor]:
        fields = [batch.images, batch.labels, batch.targets, batch.index, batch.progress]
        return [*fields, *batch.views.values()]

    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_starts_at_a_step_repeats_the_one_that_ran_to_it(digits: Dataset, recipe: str) -> None:
    views = ("weak", "strong", "rotations")
    loader = digits.loader(protocol(recipe), seed=3, views=views)
    whole = list(loader.batches())
    resumed = list(digits.loader(protocol(recipe), seed=3, views=views).batches(7, 13))
    assert len(whole) == loader.total_steps == 18
    assert all(same(a, b) for a, b in zip(whole[7:13], resumed, strict=True))
    assert not same(whole[6], resumed[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_shares_of_a_batch_are_the_whole_batch_row_by_row(digits: Dataset, recipe: str) -> None:
    views = ("weak", "strong", "rotations")
    for world in (2, 4):
        loaders = [digits.loader(protocol(recipe), seed=3, views=views, rank=r, world=world) for r in range(world)]
        shares = [next(loader.batches(4)) for loader in loaders]
        whole = next(digits.loader(protocol(recipe), seed=3, views=views).batches(4))
        assert sorted(torch.cat([share.index for share in shares]).tolist()) == sorted(whole.index.tolist())
        for share in shares:
            places = (share.index[:, None] == whole.index).int().argmax(dim=1)
            partner = None if whole.partner is None else whole.index[whole.partner[places]]
            assert partner is None or torch.equal(share.index[share.partner], partner)
            for own, all_rows in [
                *zip(share[:3], whole[:3], strict=True),
                *((share.views[v], whole.views[v]) for v in views),
            ]:
                assert torch.equal(own, all_rows[places])


def test_a_batch_that_cannot_be_shared_evenly_is_one_line(digits: Dataset) -> None:
    with pytest.raises(
        UserError, match=r"batch of 16 images cannot be shared evenly by 3 devices; set .* multiple of 3"
    ):
        digits.loader(protocol(), seed=0, rank=0, world=3)
    with pytest.raises(UserError, match=r"each device gets 1; set .* to a multiple of 32, at most"):
        digits.loader(protocol("mixed"), seed=0, rank=0, world=16)


def test_another_seed_gives_another_order_and_other_draws(digits: Dataset) -> None:
    one = next(digits.loader(protocol("crop"), seed=0).batches())
    other = next(digits.loader(protocol("crop"), seed=1).batches())
    assert not torch.equal(one.index, other.index)


def test_an_epoch_visits_rows_once_in_an_order_of_its_own_and_drops_the_rest(digits: Dataset) -> None:
    loader = digits.loader(protocol(), seed=0)
    rows = torch.cat([batch.index for batch in loader.batches()]).view(3, -1)
    assert loader.steps_per_epoch == 100 // 16
    assert all(len(epoch.unique()) == 96 for epoch in rows)
    assert not torch.equal(rows[0], rows[1])


def test_a_set_smaller_than_a_batch_is_one_batch() -> None:
    loader = open_dataset("digits", limit=10).loader(protocol(), seed=0)
    assert loader.steps_per_epoch == 1
    assert sorted(next(loader.batches()).index.tolist()) == list(range(10))


@pytest.mark.parametrize("recipe", RECIPES)
def test_global_random_states_are_neither_used_nor_changed(digits: Dataset, recipe: str) -> None:
    def states() -> tuple[object, ...]:
        numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
        return random.getstate(), numpy["key"].tolist(), numpy["pos"], torch.get_rng_state().tolist()

    def batch() -> Batch:
        views = ("weak", "strong")
        return next(digits.loader(protocol(recipe), seed=0, views=views).batches())

    before = states()
    first = batch()
    assert states() == before
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    assert same(first, batch())


def test_images_are_the_rows_named_by_index_in_the_unit_range(digits: Dataset) -> None:
    source = open_source("digits", Path()).limited(100)
    batch = next(digits.loader(protocol(), seed=0).batches())
    expected = source.train.array[batch.index.numpy()].transpose(0, 3, 1, 2) / np.float32(255)  # type: ignore[union-attr]
    assert np.array_equal(batch.images.numpy(), expected)
    assert batch.images.dtype == torch.float32
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch.labels, digits.spec.labels[batch.index])
    assert batch.partner is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_augmented_images_stay_in_the_unit_range_and_channels_last(digits: Dataset, recipe: str) -> None:
    batch = next(digits.loader(protocol(recipe), seed=0, views=("weak", "strong")).batches())
    for images in (batch.images, *batch.views.values()):
        assert images.shape == (16, 3, 8, 8)
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert 0 <= images.min() < images.max() <= 1


def test_progress_is_the_share_of_steps_done(digits: Dataset) -> None:
    shares = [batch.progress for batch in digits.loader(protocol(), seed=0).batches()]
    assert shares[0].shape == ()
    assert shares[0].dtype == torch.float32
    assert torch.allclose(torch.stack(shares), torch.arange(18) / 18)


def test_smoothing_leaves_an_equal_share_at_every_class(digits: Dataset) -> None:
    batch = next(digits.loader(protocol(label_smoothing=0.1), seed=0).batches())
    on = batch.targets.gather(1, batch.labels[:, None])
    assert torch.allclose(batch.targets.sum(1), torch.ones(16))
    assert torch.allclose(on, torch.full((16, 1), 0.91))
    assert torch.allclose(batch.targets.min(), torch.tensor(0.01))


def test_mixup_blends_images_and_targets_with_the_partner(digits: Dataset) -> None:
    plain = next(digits.loader(protocol(), seed=0).batches())
    mixing = Protocol(epochs=3, batch_size=16, augmentation=Augmentation(mixup=0.8))
    mixed = next(digits.loader(mixing, seed=0).batches())
    assert mixed.partner is not None
    assert mixed.partner.tolist() == list(range(15, -1, -1))
    assert torch.equal(mixed.labels, plain.labels)
    row = int((plain.labels != plain.labels[mixed.partner]).nonzero()[0])
    own = mixed.targets[row, plain.labels[row]]
    blend = own * plain.images + (1 - own) * plain.images[mixed.partner]
    assert 0 < own < 1
    assert torch.allclose(mixed.images, blend, atol=1e-6)
    assert torch.allclose(mixed.targets, own * plain.targets + (1 - own) * plain.targets[mixed.partner])


def test_cutmix_takes_the_partners_share_of_pixels(digits: Dataset) -> None:
    plain = next(digits.loader(protocol(), seed=0).batches())
    cutting = Protocol(epochs=3, batch_size=16, augmentation=Augmentation(cutmix=1.0), label_smoothing=0.1)
    cut = next(digits.loader(cutting, seed=0).batches())
    assert cut.partner is not None
    partners = plain.images[cut.partner]
    assert torch.all((cut.images == plain.images) | (cut.images == partners))
    assert not torch.equal(cut.images, plain.images)
    assert torch.allclose(cut.targets.sum(1), torch.ones(16))


def test_mixing_refuses_batches_that_do_not_pair() -> None:
    with pytest.raises(UserError, match=r"each device gets 9; set .* to a multiple of 2, at most 9"):
        open_dataset("digits", limit=9).loader(protocol("mixed"), seed=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_views_leave_the_images_as_they_are(digits: Dataset, recipe: str) -> None:
    alone = next(digits.loader(protocol(recipe), seed=0).batches())
    viewed = next(digits.loader(protocol(recipe), seed=0, views=("rotations", "strong", "weak")).batches())
    assert torch.equal(alone.images, viewed.images)
    assert alone.views == {}
    assert set(viewed.views) == {"rotations", "strong", "weak"}


def test_views_are_further_draws_of_the_same_images(digits: Dataset) -> None:
    views = ("weak", "strong", "rotations")
    batch = next(digits.loader(protocol("crop"), seed=0, views=views).batches())
    still = next(digits.loader(protocol(), seed=0, views=views).batches())
    assert not torch.equal(batch.views["weak"], batch.images)
    assert torch.equal(still.views["weak"], still.images)
    assert not torch.equal(still.views["strong"], still.images)
    for turns in range(4):
        turned = np.rot90(batch.images.numpy(), turns, (2, 3))
        assert np.array_equal(batch.views["rotations"][:, turns].numpy(), turned)


def test_an_unknown_view_gets_a_suggestion(digits: Dataset) -> None:
    with pytest.raises(UserError, match="unknown view 'week'; did you mean weak"):
        digits.loader(protocol(), seed=0, views=("week",))


def test_two_kinds_of_crop_are_refused(digits: Dataset) -> None:
    both = Protocol(augmentation=Augmentation(crop=1, resized_crop=(0.5, 1.0)))
    with pytest.raises(UserError, match="keep one"):
        digits.loader(both, seed=0)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_steps(digits: Dataset) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1])  # pages

    long = Protocol(epochs=100, batch_size=16, augmentation=RECIPES["mixed"])
    batches = digits.loader(long, seed=0).batches()
    for _ in range(100):
        next(batches)
    before = resident()
    for _ in range(400):
        next(batches)
    assert resident() - before < 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["nothing", "crop", "resized", "mixed"])
def test_a_step_on_the_gpu_never_waits_and_repeats_itself(recipe: str, never_waits) -> None:
    data = open_dataset("digits", limit=100, device="cuda", image_size=12 if recipe == "resized" else None)
    views = ("weak", "rotations")
    loader = data.loader(protocol(recipe, label_smoothing=0.1), seed=0, views=views)
    batches = loader.batches()
    next(batches)  # the first step may build kernels
    with never_waits():
        rest = list(batches)
    assert all(same(a, b) for a, b in zip(rest, loader.batches(1), strict=True))
    assert rest[0].images.is_cuda


@pytest.mark.parametrize("recipe", RECIPES)
def test_small_images_are_shown_larger_where_asked(recipe: str) -> None:
    data = open_dataset("digits", limit=32, image_size=20)
    batch = next(data.loader(protocol(recipe), seed=0, views=("weak",)).batches())
    assert batch.images.shape == batch.views["weak"].shape == (16, 3, 20, 20)
    assert next(data.test_batches(4))[0].shape == (4, 3, 20, 20)


def test_the_test_crop_keeps_the_centre() -> None:
    data = open_dataset("digits", image_size=16)
    images, labels = next(data.test_batches(5))
    cropped, again = next(data.test_batches(5, test_crop=0.5))
    assert cropped.shape == images.shape
    assert torch.equal(labels, again)
    larger = next(open_dataset("digits", image_size=32).test_batches(5))[0]
    assert torch.equal(cropped, larger[:, :, 8:24, 8:24])
