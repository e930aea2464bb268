"""AdamW over four groups of parameters, the learning rate at every iteration, and the clipped step."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from m2f_lab.recipes import OptimizationConfig

_EMBEDDINGS = (
    "query_features", "query_positions", "level_embedding",  # ours
    "relative_position_bias_table", "absolute_pos_embed", "pos_embed", "cls_token", "reg_token",  # timm's
)  # fmt: skip


def is_decayed(module: nn.Module, name: str) -> bool:
    """True if weight decay pulls on a parameter that `module` holds under `name`.

    Weights and biases are decayed, as in the published code, and so are parameters of a kind that is not known here.
    Norms and embeddings of any kind are not: pulling a scale or a position towards zero regularises nothing. (The
    published code decays one embedding by oversight, the pixel decoder's level embedding; here all embeddings are
    treated alike.) A module of your own names its embeddings as timm's modules do: its method `no_weight_decay()`
    returns their names.
    """
    is_norm = "norm" in type(module).__name__.lower()  # timm has norms of its own that share no base class
    exempt = getattr(module, "no_weight_decay", frozenset)()
    return not (is_norm or isinstance(module, nn.Embedding) or name in _EMBEDDINGS or name in exempt)


def named_groups(model: nn.Module) -> dict[str, list[str]]:
    """Group the names of all trainable parameters: backbone or not, decayed or not.

    Args:
        model: any module. Its backbone is the attribute `backbone`; a model without one has none, and learns at the
            full rate.

    Returns:
        "backbone", "backbone, not decayed", "decoders" and "decoders, not decayed"; a parameter that two modules share
        is listed once.
    """
    groups = {f"{part}{decay}": [] for part in ("backbone", "decoders") for decay in ("", ", not decayed")}
    for full_name, module, name in _parameters(model):
        part = "backbone" if full_name.startswith("backbone.") else "decoders"
        groups[part + ("" if is_decayed(module, name) else ", not decayed")].append(full_name)
    return groups


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (full name, the module that holds it, its name there) of every trainable parameter, each once."""
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield f"{prefix}.{name}" if prefix else name, module, name


def build_optimizer(model: nn.Module, config: OptimizationConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with the groups of `named_groups`; fused where the device has it.

    Every group remembers its `initial_lr`, which `set_learning_rate` scales.
    """
    parameters = dict(model.named_parameters())
    groups = []
    for group, names in named_groups(model).items():
        rate = config.learning_rate * (config.backbone_multiplier if group.startswith("backbone") else 1.0)
        decay = 0.0 if group.endswith("not decayed") else config.weight_decay
        groups.append(
            dict(name=group, params=[parameters[n] for n in names], lr=rate, initial_lr=rate, weight_decay=decay)
        )
    fused = all(p.device.type in ("cuda", "cpu") for p in parameters.values())
    return torch.optim.AdamW([g for g in groups if g["params"]], fused=fused)


def learning_rate_factor(iteration: int, config: OptimizationConfig) -> float:
    """Factor of the learning rates in a step.

    Args:
        iteration: steps taken before this one, 0…max_iterations - 1.

    Returns:
        A linear rise to 1 over the warm-up, times (1 - iteration / max_iterations) ^ poly_power; or, if the config has
        `step_at`, times step_factor for each of these that is reached.
    """
    rise = min(1.0, (iteration + 1) / config.warmup_iterations) if config.warmup_iterations else 1.0
    if config.step_at:
        return rise * config.step_factor ** sum(iteration >= at for at in config.step_at)
    return rise * (1 - iteration / config.max_iterations) ** config.poly_power


def set_learning_rate(optimizer: torch.optim.Optimizer, iteration: int, config: OptimizationConfig) -> float:
    """Set the learning rates of step `iteration`; return that of the decoders."""
    factor = learning_rate_factor(iteration, config)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return config.learning_rate * factor


def clip_gradient(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, model: nn.Module, clip_norm: float
) -> Tensor:
    """Clip the gradient of the whole model to a norm of `clip_norm`; return the norm before clipping, a scalar.

    One norm over all parameters, as in the published code, and not one per parameter or group: the direction of the
    gradient is kept.
    """
    scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)


def update_weights(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, norm: float) -> None:
    """Update the weights by a clipped gradient, whose norm was `norm`.

    A float16 scaler skips the update where the gradient is not finite, and scales less next time.

    Raises:
        FloatingPointError: the gradient is not finite, and no float16 scaler explains it; no weight was changed.
    """
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise FloatingPointError(f"The norm of the gradient is {norm}.")
    scaler.step(optimizer)
    scaler.update()
