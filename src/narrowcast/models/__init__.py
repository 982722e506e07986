"""The only room that knows a framework's models."""

from narrowcast.models.base import Layer, ModelAdapter, Observation, Sample, Site
from narrowcast.models.batchnorm import FoldReport, find_pairs, fold_
from narrowcast.models.torch_model import TorchModel

__all__ = ["FoldReport", "Layer", "ModelAdapter", "Observation", "Sample", "Site", "TorchModel", "find_pairs", "fold_"]
