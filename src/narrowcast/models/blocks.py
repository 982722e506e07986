"""The blocks of a model, found without tracing: parts that run one after another, each once per forward pass.

Candidates come from the module tree: the members of the outermost `ModuleList` or `Sequential` that repeats parts
(transformer layers, residual blocks), modules of one class side by side that hold no such container, and every
quantizable layer that stands outside of these as a block of its own (embeddings, stems, downsampling, heads). One
forward pass then says in which order they run, and how the inputs of each follow from the block before it, also
through functions in between, see `glue.py`. Where they do not, because earlier blocks or the model's inputs have a
part in them, the model has to be run up to the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from narrowcast.models.glue import Glue, GlueRecorder
from narrowcast.models.modules import get_module

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Link:
    """How the inputs of a block follow from the block before it.

    Args:
        spec: structure of (args, kwargs).
        sources: for each leaf ("output", i) or ("input", i), the i-th leaf of what the block before gave or got, or
            ("glue", i), a slot of what is computed in between, or ("value", x), the same at every call.
        glue: what is computed in between.
    """

    spec: pytree.TreeSpec
    sources: tuple[tuple[str, Any], ...]
    glue: Glue | None = None

    def follow(self, before: tuple[Any, Any], output: Any) -> tuple[Any, Any] | None:
        """(args, kwargs) of the block, from those of the block before and what that gave.

        None where these have other shapes than those that the glue was recorded with.
        """
        leaves: dict[str, Any] = {"output": pytree.tree_leaves(output), "input": pytree.tree_leaves(before)}
        if self.glue is not None:
            known = [*leaves["input"], *leaves["output"]]
            if not self.glue.fits(known):
                return None
            leaves["glue"] = self.glue.replay(known)
        found = [what if kind == "value" else leaves[kind][what] for kind, what in self.sources]
        args, kwargs = pytree.tree_unflatten(found, self.spec)
        return tuple(args), dict(kwargs)


@dataclass(frozen=True)
class ModelBlock:
    """A part of a model that is quantized as one.

    Args:
        path: of the module; "" is the whole model.
        layers: paths of the quantizable modules in it, in the order of their first call.
        link: how its inputs follow from the block before; None where the model must be run up to it.
        row_bytes: bytes of its inputs and outputs per row of the model's input, measured on the first batch.
    """

    path: str
    layers: tuple[str, ...]
    link: Link | None = None
    row_bytes: float = 0.0


@dataclass(frozen=True)
class Blocks:
    """What was found.

    Args:
        blocks: in the order in which they run.
        loose: paths of quantizable modules in no block: called more than once, or never.
        notes: what the user should know.
    """

    blocks: tuple[ModelBlock, ...] = ()
    loose: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def find_blocks(model: nn.Module, wanted: Iterable[str], run: Callable[[], Any]) -> Blocks:
    """The blocks that hold the wanted modules. Changes nothing.

    Args:
        model: in evaluation mode.
        wanted: paths of the quantizable modules.
        run: runs the model on the first batch; only the first forward pass of it is looked at.

    Returns:
        Blocks in the order in which they run. One block, the whole model, where no order can be established.
    """
    paths = tuple(wanted)
    candidates = {path: _inside(path, paths) for path in _candidates("", model, paths, inside=False)}
    seen = _watch(model, candidates, run)
    if problem := seen.problem(candidates):
        order = [path for path in seen.order if path in paths]
        rest = tuple(path for path in paths if path not in order)
        note = f"no order of blocks could be established ({problem}): the whole model is one block"
        return Blocks((ModelBlock("", tuple(order), None, seen.bytes_of(("",))),), rest, (note,))
    blocks = []
    for path in seen.entered:
        layers = tuple(layer for layer in seen.order if layer in candidates[path])
        layers += tuple(layer for layer in candidates[path] if layer not in layers)
        blocks.append(ModelBlock(path, layers, seen.links[path], seen.bytes_of((path,))))
    once = [block for block in blocks if seen.calls[block.path] == 1]
    found = {path for block in once for path in block.layers}
    loose = tuple(path for path in paths if path not in found)
    if len(once) < len(blocks):  # a link past a block that is none of its own does not hold
        once = [_unlinked(block) if block.link else block for block in once]
    return Blocks(tuple(once), loose, _loose_notes(loose, seen))


def _unlinked(block: ModelBlock) -> ModelBlock:
    return ModelBlock(block.path, block.layers, None, block.row_bytes)


def _loose_notes(loose: tuple[str, ...], seen: _Seen) -> tuple[str, ...]:
    often = [path for path in loose if seen.calls.get(path, 0) > 1]
    if not often:
        return ()
    return (f"called more than once per pass and so quantized last, together: {', '.join(often[:8])}",)


def _inside(path: str, wanted: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in wanted if name == path or path == "" or name.startswith(path + "."))


def _candidates(path: str, module: nn.Module, wanted: tuple[str, ...], *, inside: bool) -> list[str]:
    """Paths of the parts that may be blocks; `inside` a container that repeats parts, the first module is one."""
    if path in wanted:
        return [path]
    names = {child: (f"{path}.{name}" if path else name) for name, child in module.named_children()}
    children = [(name, child) for child, name in names.items() if _inside(name, wanted)]
    if not isinstance(module, _CONTAINERS):
        if inside:
            return [path]
        return _of_children(children, wanted)
    single = all(len(_inside(name, wanted)) == 1 for name, _ in children)
    if inside and single and type(module) is nn.Sequential and len(children) > 1:
        return [path]  # the depthwise and the pointwise convolution of one MobileNet block
    repeats = inside or len(children) > 1
    return [found for name, child in children for found in _candidates(name, child, wanted, inside=repeats)]


def _of_children(children: list[tuple[str, nn.Module]], wanted: tuple[str, ...]) -> list[str]:
    """Of modules side by side, those of a class that occurs again are parts that repeat, as in a list."""
    classes = [type(child) for _, child in children]
    found: list[str] = []
    for name, child in children:
        inner = _candidates(name, child, wanted, inside=False)
        layers = _inside(name, wanted)
        is_part = name not in wanted and classes.count(type(child)) > 1 and set(inner) == set(layers)
        found += [name] if is_part and len(layers) > 1 else inner
    return found


@dataclass
class _Seen:
    """What one forward pass showed.

    Args:
        entered: candidates in the order of their first call.
        order: quantizable modules in the order of their first call.
        calls: how often each candidate and each quantizable module ran.
        links: path of a candidate -> how its inputs follow from the one before.
        sizes: path -> bytes of inputs and outputs.
        strays: quantizable modules that ran while their block did not.
        rows: of the model's input.
        passes: forward passes of the model itself.
    """

    entered: list[str] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    links: dict[str, Link | None] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)
    rows: int = 1
    passes: int = 0

    def problem(self, candidates: dict[str, tuple[str, ...]]) -> str:
        """Why these candidates are not blocks; "" when they are."""
        if not self.passes:
            return "the data runs parts of the model and never its forward"
        if self.strays:
            return f"{self.strays[0]} runs outside of the part that it belongs to"
        for path, layers in candidates.items():
            if path not in layers and self.calls.get(path, 0) > 1:
                return f"{path} runs {self.calls[path]} times in one pass"
        if not self.entered:
            return "no layer ran"
        return ""

    def bytes_of(self, paths: Iterable[str]) -> float:
        """Bytes of inputs and outputs per row."""
        return max((self.sizes.get(path, 0) for path in paths), default=0) / max(self.rows, 1)


class _Watch:
    """Hooks of one pass."""

    def __init__(self, recorder: GlueRecorder) -> None:
        self.seen = _Seen()
        self.recorder = recorder
        self.active = False
        self.inside: list[str] = []
        self.before: tuple[list[tuple[Any, int]], list[tuple[Any, int]]] | None = None  # leaves with versions
        self.inputs: list[tuple[Any, int]] = []

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's own forward begins."""
        self.active = self.seen.passes == 0
        self.seen.passes += 1
        if self.active:
            first = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if _is_shaped(leaf)), None)
            self.seen.rows = 1 if first is None else int(first.shape[0])
            self.seen.sizes[""] = _bytes((args, kwargs))

    def end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The model's own forward ends; later passes are not looked at."""
        self.active = False
        self.recorder.stop()

    def enter(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A candidate begins."""
        if not self.active:
            return
        if path not in self.seen.calls:
            self.seen.entered.append(path)
            self.seen.links[path] = self._link((args, kwargs))
        self.recorder.stop()
        self.seen.calls[path] = self.seen.calls.get(path, 0) + 1
        self.inside.append(path)
        self.inputs = _leaves((args, kwargs))
        self.seen.sizes[path] = self.seen.sizes.get(path, 0) + _bytes((args, kwargs))

    def leave(self, path: str, output: Any) -> None:
        """A candidate ends."""
        if not self.active:
            return
        self.inside.pop()
        self.before = (self.inputs, _leaves(output))
        self.recorder.begin([leaf for part in self.before for leaf, _ in part])
        self.seen.sizes[path] += _bytes(output)

    def layer(self, path: str, owner: str) -> None:
        """A quantizable module begins."""
        if not self.active:
            return
        if path not in self.seen.order:
            self.seen.order.append(path)
        if path != owner:
            self.seen.calls[path] = self.seen.calls.get(path, 0) + 1
            if owner not in self.inside:
                self.seen.strays.append(path)

    def _link(self, inputs: tuple[Any, Any]) -> Link | None:
        if self.before is None:
            return None
        leaves, spec = pytree.tree_flatten(inputs)
        sources: list[tuple[str, Any]] = []
        computed: dict[int, Tensor] = {}
        for leaf in leaves:
            source = _source(leaf, *self.before)
            if source is None and (slot := self.recorder.slot(leaf)) is not None:
                source = "glue", slot
                computed[slot] = leaf
            if source is None:
                return None
            sources.append(source)
        if all(kind == "value" for kind, _ in sources):
            return None  # it comes from somewhere else
        glue = self.recorder.glue(computed) if computed else None
        return Link(spec, tuple(sources), glue) if glue is not None or not computed else None


def _source(leaf: Any, inputs: list[tuple[Any, int]], outputs: list[tuple[Any, int]]) -> tuple[str, Any] | None:
    """Where a leaf comes from; None where that is not known. A tensor written to in between is another tensor."""
    if leaf is None or isinstance(leaf, bool | str):
        return "value", leaf
    for kind, known in (("output", outputs), ("input", inputs)):
        for index, (other, version) in enumerate(known):
            if leaf is other and (not isinstance(leaf, Tensor) or leaf._version == version):
                return kind, index
    return None


def _leaves(values: Any) -> list[tuple[Any, int]]:
    return [(leaf, leaf._version if isinstance(leaf, Tensor) else 0) for leaf in pytree.tree_leaves(values)]


def _bytes(values: Any) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor))


def _is_shaped(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def _watch(model: nn.Module, candidates: dict[str, tuple[str, ...]], run: Callable[[], Any]) -> _Seen:
    recorder = GlueRecorder(model, [get_module(model, path) for path in candidates])
    watch = _Watch(recorder)
    handles = [model.register_forward_pre_hook(watch.start, with_kwargs=True, prepend=True)]
    for path, layers in candidates.items():
        module = get_module(model, path)
        handles.append(
            module.register_forward_pre_hook(lambda m, a, k, path=path: watch.enter(path, a, k), with_kwargs=True)
        )
        handles.append(module.register_forward_hook(lambda m, a, o, path=path: watch.leave(path, o)))
        for layer in layers:
            part = get_module(model, layer)
            handles.append(part.register_forward_pre_hook(lambda m, a, p=layer, o=path: watch.layer(p, o)))
    handles.append(model.register_forward_hook(watch.end))
    try:
        with recorder:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return watch.seen
