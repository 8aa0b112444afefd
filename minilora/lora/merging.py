"""Merging adapters into base weights, and taking that back to the very bits."""

import copy
import shutil
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.files import read_tensors, tensor_content, write
from minilora.lora.base import base_of
from minilora.lora.layer import LoRALayer
from minilora.lora.mergeable import changed, check_mergeable, merged_tensors
from minilora.lora.modes import inference, require_free
from minilora.lora.routes import Merged
from minilora.lora.samples import is_read, marked_as, weight_sample
from minilora.lora.survey import Survey
from minilora.quantization import QuantizedLinear


class DiskCopy:
    """Original weights in one safetensors file that goes when the last user of it goes."""

    def __init__(self, tensors: dict[str, Tensor]):
        folder = tempfile.mkdtemp(prefix="minilora-merge-")
        self.file = Path(folder) / "originals.safetensors"
        self._finalizer = weakref.finalize(self, shutil.rmtree, folder, True)
        write(self.file, tensor_content(tensors, {}, sums=False))

    def read(self) -> dict[str, Tensor]:
        """Return the tensors by the names they were given."""
        return read_tensors(self.file)[0]

    def __deepcopy__(self, memo: dict) -> "DiskCopy":
        return self  # a copied model reads the same file; it stays until both are gone

    def __reduce__(self):
        return DiskCopy, (self.read(),)  # a pickle outlives the file, so it holds it


class Kept:
    """What `unmerge` puts back on a layer: the base, and those parameters that were replaced.

    A parameter on the disk is its name in the file.
    """

    def __init__(self, base: Any):
        self.base = base
        self.parameters: dict[str, Any] = {}
        self.disk: DiskCopy | None = None

    def tensors(self) -> list[Tensor]:
        """Return what is kept in memory, and what the base still has."""
        held = [*self.parameters.values(), *self.base.parameters(recurse=False)]
        return [tensor for tensor in held if isinstance(tensor, Tensor)]

    def leave_to(self, disk: DiskCopy, name: str, apart: set[tuple[str, str]]) -> None:
        """Keep the values in the file alone, except parameters shared with other modules."""
        self.disk = disk
        if not self.parameters:  # the whole base
            self.parameters = {k: p for k, p in self.base._parameters.items() if p is not None}
            self.base._parameters.update(dict.fromkeys(self.parameters))
        for key in self.parameters:
            if (name, key) not in apart:
                self.parameters[key] = f"{name}.{key}"

    def restored(self, merged: nn.Module, files: dict[Path, dict[str, Tensor]]) -> nn.Module:
        """Return the base as it was, but for casts, moves and the mode of the merged one."""
        if self.disk is not None and self.disk.file not in files:
            files[self.disk.file] = self.disk.read()
        for key, kept in self.parameters.items():
            held = kept
            if self.disk is not None and isinstance(kept, str):
                held = nn.Parameter(files[self.disk.file][kept], requires_grad=False)
            here = self.base._parameters[key]
            if here is not None:
                held.data = held.data.to(here)
                marked_as(is_read(here), held)
            self.base._parameters[key] = held
        if self.base is not merged:
            now = base_of(merged)
            self.base.to(now.device)
            if now.dtype != base_of(self.base).dtype:
                self.base.to(now.dtype)
            self.base.train(merged.training)
        return self.base


MODES = ("dequantize", "requantize")


@dataclass(frozen=True)
class MergedLayer:
    """How far the stored weight is from W + ΔW: relative to it, and in units of ‖ΔW‖."""

    name: str
    relative: float
    of_delta: float


@dataclass(frozen=True)
class MergeReport:
    """What quantizing merged weights again cost, worst layer first.

    `outputs` is the relative RMS difference of the model's outputs on `sample`, or None.
    """

    layers: tuple[MergedLayer, ...]
    outputs: float | None = None

    def __str__(self) -> str:
        lines = [
            f"{x.name}: {x.relative:.2%} of the weight, {x.of_delta:.2f} times the adapter's part"
            for x in self.layers[:5]
        ]
        if len(self.layers) > 5:
            lines.append(f"... and {len(self.layers) - 5} layers with less")
        outputs = "not measured (pass sample=)" if self.outputs is None else f"{self.outputs:.2%}"
        return "\n".join([*lines, f"outputs differ by: {outputs}"])


def _new_base(base: QuantizedLinear, merged: dict[str, Tensor], mode: str | None) -> nn.Module:
    """Return what stands in a quantized layer's place: plain, or of the same format again."""
    bias = merged.get("bias", base.bias)
    if mode == "requantize" and torch.equal(merged["weight"], base.dequantize(torch.float32)):
        again = copy.deepcopy(base)  # nothing was added: nothing is rounded anew
        again.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        return again
    if mode != "requantize":
        module: Any = base.plain_module(merged["weight"].to(base.dtype))
        if "bias" in merged:
            module.bias = nn.Parameter(merged["bias"], requires_grad=False)
        return module
    again = QuantizedLinear.from_weight(merged["weight"], base.spec, bias=bias, plain=base.plain)
    again._dtype = base.dtype
    return again.train(base.training)


def _requantized_error(name: str, layer: LoRALayer, names: tuple[str, ...]) -> MergedLayer:
    before = layer.base.dequantize(torch.float32)
    wanted = merged_tensors(layer, names)["weight"]
    if torch.equal(before, wanted):
        return MergedLayer(name, 0.0, 0.0)
    stored = QuantizedLinear.from_weight(wanted, layer.base.spec).dequantize(torch.float32)
    error, delta = float((stored - wanted).norm()), float((wanted - before).norm())
    return MergedLayer(name, error / max(float(wanted.norm()), 1e-30), error / max(delta, 1e-30))


def merge(
    model: nn.Module,
    adapters: str | Sequence[str] | None = None,
    *,
    keep: str | bool | None = "memory",
    untie: bool = False,
    mode: str | None = None,
    tolerance: float | None = 1.0,
    sample: Tensor | None = None,
) -> MergeReport | None:
    """Add `scaling · B A` of adapters to the base weights, in place: no branch is left to compute.

    The sum is formed in f32 (f64 for f64 bases) and rounded once to the storage dtype. The
    adapters themselves stay as they are; `save` still writes them. A warning says so where rounding
    to a 16-bit dtype loses over half of what they add.

    Args:
        model: a model with adapters; changed in place.
        adapters: a name, several, or None for the active ones.
        keep: what makes `unmerge` possible: `"memory"` keeps the original weights beside the
            merged ones (as many bytes again), `"disk"` in a temporary file, None or False nowhere
            (`unmerge` then raises).
        untie: give a layer that shares its weight (a head tied to the embedding) a weight of its
            own for the merged values; `unmerge` ties them again. False refuses such a layer.
        mode: what becomes of a quantized base: `"dequantize"` a plain layer in the dtype it had
            before, or `"requantize"` the same format again, which rounds the sum anew. Both start
            from the rounded weights; to merge into the full-precision ones, load that model, load
            the adapter there and merge.
        tolerance: refuse `"requantize"` where in some layer the new rounding exceeds this many
            times what the adapter adds, ‖ΔW‖_F; None accepts any.
        sample: an input for `model(sample)`; with `"requantize"` the report then says how far the
            outputs moved.

    Returns:
        With `mode="requantize"` a `MergeReport` with the error per layer, else None.

    Raises:
        ValueError: unknown names, nothing to merge, a weight shared with another module, a base
            of another kind, a quantized base without `mode`, a rounding error above the
            tolerance, a result that is not finite; the model is unchanged.
        RuntimeError: adapters are merged already, or a block of `disabled` or `mixed` is open.
    """
    survey = Survey(model)
    layers = survey.require_layers("merge", unmerged=True)
    require_free(layers.values(), "merge()")
    keep = None if keep is False else keep
    if keep not in ("memory", "disk", None):
        raise ValueError(f"keep must be 'memory', 'disk' or None, found {keep!r}")
    names, plan = _plan(survey, adapters)
    chosen = {n: layers[n] for n in plan}
    quantized = {n: layer for n, layer in chosen.items() if layer.view.is_quantized}
    _check_mode(quantized, mode)
    _check_tolerance(tolerance)
    if mode != "requantize" and (sample is not None or tolerance != 1.0):
        raise ValueError(
            f"{'tolerance' if sample is None else 'sample'} measures what rounding anew costs, so "
            f"it goes with mode='requantize', found mode={mode!r}; leave it out"
        )
    before, own, read = survey.in_place, survey.originals, any(map(is_read, model.parameters()))
    survey.install(names)
    disk = outputs = None
    errors: list[MergedLayer] = []
    try:
        # What must stay the very parameter: weights that others read, and trained copies.
        apart = check_mergeable(survey, plan, untie, rounded=mode != "requantize")
        if mode == "requantize":
            errors = [_requantized_error(n, layer, plan[n]) for n, layer in quantized.items()]
            errors.sort(key=lambda x: -x.of_delta)
            _refuse_losses(errors, tolerance)
        if keep == "disk":
            disk = DiskCopy({
                f"{n}.{key}": layer.base._parameters[key]
                for n, layer in chosen.items() for key in _replaced(layer, plan[n])
                if (n, key) not in apart
            })  # fmt: skip
        if sample is not None and errors:
            with survey.switched():  # exactly what is merged adds to the output
                for name, layer in layers.items():
                    layer.activate(plan.get(name, ()))
                outputs = _outputs(model, sample)
            survey.install(names)
    except BaseException:
        survey.install(before)
        raise
    for name, layer in chosen.items():
        kept = Kept(layer.base)
        weight = own.get(f"{name}.weight", layer.view.values())
        route = Merged(plan[name], keep and kept, weight_sample(name, weight), layer.view.stored)
        _replace(layer, plan[name], mode, kept, read)
        if disk is not None:
            kept.leave_to(disk, name, apart)
        layer.enter(route)
    for name, layer in layers.items():
        if name not in chosen:  # the merged model is base + names: nothing else adds there either
            layer.enter(Merged(names, Kept(layer.base)))
    if not errors:
        return None
    if outputs is None or sample is None:
        return MergeReport(tuple(errors))
    moved = (_outputs(model, sample) - outputs).norm() / outputs.norm()
    return MergeReport(tuple(errors), float(moved))


def _plan(
    survey: Survey, adapters: str | Sequence[str] | None
) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Return the adapters to merge, in all and by layer."""
    if adapters is None:
        names = survey.active
        plan = {name: layer.active for name, layer in survey.layers.items()}
    else:
        names = survey.known(adapters, "merge")
        plan = {n: tuple(a for a in names if a in m.adapters) for n, m in survey.layers.items()}
    if not names:
        raise ValueError("merge() needs an adapter: none is active and none was named")
    survey.require_compatible(names)
    return names, {name: wanted for name, wanted in plan.items() if wanted}


def _check_mode(small: dict[str, LoRALayer], mode: object) -> None:
    if mode not in (None, *MODES):
        raise ValueError(f"mode must be one of {', '.join(MODES)} or None, found {mode!r}")
    if small and mode is None:
        raise ValueError(
            f"merging into a quantized base needs mode='dequantize' (plain layers) or 'requantize' "
            f"(the same format, rounded anew), found none ({next(iter(small))} and "
            f"{len(small) - 1} more are quantized); or save the adapter, load it on the "
            f"full-precision model and merge there"
        )
    if not small and mode is not None:
        raise ValueError("mode= is for quantized bases, found none; leave it out")


def _check_tolerance(tolerance: Any) -> None:
    number = isinstance(tolerance, (int, float)) and not isinstance(tolerance, bool)
    if tolerance is not None and not (number and tolerance > 0):
        raise ValueError(f"tolerance must be a number above 0 or None, found {tolerance!r}")


def _refuse_losses(errors: list[MergedLayer], tolerance: float | None) -> None:
    over = [x for x in errors if tolerance is not None and not x.of_delta <= tolerance]
    if over:
        raise ValueError(
            f"mode='requantize' must not lose more than tolerance={tolerance:g} times what the "
            f"adapter adds, found {over[0].of_delta:.2f} times in {over[0].name} ({len(over)} of "
            f"{len(errors)} layers are above); use mode='dequantize', or pass "
            f"tolerance=None to merge all the same"
        )


def _outputs(model: nn.Module, sample: Tensor) -> Tensor:
    with inference(model):
        found = model(sample)
    return getattr(found, "logits", found).double()


def _replaced(layer: LoRALayer, names: tuple[str, ...]) -> list[str]:
    """Return which of the base's parameters a merge replaces."""
    if not layer.view.is_quantized:
        return changed(layer, names)
    return [key for key, parameter in layer.base._parameters.items() if parameter is not None]


@torch.no_grad()
def _replace(
    layer: LoRALayer, names: tuple[str, ...], mode: str | None, kept: Kept, read: bool
) -> None:
    """Give the layer merged weights: new parameters, or a new base in a quantized one's place.

    `read` is whether that counts as read from a checkpoint.
    """
    merged = merged_tensors(layer, names)
    if layer.view.is_quantized:
        layer.base = _new_base(layer.base, merged, mode)
        for parameter in layer.base.parameters(recurse=False):
            marked_as(read, parameter)
        return
    for key, value in merged.items():
        before = kept.parameters[key] = layer.base._parameters[key]
        new = nn.Parameter(value, requires_grad=False)
        layer.base._parameters[key] = marked_as(is_read(before), new)


def unmerge(model: nn.Module) -> None:
    """Restore the base weights to the very bits they had before `merge`.

    Args:
        model: a merged model; changed in place.

    Raises:
        ValueError: a model without adapters.
        RuntimeError: nothing is merged, or `merge(keep=None)` kept no original.
    """
    layers = Survey(model).require_layers("unmerge")
    merged = {
        name: (layer, route)
        for name, layer in layers.items() for route in layer.routes() if isinstance(route, Merged)
    }  # fmt: skip
    if not merged:
        raise RuntimeError("unmerge() needs merged weights, found none; call minilora.merge first")
    lost = next((name for name, (_, route) in merged.items() if route.kept is None), None)
    if lost is not None:
        raise RuntimeError(
            f"unmerge() needs the original weights, but merge(keep=None) kept none (first: "
            f"{lost}); load the base again, or merge with keep='memory' or 'disk'"
        )
    files: dict[Path, dict[str, Tensor]] = {}
    for layer, route in merged.values():
        layer.base = route.kept.restored(layer.base, files)
        layer.leave(route)
    active = {name for layer in layers.values() for name in layer.active}
    survey = Survey(model)  # bases have been put back
    survey.install([name for name in survey.adapters if name in active])
