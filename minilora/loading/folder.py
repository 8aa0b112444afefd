"""Hugging Face model folders, read into a `Llama` or `GPT2`; `saving` writes them.

The format: `config.json`, and `model.safetensors` or `model.safetensors.index.json` with the shards
it names (https://huggingface.co/docs/safetensors).
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import nn

from minilora.files import Checksums, leads_out, read_json, tensor_file
from minilora.kernels import hardware
from minilora.models import GPT2, GPT2Config, Llama, LlamaConfig, Prepare, Transform, stored_fqn
from minilora.quantization import is_finite

CONFIG, WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_MAPPED = 2**24  # bytes of a file read through one mapping
_DERIVED = ".rotary_emb.inv_freq"  # old checkpoints store it; it follows from the configuration

Model = Llama | GPT2
Place = tuple[Path, str]  # a file, and a tensor's name in it


class Kind(NamedTuple):
    """What reading and writing must know of an architecture."""

    model: type[Model]
    config: type[LlamaConfig] | type[GPT2Config]
    embedding: str  # its dotted name
    fqn: Callable[[str], str | None]  # of a stored name; None: passed over


KINDS = {  # by config.json's model_type
    "gpt2": Kind(GPT2, GPT2Config, "transformer.wte.weight", stored_fqn),
    "llama": Kind(
        Llama,
        LlamaConfig,
        "model.embed_tokens.weight",
        lambda name: None if name.endswith(_DERIVED) else name,
    ),
}


def read_folder(
    folder: str | Path,
    *,
    dtype: torch.dtype | str | None,
    device: torch.device | str,
    transform: Transform | None,
    kind: str = "llama",
    prepare: Prepare | None = None,
) -> Any:
    """Read a folder into the model of that kind; its `from_pretrained` says what holds."""
    folder = Path(folder)
    known = KINDS[kind]
    config = known.config.from_dict(read_json(folder / CONFIG))
    wanted = resolve_dtype(dtype)
    with contextlib.ExitStack() as stack:
        files = {file: stack.enter_context(tensor_file(file)) for file in _weight_files(folder)}
        owner = _owners(files, known)
        check_blocks(config, len(owner), folder)
        model = known.model(config, device="meta")  # type: ignore[arg-type]
        _check_index(folder, owner, known)
        shapes = {
            fqn: tuple(files[file].get_slice(name).get_shape())
            for fqn, (file, name) in owner.items()
        }
        check_names_and_shapes(model, shapes, folder)
        if wanted is None:
            _refuse_mixed_dtypes(files, owner, folder)
        if config.tie_word_embeddings and "lm_head.weight" in owner:
            _check_tied_head(files, owner, folder, known.embedding)
    fill(model, _stored(owner), wanted, device, transform, prepare)
    model.name_or_path = str(folder)
    return model.eval()


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Turn `"auto"` into the fastest dtype here; pass None and floating dtypes through."""
    if dtype == "auto":
        return hardware().dtype
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in FLOATS):
        return dtype
    names = ", ".join(str(kind) for kind in FLOATS)
    raise ValueError(f"dtype must be None, 'auto' or one of {names}, found {dtype!r}")


def check_blocks(config: Any, tensors: int, source: str | Path) -> None:
    """Raise where a configuration has more blocks than tensors are stored, before any is built."""
    if config.num_hidden_layers > tensors:
        raise ValueError(
            f"a model must have a tensor for each of its blocks, found {config.num_hidden_layers} "
            f"blocks in the configuration and {tensors} tensors in '{source}'; the weights and the "
            f"configuration do not belong together"
        )


def check_names_and_shapes(
    model: Model, found: dict[str, tuple[int, ...]], source: str | Path
) -> None:
    """Raise, by name, unless the tensors are exactly those of the model.

    Args:
        model: on the meta device.
        found: stored shape by dotted name. `lm_head.weight` may be absent where the head is tied.
        source: named in the message.
    """
    parameters = model.named_parameters(remove_duplicate=False)
    wanted = {fqn: tuple(parameter.shape) for fqn, parameter in parameters}
    missing = wanted.keys() - found.keys()
    if model.config.tie_word_embeddings:
        missing.discard("lm_head.weight")
    unexpected = found.keys() - wanted.keys()
    wrong = [
        f"{fqn} {list(found[fqn])} instead of {list(wanted[fqn])}"
        for fqn in sorted(wanted.keys() & found.keys())
        if found[fqn] != wanted[fqn]
    ]
    problems = [
        f"{what}: {some(names)}"
        for what, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected)))
        if names
    ]
    if wrong:
        problems.append(f"of another shape: {some(wrong)}")
    if problems:
        raise ValueError(
            f"the tensors in '{source}' must be those its configuration describes, found "
            f"{'; '.join(problems)}; the weights and the configuration do not belong together"
        )


def some(names: list[str]) -> str:
    """Join the first five names, and say how many more there are."""
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + rest


def fill(
    model: Model,
    stored: Iterable[tuple[str, torch.Tensor]],
    dtype: torch.dtype | None,
    device: torch.device | str,
    transform: Transform | None,
    prepare: Prepare | None = None,
) -> None:
    """Put tensors into a model on the meta device, one at a time, then tie the head.

    Only one stored tensor is alive beside what has been put in. A transform may have a method
    `start(model)`, called first with the model on the meta device; and for a layer's weight it
    may return a module to stand in the layer's place. With `prepare`, what it returns puts the
    tensors in.
    """
    if prepare is not None:
        put = prepare(model.to(dtype or torch.float32).eval())
        for fqn, tensor in stored:
            if fqn != "lm_head.weight" or not model.config.tie_word_embeddings:
                put(fqn, finite(fqn, tensor, tensor.to(dtype or torch.float32)))
        return
    start = getattr(transform, "start", None)
    if start is not None:
        start(model)
    for fqn, tensor in stored:
        if fqn == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        # A copy even where nothing changes: a parameter must not be a view of a mapped file.
        value: Any = tensor.to(device=device, dtype=dtype or tensor.dtype, copy=True)
        finite(fqn, tensor, value)
        if transform is not None:
            value = transform(fqn, value)
            if isinstance(value, nn.Module):
                _replace(model, fqn, value)
                continue
            if not isinstance(value, torch.Tensor) or value.shape != tensor.shape:
                raise ValueError(
                    f"transform must return a tensor of shape {list(tensor.shape)} for {fqn}, "
                    f"found {getattr(value, 'shape', type(value).__name__)}"
                )
        owner, _, leaf = fqn.rpartition(".")
        trainable = value.is_floating_point()
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=trainable))
    model.tie_weights()


def finite(fqn: str, stored: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return a stored tensor's value in another dtype, or raise where it isn't finite."""
    if is_finite(value):
        return value
    if is_finite(stored):
        raise ValueError(
            f"{fqn} must be finite in {value.dtype}, found values up to "
            f"{float(stored.abs().max()):.3g}, which that can't hold; name a dtype that can, such "
            f"as dtype=torch.bfloat16 or torch.float32"
        )
    raise ValueError(f"{fqn} must be finite, found NaN or Inf; fetch or write the file again")


def _replace(model: Model, fqn: str, module: nn.Module) -> None:
    """Put a module where the owner of a weight is; a bias read before goes along."""
    name = fqn.rpartition(".")[0]
    parent, _, child = name.rpartition(".")
    bias = model.get_submodule(name)._parameters.get("bias")
    if bias is not None and not bias.is_meta:
        module.register_parameter("bias", bias)
    setattr(model.get_submodule(parent), child, module)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / _INDEX).is_file():
        others = sorted(
            file.name for kind in ("*.bin", "*.safetensors") for file in folder.glob(kind)
        )
        raise ValueError(
            f"a model folder must hold {WEIGHTS} or {_INDEX}, found {others or 'neither'} in "
            f"'{folder}'; only safetensors are read"
        )
    names = sorted(set(_weight_map(folder).values()))
    return [_inside(folder, name) for name in names]


def _weight_map(folder: Path) -> dict[str, str]:
    entries = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(v, str) for v in entries.values()):
        raise ValueError(f"'{folder / _INDEX}' must map tensor names to files under 'weight_map'")
    return entries


def _inside(folder: Path, name: str) -> Path:
    """A shard's path, refused when it leads out of the folder."""
    pure, file = PurePosixPath(name), folder / name
    if (
        pure.is_absolute()
        or Path(name).is_absolute()
        or ".." in pure.parts
        or leads_out(folder, file)
    ):
        raise ValueError(
            f"'{folder / _INDEX}' must name files inside its folder, found {name!r}, which leads "
            f"out of it; do not use this folder"
        )
    if not file.is_file():
        raise ValueError(f"'{folder / _INDEX}' names {name!r}, found no such file in the folder")
    return file


def _check_index(folder: Path, owner: dict[str, Place], kind: Kind) -> None:
    """Where there is an index, it must say of every tensor the file that holds it."""
    if (folder / WEIGHTS).is_file():
        return
    entries = _weight_map(folder).items()
    mapped = {name: folder / file for name, file in entries if kind.fqn(name) is not None}
    held = {name: file for file, name in owner.values()}
    wrong = sorted(name for name in mapped.keys() | held if mapped.get(name) != held.get(name))
    if wrong:
        raise ValueError(
            f"'{folder / _INDEX}' must agree with the files it names, found it wrong about "
            f"{some(wrong)}; fetch the folder again"
        )


def _owners(files: dict[Path, Any], kind: Kind) -> dict[str, Place]:
    """Where a tensor lies, by its dotted name in the model."""
    owner: dict[str, Place] = {}
    for file, handle in files.items():
        for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
            fqn = kind.fqn(name)
            if fqn in owner:
                at, before = owner[fqn]
                raise ValueError(
                    f"{fqn} must be stored once, found {before} in '{at}' and {name} in '{file}'; "
                    f"fetch the folder again"
                )
            if fqn is not None:
                owner[fqn] = (file, name)
    return owner


def _stored(owner: dict[str, Place]) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors one by one. Files are mapped anew now and then, so that read pages don't pile up."""
    for file in dict.fromkeys(at for at, _ in owner.values()):
        names = [(fqn, name) for fqn, (at, name) in owner.items() if at == file][::-1]
        while names:
            with tensor_file(file) as handle:
                sums, read = Checksums(file, handle.metadata() or {}), 0
                while names and read < _MAPPED:
                    fqn, name = names.pop()
                    tensor = _read(handle, name, file)
                    sums.check(name, tensor)
                    read += tensor.nbytes
                    yield fqn, tensor


def _read(handle: Any, fqn: str, file: Path) -> torch.Tensor:
    tensor = handle.get_tensor(fqn)
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{fqn} in '{file}' must be stored in a floating-point type of 16 bits or more, found "
            f"{tensor.dtype}; use an unquantized copy of the model"
        )
    return tensor


def _refuse_mixed_dtypes(files: dict[Path, Any], owner: dict[str, Place], folder: Path) -> None:
    kinds = sorted({files[file].get_slice(name).get_dtype() for file, name in owner.values()})
    if len(kinds) > 1:
        raise ValueError(
            f"dtype=None needs weights stored in one dtype, found {', '.join(kinds)} in "
            f"'{folder}'; name a dtype, such as dtype=torch.float32"
        )


def _check_tied_head(
    files: dict[Path, Any], owner: dict[str, Place], folder: Path, embedding_name: str
) -> None:
    places = owner["lm_head.weight"], owner[embedding_name]
    head, embedding = (_read(files[file], name, file) for file, name in places)
    if not torch.equal(head, embedding):
        raise ValueError(
            f"tie_word_embeddings is true in '{folder / CONFIG}', found an lm_head.weight that "
            f"differs from {embedding_name}; set it to false to keep both"
        )
