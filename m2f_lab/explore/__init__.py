"""Tools that show what the model decides, each in a file of its own.

Everything here needs Jupyter or matplotlib, so nothing is imported before it is used.
"""

from importlib import import_module

_HOME = {
    "Biographies": "biographies",
    "BiographyCollector": "biography_collection",
    "BiographyGallery": "biography_gallery",
    "CounterfactualExplorer": "counterfactual_explorer",
    "EditHistory": "edits",
    "ForceClass": "edits",
    "LiveMonitor": "live_monitor",
    "MaskView": "mask_view",
    "MatchingInspector": "matching_inspector",
    "MatchingTrace": "matching",
    "Mute": "edits",
    "PaintAttention": "edits",
    "PixelLedger": "pixel_ledger",
    "QueryExplorer": "query_explorer",
    "QueryTrace": "query_trace",
    "Replay": "counterfactual",
    "SamplingViewer": "sampling_viewer",
    "TrapLab": "trap_lab",
    "Unmask": "edits",
    "biographies_of": "biography_collection",
    "collect_biographies": "biography_collection",
    "compare": "comparison",
    "compare_label_maps": "label_change",
    "trace_matching": "matching",
    "trace_queries": "query_trace",
    "trace_sampling": "sampling",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
