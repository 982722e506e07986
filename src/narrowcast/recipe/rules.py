"""Rule and Recipe: plain data, checked when made, written and read as JSON values."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from narrowcast.core import PerChannel, PerToken, QuantSpec
from narrowcast.errors import FormatError, RecipeError
from narrowcast.methods import make_method
from narrowcast.models import Layer
from narrowcast.nn import DEFAULT_TRAINING, TRAINING, activation_spec
from narrowcast.observers import make_observer
from narrowcast.transforms import make_transform

DEFAULT_OBSERVER = "minmax"
_FEWEST_OUTLIERS, _MOST_OUTLIERS = 0.001, 25.0
_RULE_KEYS = ("layers", "type", "role", "weight", "input", "method", "train", "keep", "optional")
_RECIPE_KEYS = (
    "name", "rule", "fold_batchnorm", "correct_bias", "fuse", "sequential", "portable", "token_ranges", "transforms",
)  # fmt: skip


@dataclass(frozen=True)
class InputRule:
    """How a layer's input is treated.

    Args:
        spec: "int8/token" (found at run time), "uint8/tensor" (static), "bf16" or "fp16" (a cast).
        observer: what fixes a static range, e.g. "percentile(99.99)" or "best(minmax,mse)"; "" where it is not static.
        outliers: percentage of a linear layer's input channels, the largest in calibration, that stay float.
    """

    spec: QuantSpec
    observer: str = ""
    outliers: float = 0.0

    @classmethod
    def parse(cls, text: str) -> InputRule:
        """The input rule written as `text`: "int8/token", "uint8/tensor static:percentile(99.99)" or
        "int8/token outliers:top(0.5%)".

        Raises:
            FormatError: no kernel takes such inputs, or the text has parts that mean nothing.
            RecipeError: the observer is not known.
        """
        match = re.fullmatch(
            r"\s*(\S+?)(?:\s+static(?::(\w+\([^:%]*\)|\S+))?)?(?:\s+outliers:top\(([\d.]+)%\))?\s*", text
        )
        if match is None:
            raise FormatError(
                f"input {text!r}: expected '<format>', '<format> static:<observer>' or '<format> outliers:top(0.5%)'"
            )
        spec = activation_spec(match[1])
        is_static = spec.format.scaled and not isinstance(spec.granularity, PerToken)
        if "static" in text.split(maxsplit=1)[-1] and not is_static:
            raise FormatError(f"input {text!r}: {spec} has no static range; use 'uint8/tensor static:...'")
        observer = "".join((match[2] or DEFAULT_OBSERVER).split()) if is_static else ""
        if observer:
            make_observer(observer)
        if isinstance(spec.granularity, PerChannel) and observer != "minmax":
            raise FormatError(f"input {text!r}: ranges per channel are observed by minmax; write 'static:minmax'")
        return cls(spec, observer, _outliers(text, match[3], spec))

    def __str__(self) -> str:
        static = f" static:{self.observer}" if self.observer else ""
        return f"{self.spec}{static}" + (f" outliers:top({self.outliers:g}%)" if self.outliers else "")

    def outlier_count(self, channels: int) -> int:
        """Input channels of a layer that stay float: at least one where any percentage is asked for."""
        return min(channels, math.ceil(channels * self.outliers / 100 - 1e-9))


@dataclass(frozen=True)
class Rule:
    """What happens to the layers that match.

    Args:
        layers: glob patterns on the layer's name; empty matches every name.
        type: the layer's type ("Conv2d"); "" matches every type.
        role: "embedding", "head" or "tied" (one weight for both); "" matches every role.
        weight: format of the weight; None only with `keep`.
        input: treatment of the input; None leaves it float.
        method: the weight solver and its options, e.g. {"rtn": {"range": "absmax"}}; empty leaves the choice to
            `default_method`.
        train: how ranges are trained in quantization-aware training ("lsq", "lsq+", "ste", "pact"); no other use.
        keep: the reason to leave the layer as it is; "" quantizes it.
        optional: whether the rule may match nothing.
    """

    layers: tuple[str, ...] = ()
    type: str = ""
    role: str = ""
    weight: QuantSpec | None = None
    input: InputRule | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    keep: str = ""
    optional: bool = False
    train: str = DEFAULT_TRAINING

    def matches(self, layer: Layer) -> bool:
        """Whether the rule speaks of this layer."""
        if self.layers and not any(fnmatchcase(layer.name, pattern) for pattern in self.layers):
            return False
        if self.type and self.type not in layer.types:
            return False
        return not self.role or self.role == layer.role

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "rule") -> Rule:
        """The rule written as a table of a recipe file.

        Raises:
            RecipeError: a key is unknown or missing, or a value is not what the key takes; says where.
        """
        if not isinstance(values, Mapping):
            raise RecipeError(f"{where}: expected a table of keys, got {type(values).__name__}")
        _refuse_unknown(values, _RULE_KEYS, where)
        if ("weight" in values) == ("keep" in values):
            raise RecipeError(f"{where}: needs exactly one of 'weight' (a format) and 'keep' (a reason)")
        layers = _patterns(values, where)
        texts = {"type": "", "role": "", "keep": ""} | {k: values[k] for k in ("type", "role", "keep") if k in values}
        for key, value in {**texts, **{f"layers[{i}]": text for i, text in enumerate(layers)}}.items():
            _check_text(key, value, where)
        if texts["role"] not in ("", "embedding", "head", "tied"):
            raise RecipeError(f"{where}: role {texts['role']!r} is not known; use 'embedding', 'head' or 'tied'")
        if not isinstance(values.get("optional", False), bool):
            raise RecipeError(f"{where}: optional is true or false, got {values['optional']!r}")
        if "keep" in values:
            if not texts["keep"] or {"input", "method", "train"} & set(values):
                raise RecipeError(
                    f"{where}: 'keep' is a reason in words, and goes with neither 'input' nor 'method' nor 'train'"
                )
            return cls(layers, texts["type"], texts["role"], keep=texts["keep"], optional=values.get("optional", False))
        return cls(
            layers, texts["type"], texts["role"], _weight_spec(values["weight"], where),
            _input_rule(values.get("input"), where), _method(values["method"], where) if "method" in values else {},
            optional=values.get("optional", False), train=_training(values.get("train", DEFAULT_TRAINING), where),
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` takes them back."""
        values: dict[str, Any] = {"layers": list(self.layers)} if self.layers else {}
        values |= {key: getattr(self, key) for key in ("type", "role", "keep") if getattr(self, key)}
        if self.weight is not None:
            values |= {"weight": str(self.weight)} | ({"method": dict(self.method)} if self.method else {})
        if self.input is not None:
            values["input"] = str(self.input)
        if self.train != DEFAULT_TRAINING:
            values["train"] = self.train
        if self.optional:
            values["optional"] = True
        return values

    def __str__(self) -> str:
        parts = [f"{key} = {value!r}" for key, value in self.to_dict().items() if key in ("layers", "type", "role")]
        return ", ".join(parts) or "every layer"


@dataclass(frozen=True)
class Recipe:
    """Ordered rules; the first that matches a layer decides.

    Args:
        rules: in order.
        name: for reports.
        fold_batchnorm: whether BatchNorm is folded into the convolution before it.
        correct_bias: whether the mean error of each layer is taken out through its bias: as measured with data,
            without as the BatchNorms before it tell.
        fuse: whether layers take in the operations that follow them: chains of static convolutions run as one network
            with 8-bit activations between them, linear layers apply the activation function behind them.
        sequential: whether each block of the model is quantized on what the quantized blocks before it give; "auto"
            where a method asks for more than magnitudes. False lets every block see what the float model gives.
        portable: whether integer products of ONNX files are kept from saturating on CPUs without VNNI; narrowcast's own
            kernels never saturate.
        token_ranges: whether linear layers of ONNX files that find their ranges at run time have one per token, as
            PyTorch modules have, and not one per input, which is faster.
        transforms: function-preserving rewrites before anything is quantized, in order, each one name with its options.
    """

    rules: tuple[Rule, ...]
    name: str = ""
    fold_batchnorm: bool = True
    correct_bias: bool = True
    fuse: bool = True
    sequential: Literal["auto"] | bool = "auto"
    portable: bool = False
    token_ranges: bool = False
    transforms: tuple[Mapping[str, Mapping[str, Any]], ...] = ()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """The recipe of a TOML or JSON document.

        Raises:
            RecipeError: a key is unknown, there is no rule, or a rule is wrong; says which.
        """
        if not isinstance(values, Mapping):
            raise RecipeError(f"{where}: expected a document with [[rule]] tables, got {type(values).__name__}")
        _refuse_unknown(values, _RECIPE_KEYS, where)
        rules = values.get("rule", [])
        if not isinstance(rules, list) or not rules:
            raise RecipeError(f"{where}: has no [[rule]]; a recipe needs at least one")
        switches = {key: values.get(key, True) for key in ("fold_batchnorm", "correct_bias", "fuse")}
        switches |= {key: values.get(key, False) for key in ("portable", "token_ranges")}
        for key, value in switches.items():
            if not isinstance(value, bool):
                raise RecipeError(f"{where}: {key} is true or false, got {value!r}")
        sequential = values.get("sequential", "auto")
        if not isinstance(sequential, bool) and sequential != "auto":
            raise RecipeError(f"{where}: sequential is true, false or 'auto', got {sequential!r}")
        _check_text("name", values.get("name", ""), where)
        made = tuple(Rule.from_dict(rule, f"{where}: rule {index + 1}") for index, rule in enumerate(rules))
        transforms = _transforms(values.get("transforms", []), where)
        return cls(made, values.get("name", ""), **switches, sequential=sequential, transforms=transforms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `from_dict` takes them back."""
        rules = [rule.to_dict() for rule in self.rules]
        switches = {"fold_batchnorm": self.fold_batchnorm, "correct_bias": self.correct_bias, "fuse": self.fuse}
        transforms = {"transforms": [_plain(entry) for entry in self.transforms]} if self.transforms else {}
        of_onnx = {key: True for key in ("portable", "token_ranges") if getattr(self, key)}
        return {"name": self.name, **switches, "sequential": self.sequential, **of_onnx, **transforms, "rule": rules}


def _refuse_unknown(values: Mapping[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in values:
        if key not in known:
            raise RecipeError(f"{where}: key {key!r} is not known; use {', '.join(known)}")


def _check_text(key: str, value: Any, where: str) -> None:
    if not isinstance(value, str):
        raise RecipeError(f"{where}: {key} is a text, got {value!r}")


def _patterns(values: Mapping[str, Any], where: str) -> tuple[Any, ...]:
    if "layers" not in values:
        return ()
    layers = values["layers"]
    layers = [layers] if isinstance(layers, str) else layers
    if not isinstance(layers, list | tuple) or not layers:
        raise RecipeError(f"{where}: layers is a pattern or a list of patterns, got {layers!r}; '*' is every layer")
    return tuple(layers)


def _outliers(text: str, percentage: str | None, spec: QuantSpec) -> float:
    if percentage is None:
        return 0.0
    try:
        value = float(percentage)
    except ValueError:
        value = math.nan
    if not _FEWEST_OUTLIERS <= value <= _MOST_OUTLIERS:
        raise FormatError(
            f"input {text!r}: outliers:top({percentage}%) is not a percentage between {_FEWEST_OUTLIERS:g} and "
            f"{_MOST_OUTLIERS:g}; use for example outliers:top(0.5%)"
        )
    if not spec.format.scaled or not isinstance(spec.granularity, PerToken):
        raise FormatError(
            f"input {text!r}: outlier channels go with ranges found at run time; use 'int8/token' or 'uint8/token'"
        )
    return value


def _weight_spec(text: Any, where: str) -> QuantSpec:
    try:
        spec = QuantSpec.parse(text)
    except FormatError as error:
        raise RecipeError(f"{where}: weight: {error}") from None
    if isinstance(spec.granularity, PerToken):
        raise RecipeError(f"{where}: weight {text!r}: a weight has no tokens; use channel or group<size>")
    return spec


def _input_rule(text: Any, where: str) -> InputRule | None:
    if text is None:
        return None
    if not isinstance(text, str):
        raise RecipeError(f"{where}: input is a text like 'int8/token', got {text!r}")
    try:
        rule = InputRule.parse(text)
    except (FormatError, RecipeError) as error:
        raise RecipeError(f"{where}: {error}") from None
    return None if rule.spec.format.name == "fp32" else rule


def _method(values: Any, where: str) -> dict[str, Any]:
    values = {values: {}} if isinstance(values, str) else values
    try:
        make_method(values)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return {name: dict(options) for name, options in values.items()}


def _training(name: Any, where: str) -> str:
    if name not in TRAINING:
        raise RecipeError(f"{where}: train {name!r} is not known; use {', '.join(map(repr, TRAINING))}")
    return str(name)


def _transforms(values: Any, where: str) -> tuple[dict[str, dict[str, Any]], ...]:
    if not isinstance(values, list | tuple):
        raise RecipeError(f"{where}: transforms is a list like ['equalize', {{'awq': {{}}}}], got {values!r}")
    made = []
    for value in values:
        entry = {value: {}} if isinstance(value, str) else value
        try:
            make_transform(entry)
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from None
        made.append({name: dict(options) for name, options in entry.items()})
    return tuple(made)


def _plain(entry: Mapping[str, Mapping[str, Any]]) -> Any:
    """A transform as a recipe file has it: its name alone where it has no options."""
    (name, options), *_ = entry.items()
    return {name: dict(options)} if options else name
