"""What decoder-only language models share: checks, the loop around the blocks, logits and loss.

B sequences, T new tokens, S tokens attended to (cached ones and the new), V vocabulary.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minilora.kernels import linear_cross_entropy
from minilora.models.blocks import DecoderLayer, KVCache, SharedPrefix
from minilora.models.config import ModelConfig
from minilora.models.gguf_names import GGUFNames
from minilora.models.inputs import IGNORED, check_ids, check_positions, check_shared, checked_mask
from minilora.models.rotary import outgrows, rotation_at

_CHUNK_ELEMENTS = 2**24  # logits held at a time where the head is wrapped


class CausalLM(nn.Module):
    """The base of every family: a body and `lm_head`; module names are Hugging Face's.

    A fresh model is random: matrices are normal with standard deviation 0.02, biases zero.
    `minilora.load_model` reads one.

    Args:
        config: the model's shape, kept.
        dtype: of every parameter; torch's default when None.
        device: where they lie; `"meta"` takes no memory.

    Attributes:
        config_class: the family's configuration.
        gguf: its names in GGUF files, or None where those are not read.
        embedding_name, blocks_name, norm_name: dotted names of the embedding, of the list of
            blocks and of the last norm.
        layer_class: what each block is; the last norm is of its `norm_class`.
        positions_name: dotted name of an embedding of positions, which is added; or None.
        head_name: what checkpoints call the head's weight.
        passed_over: endings of names in checkpoints that belong to no weights.
        end_of_text: the token that ends a text where the tokenizer's files name none, or None.
        gradient_checkpointing: when True, each block is run again in the backward pass instead of
            keeping its activations; acts in training mode with gradients on.
        compiled_loss: when True, `loss` runs its passes over the logits through `torch.compile`
            (on a CPU, and with a head that is a plain nn.Linear).
        logit_cap: each logit y becomes `logit_cap · tanh(y / logit_cap)`; None: it stays.
        name_or_path: where the weights came from, or None.
    """

    config_class: ClassVar[type[ModelConfig]]
    gguf: ClassVar[GGUFNames | None] = None
    embedding_name: ClassVar[str] = "model.embed_tokens"
    blocks_name: ClassVar[str] = "model.layers"
    norm_name: ClassVar[str] = "model.norm"
    positions_name: ClassVar[str | None] = None
    head_name: ClassVar[str] = "lm_head.weight"
    layer_class: ClassVar[Any] = DecoderLayer
    passed_over: ClassVar[tuple[str, ...]] = (".rotary_emb.inv_freq",)
    end_of_text: ClassVar[str | None] = None

    def __init__(
        self,
        config: Any,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.compiled_loss = False
        self.logit_cap: float | None = config.logit_cap
        self.name_or_path: str | None = None
        body = self.body(dtype=dtype, device=device)
        self.add_module(self.norm_name.partition(".")[0], body)
        # Tuples: torch 2.6 traces no loop over a set.
        self.windows = tuple({block.window for block in self.blocks})
        self.ropes = tuple({block.rope for block in self.blocks})
        self.lm_head: nn.Module = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=device
        )
        for name, parameter in self.named_parameters():
            if parameter.is_meta:  # there is nothing to draw, and it takes its time
                continue
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=self._deviation(name))
        self.tie_weights()

    @classmethod
    def stored_fqn(cls, name: str) -> str | None:
        """Return the dotted name in the model of a tensor in a checkpoint, None to pass it over."""
        if name.endswith(cls.passed_over):
            return None
        return "lm_head.weight" if name == cls.head_name else name

    @classmethod
    def written_fqn(cls, name: str) -> str:
        """Return the dotted name in a checkpoint of a tensor in the model."""
        return cls.head_name if name == "lm_head.weight" else name

    def body(self, **made: Any) -> nn.Module:
        """Make everything but the head, with the dtype and on the device of `made`."""
        config, layer, body = self.config, self.layer_class, nn.Module()
        width, layers = config.hidden_size, range(config.num_hidden_layers)

        def add(name: str, module: nn.Module) -> None:
            body.add_module(name.partition(".")[2], module)

        add(self.embedding_name, nn.Embedding(config.vocab_size, width, **made))
        if self.positions_name is not None:
            add(self.positions_name, nn.Embedding(config.context_length, width, **made))
        add(self.blocks_name, nn.ModuleList(layer(config, i, **made) for i in layers))
        add(self.norm_name, layer.norm_class(width, config.norm_eps, **made))
        return body

    def begin(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, dict[Any, tuple]]:
        """Return the first hidden state, and by `block.rope` what a block takes beside it.

        A block is called as `block(x, *beside[block.rope], mask, slot of the cache)`; the mask is
        a tensor, a `SharedPrefix` or None.
        """
        x = self.get_input_embeddings()(ids)
        if self.positions_name is not None:
            x = x + self.get_submodule(self.positions_name)(positions.long())
        return x, {rope: (rotation_at(rope, positions, x.dtype),) for rope in self.ropes}

    def end(self, x: Tensor) -> Tensor:
        """Return what the head reads of what the last norm returns."""
        return x

    @property
    def blocks(self) -> Iterable[Any]:
        """The blocks, in order; each has a `window` and a `rope`."""
        return self.get_submodule(self.blocks_name)  # type: ignore[return-value]

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding module."""
        return self.get_submodule(self.embedding_name)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output head module."""
        return self.lm_head

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's own parameter where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.get_input_embeddings().weight

    def _deviation(self, name: str) -> float:
        """Return the standard deviation of a fresh matrix."""
        return 0.02

    def set_windows(self, window: int | None) -> None:
        """Give the layers that have a window another one, or none; in place."""
        for block in self.blocks:
            if block.window is not None:
                block.window = window
        self.windows = tuple({block.window for block in self.blocks})

    @property
    def by_length(self) -> bool:
        """Whether a token's rotary embeddings depend on the length of its document."""
        return any(rope and rope.scaling and rope.scaling.by_length for rope in self.ropes)

    def outgrows(self, positions: Tensor) -> bool:
        """Return whether new tokens at `positions` invalidate the cache, so that all must be rerun.

        Their documents become longer than LongRoPE's original context, from where on it has other
        frequencies for all keys. With the dynamic rope keys stay as they are, as in transformers.
        """
        return any(outgrows(rope, positions) for rope in self.ropes)

    def hidden(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        shared: int = 0,
    ) -> Tensor:
        """Return what the head reads: `[B, T, hidden]` after the last norm; see `forward`.

        With `shared`, as `loss` takes it, it is `[1, shared + B·(T - shared), hidden]`.
        """
        check_ids(input_ids, self.config.vocab_size)
        batch, tokens = input_ids.shape
        past = 0
        if cache is not None:
            cache.check_room(batch, tokens)
            past = cache.length
        if past + tokens > self.config.context_length:
            name = "max_position_embeddings"
            raise ValueError(
                f"a sequence may have at most {self.config.context_length} tokens "
                f"({self.config.aliases.get(name, name)}), found {past + tokens}; shorten it"
            )
        if positions is None:
            positions = torch.arange(past, past + tokens, device=input_ids.device)
        else:
            check_positions(positions, batch, tokens, self.config.context_length)
        if past and self.outgrows(positions):
            raise ValueError(
                "documents of this length have other rotary embeddings than those that the cached "
                "keys were made with; set the cache's length to 0 and pass whole sequences"
            )
        masks: dict[Any, Any] = self._masks(mask, batch, tokens, past, input_ids.device)
        if shared:
            ids, positions = (
                torch.cat((x[0, :shared], x[:, shared:].flatten()))
                for x in (input_ids, positions.expand(batch, -1))
            )
            input_ids = ids[None]
            masks = {k: SharedPrefix(shared, batch, one) for k, one in masks.items()}
        x, beside = self.begin(input_ids, positions)
        again = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        for i, block in enumerate(self.blocks):
            given = (*beside[block.rope], masks[block.window])
            if again and cache is None:
                x = checkpoint(block, x, *given, None, use_reentrant=False)
            else:
                x = block(x, *given, None if cache is None else cache.slot(i))
        if cache is not None:
            cache.length += tokens
        return self.end(self.get_submodule(self.norm_name)(x))

    def forward(
        self,
        input_ids: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        last: int | None = None,
    ) -> Tensor:
        """Compute logits.

        Args:
            input_ids: `[B, T]` int64 or int32 in `[0, vocab_size)`.
            positions: `[T]` or `[B, T]` integers in `[0, config.context_length)`; default: they
                count up from the cache's length (0 without one).
            mask: bool, True where a query may attend, broadcastable to `[B, heads, T, S]` with S
                the cached and the new tokens. It replaces the causal rule; a layer's window, which
                counts places in the row, acts beside it. Default: each token sees itself and
                everything before it, cached or new.
            cache: keys and values of earlier tokens; the new ones are appended (changed in place).
            last: compute only the logits of the last that many positions.

        Returns:
            Logits `[B, T or last, V]` in the model's dtype.

        Raises:
            ValueError: ids out of range, shapes or dtypes that do not fit, a sequence longer than
                the model or the cache allows.
        """
        if last is not None and last < 1:
            raise ValueError(f"last must be 1 or more positions, or None for all, found {last}")
        x = self.hidden(input_ids, positions=positions, mask=mask, cache=cache)
        return self.logits(x if last is None else x[:, -last:])

    def logits(self, x: Tensor) -> Tensor:
        """Return what the head makes of what `hidden` returns, capped."""
        found = self.lm_head(x)
        cap = self.logit_cap
        return found if cap is None else (found / cap).tanh() * cap

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        *,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        shared: int = 0,
    ) -> Tensor:
        """Compute the mean next-token cross-entropy, never holding all logits at once.

        Position t predicts `labels[:, t + 1]`, as in Hugging Face.

        Args:
            input_ids: `[B, T]` as in `forward`.
            labels: `[B, T]` int64 beside `input_ids`; −100 marks tokens that do not count.
            positions: as in `forward`.
            mask: as in `forward`; for several documents in a row, each seeing only itself.
            shared: how many first tokens are the same in all rows; neither they nor the next one
                is learned. They are computed once; the loss and its gradient are the same but for
                rounding. Without mask and positions.

        Returns:
            A 0-dim tensor in f32 (f64 for an f64 model): the mean over the tokens that count.

        Raises:
            ValueError: as `forward`; labels of another shape or dtype, or none that counts; rows
                that differ in their first `shared` tokens, or learn of them (seen on a CPU only).
        """
        if labels.shape != input_ids.shape or labels.dtype != torch.int64:
            raise ValueError(
                f"labels must be int64 of input_ids' shape {list(input_ids.shape)}, found "
                f"{labels.dtype} of shape {list(labels.shape)}"
            )
        target = labels[:, 1:].reshape(-1)
        plain = is_plain_linear(self.lm_head)
        # On a GPU looking waits for it, and the loss of a plain head looks by itself.
        unseen = plain and target.device.type != "cpu"
        if not unseen and not bool((target != IGNORED).any()):
            raise ValueError(
                f"at least one label after the first token must count, found all of them "
                f"{IGNORED} (or sequences of one token); leave such a batch out"
            )
        if shared:
            check_shared(input_ids, labels, shared, mask=mask, positions=positions)
            hidden = self.hidden(input_ids, shared=shared)
            hidden = hidden[0, shared:].unflatten(0, (len(labels), -1))
            target = labels[:, shared + 1 :].reshape(-1)
        else:
            hidden = self.hidden(input_ids, positions=positions, mask=mask)
        rows = hidden[:, :-1].flatten(0, 1)
        if plain:
            fused = self.compiled_loss and rows.device.type == "cpu"
            options: Any = {"ignore_index": IGNORED, "fused": fused, "cap": self.logit_cap}
            return linear_cross_entropy(rows, self.lm_head.weight, target, **options)
        return self._loss_through_head(rows, target)

    def _loss_through_head(self, rows: Tensor, target: Tensor) -> Tensor:
        """The same mean where the head is wrapped: its forward is run, chunk by chunk, twice."""

        def chunk_loss(h: Tensor, label: Tensor) -> Tensor:
            logits = self.logits(h)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            return F.cross_entropy(wide, label, ignore_index=IGNORED, reduction="sum")

        counted = (target != IGNORED).nonzero().squeeze(1)
        rows, target = rows[counted], target[counted]
        size = max(32, _CHUNK_ELEMENTS // self.config.vocab_size)
        sums = [
            checkpoint(chunk_loss, h, label, use_reentrant=False)
            for h, label in zip(rows.split(size), target.split(size), strict=True)
        ]
        return torch.stack(sums).sum() / len(target)

    def _masks(
        self, mask: Tensor | None, batch: int, tokens: int, past: int, device: torch.device
    ) -> dict[int | None, Tensor | None]:
        """The mask of each window `[.., .., T, S]`, or None where plain causality is enough."""
        reach = past + tokens
        if mask is not None:
            mask = checked_mask(mask, (batch, self.config.num_attention_heads, tokens, reach))
        elif past and tokens > 1:
            mask = torch.ones(tokens, reach, dtype=torch.bool, device=device).tril(past)
        masks: dict[int | None, Tensor | None] = {}
        for window in self.windows:
            masks[window] = mask
            if window is not None and window < reach:
                near = torch.ones(tokens, reach, dtype=torch.bool, device=device)
                near = near.triu(past - window + 1)
                masks[window] = near & (near.tril(past) if mask is None else mask)
        return masks


def is_plain_linear(module: nn.Module) -> bool:
    """Whether reading the weight does all that calling the module would."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    return type(module) is nn.Linear and module.bias is None and not hooks
