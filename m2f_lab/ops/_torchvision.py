"""Lets timm import torchvision on machines where torchvision's compiled operators are missing.

timm imports torchvision. A torchvision built for CUDA next to a CPU-only torch fails on import with
`operator torchvision::nms does not exist`, because it registers fake kernels for operators whose library
could not be loaded. None of them is used here; declaring their schemas is enough for the import to pass.
Where the operators exist, this module does nothing.
"""

import importlib.util

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _operators_load() -> bool:
    """Whether torchvision's own library can be loaded, which declares the operators itself."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or not spec.submodule_search_locations:
        return True
    try:
        for library in _libraries(spec.submodule_search_locations[0]):
            torch.ops.load_library(library)
    except OSError:
        return False
    return True


def _libraries(folder: str) -> list[str]:
    from pathlib import Path

    return [str(path) for path in sorted(Path(folder).glob("_C.*")) if path.suffix in (".so", ".pyd")]


if not _operators_load():
    _library = torch.library.Library("torchvision", "FRAGMENT")  # kept alive: schemas vanish with it
    for _name, _schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, _name):
            _library.define(_schema)
