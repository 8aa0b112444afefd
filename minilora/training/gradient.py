"""The gradient of one optimizer step, over as many passes as the memory needs."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data import Batch
from minilora.files import one_line
from minilora.kernels import out_of_memory, row_masks
from minilora.lora import LoRALayer
from minilora.models import CausalLM
from minilora.planning import pass_rows, usual_pass_tokens
from minilora.running import shares_prefix
from minilora.training.run import Run

# What else makes one row fit, by where the memory is.
_ROOM = {
    "cpu": "load the base in a narrower dtype",
    "cuda": "store the base in fewer bits (quantize='nf4', --quantize nf4), or end what else uses "
    "this GPU (nvidia-smi lists it)",
    "mps": "store the base in fewer bits (quantize='nf4', --quantize nf4)",
}

# Torch's words; the second are of its check of cuBLAS' workspace, which older versions have.
_UNORDERED = ("does not have a deterministic implementation", "Deterministic behavior was enabled")


def mix_seed(seed: int, step: int, index: int) -> int:
    """Spread (seed, step, micro-batch or row) over 63 bits, so that neighbours share no stream."""
    value = seed
    for part in (step, index):
        value = (value * 6364136223846793005 + part + 1442695040888963407) % 2**63
    return value


class Gradient:
    """Accumulate the gradient of `Σ loss / Σ tokens` over the micro-batches of a step.

    A micro-batch of more tokens than a pass may have is computed in several. A pass that does not
    fit in memory is split in halves, down to one row, and the split is remembered. The gradient
    stays the same: sums are divided once, at the end, and dropout's masks depend on (seed, step,
    row), but for those of `_masks_by_batch`. `run.limit` says before a pass whether it will fit;
    without one the pass itself shows.
    """

    def __init__(
        self, run: Run, autocast: Callable[[], AbstractContextManager], say: Callable[[str], None]
    ):
        self.run, self.autocast, self.say = run, autocast, say
        self.pass_tokens = pass_tokens(run)
        self.shares = not run.own_loss and shares_prefix(run.model)
        self.strict = run.ranks.parallel != "fsdp"  # a pass that fails there can't be repeated

    def of(self, micro: Sequence[Batch]) -> tuple[float, float, int]:
        """Return loss per token, gradient norm and tokens; gradients are left on the parameters.

        A loss over pairs of answers counts pairs where others count tokens.
        """
        run = self.run
        run.optimizer.zero_grad(set_to_none=True)
        if run.preference is not None:
            with self.autocast():
                rows = min(filter(None, map(self._rows, micro)), default=0)
                run.preference.prepare(
                    run.model, micro, rows, run.ranks.merge, run.ranks.all_reduce
                )
        value, tokens = 0.0, 0
        for index, batch in enumerate(micro):
            part, count = self._micro(batch, index)
            value += part
            tokens += count
        run.ranks.reduce_gradients()
        value, tokens = run.ranks.all_reduce(value, tokens)  # type: ignore[assignment]
        tokens, run.rows_of_all = int(tokens), run.ranks.all_gather(run.rows)
        if tokens == 0:
            return math.nan, math.nan, 0
        gradients = [p.grad for p in run.names if p.grad is not None]
        # Once at the end: only now is the step's number of tokens known. The ranks' mean.
        if gradients:
            torch._foreach_div_(gradients, tokens * run.scale.value / run.ranks.world_size)
        norm: Any = torch.nn.utils.get_total_norm(gradients)
        return value / tokens, float(run.ranks.full(norm)), tokens

    def _micro(self, batch: Batch, index: int) -> tuple[float, int]:
        """Add one micro-batch's gradient, in parts that fit; return the sums of loss and tokens."""
        run, limit = self.run, self.run.limit
        size = self._rows(batch)
        if limit is not None and size:
            while size > 1 and not limit.fits(batch.rows(0, size)):
                size = self._smaller(batch, size, f"would take more than {limit.gigabytes:g} GB")
            if size == 1:
                limit.check_row(batch.input_ids.shape[1], batch.documents is not None)
        if size == 0:  # this rank has no row of it, but must take part in the collectives
            return (0.0, 0) if run.ranks.parallel != "fsdp" else self._idle(index)
        while True:
            held = {p: p.grad for p in run.names if p.grad is not None}
            # One operation for all, which keeps every bit.
            copies = torch._foreach_mul(list(held.values()), 1) if held else ()
            kept = dict(zip(held, copies, strict=True))
            told = len(run.preference.seen) if run.preference is not None else 0
            strict = self.strict
            sums = self._parts(batch, size, index)
            if sums is not None:
                return sums
            # Here the error and, with it, the graph of the failed pass are gone.
            if run.device.type == "cuda":
                torch.cuda.empty_cache()
            for parameter in run.names:
                parameter.grad = kept.get(parameter)
            if run.preference is not None:
                del run.preference.seen[told:]
            if self.strict != strict:
                continue
            if size == 1:
                raise RuntimeError(
                    f"one row of {batch.input_ids.shape[1]} tokens must fit in memory, and on "
                    f"{run.device} it does not; cut examples (--max-length), pass --checkpointing "
                    f"(in Python: checkpointing=True), or "
                    f"{_ROOM.get(run.device.type, _ROOM['mps'])}"
                )
            size = self._smaller(batch, size, "did not fit in memory")

    def _rows(self, batch: Batch) -> int:
        """Return how many of the rows a pass has at most, as far as is known before it runs."""
        run, tokens = self.run, batch.input_ids.shape[1]
        if run.preference is not None:
            tokens *= run.preference.rows_per_pair(run.model, batch)
        shared = batch.shared if self.shares else 0
        return min(run.rows or len(batch), pass_rows(len(batch), tokens, self.pass_tokens, shared))

    def _smaller(self, batch: Batch, size: int, why: str) -> int:
        """Halve the passes from here on, and say so."""
        tried = f"a micro-batch of {size}" if size == len(batch) else f"a pass of {size}"
        size = self.run.rows = math.ceil(size / 2)
        masks = _masks_by_batch(self.run.model)
        but = f" but for the masks of {' and '.join(masks)}" if masks else ""
        self.say(
            f"{tried} rows {why}: from here on in passes of {size}, with the same gradient{but}"
        )
        return size

    def _parts(self, batch: Batch, size: int, index: int) -> tuple[float, int] | None:
        """Run forward and backward in parts; return None if it must be done in another way."""
        value, tokens = 0.0, 0
        try:
            number = math.ceil(len(batch) / size)
            cuts = [len(batch) * i // number for i in range(number + 1)]
            for start, stop in itertools.pairwise(cuts):
                part = batch.rows(start, stop)
                if part.tokens or self.run.own_loss:  # the mean over no token has no meaning
                    total, count = self._pass(part, index, start)
                    value += total
                    tokens += count
        except RuntimeError as error:
            if self.strict and any(text in str(error) for text in _UNORDERED):
                self.strict = False
                self.say(f"a run repeated may differ in the last bits: {one_line(error, 120)}")
            elif out_of_memory(error) is None or self.run.ranks.parallel == "fsdp":
                raise
            return None
        return value, tokens

    def _pass(self, batch: Batch, index: int, start: int) -> tuple[float, int]:
        run, seed = self.run, self.run.config.seed
        # Dropout depends on where in the run we are, not on what ran before: so a resumed run draws
        # the same masks. On every rank and in every part a row has the number it has in the step.
        first, ranks = index * run.config.batch_size, run.ranks
        rows = [first + ranks.rank + ranks.world_size * (start + i) for i in range(len(batch))]
        seeds = [mix_seed(seed + 1, run.step, row) for row in rows]
        if run.preference is not None and run.preference.rows_per_pair(run.model, batch) == 2:
            seeds = [mix_seed(one, run.step, answer) for one in seeds for answer in (1, 2)]
        torch.manual_seed(mix_seed(seed, run.step, index))
        with row_masks(seeds), _strictly(self.strict):
            with self.autocast():
                total, count = _checked(run.loss(run.model, batch))
            (total * run.scale.value).backward()
        return float(total.detach()), count

    def _idle(self, index: int) -> tuple[float, int]:
        """Take part in a pass of the other ranks without adding to it."""
        batch = self.run.batches.any_batch().to(self.run.device)
        torch.manual_seed(mix_seed(self.run.config.seed, self.run.step, index))
        with self.autocast():
            total, _ = _checked(self.run.loss(self.run.model, batch))
        (total * 0).backward()
        return 0.0, 0


@contextmanager
def _strictly(wanted: bool) -> Iterator[None]:
    """Where torch only warns of what adds up in no fixed order, let it raise instead.

    For attention's backward pass on CUDA that is more than a warning: it has an order, and takes it
    only here.
    """
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if not (wanted and warns and torch.are_deterministic_algorithms_enabled()):
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


def pass_tokens(run: Run) -> int | None:
    """Return how many tokens a pass of the run has at most, None for any number."""
    config, model = run.config, run.model
    if config.pass_tokens is not None:
        return config.pass_tokens
    mixing = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    foreign = run.own_loss or not isinstance(model, CausalLM) or mixing or _masks_by_batch(model)
    return usual_pass_tokens(run.device.type != "cpu", run.ranks.parallel, bool(foreign))


def _masks_by_batch(model: nn.Module) -> list[str]:
    """Name the dropout whose masks follow the batch and not the row.

    Our models' head reads the learned tokens of all rows, chunk by chunk.
    """
    dropouts = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
    own = any(isinstance(module, dropouts) and module.p > 0 for module in model.modules())
    found = ["the model's own dropout"] if own else []
    head = model.lm_head if isinstance(model, CausalLM) else None
    if isinstance(head, LoRALayer) and any(head.adapters[name].dropout for name in head.active):
        found.append("dropout on the head")
    return found


def _checked(result: Any) -> tuple[Tensor, int]:
    """Check what a loss returned."""
    good = isinstance(result, tuple) and len(result) == 2
    total, count = result if good else (result, None)
    if isinstance(count, Tensor) and count.numel() == 1 and not count.is_floating_point():
        count = int(count)
    good = good and isinstance(total, Tensor) and total.numel() == 1
    if not good or not isinstance(count, int) or isinstance(count, bool) or count < 0:
        found = tuple(type(x).__name__ for x in result) if isinstance(result, tuple) else result
        raise TypeError(
            f"loss must return (sum over tokens, tokens): a tensor of one element and a whole "
            f"number of at least 0, found {found!r:.80}"
        )
    if not total.requires_grad:
        raise RuntimeError(
            "the loss must carry a gradient to the adapter, found a tensor that requires none; is "
            "fit or the model run under torch.no_grad(), is its output detached, or does no input "
            "reach an adapted layer?"
        )
    return total, count
