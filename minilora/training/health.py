"""Catch adapters that silently learn nothing, in the first steps of a run."""

from collections.abc import Iterator

from torch import Tensor, nn

from minilora.lora import LoRALayer, Survey, lora_layers

PATIENCE = 5  # of a layer's own steps


class Health:
    """Watch the factors of every trainable layer until each has had a gradient and moved.

    A layer's own steps are those in which it was called with tokens, so a layer that rests now
    and then (an expert, LayerDrop) is judged by these alone. In each of them:

    - Both factors have a gradient.
    - It is not 0, once the other factor is not 0 (of a fresh adapter, `lora_B` in its first step
      and `lora_A` in its second). A batch may have nothing for a layer to learn (softmax over one
      key), so this is an error in the fifth such step in a row, or when it holds for all layers.
      A resumed run may have learned its data to the last bit, so there it is none.
    - A factor that began at 0 has left it four updates after its first gradient.

    A layer that saw no token is reported, not failed, and so is a trained copy of a parameter
    (`bias=`, `modules_to_save=`) that had no gradient.
    """

    def __init__(self, model: nn.Module, resumed: bool = False):
        self.resumed, self.first = resumed, True
        self.layers = {
            name: layer
            for name, layer in lora_layers(model).items()
            if any(p.requires_grad for n in layer.active for p in layer.adapters[n].parameters())
        }
        survey = Survey(model)
        self.copies = {
            name: one
            for adapter in survey.in_place
            for name, one in survey.copies_of(adapter).items()
            if one.requires_grad
        }
        self.zeros: dict[str, int] = {}  # own steps in which a factor's gradient was 0
        self.alive: dict[str, int] = {}  # own steps since a factor's first gradient

    def begin(self) -> None:
        """Forget which layers were called: a step begins."""
        for layer in self.layers.values():
            layer.begin_step()

    def check(self) -> list[str]:
        """Check after the backward pass of a step, before the update; return remarks.

        Raises:
            RuntimeError: a factor without a gradient, or one that does not move.
        """
        # A compiled layer does not note its path, but its factors have gradients.
        called = {
            name: layer
            for name, layer in self.layers.items()
            if layer.last_path or any(p.grad is not None for p in layer.adapters.parameters())
        }
        zero, learning = [], False
        for name, layer in called.items():
            for what, factor, other in _factors(name, layer):
                if factor.grad is None:
                    raise _no_gradient(what, "none at all")
                if what in self.alive or _any(factor.grad):
                    learning = True
                    self._follow(what, factor)
                elif _any(other) and not self.resumed:
                    zero.append(what)
                    self.zeros[what] = self.zeros.get(what, 0) + 1
                    if self.zeros[what] == PATIENCE:
                        raise _no_gradient(what, f"only zeros in {PATIENCE} steps")
        if zero and not learning:
            raise _no_gradient(zero[0], "only zeros, as all others did")
        unseen = {n: m for n, m in self.layers.items() if self.first and n not in called}
        still = [n for n, one in self.copies.items() if self.first and one.grad is None]
        self.first = False
        self.layers = {  # go on with those that have not shown all of it
            name: layer
            for name, layer in self.layers.items()
            if any(self.alive.get(what, 0) < PATIENCE for what, _, _ in _factors(name, layer))
        }
        used = [name for name, layer in unseen.items() if layer.weight_read]
        idle = [name for name in unseen if name not in used]
        remarks = []
        if used:
            remarks.append(
                f"{len(used)} adapted layers do nothing, because the model uses their weight "
                f"without calling them (first: {used[0]}); leave them out with exclude="
            )
        if idle:
            remarks.append(
                f"{len(idle)} adapted layers saw no token (first: {idle[0]}) in the first step"
            )
        if still:
            remarks.append(
                f"{len(still)} trained copies had no gradient (first: {still[0]}) in the first step"
            )
        return remarks

    def _follow(self, what: str, factor: Tensor) -> None:
        """Count a factor's steps since its first gradient, and see that it does not stay 0."""
        steps = self.alive[what] = self.alive.get(what, 0) + 1
        if steps == PATIENCE and not _any(factor):
            raise RuntimeError(
                f"{what} must move as it is trained, but after {steps - 1} steps it is still 0; "
                f"is the optimizer given this parameter, and its learning rate above 0?"
            )


def _any(tensor: Tensor) -> bool:
    """Return whether anything is not 0, over all shards of a sharded tensor."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return bool(whole.any())


def _no_gradient(what: str, found: str) -> RuntimeError:
    return RuntimeError(
        f"every adapted layer must get a gradient, but {what} got {found}; something cuts the "
        f"graph – a torch.no_grad() or .detach() in the model, or activation checkpointing whose "
        f"inputs need no gradient (use_reentrant=True) – or the data has nothing for this layer to "
        f"learn, and it should be excluded"
    )


def _factors(name: str, layer: LoRALayer) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield what to call a trained factor, the factor, and the one it is multiplied with."""
    for adapter in layer.active:
        factors = layer.adapters[adapter]
        A, B = factors.lora_A, factors.lora_B
        for which, factor, other in (("lora_A", A, B), ("lora_B", B, A)):
            if factor.requires_grad:
                yield f"{name} ({which} of {adapter})", factor, other
