"""Llama in plain PyTorch, with the module names of Hugging Face's `LlamaForCausalLM`.

    h = E[ids]
    per layer:  h += O·attention(norm(h));  n = norm(h);  h += down(silu(gate(n)) ⊙ up(n))
    logits = head(norm(h))

B sequences, T new tokens, S tokens attended to (cached ones and the new), V vocabulary.
The parts are in `decoder.py`.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from minilora.models.blocks import Body, rotation_at
from minilora.models.causal import CausalLM, Transform
from minilora.models.llama_config import LlamaConfig


class Llama(CausalLM):
    """Compute next-token logits as Hugging Face's `LlamaForCausalLM` does.

    A fresh model is random (normal, standard deviation 0.02); `from_pretrained` and `from_gguf`
    read one.

    Args:
        config: the model's shape, kept.
        dtype: of every parameter; torch's default when None.
        device: where they lie; `"meta"` takes no memory.

    Attributes:
        config: the `LlamaConfig`; the others as in `CausalLM`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config, dtype=dtype, device=device)
        self.lm_head = nn.Linear(
            config.hidden_size, config.vocab_size, bias=False, dtype=dtype, device=device
        )
        for name, parameter in self.named_parameters():
            if parameter.is_meta:  # there is nothing to draw, and it takes its time
                continue
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head's weight the embedding's own parameter where the config says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        transform: Transform | None = None,
    ) -> "Llama":
        """Read a Hugging Face folder: `config.json` and safetensors, whole or sharded.

        Args:
            folder: path of the folder.
            dtype: None as stored, `"auto"` the fastest here (`minilora.hardware().dtype`), or a
                floating-point torch dtype.
            device: where the weights go.
            transform: called per tensor as `transform(fqn, tensor)` with the tensor already in
                dtype and on device; what it returns, of the same shape, is put in.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: a configuration that is not built; files that are missing, damaged or
                point outside the folder; tensors missing, unexpected or of another shape, by name.
        """
        from minilora.loading import read_folder

        return read_folder(folder, dtype=dtype, device=device, transform=transform)

    @classmethod
    def from_gguf(
        cls,
        file: str | Path,
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        transform: Transform | None = None,
    ) -> "Llama":
        """Read a llama-architecture GGUF file.

        Args:
            file: path of the file.
            dtype: None for f32 (what the blocks decode to), `"auto"`, or a torch dtype.
            device: where the weights go.
            transform: as in `from_pretrained`.

        Returns:
            The model in evaluation mode.

        Raises:
            ValueError: no GGUF or a damaged one, another architecture, tensor types or options
                that are not built, by name.
        """
        from minilora.loading import read_gguf, read_model

        return read_model(read_gguf(file), dtype=dtype, device=device, transform=transform)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embedding module."""
        return self.model.embed_tokens

    def _begin(self, ids: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        x = self.model.embed_tokens(ids)
        return x, (rotation_at(self.config, positions, x.dtype),)

    def _blocks(self) -> Iterable[nn.Module]:
        return self.model.layers

    def _end(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.norm(x)
