"""A reader for pickles that hold arrays and containers. It cannot run code.

A pickle names functions and has them called. This reader resolves a handful of names to the stand-ins below and
refuses all others before anything is imported. Not even numpy's own reconstruction is called: arrays are built here
from a shape, a plain number type and bytes, because numpy's trusts what the file says about memory.
"""

from __future__ import annotations

import collections
import pickle
import re
from pathlib import Path

import numpy as np

_NUMBER_TYPE = re.compile(r"[<>=|]?([fiub]\d{1,2}|\?)")


class UnsafeFileError(ValueError):
    """A file wants to run code, or holds objects that only running code could rebuild."""


class PickledType:
    """Stands in for `numpy.dtype`: bools, integers and floats only."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(code, str) or not _NUMBER_TYPE.fullmatch(code):
            raise UnsafeFileError(f"holds an array of type {code!r}; only arrays of numbers are read.")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])  # the rest describes records, which are refused above


class PickledArray:
    """Stands in for `numpy.ndarray`; the real one is in `array` once its state has been read."""

    def __init__(self, *_) -> None:
        self.array: np.ndarray | None = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, number_type, is_fortran, data = state
        self._fill(data, number_type, shape, "F" if is_fortran else "C")

    def _fill(self, data: bytes | str, number_type: PickledType, shape: tuple, order: str) -> PickledArray:
        data = data.encode("latin1") if isinstance(data, str) else data  # pickled by Python 2
        self.array = np.frombuffer(data, dtype=number_type.dtype).reshape(shape, order=order)
        return self

    @classmethod
    def from_scalar(cls, number_type: PickledType, data: bytes | str) -> PickledArray:
        return cls()._fill(data, number_type, (), "C")

    @classmethod
    def from_buffer(cls, data: bytes, number_type: PickledType, shape: tuple, order: str, *_) -> PickledArray:
        return cls()._fill(data, number_type, shape, order)


_KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("builtins", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "bytearray"): bytearray,
    ("_codecs", "encode"): str.encode,  # protocol 2 spells bytes as text; this one knows text encodings only
    ("numpy", "dtype"): PickledType,
    ("numpy", "ndarray"): PickledArray,
}
for _package in ("numpy.core", "numpy._core"):
    _KNOWN[f"{_package}.multiarray", "_reconstruct"] = PickledArray
    _KNOWN[f"{_package}.multiarray", "scalar"] = PickledArray.from_scalar
    _KNOWN[f"{_package}.numeric", "_frombuffer"] = PickledArray.from_buffer  # protocol 5


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        try:
            return _KNOWN[module, name]
        except KeyError:
            raise UnsafeFileError(
                f"asks for {module}.{name}, which is neither an array nor a container: loading it would run code from "
                "the file, which never happens here. Get the weights from another source, or, if you trust this one, "
                "save its arrays as safetensors where it was made."
            ) from None


def read_pickle(path: Path) -> object:
    """Read a pickle of containers, text, numbers and arrays; the latter arrive as `PickledArray`.

    Raises:
        UnsafeFileError: it asks for anything else.
    """
    with path.open("rb") as file:
        try:
            return _Unpickler(file, encoding="latin1").load()
        except UnsafeFileError as error:
            raise UnsafeFileError(f"{path} {error}") from None
