"""`nc.verify`: whether two artefacts of one model compute the same, layer by layer, and where they part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from narrowcast.data import iterate
from narrowcast.errors import ModelError
from narrowcast.evaluate import Opened, evaluating, open_side
from narrowcast.kernels import check_kernels
from narrowcast.models import is_onnx_module
from narrowcast.nn.integer_graph import apart
from narrowcast.parity.bounds import Bound, bound_for_output, parse_tolerance
from narrowcast.parity.difference import Difference
from narrowcast.parity.onnx_runtime import OnnxRuntime
from narrowcast.parity.pairs import Pair, find_pairs
from narrowcast.parity.parity import BEYOND, EQUAL, MODEL, OPEN, OUTPUT, WITHIN, LayerParity, Parity
from narrowcast.parity.runtime import Runtime
from narrowcast.parity.stored import SAME, stored_difference
from narrowcast.parity.torch_runtime import TorchRuntime
from narrowcast.parity.walk import Walk, Watched

RUNTIMES: tuple[tuple[Callable[[Opened], bool], Callable[[Opened, str | None], Runtime]], ...] = (
    (lambda side: is_onnx_module(side.model), lambda side, kernels: OnnxRuntime(side.name, side.model, kernels)),
    (lambda side: True, lambda side, kernels: TorchRuntime(side.name, side.model, kernels)),
)
"""(takes this model, makes its runtime) in the order in which they are asked; torch takes what none above it does."""

NAMES = ("reference", "artefact")


def verify(
    reference: Any,
    artefact: Any,
    data: Any,
    *,
    tolerance: str | float | None = None,
    kernels: tuple[str | None, str | None] = (None, None),
    into: Any = None,
) -> Parity:
    """Compare two artefacts of one model layer by layer, on the same data.

    Every layer is compared twice: alone, the artefact's layer on the reference's inputs, so that a bad layer is told
    from one behind it; and in the model, the layer's output in the artefact's own run, where differences add up. Layers
    are matched by name. One batch is in memory at a time.

    Args:
        reference: the side that is right by definition: an nn.Module (float, quantized, or prepared for training: it
            is compared in eval mode), a Quantized, an ONNX model, or a path or factory as in `nc.compare`.
        artefact: the side to verify, of the same kinds. A checkpoint without an architecture is loaded into a copy of
            the reference.
        data: in any form of `narrowcast.data`; a generator is read once.
        tolerance: what the outputs of each layer alone, and of the model, may differ by: "exact", a least ratio of
            signal to noise such as "40dB", or a share of the largest output such as 1e-3. None takes the bound that
            follows from each layer's arithmetic: 0 where it is integer, the kernel's stated bound where it is float.
            Where the sides hold different formats none follows, and parity is not shown unless you state one.
        kernels: what narrowcast's ops of each side run on: "reference" for the bodies in torch that define them, a
            name in `nc.kernels.TIERS`, or None for those in use.
        into: the model, or its factory, into copies of which checkpoints without an architecture are loaded, on either
            side: needed where such a checkpoint is the reference, or an ONNX file is.

    Returns:
        The parity; print it, ask `ok`, `equal`, `first_difference`, or take `to_dict()`.

    Raises:
        ModelError: a model cannot be opened or run, the two have no common layer or differ in structure, or an output
            is not finite; the message names the layer, the side and the batch.
        DataError: the data is empty or does not fit.
        FormatError: the tolerance is not known.
        KernelError: the kernels are not known here.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> nc.verify(net, net, [torch.ones(2, 4)]).equal
        True
    """
    asked = None if tolerance is None else parse_tolerance(tolerance)
    for name in kernels:
        check_kernels(name)
    architecture = None if into is None else open_side(into, None, role="architecture")
    called = f"the {NAMES[0]}" if architecture is None else architecture.name
    left = _plain(open_side(reference, architecture, role=NAMES[0], called=called))
    right = _plain(open_side(artefact, architecture or left, role=NAMES[1], called=called))
    models = dict(zip(NAMES, (left.model, right.model), strict=True))
    with evaluating(models) as notes, apart(*_to_take_apart(left, right)) as taken:
        sides = [_runtime(side, name) for side, name in zip((left, right), kernels, strict=True)]
        changed = _meet(sides)
        pairs, more = find_pairs(sides[0], sides[1])
        whole = pairs.pop("") if "" in pairs and pairs[""].is_group else None  # the output is the whole model's
        walk = Walk(sides[0], sides[1], pairs, asked)
        for batch in iterate(data, left.model):
            walk.step(batch)
            if batch.note and batch.note not in notes:
                notes.append(batch.note)
        if not walk.order and not _hidden(walk):
            raise ModelError(
                f"none of the {len(pairs)} common layers ran: {left.name} does not call its layers as modules (an "
                "exported program does not), or the data does not reach them; give the model it was made from, or "
                "compare outputs by nc.compare"
            )
        rows = (*_hidden_rows(walk, asked), *(_row(name, walk) for name in walk.order))
        output = _output(walk, whole, asked)
    notes += [side.note for side in (left, right) if side.note]
    if taken:
        notes.append("networks of the torch side ran layer by layer, so that each layer could be seen")
    notes += [*_kernel_notes(sides), *changed, *more, *_left_out(walk)]
    if output is None:
        notes.append("the models returned no tensor: only their layers were compared")
    return Parity(left.name, right.name, rows, output, walk.batches, walk.samples, tuple(notes))


def _plain(side: Opened) -> Opened:
    """The model that torch.compile wrapped: only it calls its layers one by one, by their own names."""
    wrapped = side.model._modules.get("_orig_mod")
    if wrapped is None:
        return side
    note = f"{side.name} is compiled: its layers were run eagerly"
    return replace(side, model=wrapped, note="; ".join(text for text in (side.note, note) if text))


def _to_take_apart(left: Opened, right: Opened) -> list[Any]:
    """The torch side where the other is none: its networks do not show their layers, which the other side has."""
    onnx = [is_onnx_module(side.model) for side in (left, right)]
    return [side.model for side, is_onnx in zip((left, right), onnx, strict=True) if any(onnx) and not is_onnx]


def _meet(sides: list[Runtime]) -> list[str]:
    """Tell the sides of each other; returns warnings of runtimes that change the arithmetic."""
    pairs = zip(sides, reversed(sides), NAMES, strict=True)
    return [f"the {role}: {text}" for side, other, role in pairs for text in side.meet(other)]


def _runtime(side: Opened, kernels: str | None) -> Runtime:
    return next(make for takes, make in RUNTIMES if takes(side))(side, kernels)


def _row(name: str, walk: Walk) -> LayerParity:
    layer = walk.layers[name]
    pair, alone, in_model = layer.pair, layer.alone.result(), layer.in_model.result()
    verdict = _verdict(alone, layer.bound)
    kind = pair.reference.type
    if pair.artefact.type != kind:
        kind = f"{kind}, {pair.artefact.type}"
    words = layer.bound.words if layer.bound is not None else "none: different formats"
    return LayerParity(
        name or MODEL, kind, pair.reference.arithmetic.formats, pair.artefact.arithmetic.formats, words, alone,
        in_model, verdict, _reason(layer, verdict, in_model, walk),
    )  # fmt: skip


def _verdict(seen: Difference | None, bound: Bound | None) -> str:
    if seen is not None and seen.equal:
        return EQUAL
    if seen is None or bound is None:
        return OPEN
    return WITHIN if seen.within(bound) else BEYOND


def _reason(layer: Watched, verdict: str, in_model: Difference | None, walk: Walk) -> str:
    """What is known of why a layer differs, and of what could not be seen."""
    pair, said = layer.pair, []
    same_format = pair.reference.arithmetic.formats == pair.artefact.arithmetic.formats
    if verdict == BEYOND and same_format and not pair.is_group:
        said.append(_stored(walk, pair))
    if in_model is None:
        inside = pair.artefact.inside
        said.append("not called in the artefact's run" if inside is None else f"runs inside {inside or MODEL}")
    return "; ".join(text for text in said if text)


def _stored(walk: Walk, pair: Pair) -> str:
    """What both sides store differently; of different runtimes only what both have by one name."""
    ours, theirs = walk.reference.stored(pair.reference), walk.artefact.stored(pair.artefact)
    if type(walk.reference) is not type(walk.artefact):
        both = ours.keys() & theirs.keys()
        ours, theirs = ({name: held[name] for name in both} for held in (ours, theirs))
        if not both:
            return ""
    return stored_difference(ours, theirs)


def _hidden(walk: Walk) -> dict[str, Pair]:
    """The common layers that run inside a network of the reference, where neither inputs nor outputs are seen."""
    idle = {name: layer.pair for name, layer in walk.layers.items() if name not in walk.order}
    return {name: pair for name, pair in idle.items() if pair.reference.inside is not None}


def _hidden_rows(walk: Walk, asked: Bound | None) -> list[LayerParity]:
    """Rows of layers that can be compared by what they store only: those of one format, where equality is asked."""
    rows = []
    for name, pair in _hidden(walk).items():
        formats = pair.reference.arithmetic.formats
        if asked is None and formats == pair.artefact.arithmetic.formats:
            said = stored_difference(walk.reference.stored(pair.reference), walk.artefact.stored(pair.artefact))
            verdict = EQUAL if said == SAME else BEYOND
            bound = "equal: what it stores; it runs inside a network"
            rows.append(LayerParity(name, pair.reference.type, formats, formats, bound, None, None, verdict, said))
    return rows


def _output(walk: Walk, whole: Pair | None, asked: Bound | None) -> LayerParity | None:
    """The row of the models' outputs; there is none where they return no tensor."""
    seen = walk.output.result()
    if seen is None:
        return None
    bounds = [walk.layers[name].bound for name in walk.order]
    if whole is not None:
        bounds.append(walk.bound_of(whole))
    bound = asked or bound_for_output(bounds)
    words = "none: different formats" if bound is None else bound.words
    return LayerParity(OUTPUT, "", "", "", words, None, seen, _verdict(seen, bound))


def _kernel_notes(sides: list[Runtime]) -> list[str]:
    ours, theirs = (side.kernels for side in sides)
    return [] if ours == theirs else [f"kernels: the reference ran on {ours}, the artefact on {theirs}"]


def _left_out(walk: Walk) -> list[str]:
    """Sentences on the common layers that were not compared, and on those that networks hide."""
    notes = []
    idle = {name: layer.pair for name, layer in walk.layers.items() if name not in walk.order}
    hidden = _hidden(walk)
    for owner in dict.fromkeys(pair.reference.inside for pair in hidden.values()):
        count = sum(pair.reference.inside == owner for pair in hidden.values())
        notes.append(
            f"{count} layers run inside a network of the reference, where their images exist as codes only: compared "
            f"by what they store, and at the output of {owner or MODEL}"
        )
    never = [name for name in idle if name not in hidden and not idle[name].is_group]
    if never:
        shown = ", ".join(never[:5]) + (f" and {len(never) - 5} more" if len(never) > 5 else "")
        notes.append(f"not called by the reference on this data, so not compared: {shown}")
    return notes
