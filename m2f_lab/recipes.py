"""Recipes: everything that decides what a training run does, as plain data.

A recipe is five frozen dataclasses (model, data, loss, optimization, evaluation) and a few words. Nothing is looked
up elsewhere and nothing is changed on the way: what you read here is what runs. Vary one with `dataclasses.replace`, or
shorter with `recipe.vary(optimization=dict(max_iterations=1000))`. Published figures are the authors', not ours.

    published("coco", "panoptic", "swin_large")      the recipe of a published checkpoint
    named("coco_panoptic_swin_large")                the same by name; names() lists them
    ade20k_swin_tiny(), camvid_small(), …            short names of some, and recipes of our own

Two of the words are names of functions, "package.module:function": the builder of the model and that of the criterion.
"""

from __future__ import annotations

import difflib
import functools
import json
import math
import typing
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

from m2f_lab.references import is_reference

DATASETS = ("ade20k", "cityscapes", "coco", "mapillary", "folder")  # folder: ADE20K's layout with a classes.txt
TASKS = ("semantic", "panoptic", "instance")
SEMANTIC_ORDERS = ("combine_first", "resize_first")
IMAGENET_MEAN = (123.675, 116.28, 103.53)  # RGB in 0..255
IMAGENET_STD = (58.395, 57.12, 57.375)
WITH_CHECKPOINT = "with the checkpoint"  # ModelConfig.backbone_weights of a pretrained model that is loaded whole
BATCH_NORMS = ("frozen", "measured", "trained")
METRICS = {"semantic": "mIoU", "panoptic": "PQ", "instance": "AP"}
"""The figure that the best evaluation of a task is chosen by."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Architecture (paper sections 3.2 and 4.1). Defaults are the paper's, with a Swin-T backbone."""

    num_classes: int  # K, without "no object"
    backbone: str = "swin_tiny_patch4_window7_224"  # any timm name with a feature pyramid at strides 4, 8, 16, 32
    backbone_options: dict = field(default_factory=dict)  # goes to timm.create_model
    backbone_weights: bool | str | None = None  # True: timm's pretrained weights; a path; None: random
    pixel_mean: tuple[float, ...] | None = None  # by which images in 0..255 are normalised; None: the backbone tag's
    pixel_std: tuple[float, ...] | None = None
    batch_norm: str = "frozen"  # of a pretrained backbone; "measured": new statistics, old scales; "trained": both new
    frozen_stages: int = (
        0  # of a pretrained backbone: all that features up to this level need stays as it is; 1: stride 4
    )
    hidden_dim: int = 256  # width of both decoders
    mask_dim: int = 256  # C of the mask features and mask embeddings
    num_queries: int = 100
    num_heads: int = 8
    num_sampling_points: int = 4  # per head and level, in deformable attention
    num_encoder_layers: int = 6  # deformable attention layers in the pixel decoder
    encoder_feedforward_dim: int = 1024
    num_decoder_layers: int = 9  # nine layers make ten predictions: the learned queries predict first
    decoder_feedforward_dim: int = 2048
    drop_path_rate: float = 0.3  # stochastic depth, for backbones that have it

    def __post_init__(self) -> None:
        # JSON knows no tuples; without this, a recipe read back would differ from the one that was written.
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in self.backbone_options.items()}
        object.__setattr__(self, "backbone_options", options)
        for name in ("pixel_mean", "pixel_std"):
            values = getattr(self, name)
            _require(
                values is None or all(isinstance(v, int | float) and math.isfinite(v) for v in values),
                f"ModelConfig.{name} must be a finite number for each channel, or None, got {values!r}.",
            )
            object.__setattr__(self, name, None if values is None else tuple(values))
        _require(
            self.pixel_std is None or all(v > 0 for v in self.pixel_std),
            f"ModelConfig.pixel_std must be positive, got {self.pixel_std}.",
        )
        for name in _COUNTS:
            value = getattr(self, name)
            _require(
                isinstance(value, int) and value > 0, f"ModelConfig.{name} must be a positive integer, got {value!r}."
            )
        for divisor, what in ((self.num_heads, "num_heads"), (32, "the groups of the pixel decoder's normalisation")):
            _require(
                self.hidden_dim % divisor == 0,
                f"ModelConfig.hidden_dim = {self.hidden_dim} must be divisible by {what} = {divisor}.",
            )
        _require(
            0 <= self.frozen_stages <= 4 and (self.frozen_stages == 0 or self.backbone_weights is not None),
            f"ModelConfig.frozen_stages is 0 to 4, and 0 for a backbone from random weights, got {self.frozen_stages}.",
        )
        known = BATCH_NORMS
        _require(self.batch_norm in known, f"ModelConfig.batch_norm must be one of {known}, got {self.batch_norm!r}.")
        rate = self.drop_path_rate
        _require(0 <= rate < 1, f"ModelConfig.drop_path_rate must be in [0, 1), got {rate}.")

    @staticmethod
    def completed(saved: dict) -> dict:
        """Fields as a file holds them. Models that were saved before there were pixel statistics had ImageNet's."""
        return {"pixel_mean": IMAGENET_MEAN, "pixel_std": IMAGENET_STD} | saved


_COUNTS = (
    "num_classes", "hidden_dim", "mask_dim", "num_queries", "num_heads", "num_sampling_points", "num_encoder_layers",
    "encoder_feedforward_dim", "num_decoder_layers", "decoder_feedforward_dim",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Data set and the training transforms (paper section 4.1 and appendix)."""

    dataset: str  # one of `DATASETS`, or "module:function"
    crop_size: tuple[int, int]  # height, width in pixels
    shortest_edges: tuple[int, ...] = ()  # resize so that the shortest edge is a random one of these, in pixels
    longest_edge: int | None = None  # but the longest at most this, in pixels
    scale_range: tuple[float, float] | None = None  # large-scale jitter instead: fit the image into the crop times this
    single_category_max_area: float = 1.0  # redraw a crop of which one class covers more than this share
    color_jitter: bool = True  # SSD's brightness, contrast, saturation and hue
    flip: bool = True
    num_workers: int = 4

    def __post_init__(self) -> None:
        _require(
            self.dataset in DATASETS or is_reference(self.dataset),
            f'DataConfig.dataset must be one of {DATASETS} or "package.module:function", got {self.dataset!r}.',
        )
        smallest = min(*self.crop_size, 1 if self.longest_edge is None else self.longest_edge)
        _require(
            smallest > 0, f"DataConfig: crop_size {self.crop_size} and longest_edge {self.longest_edge} are pixels."
        )
        if self.scale_range is not None:
            low, high = self.scale_range
            _require(0 < low <= high, f"DataConfig.scale_range must be two positive scales, got {self.scale_range}.")
            return
        _require(
            bool(self.shortest_edges) and min(self.shortest_edges) > 0,
            f"DataConfig.shortest_edges must name at least one positive size, got {self.shortest_edges}; only large-"
            "scale jitter (scale_range) goes without.",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Matching costs and losses share their weights (paper section 3.3, PointRend's point sampling)."""

    num_points: int = 12544  # 112 × 112
    oversample_ratio: float = 3.0
    importance_sample_ratio: float = 0.75
    class_weight: float = 2.0
    mask_weight: float = 5.0
    dice_weight: float = 5.0
    no_object_weight: float = 0.1
    class_weights: tuple[float, ...] | None = None  # of segments in the class term, one for each class; None: all 1


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """AdamW, with a polynomial schedule (paper section 4.1) or one in steps (COCO)."""

    max_iterations: int
    batch_size: int = 16  # images per optimiser step, over all processes
    accumulation_steps: int = 1  # the batch is taken in this many parts, one after the other
    learning_rate: float = 1e-4
    backbone_multiplier: float = 0.1  # learning rate of the backbone, relative
    weight_decay: float = 0.05  # none on norms, embeddings and relative position biases
    poly_power: float = 0.9
    step_at: tuple[int, ...] = ()  # the rate falls in steps after so many iterations, instead of by the polynomial
    step_factor: float = 0.1  # to this share of itself at each
    warmup_iterations: int = 0  # linear, from zero
    clip_norm: float = 0.01  # over the whole model
    ema_decay: float | None = None  # also keep an exponential moving average of the weights, and measure that
    precision: str = "auto"  # "float32", "bfloat16", "float16"; auto: bfloat16 on GPUs that have it, else float32
    checkpoint_backbone: bool = False  # compute the backbone's blocks twice, to keep less memory between the passes
    compile: bool = False  # torch.compile the training forward on a GPU; on a CPU it is slower, and left out
    deterministic: bool = False  # on a GPU, sum in a fixed order: a run repeats bit by bit, and takes longer
    evaluate_every: int = 5000  # iterations; the last one is always evaluated
    checkpoint_every: int = 1000
    log_every: int = 20

    def __post_init__(self) -> None:
        for name in ("max_iterations", "evaluate_every", "checkpoint_every", "log_every", "learning_rate", "clip_norm"):
            value = getattr(self, name)
            _require(value > 0, f"OptimizationConfig.{name} must be positive, got {value}.")
        _require(
            self.batch_size > 0 and self.accumulation_steps > 0 and self.batch_size % self.accumulation_steps == 0,
            f"OptimizationConfig.batch_size = {self.batch_size} must be a multiple of accumulation_steps = "
            f"{self.accumulation_steps}.",
        )
        steps = self.step_at
        _require(
            list(steps) == sorted(set(steps)) and min(steps, default=1) > 0,
            f"OptimizationConfig.step_at must be rising positive iterations, got {steps}.",
        )
        _require(
            0 < self.step_factor <= 1, f"OptimizationConfig.step_factor must be in (0, 1], got {self.step_factor}."
        )
        decay = self.ema_decay
        _require(decay is None or 0 < decay < 1, f"OptimizationConfig.ema_decay is a share in (0, 1), got {decay}.")
        known = ("auto", "float32", "bfloat16", "float16")
        _require(
            self.precision in known, f"OptimizationConfig.precision must be one of {known}, got {self.precision!r}."
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Inference as it is measured: the size at which the model sees images, and how its queries are combined.

    Results are compared at the image's own size. Defaults are the published ones of semantic models.
    """

    shortest_edge: int | None = None  # pixels; None: the image's own size
    longest_edge: int | None = None
    tile: tuple[int, int] | None = None  # height and width of overlapping tiles in pixels, after resizing
    tile_overlap: float = 0.25  # share of a tile
    semantic_order: str = "combine_first"  # or "resize_first", as the published panoptic and instance models
    object_mask_threshold: float = 0.8  # panoptic: queries need a larger class probability than this
    overlap_threshold: float = 0.8  # panoptic: and must win at least this share of their own mask
    top_k: int = 100  # instance: segments per image, those of the highest score
    multi_scale_edges: tuple[int, ...] = ()  # semantic: shortest edges of the multi-scale figure, each also mirrored
    multi_scale_longest_edge: int | None = None

    def __post_init__(self) -> None:
        orders, order = SEMANTIC_ORDERS, self.semantic_order
        _require(order in orders, f"EvaluationConfig.semantic_order must be one of {orders}, got {order!r}.")
        for name in ("object_mask_threshold", "overlap_threshold"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"EvaluationConfig.{name} is a share in [0, 1], got {value}.")
        sizes = {name: getattr(self, name) for name in ("shortest_edge", "longest_edge", "multi_scale_longest_edge")}
        for name, value in {**sizes, "top_k": self.top_k}.items():
            _require(value is None or value > 0, f"EvaluationConfig.{name} must be positive, got {value}.")
        _require(
            self.tile is None or (len(self.tile) == 2 and min(self.tile) > 0),
            f"EvaluationConfig.tile is a height and a width in pixels, got {self.tile}.",
        )
        overlap = self.tile_overlap
        _require(0 <= overlap < 1, f"EvaluationConfig.tile_overlap is a share in [0, 1), got {overlap}.")
        edges = self.multi_scale_edges
        _require(all(e > 0 for e in edges), f"EvaluationConfig.multi_scale_edges are pixels, got {edges}.")

    @property
    def tiles(self) -> dict:
        """Arguments of `predict` for tiles; none where images are seen whole."""
        return {} if self.tile is None else {"tile": self.tile, "tile_overlap": self.tile_overlap}

    def options(self, task: str) -> dict:
        """Arguments of the function of this task in `m2f_lab.inference.postprocess`."""
        return {
            "semantic": {"order": self.semantic_order},
            "panoptic": {name: getattr(self, name) for name in ("object_mask_threshold", "overlap_threshold")},
            "instance": {"top_k": self.top_k},
        }[task]

    @property
    def multi_scale(self) -> dict:
        """Arguments of `predict` for the multi-scale figure.

        Raises:
            ValueError: there are no sizes for one; only semantic models were measured so.
        """
        _require(
            bool(self.multi_scale_edges),
            "EvaluationConfig.multi_scale_edges is empty: there are no sizes for a multi-scale figure.",
        )
        return {"shortest_edge": self.multi_scale_edges, "longest_edge": self.multi_scale_longest_edge, "flip": True}

    @property
    def edges(self) -> dict[str, int | None]:
        """Both, as `predict` and the explorers take them."""
        return {"shortest_edge": self.shortest_edge, "longest_edge": self.longest_edge}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. `published` holds the authors' figures in percent, `notes` their source."""

    name: str
    task: str
    model: ModelConfig
    builder: str = "m2f_lab.model:build_model"  # ModelConfig → the model, a module that returns an Output
    criterion: str = "m2f_lab.loss:build_criterion"  # Recipe → the Criterion
    data: DataConfig
    loss: LossConfig = field(default_factory=LossConfig)
    optimization: OptimizationConfig
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    seed: int = 0
    published: dict[str, float] = field(default_factory=dict)
    notes: str = ""

    def __post_init__(self) -> None:
        _require(self.task in TASKS, f"Recipe.task must be one of {TASKS}, got {self.task!r}.")
        for name, reference in (("builder", self.builder), ("criterion", self.criterion)):
            _require(
                is_reference(reference),
                f'Recipe.{name} names a function, "package.module:function", got {reference!r}.',
            )

    @property
    def metric(self) -> str:
        """Name of the figure that the best evaluation is chosen by: "mIoU", "PQ" or "AP"."""
        return METRICS[self.task]

    def vary(self, **changes) -> Recipe:
        """Return a copy with some fields changed; a dict changes fields of a part.

        recipe.vary(seed=1, optimization=dict(max_iterations=100, batch_size=4))
        """
        for name, value in changes.items():
            part = getattr(self, name, None)
            if is_dataclass(part) and isinstance(value, dict):
                changes[name] = replace(part, **value)
        return replace(self, **changes)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read what `save` wrote; fields that the file lacks have their defaults.

        Raises:
            ValueError: the file is not JSON, or has fields that this version does not know.
        """
        try:
            return _from_dict(cls, json.loads(Path(path).read_text()))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is not a recipe: {error}") from error


def _from_dict(kind: type, values: dict):
    """Rebuild a dataclass from JSON: nested dataclasses from dicts, tuples from lists."""
    if kind is ModelConfig:
        values = ModelConfig.completed(values)
    hints = typing.get_type_hints(kind)
    unknown = set(values) - {f.name for f in fields(kind)}
    _require(not unknown, f"{kind.__name__} has no field {sorted(unknown)}; was this file written by another version?")
    built = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            value = _from_dict(hints[name], value)
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return kind(**built)


# Published recipes: `zoo.json` has a line for each checkpoint, with the figures of its authors; its settings follow
# from the rules below. Backbones by their timm tags: ResNets, tiny and small are pretrained on ImageNet-1k at 224
# pixels; base and large on ImageNet-22k at 384, with windows of 12; "swin_base_in1k" on ImageNet-1k at 384.
# Of the figures, mIoU is that of a single scale and mIoU_ms_flip that of several and their mirror images; AP_pan and
# mIoU_pan are those of a panoptic model.

_BACKBONES = {
    "resnet50": "resnet50.tv_in1k",
    "resnet101": "resnet101.tv_in1k",
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base_in1k": "swin_base_patch4_window12_384.ms_in1k",
    "swin_base": "swin_base_patch4_window12_384.ms_in22k",
    "swin_large": "swin_large_patch4_window12_384.ms_in22k",
}
_CLASSES = {
    "ade20k": {"semantic": 150, "panoptic": 150, "instance": 100},
    "cityscapes": {"semantic": 19, "panoptic": 19, "instance": 8},
    "coco": {"panoptic": 133, "instance": 80},
    "mapillary": {"semantic": 65, "panoptic": 65},
}


@functools.cache
def _zoo() -> dict[str, dict]:
    """Lines of `zoo.json` by the names of their recipes."""
    rows = json.loads(Path(__file__).with_name("zoo.json").read_text())
    return {_name(row["dataset"], row["task"], row["backbone"], row["source"]): row for row in rows}


def _name(dataset: str, task: str, backbone: str, source: str) -> str:
    return f"{dataset}_{task}_{backbone}" + ("" if source == "official" else f"_{source}")


def names() -> tuple[str, ...]:
    """Names of the published recipes, by data set, task and source."""
    return tuple(_zoo())


def published(dataset: str, task: str, backbone: str, source: str = "official") -> Recipe:
    """The recipe of a published checkpoint.

    Args:
        dataset: "ade20k", "cityscapes", "coco" or "mapillary"
        task: "semantic", "panoptic" or "instance"
        backbone: "resnet50", "resnet101", "swin_tiny", "swin_small", "swin_base" or "swin_large"; "swin_base_in1k" is
            pretrained on the smaller ImageNet
        source: who trained it: "official", "mmdetection", "mmsegmentation" or "sssegmentation"

    Raises:
        ValueError: no such checkpoint was published.
    """
    return named(_name(dataset, task, backbone, source))


def authors(dataset: str, task: str, backbone: str) -> Recipe:
    """The settings of the authors, with their figures if they published a checkpoint with this backbone.

    Args:
        dataset, task, backbone: as `published` takes them

    Raises:
        ValueError: the data set has no such task, or there is no such backbone.
    """
    tasks = _CLASSES.get(dataset, {})
    _require(task in tasks, f"There are no settings for {task!r} on {dataset!r}; there are for {', '.join(tasks)}.")
    _require(backbone in _BACKBONES, f"backbone must be one of {', '.join(_BACKBONES)}, got {backbone!r}.")
    if (name := _name(dataset, task, backbone, "official")) in _zoo():
        return named(name)
    notes = "The authors' settings; no checkpoint with this backbone was published, so there is no figure to reach."
    return _official(dataset, task, backbone).vary(notes=notes)


def named(name: str) -> Recipe:
    """The recipe of a published checkpoint by its name, for example "coco_panoptic_swin_large"; `names` lists them.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in _zoo():
        close = difflib.get_close_matches(name, names(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "recipes.names() lists them."
        raise ValueError(f"There is no published recipe {name!r}; {hint}")
    row = _zoo()[name]
    official = _official(row["dataset"], row["task"], row["backbone"])
    official = official.vary(
        name=name, published=dict(row["published"]), notes=f"Trained by {row['source']}: {row['checkpoint']}"
    )
    return official.vary(**_DIFFERENCES[row["source"]](official))


def _official(dataset: str, task: str, backbone: str) -> Recipe:
    data, optimization, evaluation = _SETTINGS[dataset](task, backbone)
    return Recipe(
        name=_name(dataset, task, backbone, "official"),
        task=task,
        model=_paper_model(dataset, task, backbone),
        data=data,
        optimization=optimization,
        evaluation=replace(evaluation, semantic_order="combine_first" if task == "semantic" else "resize_first"),
    )


def _paper_model(dataset: str, task: str, backbone: str) -> ModelConfig:
    """100 queries, and 200 for Swin-L, but not in semantic segmentation.

    Batch norms are trained over all processes on Cityscapes, and by ResNet-101 on ADE20K; else they stay frozen.
    """
    is_resnet = backbone.startswith("resnet")
    trains_norms = is_resnet and (dataset == "cityscapes" or (dataset, backbone) == ("ade20k", "resnet101"))
    return ModelConfig(
        num_classes=_CLASSES[dataset][task],
        backbone=_BACKBONES[backbone],
        backbone_weights=True,
        batch_norm="trained" if trains_norms else "frozen",
        num_queries=200 if backbone == "swin_large" and task != "semantic" else 100,
        drop_path_rate=0.0 if is_resnet else 0.3,
    )


def _scales(reference: int) -> tuple[int, ...]:
    """Shortest edges from 0.5 to 2.0 times the reference, in steps of a tenth."""
    return tuple(int(reference * tenth * 0.1) for tenth in range(5, 21))


def _quarters(reference: int) -> tuple[int, ...]:
    """Shortest edges from 0.5 to 1.75 times the reference, in steps of a quarter."""
    return tuple(reference * quarters // 4 for quarters in range(2, 8))


_Settings = tuple[DataConfig, OptimizationConfig, EvaluationConfig]


def _ade20k(task: str, backbone: str) -> _Settings:
    """160 000 iterations; crops of 512 pixels for semantic ResNets, tiny and small Swins, and of 640 for the others."""
    small = task == "semantic" and backbone in ("resnet50", "resnet101", "swin_tiny", "swin_small")
    edge = 512 if small else 640
    return (
        DataConfig(dataset="ade20k", crop_size=(edge, edge), shortest_edges=_scales(edge), longest_edge=4 * edge),
        OptimizationConfig(max_iterations=160_000),
        EvaluationConfig(
            shortest_edge=edge, longest_edge=4 * edge,
            multi_scale_edges=_quarters(edge), multi_scale_longest_edge=7 * edge,
        ),
    )  # fmt: skip


def _cityscapes(task: str, backbone: str) -> _Settings:
    """90 000 iterations, crops of 512 × 1024 pixels."""
    return (
        DataConfig(dataset="cityscapes", crop_size=(512, 1024), shortest_edges=_scales(1024), longest_edge=4096),
        OptimizationConfig(max_iterations=90_000),
        EvaluationConfig(
            shortest_edge=1024, longest_edge=2048,
            multi_scale_edges=_quarters(1024), multi_scale_longest_edge=4096,
        ),
    )  # fmt: skip


def _coco(task: str, backbone: str) -> _Settings:
    """50 epochs, for Swin-L 100, of large-scale jitter; the rate falls in steps."""
    times = 2 if backbone == "swin_large" else 1
    return (
        DataConfig(dataset="coco", crop_size=(1024, 1024), scale_range=(0.1, 2.0), color_jitter=False),
        OptimizationConfig(max_iterations=times * 368_750, step_at=(times * 327_778, times * 355_092)),
        EvaluationConfig(shortest_edge=800, longest_edge=1333),
    )


def _mapillary(task: str, backbone: str) -> _Settings:
    """300 000 iterations, crops of 1024 pixels; every query with a class takes part in the panoptic result."""
    return (
        DataConfig(dataset="mapillary", crop_size=(1024, 1024), shortest_edges=_scales(2048), longest_edge=8192),
        OptimizationConfig(max_iterations=300_000),
        EvaluationConfig(shortest_edge=2048, longest_edge=2048, object_mask_threshold=0.0),
    )


_SETTINGS = {"ade20k": _ade20k, "cityscapes": _cityscapes, "coco": _coco, "mapillary": _mapillary}

# Others trained the same models with small differences.


def _none(recipe: Recipe) -> dict:
    return {}


def _mmsegmentation(recipe: Recipe) -> dict:
    """Crops of one class are drawn again; batch norms measure the new images, but keep their scales."""
    is_resnet = recipe.model.backbone.startswith("resnet")
    return dict(
        model=dict(batch_norm="measured" if is_resnet else "frozen"),
        data=dict(single_category_max_area=0.75),
        evaluation=dict(multi_scale_edges=(), multi_scale_longest_edge=None),
    )


def _sssegmentation(recipe: Recipe) -> dict:
    """Crops of one class are drawn again; 130 epochs of ADE20K, resized around 512 pixels, or 500 of Cityscapes."""
    on_ade20k = recipe.data.dataset == "ade20k"
    sizes = dict(shortest_edges=_scales(512), longest_edge=2048) if on_ade20k else {}
    images, epochs = (20_210, 130) if on_ade20k else (2_975, 500)
    return dict(
        data=dict(single_category_max_area=0.75, **sizes),
        optimization=dict(max_iterations=epochs * (images // recipe.optimization.batch_size)),
        evaluation=dict(multi_scale_edges=(), multi_scale_longest_edge=None),
    )


_DIFFERENCES = {
    "official": _none,
    "mmdetection": _none,  # none that a recipe decides
    "mmsegmentation": _mmsegmentation,
    "sssegmentation": _sssegmentation,
}


def ade20k_swin_tiny(task: str = "semantic") -> Recipe:
    return authors("ade20k", task, "swin_tiny")


def ade20k_swin_small(task: str = "semantic") -> Recipe:
    return authors("ade20k", task, "swin_small")


def ade20k_swin_base(task: str = "semantic") -> Recipe:
    return authors("ade20k", task, "swin_base")


def ade20k_swin_large(task: str = "semantic") -> Recipe:
    return authors("ade20k", task, "swin_large")


def ade20k_resnet50(task: str = "semantic") -> Recipe:
    return authors("ade20k", task, "resnet50")


def cityscapes_swin_tiny(task: str = "semantic") -> Recipe:
    return authors("cityscapes", task, "swin_tiny")


def cityscapes_swin_small(task: str = "semantic") -> Recipe:
    return authors("cityscapes", task, "swin_small")


def cityscapes_swin_base(task: str = "semantic") -> Recipe:
    return authors("cityscapes", task, "swin_base")


def cityscapes_swin_large(task: str = "semantic") -> Recipe:
    return authors("cityscapes", task, "swin_large")


def cityscapes_resnet50(task: str = "semantic") -> Recipe:
    return authors("cityscapes", task, "resnet50")


_ABLATIONS = {
    "no_masked_attention": "builder",
    "single_scale": "builder",
    "no_learnable_queries": "builder",
    "self_attention_first": "builder",
    "learnable_queries_not_supervised": "criterion",
    "mask_loss_on_full_masks": "criterion",
}


def ablation(name: str, recipe: Recipe | None = None) -> Recipe:
    """A recipe with one of the paper's ideas taken out (section 4.3), for example "no_masked_attention".

    No figure is published with it: the paper's tables could not be checked here.

    Args:
        name: "no_masked_attention", "single_scale" (every layer attends to stride 32), "no_learnable_queries" (they
            start from zero), "self_attention_first", "learnable_queries_not_supervised" (no loss before the first
            layer) or "mask_loss_on_full_masks" (at every cell of the mask features instead of points).
        recipe: what to change; by default ADE20K with ResNet-50.

    Raises:
        ValueError: there is no such ablation.
    """
    _require(name in _ABLATIONS, f"There is no ablation {name!r}; there are {', '.join(_ABLATIONS)}.")
    recipe = recipe or ade20k_resnet50()
    changed = {_ABLATIONS[name]: f"m2f_lab.training.ablations:{name}"}
    return recipe.vary(name=f"{recipe.name}_{name}", published={}, **changed)


# Small recipes for CPUs. Nothing is pretrained here, so the backbone learns at the full rate.


def debug_tiny(num_classes: int = 19, dataset: str = "cityscapes") -> Recipe:
    """A model of 0.64 million parameters that learns the drawn scenes on a CPU in a minute or two."""
    return Recipe(
        name=f"debug_tiny_{dataset}",
        task="semantic",
        model=ModelConfig(
            num_classes=num_classes, backbone="test_resnet", hidden_dim=64, mask_dim=64, num_queries=24, num_heads=4,
            num_encoder_layers=1, encoder_feedforward_dim=128, num_decoder_layers=3, decoder_feedforward_dim=128,
            drop_path_rate=0.0,
        ),
        data=DataConfig(
            dataset=dataset, crop_size=(96, 128), shortest_edges=(80, 96, 112, 128), longest_edge=320, num_workers=0
        ),
        loss=LossConfig(num_points=1024),
        optimization=OptimizationConfig(
            max_iterations=300, batch_size=4, learning_rate=1e-3, backbone_multiplier=1.0, warmup_iterations=20,
            clip_norm=1.0, precision="float32", evaluate_every=100, checkpoint_every=100, log_every=5,
        ),
    )  # fmt: skip


def camvid_small() -> Recipe:
    """Photographs of streets, 360 × 480, 11 classes (CamVid in ADE20K's layout), from random weights, on a CPU.

    The backbone is convolutional: from random weights it learns faster than Swin. Images are seen at two thirds of
    their size, in training as in evaluation; results are compared at 360 × 480.
    """
    return Recipe(
        name="camvid_small",
        task="semantic",
        model=ModelConfig(
            num_classes=11, backbone="hgnetv2_b0", hidden_dim=128, mask_dim=128, num_queries=24,
            num_encoder_layers=2, encoder_feedforward_dim=256, num_decoder_layers=3, decoder_feedforward_dim=512,
            drop_path_rate=0.0,
        ),
        data=DataConfig(
            dataset="folder", crop_size=(160, 224), shortest_edges=tuple(range(176, 289, 16)), longest_edge=800,
            num_workers=0,
        ),
        loss=LossConfig(num_points=2048),
        optimization=OptimizationConfig(
            max_iterations=900, batch_size=8, learning_rate=1e-3, backbone_multiplier=1.0, warmup_iterations=50,
            clip_norm=1.0, precision="float32", evaluate_every=300, checkpoint_every=100, log_every=10,
        ),
        evaluation=EvaluationConfig(shortest_edge=240),
    )  # fmt: skip


def nuclei_small() -> Recipe:
    """Cell nuclei in microscopy, one class, instances as numbers (see data/README.md), on a CPU in an hour.

    Up to hundreds of nuclei lie in an image, and they all look alike: the model learns from crops with about ten of
    them, and looks at images in tiles of the same size.
    """
    return Recipe(
        name="nuclei_small",
        task="instance",
        model=ModelConfig(
            num_classes=1, backbone="tf_efficientnet_lite0", backbone_weights=True, hidden_dim=128, mask_dim=128,
            num_encoder_layers=2, encoder_feedforward_dim=256, num_decoder_layers=6, decoder_feedforward_dim=512,
            drop_path_rate=0.0,
        ),
        data=DataConfig(
            dataset="folder", crop_size=(256, 256), scale_range=(1.5, 3.5), color_jitter=False, num_workers=0
        ),
        loss=LossConfig(num_points=2048),
        optimization=OptimizationConfig(
            max_iterations=2400, batch_size=8, learning_rate=7e-4, backbone_multiplier=0.2, warmup_iterations=100,
            clip_norm=1.0, precision="float32", evaluate_every=2400, checkpoint_every=200, log_every=10,
        ),
        evaluation=EvaluationConfig(shortest_edge=512, tile=(256, 256), tile_overlap=0.375, top_k=400),
    )  # fmt: skip


def streets_small(task: str = "panoptic") -> Recipe:
    """Drawn streets in Cityscapes' layout (`python -m m2f_lab.scenes`), from a pretrained backbone, on a CPU.

    The model sees whole streets, in training as in evaluation: on crops it would learn other places and numbers of
    things than it is asked for. A panoptic model is measured by PQ, AP of its things and mIoU at once.
    """
    return Recipe(
        name=f"streets_small_{task}",
        task=task,
        model=ModelConfig(
            num_classes=_CLASSES["cityscapes"][task], backbone="tf_efficientnet_lite0", backbone_weights=True,
            hidden_dim=64, mask_dim=64, num_queries=50, num_heads=4, num_encoder_layers=1, encoder_feedforward_dim=128,
            num_decoder_layers=6, decoder_feedforward_dim=256, drop_path_rate=0.0,
        ),
        data=DataConfig(
            dataset="cityscapes", crop_size=(256, 512), shortest_edges=(256,), longest_edge=512, color_jitter=False,
            num_workers=0,
        ),
        loss=LossConfig(num_points=6272),
        optimization=OptimizationConfig(
            max_iterations=3200, batch_size=2, learning_rate=2.8e-3, backbone_multiplier=0.3, warmup_iterations=100,
            clip_norm=1.0, precision="float32", evaluate_every=3200, checkpoint_every=200, log_every=20,
        ),
        evaluation=EvaluationConfig(semantic_order="resize_first"),
    )  # fmt: skip
