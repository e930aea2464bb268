"""Query biographies: statistics of every query over a whole data set, as plain arrays, and stored beside the run.

Q queries, K classes, G cells along each edge of a heat map.

Words with an exact meaning here:
- active: in an image, a query whose likeliest class is a class ("no object" is none) and whose mask probability is
  above one half somewhere.
- wins: a query wins a pixel if it contributes most to the class predicted there (`winning_queries`).
- dead: a query that wins no pixel of any image.
- size: the share of an image where the mask probability is above one half.
- overlap: of two queries, the intersection over union of those areas, averaged over the images in which both are
  active; an image in which their likeliest classes differ counts as 0.
- duplicates: two queries that overlap by more than a threshold.
Masks are read at stride 4, or more coarsely for large images, without padding.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from m2f_lab.data import Classes
from m2f_lab.training.checkpoint import recover_folder, replace_folder

FORMAT = 1
SIZE_BINS = 256
"""Of the histograms of sizes, evenly spaced in the square root of the size: small masks are told apart as well."""

DUPLICATE = 0.7
"""Overlap from which two queries count as duplicates, unless one says otherwise."""


@dataclass(frozen=True)
class Biographies:
    """Statistics of Q queries over a number of images.

    Attributes:
        num_images: number of images.
        num_pixels: of all images together, as the model saw them.
        won_pixels: won by each query for each predicted class, in pixels of the images. float64 [Q, K]
        won_images: in how many images each query won a pixel. int64 [Q]
        predicted: in how many images each class was the likeliest; "no object" last. int64 [Q, K+1]
        active_images: in how many images each query was active. int64 [Q]
        size_sum: of its sizes over those images. float64 [Q]
        size_histogram: of its sizes over those images; see `size_quantile`. int64 [Q, SIZE_BINS]
        heat: p(not "no object") · p(pixel | query), averaged over all images: how much the query claims each place of
            an image, whose width and height are stretched to 1. float32 [Q, G, G]
        overlap: of each pair of queries; 0 where they are never active together. float64 [Q, Q]
        together: in how many images both are active. int64 [Q, Q]
        mean_image: of all images, stretched to a square. uint8 [2 G, 2 G, 3]
        aspect: mean of width / height of the images.
        classes: names and colours; None where they are not known.
        source: of the numbers, for example the checkpoint; may be empty.
    """

    num_images: int
    num_pixels: int
    won_pixels: np.ndarray
    won_images: np.ndarray
    predicted: np.ndarray
    active_images: np.ndarray
    size_sum: np.ndarray
    size_histogram: np.ndarray
    heat: np.ndarray
    overlap: np.ndarray
    together: np.ndarray
    mean_image: np.ndarray
    aspect: float
    classes: Classes | None = None
    source: dict = field(default_factory=dict)

    @property
    def num_queries(self) -> int:
        return len(self.won_images)

    @property
    def num_classes(self) -> int:
        """K, without "no object"."""
        return self.won_pixels.shape[1]

    @property
    def wins(self) -> np.ndarray:
        """The share of all pixels that each query wins; they add up to 1. float64 [Q]"""
        return self.won_pixels.sum(axis=1) / self.num_pixels

    @property
    def dead(self) -> np.ndarray:
        """Queries that win no pixel of any image. bool [Q]"""
        return self.won_images == 0

    @property
    def main_class(self) -> np.ndarray:
        """The class of most pixels a query wins; if it is dead, its likeliest class in most images. [Q]

        -1 where a dead query never prefers any class to "no object".
        """
        likeliest = self.predicted[:, :-1]
        instead = np.where(likeliest.any(axis=1), likeliest.argmax(axis=1), -1)
        return np.where(self.dead, instead, self.won_pixels.argmax(axis=1))

    @property
    def mean_size(self) -> np.ndarray:
        """As a share of the image, over the images in which a query is active; NaN where there is none. float64 [Q]"""
        return np.where(self.active_images > 0, self.size_sum / np.maximum(self.active_images, 1), np.nan)

    def size_quantile(self, share: float) -> np.ndarray:
        """The size that a share of the images in which a query is active stays below. NaN where there is none. [Q]

        Read from a histogram, so its square root is exact to 1 / SIZE_BINS.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"A quantile is between 0 and 1, got {share}.")
        counts = np.cumsum(self.size_histogram, axis=1)
        wanted = np.maximum(share * counts[:, -1:], 1)  # at least the first image
        bins = (counts < wanted).sum(axis=1)
        middle = ((bins + 0.5) / SIZE_BINS) ** 2
        return np.where(self.active_images > 0, middle, np.nan)

    def duplicates(self, threshold: float = DUPLICATE) -> list[tuple[int, int, float]]:
        """Pairs of queries that overlap by more than a threshold, the strongest first.

        Returns:
            (the query that wins more, the other one, their overlap) each.
        """
        first, second = np.nonzero(np.triu(self.overlap > threshold, k=1))
        order = np.argsort(-self.overlap[first, second], kind="stable")
        swapped = self.wins[second] > self.wins[first]
        winner, other = np.where(swapped, (second, first), (first, second))[:, order]
        return list(zip(winner.tolist(), other.tolist(), self.overlap[winner, other].tolist(), strict=True))

    def duplicate_of(self, threshold: float = DUPLICATE) -> np.ndarray:
        """For each query, the one it overlaps most among those that win more and that it duplicates; else -1. [Q]"""
        found = np.full(self.num_queries, -1)
        for winner, other, _ in reversed(self.duplicates(threshold)):  # the strongest comes last, and stays
            found[other] = winner
        return found

    def orders(self, threshold: float = DUPLICATE) -> dict[str, list[int]]:
        """Queries, sorted or chosen: by wins, by main class, by size, by number; the dead; the duplicates."""
        wins = np.argsort(-self.wins, kind="stable")
        main, size = self.main_class, np.nan_to_num(self.mean_size, nan=-1)
        by_class = wins[np.argsort(np.where(main < 0, self.num_classes, main)[wins], kind="stable")]
        pairs = [query for winner, other, _ in self.duplicates(threshold) for query in (winner, other)]
        return {
            "wins": wins.tolist(),
            "class": by_class.tolist(),
            "size": wins[np.argsort(-size[wins], kind="stable")].tolist(),
            "number": list(range(self.num_queries)),
            "dead": np.flatnonzero(self.dead).tolist(),
            "duplicates": list(dict.fromkeys(pairs)),
        }

    def save(self, folder: str | Path) -> None:
        """Write arrays.npz and biographies.json; the folder's previous content stays until all is written."""
        words = {each.name: getattr(self, each.name) for each in fields(self)}
        arrays = {name: words.pop(name) for name, value in [*words.items()] if isinstance(value, np.ndarray)}
        words |= {"format": FORMAT, "classes": self.classes and self.classes.to_json()}
        text = json.dumps(words, indent=2, ensure_ascii=False) + "\n"

        def write(new: Path) -> None:
            np.savez_compressed(new / "arrays.npz", **arrays)
            (new / "biographies.json").write_text(text, encoding="utf-8")

        replace_folder(Path(folder).expanduser(), write)

    @classmethod
    def load(cls, folder: str | Path) -> Biographies:
        """Read the files of `save`. Nothing is unpickled.

        Raises:
            FileNotFoundError: there are no biographies in this folder.
            ValueError: they were written by another version.
        """
        folder = Path(folder).expanduser()
        recover_folder(folder)
        file = folder / "biographies.json"
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} holds no biographies: there is no {file}. collect_biographies makes them."
            )
        words = json.loads(file.read_text(encoding="utf-8"))
        if words.pop("format", None) != FORMAT:
            raise ValueError(
                f"{file} was written by another version of m2f_lab; delete {folder} and collect them again."
            )
        classes = words.pop("classes")
        with np.load(folder / "arrays.npz", allow_pickle=False) as arrays:
            return cls(**words, **arrays, classes=classes and Classes.from_json(classes))

    def __repr__(self) -> str:
        duplicates = int((self.duplicate_of() >= 0).sum())
        return (
            f"Biographies({self.num_queries} queries, {self.num_images} images, {int(self.dead.sum())} dead, "
            f"{duplicates} duplicate{'s' * (duplicates != 1)})"
        )
