"""One call from a path, or a known name, to a model and its tokenizer."""

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minilora.files import (
    HubName,
    absent,
    folder_below,
    on_hub,
    read_json,
    reading,
    short,
    tensor_file,
)
from minilora.kernels import resolve_device
from minilora.loading.fetching import NAMES, fetch, known_name
from minilora.loading.folder import CONFIG, open_folder
from minilora.loading.foreign import ForeignSource, make_foreign, open_foreign
from minilora.loading.foreign_config import foreign_config
from minilora.loading.from_hub import fetch_config, fetch_model, fetch_tokenizer
from minilora.loading.gguf_file import open_gguf
from minilora.loading.gguf_reader import read_gguf
from minilora.loading.quantized import described_layers, is_quantized, open_quantized
from minilora.loading.source import (
    Layers,
    Prepare,
    Source,
    family_of,
    make_model,
    resolve_dtype,
    some,
)
from minilora.models import FAMILIES, NotBuiltError
from minilora.peft import CONFIG_FILE, find_pair
from minilora.quantization import FORMATS, Quantization
from minilora.text import Tokenizer, read_folder_tokenizer


def load_model(
    source: str | Path,
    quantize: str | Quantization | None = None,
    dtype: torch.dtype | str | None = "auto",
    device: torch.device | str = "auto",
    *,
    targets: object = "all-linear",
    exclude: object = (),
    layers: Iterable[int] | None = None,
    prepare: Prepare | None = None,
    **options: Any,
) -> tuple[Any, Tokenizer]:
    """Read a model and its tokenizer from the same place.

    With `quantize`, each weight is quantized as it is read: beside what is loaded so far, one
    tensor is in memory in full precision, and the result is that of `minilora.quantize` after
    loading.

    >>> model, tokenizer = minilora.load_model("smollm2-135m", quantize="nf4")

    Args:
        source: a Hugging Face folder (where its `config.json` names no family of
            `minilora.models`, transformers' own model is made, if that is installed), a folder of
            a quantized model (that `save_pretrained` wrote, or transformers with
            bitsandbytes' NF4), a GGUF file, or `"smollm2-135m"`, which is fetched when it is not
            in the cache; or a name on the Hugging Face hub, `"owner/name"`,
            `"owner/name@revision"` or, of a GGUF file, `"owner/name:file.gguf"`, which
            huggingface_hub downloads into its cache. A file or folder of that name goes first.
        quantize: `"int8"`, `"nf4"` or `"int4"`, or a `Quantization`, stores linear layers so; None
            as they are.
        dtype: of everything that is not quantized, and of what is computed: `"auto"` the fastest
            on the device, None as stored, or a floating-point torch dtype or its name.
        device: where the weights go, quantized there: `"auto"` is CUDA where it is there (under
            torchrun the GPU of the process), else Apple's MPS (untested), else the CPU.
        targets, exclude, layers: which layers to quantize, as for `minilora.quantize`.
        prepare: called with the model on the meta device, in its dtype; returns a function that is
            called with name and value of each weight, one at a time, and puts it where it belongs.
            A quantized layer comes as a `QuantizedLinear` under the name of its weight. None keeps
            each weight whole.
        options: its other options: `block_size`, `double_quant`, `compute`, `grad_compute` and
            `outliers`. The last three go for a model that is stored quantized, too.

    Returns:
        The model in evaluation mode (a `CausalLM`, or a causal language model of transformers), and
        the tokenizer.

    Raises:
        ValueError: a source that is none of these, whose content cannot be read, or what
            `minilora.quantize` refuses.
        RuntimeError: a package is missing, or fetching fails.
    """
    spec = None if quantize is None else _quantization(quantize, options)
    device = resolve_device(device)
    dtype, path = resolve_dtype(dtype, device), _path(source)
    opened = _opened(path, dtype)
    if opened.layers and spec is not None:
        raise ValueError(
            f"'{path}' is quantized already; load it without quantize, or quantize the model it "
            f"was made from"
        )
    chosen = targets, exclude, layers
    if spec is None:
        named = zip(("targets", "exclude", "layers"), chosen, ("all-linear", (), None), strict=True)
        _check_options(path, opened.layers, [*options, *(n for n, a, b in named if a != b)])
    opened = replace(opened, layers=_multiplied_as(opened.layers, options))
    if opened.metadata is None:
        tokenizer = read_folder_tokenizer(path, opened.end_of_text)
    else:
        tokenizer = _gguf_tokenizer(path, opened.metadata)
    _check_tokenizer(opened, tokenizer)
    if isinstance(opened, ForeignSource):
        if prepare is not None:
            raise ValueError(
                f"only models that are built here can be read in parts (prepare=, --parallel "
                f"fsdp), found a {opened.family.__name__} in '{path}'; use parallel='ddp'"
            )
        return make_foreign(opened, dtype, device, spec, chosen), tokenizer
    return make_model(opened, dtype, device, spec, chosen, prepare), tokenizer


def _quantization(quantize: str | Quantization, options: dict[str, Any]) -> Quantization:
    if isinstance(quantize, Quantization):
        return replace(quantize, **options)
    return Quantization(quantize, **options)


def _check_options(path: Path, layers: Layers, given: list[str]) -> None:
    """Refuse options of a quantization where nothing is quantized."""
    if given and not layers:
        raise ValueError(
            f"{', '.join(given)} say how a model is quantized, found '{path}' without quantize; "
            f"pass one of {', '.join(FORMATS)}"
        )
    fixed = [name for name in given if name not in ("compute", "grad_compute", "outliers")]
    if fixed:
        raise ValueError(
            f"{', '.join(fixed)} say how a model is quantized, found '{path}', which is quantized "
            f"already; leave them out"
        )


def _multiplied_as(layers: Layers, options: dict[str, Any]) -> Layers:
    """Return how stored layers are asked to be multiplied, each by what its format reads."""
    known = {name for how, _ in layers.values() for name in how.storage.reads}
    found = {}
    for name, (how, bias) in layers.items():
        own = {*how.storage.reads, *(options.keys() - known)}  # what no layer reads is refused
        found[name] = replace(how, **{key: options[key] for key in options if key in own}), bias
    return found


def read_config(source: str | Path) -> Any:
    """Read the `ModelConfig` in a folder, a `config.json`, a GGUF file, or of a name on the hub.

    Of a model that is not built here it is a `ForeignConfig`.

    Raises:
        ValueError: nothing of the kind, or what neither we nor transformers read, by name.
        RuntimeError: it takes transformers, which is not installed.
    """
    name = on_hub(source)
    path = Path(source) if name is None else fetch_config(name)
    if not path.exists():  # smollm2-135m, too: it is not fetched whole for this
        raise ValueError(f"a model's configuration is in a folder or file, {absent(source)}")
    if path.is_file() and path.suffix != ".json":
        return open_gguf(read_gguf(path)).config
    if path.is_dir():
        _check_folder(path)
    file = path / CONFIG if path.is_dir() else path
    entries = read_json(file)
    try:
        return family_of(entries, file).config_class.from_dict(entries)
    except NotBuiltError as why:
        return foreign_config(file, why)


def read_tokenizer(source: str | Path) -> Tokenizer:
    """Read the tokenizer that `load_model` would return; no weights are fetched from the hub."""
    path = _path(source, fetch_tokenizer)
    if path.is_file():
        return _gguf_tokenizer(path, read_gguf(path).metadata)
    _check_folder(path)
    named = read_json(path / CONFIG).get("model_type")
    return read_folder_tokenizer(path, FAMILIES[named].end_of_text if named in FAMILIES else None)


def _path(source: str | Path, fetch_name: Callable[[HubName], Path] = fetch_model) -> Path:
    """Return a folder or file that is there; what a name stands for is fetched."""
    path = Path(source)
    if str(source) in NAMES and not path.exists():
        return fetch(str(source))
    if (name := on_hub(source)) is not None:
        return fetch_name(name)
    if not path.is_dir() and not path.is_file():
        raise ValueError(
            f"a model is a folder with config.json, a .gguf file, a name of the hub (owner/name) "
            f"or one of {', '.join(NAMES)}, {absent(source)}"
        )
    return path


def _opened(path: Path, dtype: torch.dtype | None) -> Source | ForeignSource:
    if path.is_file():
        return open_gguf(read_gguf(path))
    _check_folder(path)
    try:
        return open_quantized(path) if is_quantized(path) else open_folder(path, dtype)
    except NotBuiltError as why:
        return open_foreign(path, why, described_layers(path))


def _check_folder(folder: Path) -> None:
    """Raise where a folder holds an adapter, or folders, instead of a model."""
    if (folder / CONFIG).is_file():
        return
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"a model folder must hold {CONFIG}, found none in '{folder}'"
            f"{folder_below(folder, CONFIG, CONFIG_FILE)}"
        )
    base = base_name(folder)
    raise ValueError(
        f"this must be a model, found an adapter in '{folder}'; pass the model that it was trained "
        f"on{f', {short(base)}' if base else ''} (train goes on from an adapter with --adapter; in "
        f"Python, minilora.load(model, folder) puts it into a model)"
    )


def base_name(adapter: Path) -> str | None:
    """Return the base that an adapter names, as `load_model` takes it; None where it names none."""
    config_file, weights = find_pair(adapter)
    config = read_json(config_file)
    named, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not named or not isinstance(named, str):
        return None
    if Path(named).exists():
        return named
    if revision:
        name = on_hub(named)
        return str(name._replace(revision=str(revision))) if name else named
    known = known_name(named)
    if known is None or not weights.is_file():
        return named
    with tensor_file(weights) as opened:  # our file has the name of what it was made from
        return known if "minilora_base" in (opened.metadata() or {}) else named


def _gguf_tokenizer(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    with reading(f"the tokenizer in '{path}'"):
        try:
            return Tokenizer.from_metadata(metadata)
        except ValueError as error:
            raise ValueError(f"'{path}': {error}") from error


def _check_tokenizer(source: Source | ForeignSource, tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose texts have ids beyond the embedding, and warn of other such ids."""
    rows, ids = source.config.vocab_size, tokenizer.vocab_size
    problems = []
    if ids > rows:
        if beyond := tokenizer.tokens_from(rows):
            raise ValueError(
                f"a tokenizer must give ids that its model has, found in '{source.path}' beyond "
                f"the {rows} rows of the embedding: {some([short(token) for token in beyond])}; "
                f"use the tokenizer that the model was trained with, or save the model with more "
                f"rows (transformers, resize_token_embeddings)"
            )
        problems.append(f"its tokenizer has {ids} ids, and the model can't compute {rows} and more")
    if tokenizer.stop_ids and min(tokenizer.stop_ids) >= rows:
        stop = min(tokenizer.stop_ids)
        problems.append(f"eos_token_id {stop} is not among the model's {rows} ids: no text ends")
    for problem in problems:
        warnings.warn(f"minilora: '{source.path}': {problem}", stacklevel=3)
