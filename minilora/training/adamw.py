"""The optimizer of a run, and what of it is kept on the disk."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minilora.training.config import TrainConfig

ADAM = ("step", "exp_avg", "exp_avg_sq")


class AdamW(torch.optim.AdamW):
    """AdamW whose parameters narrower than float32 are the roundings of copies in float32.

    In bfloat16 an update below 1/256 of a value would be rounded away: a norm's weights, trained by
    `bias=` or `modules_to_save=`, would stay where they are. Micikevicius et al. 2018, "Mixed
    precision training", section 3.1. Each group's `ratio` multiplies the learning rate.
    """

    def __init__(self, names: dict[Tensor, str], config: TrainConfig):
        self.wide = {p: nn.Parameter(p.detach().float()) for p in names if is_narrow(p)}
        self.names = {self.wide.get(p, p): name for p, name in names.items()}
        fast = [p for p, name in self.names.items() if name.endswith(".lora_B")]
        rest = [p for p, name in self.names.items() if not name.endswith(".lora_B")]
        groups: list[dict[str, Any]] = [
            {"params": rest, "ratio": 1.0},
            {"params": fast, "ratio": config.lora_plus_ratio},
        ]
        # One pass over each parameter instead of ten; not for sharded ones (tensor subclasses).
        fused = all(type(p) is nn.Parameter and p.device.type in ("cpu", "cuda") for p in names)
        super().__init__(
            [group for group in groups if group["params"]],
            fused=fused,
            betas=tuple(config.betas),  # type: ignore[arg-type]
            eps=config.eps,
            weight_decay=config.weight_decay,
        )

    def step(self, closure: Any = None) -> Any:
        """Update the parameters by their gradients; the loss is what `closure` returns."""
        for narrow, wide in self.wide.items():
            wide.grad = None if narrow.grad is None else narrow.grad.to(wide.dtype)
        loss = super().step(closure)
        with torch.no_grad():
            for narrow, wide in self.wide.items():
                narrow.copy_(wide)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        super().zero_grad(set_to_none)
        for narrow in self.wide:
            narrow.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return what it keeps of each parameter as `optimizer.<key>.<parameter's name>`."""
        kept = {
            f"optimizer.{key}.{self.names[parameter]}": value
            for parameter, state in self.state.items()
            for key, value in state.items()
        }
        return kept | {f"optimizer.wide.{self.names[p]}": p.detach() for p in self.wide.values()}

    def restore(self, tensors: dict[str, Tensor], like: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Put back what `tensors` returned; `like` lays a value out as a parameter is."""
        # Fused kernels read the step on the parameter's device; the others on the processor.
        fused = self.defaults["fused"]
        with torch.no_grad():
            for wide in self.wide.values():
                wide.copy_(like(wide, tensors[f"optimizer.wide.{self.names[wide]}"]))
        for parameter, name in self.names.items():
            if f"optimizer.step.{name}" in tensors:
                step, *moments = (tensors[f"optimizer.{key}.{name}"] for key in ADAM)
                step = step.to(parameter.device if fused else "cpu", copy=True)
                kept = [step, *(like(parameter, moment) for moment in moments)]
                self.state[parameter] = dict(zip(ADAM, kept, strict=True))


def is_narrow(parameter: Tensor) -> bool:
    """Return whether a parameter is trained by a copy in float32."""
    return parameter.dtype.itemsize < 4
