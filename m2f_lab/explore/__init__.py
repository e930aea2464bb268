"""Tools that show the decisions of a model, each in a folder of its own.

Everything here needs Jupyter or matplotlib, so nothing is imported before it is used.
"""

from importlib import import_module

_HOME = {
    "Biographies": "biographies.data",
    "BiographyCollector": "biographies.collect",
    "BiographyExplorer": "biographies.gallery",
    "CounterfactualExplorer": "counterfactuals.explorer",
    "EditHistory": "counterfactuals.edits",
    "ForceClass": "counterfactuals.edits",
    "LiveMonitor": "runs.monitor",
    "MaskView": "parts.mask_view",
    "MatchingExplorer": "matching.explorer",
    "MatchingTrace": "matching.trace",
    "Mute": "counterfactuals.edits",
    "PaintAttention": "counterfactuals.edits",
    "PixelExplorer": "pixels.explorer",
    "QueryExplorer": "queries.explorer",
    "QueryTrace": "queries.trace",
    "Replay": "counterfactuals.replay",
    "SamplingExplorer": "sampling.explorer",
    "TrapLab": "traps.lab",
    "Unmask": "counterfactuals.edits",
    "biographies_of": "biographies.collect",
    "biography_table": "biographies.words",
    "collect_biographies": "biographies.collect",
    "compare": "runs.compare",
    "compare_label_maps": "counterfactuals.label_change",
    "trace_matching": "matching.trace",
    "trace_queries": "queries.trace",
    "trace_sampling": "sampling.trace",
}

_FORMER = {  # names of an earlier release
    "BiographyGallery": "BiographyExplorer",
    "MatchingInspector": "MatchingExplorer",
    "PixelLedger": "PixelExplorer",
    "SamplingViewer": "SamplingExplorer",
}

__all__ = [*_HOME, *_FORMER]


def __getattr__(name: str):
    if name == "plots":
        return import_module(f"{__name__}.plots")
    name = _FORMER.get(name, name)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
