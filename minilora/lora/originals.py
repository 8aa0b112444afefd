"""What a merge keeps of the base weights, in memory or on the disk, so that it can be undone."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from minilora.files import read_tensors, tensor_content, write
from minilora.lora.base import base_of
from minilora.lora.samples import is_read, marked_as


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
