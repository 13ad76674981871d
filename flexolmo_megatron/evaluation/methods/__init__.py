"""The baselines and ablations of the comparison (arXiv 2507.07024, table 1): one small module per family.

    models = Models(public=..., dense={"math": ...}, merged=..., ...)
    methods = build_methods(models, Settings(...))
    store = Store("runs/compare/log_probs")
    store.fill(methods, text_sets)
    scores = {method.name: {texts.name: method.evaluate(store, texts) for texts in text_sets} for method in methods}
"""

from flexolmo_megatron.evaluation.methods.base import RUNS, Method, Models, Settings, Variant
from flexolmo_megatron.evaluation.methods.registry import FAMILIES, build_methods
from flexolmo_megatron.evaluation.methods.store import Store
from flexolmo_megatron.evaluation.texts import TextSet

__all__ = ["FAMILIES", "RUNS", "Method", "Models", "Settings", "Store", "TextSet", "Variant", "build_methods"]
