"""A Hugging Face data set: a folder that save_to_disk wrote, or a name on the hub; needs pip install 'kdzoo[hf]'."""

import os
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from shutil import rmtree
from typing import Any

from kdzoo import ImageSet
from kdzoo.data.classes import natural
from kdzoo.data.trees import TESTS, TRAIN, split_of
from kdzoo.errors import StorageError, UserError
from kdzoo.files import DAY, cache_folder, part_of, path_of, remove_parts, slug
from kdzoo.image_set import Loaded


class HuggingFace(ImageSet):
    """Read a data set of Hugging Face's library ``datasets``.

    The encoded images are written to kdzoo's cache once, a file each, and read from there as any others. The test split
    is the first of ``val``, ``valid``, ``validation``, ``eval`` and ``test`` that has labels.

    Args:
        path: a folder that ``save_to_disk`` wrote, a folder that ``load_dataset`` reads, or a name on the hub.
        config: the configuration, where a set has several.
        image: the column of images; empty: the first one.
        label: the column of labels; empty: the first of class labels.
    """

    argument = "PATH"

    def __init__(self, path: str, *, config: str = "", image: str = "", label: str = ""):
        self.path, self.config, self.image, self.label = path, config, image, label

    def load(self, root: Path) -> Loaded:
        """Write the images to the cache, if they are not there, and list them.

        Raises:
            UserError: the library or the set is missing, or it has no column of images or labels.
        """
        found = {split_of(name): split for name, split in self._splits().items() if split_of(name)}
        if TRAIN not in found:
            raise UserError(f"data 'hf:{self.path}' has no split 'train'")
        image, label = self._columns(found[TRAIN].features)
        labels = {split: list(found[split][label]) for split in (TRAIN, *TESTS) if split in found}
        test = next((split for split in TESTS if -1 not in labels.get(split, [-1])), "")
        names = getattr(found[TRAIN].features[label], "names", None)
        if names is None:  # plain text or numbers
            values = {str(value) for split in (TRAIN, test) if split for value in labels[split]}
            names = sorted(values, key=natural)
            labels = {split: [str(value) for value in given] for split, given in labels.items()}
            places = {name: place for place, name in enumerate(names)}
            labels = {split: [places.get(value, -1) for value in given] for split, given in labels.items()}
        used = {split: found[split] for split in (TRAIN, test) if split}
        folder = self._folder(used.values(), image)
        files = {split: _files(rows, image, folder / split) for split, rows in used.items()}
        return list(names), (files[TRAIN], labels[TRAIN]), (files[test], labels[test]) if test else None

    def _splits(self) -> dict[str, Any]:
        try:
            import datasets
        except ImportError as error:
            raise UserError("hf:PATH needs Hugging Face's library: pip install 'kdzoo[hf]'") from error
        path = path_of(self.path)
        is_saved = any((path / name).is_file() for name in ("dataset_dict.json", "state.json"))
        try:
            if is_saved:
                found = datasets.load_from_disk(str(path))
            else:
                found = datasets.load_dataset(str(path) if path.is_dir() else self.path, self.config or None)
        except Exception as error:  # the library, the hub's client and pyarrow each raise kinds of their own
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
            raise UserError(
                f"data 'hf:{self.path}' cannot be loaded ({reason}); expected a folder that save_to_disk wrote, or a "
                "name on the Hugging Face hub"
            ) from error
        return dict(found) if isinstance(found, dict) else {TRAIN: found}

    def _columns(self, features: Any) -> tuple[str, str]:
        """Find the columns of images and labels."""
        kinds = {name: type(kind).__name__ for name, kind in features.items()}
        image = self.image or next((name for name, kind in kinds.items() if kind == "Image"), "")
        label = self.label or next((name for name, kind in kinds.items() if kind == "ClassLabel"), "")
        for option, name in (("image", image), ("label", label)):
            if name not in kinds or (option == "image" and kinds[name] != "Image"):
                raise UserError(
                    f"data 'hf:{self.path}' has no column of {option}s '{name}' but {', '.join(kinds)}; name one by "
                    f"data.{option}=COLUMN"
                )
        return image, label

    def _folder(self, splits: Iterable[Any], column: str) -> Path:
        """Name the folder of the images: another one where the set's own files changed."""
        sources = [file["filename"] for split in splits for file in split.cache_files]
        states = [(file, os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in sources]
        key = blake2b(f"{self.path} {self.config} {column} {states}".encode(), digest_size=6).hexdigest()
        return cache_folder() / "data" / "hf" / f"{slug(self.path)}-{key}"


def _files(split: Any, column: str, folder: Path) -> list[str]:
    """Write the images of a split to a folder as they are encoded, if it is not there, and list their paths."""
    import datasets

    raw = split.cast_column(column, datasets.Image(decode=False)).select_columns(column)
    part = part_of(folder)
    is_new = not folder.is_dir()
    paths = []
    try:
        if is_new:
            part.mkdir(parents=True)
        for row, item in enumerate(raw):
            content, given = item[column]["bytes"], item[column]["path"] or ""
            if content is None:  # the set names the files
                paths.append(given)
                continue
            file = f"{row:08}{os.path.splitext(given)[1].lower() or '.img'}"
            if is_new:
                (part / file).write_bytes(content)
            paths.append(str(folder / file))
        if is_new:
            part.rename(folder)
            remove_parts(folder.parent, older_than=DAY)
    except OSError as error:
        if not folder.is_dir():  # else another process wrote it meanwhile
            raise StorageError(f"{folder.parent} cannot be written ({error.strerror}); choose another cache") from error
    finally:
        rmtree(part, ignore_errors=True)
    return paths
