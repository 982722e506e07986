"""The only room that knows a framework's models."""

from narrowcast.models.base import Layer, ModelAdapter, Observation, Possible, Sample, Site
from narrowcast.models.batchnorm import FoldReport, find_pairs, fold_
from narrowcast.models.blocks import Blocks, Link, ModelBlock, find_blocks
from narrowcast.models.expected_inputs import expected_inputs
from narrowcast.models.onnx_source import is_onnx, is_onnx_module, require_onnx
from narrowcast.models.torch_model import TorchModel

__all__ = [
    "Blocks",
    "FoldReport",
    "Layer",
    "Link",
    "ModelAdapter",
    "ModelBlock",
    "Observation",
    "Possible",
    "Sample",
    "Site",
    "TorchModel",
    "expected_inputs",
    "find_blocks",
    "find_pairs",
    "fold_",
    "is_onnx",
    "is_onnx_module",
    "require_onnx",
]
