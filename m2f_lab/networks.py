"""Networks of timm: created, filled with pretrained weights, and the statistics of the images that those have seen."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from unittest import mock

from torch import nn

import m2f_lab.ops._torchvision  # noqa: F401  isort: skip  (before timm, which imports torchvision)
import timm

from m2f_lab.recipes import IMAGENET_MEAN, IMAGENET_STD, WITH_CHECKPOINT, ModelConfig


def create_network(config: ModelConfig, options: dict, suggestion: str) -> nn.Module:
    """`timm.create_model` with errors that say what to do.

    Args:
        config: reads `backbone`, `backbone_weights` and `drop_path_rate`.
        options: of timm.
        suggestion: networks that fit, for the errors.

    Raises:
        ValueError: timm does not know the name, an option does not fit the network, or the weights are of another one.
        OSError: the weights cannot be read or downloaded.
    """
    name, weights = config.backbone, config.backbone_weights
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=5)
        hint = f"Did you mean {', '.join(close)}? " if close else ""
        raise ValueError(f"timm {timm.__version__} has no model named {name!r}. {hint}{suggestion}")
    if weights == WITH_CHECKPOINT:
        weights = None
    if isinstance(weights, (str, Path)):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(
                f"backbone_weights: there is no file {path}. Give the path of a timm checkpoint, True to download "
                "timm's pretrained weights, or None for random ones."
            )
        options = options | {"pretrained_cfg_overlay": {"file": str(path)}}
    create = functools.partial(timm.create_model, name, pretrained=bool(weights), **options)
    try:
        with _loads_recorded() as loads:
            network = _with_stochastic_depth(create, config)
    except OSError as error:
        raise OSError(
            f"The pretrained weights of {name!r} could not be loaded: {error}. timm downloads them from the Hugging "
            "Face hub; without a network set backbone_weights to a downloaded file, or to None for random weights."
        ) from error
    except (TypeError, RuntimeError, IndexError, AssertionError, AttributeError) as error:
        raise ValueError(f"timm cannot build {name!r} with {options}: {error}. {suggestion}") from error
    _check_complete(network, loads, f"{name!r}", weights)
    return network


def _with_stochastic_depth(create: functools.partial, config: ModelConfig) -> nn.Module:
    try:
        return create(drop_path_rate=config.drop_path_rate)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        if config.drop_path_rate > 0:
            raise ValueError(
                f"Backbone {config.backbone!r} has no stochastic depth: set drop_path_rate=0.0 in the ModelConfig."
            ) from error
    return create()


@contextmanager
def _loads_recorded() -> Iterator[list]:
    """Collect what `load_state_dict` is called on, and what it returns: timm ignores weights that a file lacks."""
    loads, load = [], nn.Module.load_state_dict

    def recorded(module: nn.Module, state: dict, *args, **kwargs):
        keys = load(module, state, *args, **kwargs)
        loads.append((module, list(state), keys))
        return keys

    with mock.patch.object(nn.Module, "load_state_dict", recorded):
        yield loads


def _check_complete(network: nn.Module, loads: list, name: str, weights: bool | str | Path | None) -> None:
    """Raise a ValueError if the network has weights that the file lacks. What the file has besides, say a classifier
    that the network went without, does not matter."""
    if not weights or not loads:
        return
    module, found, keys = loads[-1]
    own = {id(tensor) for tensor in network.state_dict(keep_vars=True).values() if tensor.is_floating_point()}
    tensors = module.state_dict(keep_vars=True)
    missing = [key for key in keys.missing_keys if id(tensors[key]) in own]
    if missing:
        source = "timm's pretrained weights" if weights is True else weights
        prefix = next((f.removesuffix(key) for key in missing for f in found if f.endswith(f".{key}")), "")
        hint = (
            f"Its keys begin with {prefix!r}: save them without, or, if it is a whole model, load it with "
            "m2f_lab.load_weights."
            if prefix
            else "Give a complete checkpoint of this very network."
        )
        raise ValueError(
            f"backbone_weights: {source} lacks {len(missing)} of {len(own)} tensors of {name}, first "
            f"{', '.join(missing[:3])}; its own keys are {', '.join(found[:3]) or 'none'}"
            f"{', …' if len(found) > 3 else ''}. {hint}"
        )


def pixel_statistics(config: ModelConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which the model normalises, in 0..255: the config's, or else the backbone tag's.

    Networks whose tag has none get ImageNet's. For another number of channels than the statistics have, they are
    repeated in turn, as timm repeats the weights of the first layer.

    Args:
        config: reads `backbone`, `backbone_options`, `pixel_mean` and `pixel_std`.

    Raises:
        ValueError: the config gives statistics for another number of channels.
    """
    tag = timm.get_pretrained_cfg(config.backbone, allow_unregistered=True)
    channels = config.backbone_options.get("in_chans", 3)
    found = []
    for name, imagenet in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
        given = getattr(config, f"pixel_{name}")
        if given is not None and len(given) != channels:
            raise ValueError(
                f"ModelConfig.pixel_{name} has {len(given)} values, but images have {channels} channels; give one each."
            )
        of_tag = imagenet if tag is None else tuple(round(255 * value, 4) for value in getattr(tag, name))
        found.append(given or tuple(islice(cycle(of_tag), channels)))
    return tuple(found)


def settled(config: ModelConfig) -> ModelConfig:
    """The same configuration with the pixel statistics spelled out."""
    mean, std = pixel_statistics(config)
    return replace(config, pixel_mean=mean, pixel_std=std)
