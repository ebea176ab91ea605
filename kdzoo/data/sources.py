"""Find a data set by name and load its labels and images, before any image is decoded."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdzoo import registry
from kdzoo.data.classes import in_order
from kdzoo.data.loaded import checked, without_images
from kdzoo.data.pictures import USUAL, Files, Pictures, Reading, warn_once
from kdzoo.data.superclasses import superclasses_of
from kdzoo.errors import UserError
from kdzoo.files import path_of
from kdzoo.image_set import ImageSet
from kdzoo.keywords import keyword_settings
from kdzoo.process_state import foreign
from kdzoo.quantities import counted


@dataclass(frozen=True)
class Source:
    """A data set that is loaded and not yet decoded."""

    name: str
    class_names: tuple[str, ...]  # empty where images have no labels: those of its pictures are then all 0
    train: Pictures
    test: Pictures  # empty where the set has none
    key: str  # the folder of its decoded images; empty where all are in memory
    test_names: tuple[str, ...] = ()  # of the classes of test images; empty where these have no labels

    @property
    def labelled(self) -> bool:
        """Whether training images have labels."""
        return bool(self.class_names)

    @property
    def superclasses(self) -> tuple[int, ...]:
        """(K,) the superclass of each class; empty where none are defined."""
        return superclasses_of(self.class_names)

    def holding_out(self, share: float, key: str) -> "Source":
        """Take a share of the training images, of each class alike, as the test images; 0 keeps the set's own.

        Errors name the setting ``key``, which asks for it.
        """
        if not share:
            if not len(self.test):
                raise UserError(
                    f"data '{self.name}' has images for training alone, neither 'val' nor 'test'; set data.val=0.1 to "
                    "hold out a tenth of them"
                )
            return self
        held = stratified(self.train.labels, max(1, round(len(self.train) * share)))
        kept = np.delete(np.arange(len(self.train)), held)
        if not len(kept):
            raise UserError(f"{key}={share:g} of {counted(len(self.train), 'image')} leaves none to train on")
        test = self.train.take(held)
        if absent := without_images(self.class_names, test.labels):
            warn_once(
                f"data '{self.name}': {key}={share:g} holds out images of {len(np.unique(test.labels))} of "
                f"{counted(len(self.class_names), 'class')}, none of {absent}; more images, or a larger "
                "share, have some of each"
            )
        if isinstance(test, Files):
            test = replace(test, split="test")
        return replace(self, train=self.train.take(kept), test=test, test_names=self.class_names)

    def tested_on(self, other: "Source") -> "Source":
        """Take the test images of another set, or all of its images where it has none for the test.

        Raises:
            UserError: one of them holds arrays and the other files, or its classes are others.
        """
        test, name = (other.test if len(other.test) else other.train), f"data.test={other.name}"
        if isinstance(test, Files) is not isinstance(self.train, Files):
            raise UserError(f"{name}: one of the sets is of image files and the other is not; expected the same kind")
        if not other.class_names:
            raise UserError(f"{name} has no labels, which are what it is there for; expected a set such as folder:PATH")
        if isinstance(test, Files):
            test = replace(test, split="test")
        found = replace(self, test=test, test_names=other.class_names)
        return found.naming(self.class_names) if self.class_names else found

    def naming(self, names: Sequence[str]) -> "Source":
        """Number the test images' classes as these names are numbered."""
        places = np.array(places_of(self.test_names, names), np.int64)
        return replace(self, test=replace(self.test, labels=places[self.test.labels]), test_names=tuple(names))

    def ordered(self, classes: str | None) -> "Source":
        """Bring the classes into another order, see ``kdzoo.data.classes``; None keeps the set's own."""
        if classes is None:
            return self
        if not self.labelled:
            return self  # whose names the teacher's outputs have
        names = in_order(self.class_names, classes)
        places = np.array([names.index(name) for name in self.class_names])
        train, test = (replace(split, labels=places[split.labels]) for split in (self.train, self.test))
        return replace(self, class_names=names, train=train, test=test, test_names=names)

    def limited(self, limit: int | None) -> "Source":
        """Keep ``limit`` training images, spread over the classes as in the whole set."""
        if limit is None or limit >= len(self.train):
            return self
        if limit < 1:
            raise UserError(f"limit is {limit}; expected at least one training image")
        return replace(self, train=self.train.take(stratified(self.train.labels, limit)))


def places_of(known: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """Find the place of each class among the outputs of a network, by name; by number where no name is shared.

    Raises:
        UserError: some names are there and others are not, or without common names the numbers of classes differ.
    """
    lacking = [name for name in known if name not in wanted]
    if not lacking:
        return [list(wanted).index(name) for name in known]
    if len(lacking) == len(known) == len(wanted):
        return list(range(len(known)))
    raise UserError(
        f"data.test has {counted(len(lacking), 'class')} not among the {len(wanted)} of the outputs, such as "
        f"'{lacking[0]}'; leave such images out of it or, where outputs are named otherwise, name them in a file, one "
        "name a line: data.classes=FILE"
    )


def stratified(labels: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
    """Choose ``limit`` sorted rows out of labels (N,), each class with its share; the same rows at every call."""
    shuffled = np.random.default_rng(0).permutation(len(labels))
    share = np.empty(len(labels))  # of the row's class that lies before it: classes advance together
    for label in np.unique(labels):
        rows = shuffled[labels[shuffled] == label]
        share[rows] = (np.arange(len(rows)) + 0.5) / len(rows)
    return np.sort(np.lexsort((labels, share))[:limit])


def option_settings(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Read all options of the data set of this name: those ``given``, and the defaults of the others.

    Raises:
        UserError: an unknown data set or option, or a value of another type.
    """
    return _options(name, _find(name)[0], given)


def image_set(name: str, options: Mapping[str, Any] | None = None) -> ImageSet:
    """Make the data set of this name with these options; nothing is loaded.

    Args:
        name: one of ``kdzoo list data``, with what has to follow its colon, or the path of a Python file.
        options: keywords of the set's constructor.

    Raises:
        UserError: an unknown name or option, or a value of another type.
    """
    kind, argument = _find(name)
    settings = _options(name, kind, options or {})
    with at_work(name, "its constructor"):
        return kind(*argument, **settings)


def at_work(name: str, part: str) -> AbstractContextManager[None]:
    """Make a context in which a data set's own code runs: any error inside is one line that names ``part``."""
    return foreign(f"data '{name}'", f": {part} failed", "correct its file, if it is yours")


def open_source(
    name: str,
    root: Path,
    options: Mapping[str, Any] | None = None,
    *,
    classes: str | None = None,
    val: float = 0.0,
    select: float = 0.0,
    reading: Reading = USUAL,
    choose: Callable[["Source"], "Source"] | None = None,
    test: str | None = None,
    complete: bool = True,
) -> Source:
    """Load the data set of this name with these options, see ``image_set`` and ``open_dataset``.

    Args:
        name: of the set.
        root: ``data.root``.
        options: keywords of its constructor.
        classes: the order of the classes.
        val: the share of training images that is held out.
        select: the share of those left that is held out instead.
        reading: how image files are read.
        choose: selects images before any are held out.
        test: another set, whose test images are taken instead.
        complete: whether there must be test images.

    Raises:
        UserError: as by ``image_set``, a set that gives something else than class names, images and labels, an order
            of other classes, or no test images and no share of the others.
    """
    kind, argument = _find(name)
    settings = _options(name, kind, options or {})
    with at_work(name, "its constructor"):
        found = kind(*argument, **settings)
    with at_work(name, "load"):
        loaded = found.load(root)
    class_names, train, tested = checked(name, found, loaded, root, reading)
    key = ""
    if isinstance(train, Files):  # another set, or other options, may list other files of the same folder
        what = f"{type(found).__module__} {settings} {classes} {val} {select} {reading} {choose is None} {train.root}"
        what += test or ""
        key = f"{train.root.name[:40]}-{blake2b(os.fsencode(what), digest_size=6).hexdigest()}"
    source = Source(name, class_names, train, tested, key, class_names)
    source = source if choose is None else choose(source)
    if test is not None:
        if val:
            raise UserError(f"data.val={val:g} and data.test={test} both say what is measured on; keep one of them")
        other = open_source(test, root, reading=reading, choose=choose, complete=False)
        source = source.ordered(classes).tested_on(other)
        return source.holding_out(select, "data.select") if select else source
    if not complete:
        return source
    return source.holding_out(val, "data.val").holding_out(select, "data.select").ordered(classes)


def _find(name: str) -> tuple[type[ImageSet], tuple[str, ...]]:
    """Find the class of the set of this name, and its constructor's argument where it has one."""
    head, _, argument = name.partition(":")
    if head not in registry.data_sets.names() and not head.endswith(".py"):
        head, argument = name, ""
        if name and path_of(name).is_dir():
            raise UserError(
                f"data '{name}' is a folder; expected folder:{name} where it has a folder for each class, or "
                f"images:{name} where it has no labels"
            )
    kind = registry.data_sets.load(head)
    if bool(argument) != bool(kind.argument):
        raise UserError(f"data '{name}': expected {registry.data_sets.find(head).title}")
    return kind, (argument,) if argument else ()


def _options(name: str, kind: type[ImageSet], given: Mapping[str, Any]) -> dict[str, Any]:
    if given and not keyword_settings(kind, {}):
        raise UserError(f"data '{name}' has no options, and data.options.{next(iter(given))} was given; leave it out")
    return keyword_settings(kind, given, "data.options.")
