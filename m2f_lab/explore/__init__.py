"""Tools that show what the model decides, each in a file of its own.

Everything here needs Jupyter or matplotlib, so nothing is imported before it is used.
"""

from importlib import import_module

_HOME = {
    "Biographies": "biographies.data",
    "BiographyCollector": "biographies.collect",
    "BiographyGallery": "biographies.gallery",
    "CounterfactualExplorer": "counterfactuals.explorer",
    "EditHistory": "counterfactuals.edits",
    "ForceClass": "counterfactuals.edits",
    "LiveMonitor": "runs.monitor",
    "MaskView": "parts.mask_view",
    "MatchingInspector": "matching.explorer",
    "MatchingTrace": "matching.trace",
    "Mute": "counterfactuals.edits",
    "PaintAttention": "counterfactuals.edits",
    "PixelLedger": "pixels.explorer",
    "QueryExplorer": "queries.explorer",
    "QueryTrace": "queries.trace",
    "Replay": "counterfactuals.replay",
    "SamplingViewer": "sampling.explorer",
    "TrapLab": "traps.lab",
    "Unmask": "counterfactuals.edits",
    "biographies_of": "biographies.collect",
    "collect_biographies": "biographies.collect",
    "compare": "runs.compare",
    "compare_label_maps": "counterfactuals.label_change",
    "trace_matching": "matching.trace",
    "trace_queries": "queries.trace",
    "trace_sampling": "sampling.trace",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
