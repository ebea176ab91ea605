"""What a student takes the test images for is kept beside it, and what was harmed is one line."""

import os
from dataclasses import asdict, replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kdzoo.errors import StorageError, UserError
from kdzoo.store.predictions import PICTURES, SIDE, Predictions, mistakes, read


def made(images=20, classes=3, shown=2):
    chance = np.random.default_rng(0)
    labels, student, teacher = chance.integers(classes, size=(3, images))
    return Predictions(
        labels=labels,
        student=student,
        confidence=chance.random(images),
        teacher=teacher,
        worst=np.arange(shown),
        pictures=chance.integers(256, size=(shown, 8, 8, 3)).astype(np.uint8),
        titles=tuple(f"image {i}" for i in range(shown)),
    )


@pytest.fixture
def file(tmp_path):
    made().write(tmp_path / "predictions.safetensors")
    return tmp_path / "predictions.safetensors"


def test_what_is_read_is_what_was_written_but_for_the_precision_of_probabilities(file):
    found, given = asdict(read(file, 3)), asdict(made())
    assert found.pop("titles") == given.pop("titles")
    for name, array in given.items():
        np.testing.assert_allclose(found[name], array, atol=1e-3)
    assert not np.allclose(found["confidence"], given["confidence"] + 0.01, atol=1e-3)


def test_equal_predictions_are_equal_bytes(file, tmp_path):
    made().write(tmp_path / "again")
    made(images=19).write(tmp_path / "other")
    assert (tmp_path / "again").read_bytes() == file.read_bytes() != (tmp_path / "other").read_bytes()


def test_a_student_whose_logits_are_no_numbers_is_sure_of_nothing(tmp_path):
    given = replace(made(), confidence=np.where(np.arange(20) % 2, np.nan, 0.5))
    given.write(tmp_path / "file")
    assert read(tmp_path / "file", 3).confidence.tolist() == [0.5, 0.0] * 10


def test_many_classes_need_more_bits_and_keep_their_numbers(tmp_path):
    given = made(classes=40_000, images=500)
    given.write(tmp_path / "many")
    assert read(tmp_path / "many", 40_000).labels.tolist() == given.labels.tolist()


def test_the_surest_mistakes_come_first_and_of_equal_ones_the_first():
    labels, classes = np.array([0, 0, 0, 0, 0]), np.array([1, 0, 1, 1, 1])
    confidence = np.array([0.5, 0.99, 0.7, 0.9, 0.7])
    assert mistakes(labels, classes, confidence).tolist() == [3, 2, 4, 0]
    many = mistakes(np.zeros(50, int), np.ones(50, int), np.linspace(0, 1, 50))
    assert many.tolist() == list(range(49, 49 - PICTURES, -1))


def without(name):
    return lambda arrays: arrays.pop(name)


def with_array(name, array):
    return lambda arrays: arrays.update({name: array})


@pytest.mark.parametrize(
    "harm",
    [
        without("labels"),
        without("pictures"),
        with_array("labels", np.full(20, 3, np.int16)),
        with_array("student", np.full(20, -1, np.int16)),
        with_array("teacher", np.zeros(7, np.int16)),
        with_array("student", np.zeros((20, 1), np.int16)),
        with_array("student", np.zeros(20, np.float32)),
        with_array("confidence", np.full(20, np.nan, np.float16)),
        with_array("confidence", np.full(20, 2, np.float16)),
        with_array("worst", np.array([0, 20], np.int16)),
        with_array("pictures", np.zeros((2, 8, 9, 3), np.uint8)),
        with_array("pictures", np.zeros((2, SIDE + 1, SIDE + 1, 3), np.uint8)),
        with_array("pictures", np.zeros((2, 8, 8, 3), np.float32)),
        with_array("pictures", np.zeros((3, 8, 8, 3), np.uint8)),
    ],
)
def test_a_file_of_another_shape_is_one_line(file, harm):
    arrays, titles = load_file(file), {"titles": '["image 0", "image 1"]'}
    save_file(arrays, file, titles)
    read(file, 3)
    harm(arrays)
    save_file(arrays, file, titles)
    with pytest.raises(UserError, match=r"predictions\.safetensors cannot be read .*; remove it") as caught:
        read(file, 3)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("titles", ["", "{", "[1, 2]", '["a"]', "[" * 10_000, '{"a": 1}'])
def test_titles_of_another_shape_are_one_line(file, titles):
    save_file(load_file(file), file, {"titles": titles})
    with pytest.raises(UserError, match="cannot be read"):
        read(file, 3)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, b"\xff\xff\xff\xff\xff\xff\xff\x7f{", b"\0" * 8])
def test_what_is_no_file_of_tensors_is_one_line(file, content):
    file.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read(file, 3)


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_pipe_is_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="cannot be read"):
        read(tmp_path / "pipe", 3)


def test_a_folder_that_is_gone_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(StorageError, match="is not there"):
        made().write(tmp_path / "gone" / "predictions.safetensors")
    assert list(tmp_path.iterdir()) == []
