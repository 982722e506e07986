"""Low-rank adapters over a frozen quantized model: attach them, train them in any loop, merge them or keep them apart.

Source:
    QLoRA: Dettmers et al. 2023, arXiv:2305.14314. Start from the float weight: LoftQ, Li et al. 2023, arXiv:2310.08659,
    algorithm 1 with one round. Differs: the integers are those that the recipe's solver has found, and the singular
    vectors are of what these leave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn

from narrowcast.errors import ModelError, RecipeError
from narrowcast.models import TorchModel
from narrowcast.models.layer_kinds import kind_of
from narrowcast.models.modules import get_module, replace_everywhere_
from narrowcast.nn import QuantizedLinear, QuantizedModule
from narrowcast.nn.adapted import AdaptedLinear, AdapterSettings
from narrowcast.nn.adapters import ADAPTERS
from narrowcast.nn.frozen import FrozenLinear
from narrowcast.nn.trained import TrainedModule
from narrowcast.pipeline.run import Quantized
from narrowcast.qat.state import marked
from narrowcast.recipe import Recipe
from narrowcast.report import Report

_NAME = "_narrowcast_adapted"
HOOK_TABLES = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


@dataclass(frozen=True)
class Attached:
    """What a model with adapters remembers.

    Args:
        settings: of the adapters.
        skipped: path -> why a layer that the globs match has none.
        report, recipe, source: of the quantized model; None and "" where it came without.
    """

    settings: AdapterSettings
    skipped: dict[str, str]
    report: Report | None
    recipe: Recipe | None
    source: str

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        return self  # nothing in it changes: copies of the model (moving averages) share it


def attach_adapters(
    quantized: Quantized | nn.Module, *, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0,
    layers: str | Sequence[str] = "*", merge: str = "requantize", float_model: nn.Module | None = None,
    inplace: bool = False,
) -> nn.Module:  # fmt: skip
    """A quantized model to train by adapters alone: its integers stay as they are stored, and nothing else trains.

    Args:
        quantized: what `nc.quantize` or `nc.qat.convert` returned, or a model from `nc.load`; any recipe.
        rank: of every adapter (`r` elsewhere).
        alpha: adapters count alpha / rank (`lora_alpha` elsewhere).
        dropout: share of the adapters' inputs that is left out in training (`lora_dropout` elsewhere).
        layers: globs of the linear layers that get one; layers that share their weight with another and those with
            float columns get none, which an error says where a glob without wildcards names one.
        merge: "requantize": the adapter adds to the output as everywhere, and merging rounds; "zero_points": it moves
            zero points of groups in formats like 'int4/group32/asym'; "codes": it moves the codes of integer formats.
            The last two train with the rounding in sight, and merging them loses nothing.
        float_model: the model that was quantized; with it, adapters of "requantize" start as the best approximation
            of what quantization has taken away. Without, the model starts as the quantized one.
        inplace: change `quantized` itself, and save the memory of a second set of integers.

    Returns:
        A model in training mode with the parameters `<layer>.lora_A` and `<layer>.lora_B`; all others ask for no
        gradient. Merge it with `nc.qat.merge_adapters`, or keep adapters apart with `nc.qat.save_adapters`.

    Raises:
        RecipeError: a setting is not what it may be.
        ModelError: the model is not quantized or has adapters already, a glob matches nothing, a rank is too large, a
            layer's format cannot take such an adapter, or `float_model` is not what was quantized.
    """
    settings = AdapterSettings(rank, alpha, dropout, merge)
    if float_model is not None and merge != "requantize":
        raise RecipeError(f"adapters: float_model goes with merge 'requantize', {merge!r} starts at the integers")
    given = quantized if isinstance(quantized, nn.Module) else quantized.model
    _check_quantized(given)
    globs = [layers] if isinstance(layers, str) else list(layers)
    chosen, skipped = _choose(given, globs, settings.merge)
    for path in chosen:
        ADAPTERS[merge].check(
            path, cast(QuantizedLinear, get_module(given, path)), settings
        )  # before anything is changed
    recipe = None if isinstance(quantized, nn.Module) else quantized.recipe
    starts = {} if float_model is None else _starts(given, chosen, float_model, recipe, rank)
    work = TorchModel.around(given, copy=not inplace)
    work.detach_()
    model = _adapted_(work, chosen, settings)
    for path, residual in starts.items():
        _start_(get_module(model, path), residual)
    if isinstance(quantized, nn.Module):
        kept = Attached(settings, skipped, None, None, "")
    else:
        kept = Attached(settings, skipped, quantized.report, quantized.recipe, quantized.source_sha256)
    model.__dict__[_NAME] = kept
    return model.train()


def adapted_of(model: Any) -> tuple[nn.Module, Attached]:
    """The model with adapters inside of what torch.compile and data-parallel wrappers make of it, and what it knows.

    Raises:
        ModelError: it has no adapters.
    """
    inner = marked(model, _NAME)
    if inner is None:
        raise ModelError(
            f"{type(model).__name__} has no adapters; call nc.qat.attach_adapters first, and mind that a merged model "
            "has none left: merging once is all there is to do"
        )
    return inner, inner.__dict__[_NAME]


def forget_(model: nn.Module) -> None:
    """Let a model whose adapters are gone remember none."""
    model.__dict__.pop(_NAME, None)


def adapters_of(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The layers with adapters, by path."""
    for path, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            yield path, module


class RefuseGradient:
    """A forward pre-hook of quantized layers that gradients cannot pass.

    Args:
        path: of the layer.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Raise ModelError for an input that wants a gradient."""
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise ModelError(
                f"layer {self.path!r} ({type(module).__name__}) stands behind an adapter, and gradients do not pass "
                "it: give adapters to layers behind it only, keep it in float, or train with nc.qat.prepare"
            )


def _check_quantized(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"attach_adapters takes what nc.quantize returned or a module, got {type(model).__name__}")
    if any(isinstance(module, FrozenLinear) for module in model.modules()):
        raise ModelError("the model has adapters already; merge them first, or start from the quantized model")
    if any(isinstance(module, TrainedModule) for module in model.modules()):
        raise ModelError("the model is prepared for training of all weights; convert it first: nc.qat.convert(model)")
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        raise ModelError("the model has no quantized linear layer; quantize it first: nc.quantize(model, recipe, data)")


def _choose(model: nn.Module, globs: list[str], merge: str) -> tuple[list[str], dict[str, str]]:
    """The paths that get adapters, and why others that a glob matches get none."""
    linear = {p: m for p, m in model.named_modules() if isinstance(m, QuantizedModule)}
    tied = _tied(linear)
    chosen, skipped = [], {}
    for glob in globs:
        matched = [path for path in linear if fnmatchcase(path, glob)]
        if not matched:
            known = ", ".join(repr(p) for p, m in linear.items() if isinstance(m, QuantizedLinear))
            raise ModelError(f"adapters: {glob!r} matches no quantized layer; the linear ones are {known}")
        for path in matched:
            why = _why_not(linear[path], path in tied, merge)
            if why and path == glob:
                raise ModelError(f"layer {path!r}: {why}")
            if why:
                skipped[path] = why
            else:
                chosen.append(path)
    if not chosen:
        path, why = next(iter(skipped.items()))
        raise ModelError(f"adapters: no layer can have one; layer {path!r}: {why}")
    return list(dict.fromkeys(chosen)), skipped


def _why_not(module: nn.Module, tied: bool, merge: str) -> str:
    if not isinstance(module, QuantizedLinear):
        return f"a {type(module).__name__} cannot have an adapter, only linear layers can; leave it out"
    if tied:
        return "it shares its weight with another layer, which an adapter would part from it; leave it out"
    return ADAPTERS[merge].refusal(module)


def _tied(modules: dict[str, QuantizedModule]) -> set[str]:
    """Paths of the modules whose codes another one has, too."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        module.restore_layout_()
        for name in module.weight_names:
            codes = getattr(module, f"{name}_codes")
            if codes is not None:  # convolutions keep theirs in panels, which no linear layer shares
                owners.setdefault(codes.data_ptr(), []).append(path)
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def _adapted_(work: TorchModel, chosen: list[str], settings: AdapterSettings) -> nn.Module:
    """Wrap the linear layers of the working copy, guard the other quantized ones, freeze the rest."""
    for parameter in work.model.parameters():
        parameter.requires_grad_(False)
    for path, module in list(work.model.named_modules()):
        if isinstance(module, QuantizedLinear):
            adapted = path in chosen
            wrapper = ADAPTERS[settings.merge](path, module, settings) if adapted else FrozenLinear(path, module)
            for table in HOOK_TABLES:  # what watched the layer watches it with its adapter
                getattr(wrapper, table).update(getattr(module, table))
                getattr(module, table).clear()
            work.model = replace_everywhere_(work.model, module, wrapper)
        elif isinstance(module, QuantizedModule):
            module.register_forward_pre_hook(RefuseGradient(path))
    return work.model


def _starts(
    model: nn.Module, chosen: list[str], float_model: nn.Module, recipe: Recipe | None, rank: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """The leading singular vectors [out, rank], [rank, in] of what each quantized weight lacks."""
    if recipe is not None and recipe.transforms:
        raise ModelError("adapters: the recipe has transforms, which rewrote weights; leave float_model out")
    starts = {}
    for path in chosen:
        try:
            module = get_module(float_model, path)
        except AttributeError as error:
            raise ModelError(
                f"adapters: float_model has no layer {path!r}; give the model that was quantized"
            ) from error
        base: Any = get_module(model, path)
        kind = kind_of(module)
        matrix = None if kind is None else kind.matrix(module, "weight").detach().float()
        if matrix is None or tuple(matrix.shape) != (base.out_features, base.in_features):
            raise ModelError(f"adapters: layer {path!r} of float_model is no {base.out_features}x{base.in_features}")
        residual = matrix - base.weight
        if float(residual.norm()) > float(matrix.norm()):
            raise ModelError(f"adapters: layer {path!r} of float_model is not the one that was quantized")
        left, sizes, right = torch.linalg.svd(residual, full_matrices=False)
        root = sizes[:rank].sqrt()
        starts[path] = (left[:, :rank] * root, root[:, None] * right[:rank])
    return starts


@torch.no_grad()
def _start_(module: nn.Module, start: tuple[Tensor, Tensor]) -> None:
    assert isinstance(module, AdaptedLinear)
    module.lora_B.copy_(start[0] / module.factor)
    module.lora_A.copy_(start[1])
