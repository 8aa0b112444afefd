"""Holds GGUF files against llama.cpp itself: weights, token ids, logits and greedy text.

    PYTHONPATH=tests python benchmarks/llama_cpp.py

xllamacpp's library is called by its C interface (include/llama.h, ggml.h). Over quantized weights
llama.cpp rounds activations to 8 bits, so logits are compared over the same weights in F32, too.
Of SentencePiece vocabularies it puts a space before a text that begins with one, as SentencePiece
does and transformers' LlamaTokenizer doesn't; those lines are counted apart.
"""

import argparse
import ctypes
import tempfile
from pathlib import Path

import gguf
import numpy as np
import test_loading_gguf
import test_text_gguf
import torch
import xllamacpp
from tokenizer_lines import lines

from minilora.loading import load_model
from minilora.loading.fetching import fetch
from minilora.loading.gguf_reader import read_gguf, read_tensor
from minilora.loading.gguf_types import TYPES
from minilora.text import Tokenizer
from minilora.text.cuts import CUTS

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Low-rank adaptation freezes the weights and",
)
STEPS = 24


class Params(ctypes.Structure):
    """A structure of the C interface, whatever its size: more bytes than it has."""

    _fields_ = (("bytes", ctypes.c_ubyte * 1024),)


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (("count", ctypes.c_int32), ("pointers", ctypes.c_void_p * 7))


def library():
    """Return the C library with the types of what is called."""
    found = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    for name, result, arguments in (
        ("llama_model_default_params", Params, []),
        ("llama_context_default_params", Params, []),
        ("llama_model_load_from_file", pointer, [text, Params]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_init_from_model", pointer, [pointer, Params]),
        ("llama_batch_get_one", Batch, [pointer, ctypes.c_int32]),
        ("llama_decode", ctypes.c_int32, [pointer, Batch]),
        ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [pointer, ctypes.c_int32]),
        ("ggml_quantize_chunk", ctypes.c_size_t,
         [ctypes.c_int, pointer, pointer, *[ctypes.c_int64] * 3, pointer]),
        ("llama_tokenize", ctypes.c_int32,
         [pointer, text, ctypes.c_int32, pointer, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool]),
        ("llama_log_set", None, [pointer, pointer]),
    ):  # fmt: skip
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    found.silent = ctypes.CFUNCTYPE(None, ctypes.c_int, text, pointer)(lambda *said: None)
    found.llama_log_set(ctypes.cast(found.silent, pointer), None)
    found.llama_backend_init()
    return found


class Theirs:
    """A model in llama.cpp."""

    def __init__(self, c, file):
        self.c = c
        self.model = c.llama_model_load_from_file(
            str(file).encode(), c.llama_model_default_params()
        )
        assert self.model, f"llama.cpp reads no {file}"
        self.vocab = c.llama_model_get_vocab(self.model)

    def encode(self, text, parse_special=True):
        raw = text.encode()
        ids = (ctypes.c_int32 * (len(raw) + 16))()
        count = self.c.llama_tokenize(self.vocab, raw, len(raw), ids, len(ids), True, parse_special)
        return list(ids[:count])

    def logits(self, ids, vocabulary):
        """Return the logits `[T, V]` after each id, which are read one at a time."""
        context = self.c.llama_init_from_model(self.model, self.c.llama_context_default_params())
        rows = []
        for i in ids:
            one = (ctypes.c_int32 * 1)(i)
            assert self.c.llama_decode(context, self.c.llama_batch_get_one(one, 1)) == 0
            row = self.c.llama_get_logits_ith(context, -1)
            rows.append(np.ctypeslib.as_array(row, (vocabulary,)).copy())
        return torch.from_numpy(np.stack(rows))


def quantized(c, values, kind):
    """Return the blocks that ggml stores f32 values in."""
    values = np.ascontiguousarray(values, np.float32)
    rows, width = values.shape
    per, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.empty((rows, width // per * size), np.uint8)
    weight = np.ones(width, np.float32)
    c.ggml_quantize_chunk(
        kind, values.ctypes.data, blocks.ctypes.data, 0, rows, width, weight.ctypes.data
    )
    return blocks


def check_weights(c):
    """Compare decoded blocks with ggml's own, which gguf's equal up to the last bit."""
    values = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    for number, kind in TYPES.items():
        if kind.weights == 1:
            continue
        blocks = quantized(c, values, number)
        named = kind.name[:-1].lower() + kind.name[-1] if "_K" in kind.name else kind.name.lower()
        decode = getattr(c, f"dequantize_row_{named}")
        wanted = np.empty(values.shape, np.float32)
        decode(ctypes.c_void_p(blocks.ctypes.data), ctypes.c_void_p(wanted.ctypes.data),
               ctypes.c_int64(values.size))  # fmt: skip
        ours = torch.empty(values.size // kind.weights, kind.weights)
        kind.decode(torch.from_numpy(blocks.reshape(-1, kind.size)), ours)
        found = ours.numpy().reshape(values.shape)
        same = np.array_equal(found, wanted)
        far = np.abs(found - wanted).max() / np.abs(wanted).max()
        error = np.sqrt(np.mean((found - values) ** 2))
        print(f"weights   {kind.name:7} equal to ggml's: {same} (largest difference {far:.1e}); "
              f"error of storing {error:.4f}")  # fmt: skip


def vocabulary_file(folder, make, name):
    """Write a small model with a vocabulary of the tests."""
    file = make(folder / "vocabulary.gguf", name)
    about = read_gguf(file).metadata
    count = len(about["tokenizer.ggml.tokens"])
    theirs = test_loading_gguf._theirs(vocab_size=count)
    writer = gguf.GGUFWriter(folder / "whole.gguf", "llama")
    for key, value in test_loading_gguf._metadata(theirs.config).items():
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(
            f"llama.{key}", value
        )
    for key, value in about.items():
        if key.startswith("tokenizer."):
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            add.get(type(value), writer.add_array)(key, value)
    for key, value in test_loading_gguf._tensors(theirs).items():
        writer.add_tensor(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "whole.gguf"


def check_ids(c, folder):
    """Count the lines of which llama.cpp makes other ids."""
    cases = [(test_text_gguf.bytes_file, pre) for pre in CUTS]
    cases.append((test_text_gguf.pieces_file, "llama"))
    said = [line for line in lines() if "\0" not in line]  # C's strings end there
    for make, name in cases:
        file = vocabulary_file(folder, make, name)
        ours, theirs = Tokenizer.from_metadata(read_gguf(file).metadata), Theirs(c, file)
        wrong = [line for line in said
                 if ours.encode(line, parse_special=True) != theirs.encode(line)]  # fmt: skip
        spaced = sum(line.startswith(" ") for line in wrong)
        rest = [line for line in wrong if not line.startswith(" ")]
        print(f"ids       {name:16} {len(said)} lines, others in llama.cpp: {len(wrong)}, of which "
              f"{spaced} begin with a space; the rest: {rest[:4]!r}")  # fmt: skip


def rewritten(c, file, made, plain=False):
    """Write a model in other types: K-quants where rows are long enough, others for the rest.

    With `plain`, all in F32.
    """
    long = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
    short = ["Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q4_0", "Q4_1"]
    source = read_gguf(file)
    writer = gguf.GGUFWriter(made, "llama")
    for key, value in source.metadata.items():
        if key != "general.architecture":
            add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string,
                   float: writer.add_float32}  # fmt: skip
            add.get(type(value), writer.add_array)(key, value)
    used = set()
    for i, name in enumerate(source.tensors):
        values = read_tensor(source, name).numpy()
        if values.ndim == 1 or plain:
            writer.add_tensor(name, values)
            continue
        names = long if values.shape[1] % 256 == 0 else short
        kind = gguf.GGMLQuantizationType[names[i // 9 % 6] if "embd" not in name else "Q8_0"]
        used.add(kind.name)
        writer.add_tensor(name, quantized(c, values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(used)


def check_text(c, file, what):
    """Compare logits, and each greedy token with the one that llama.cpp would write."""
    model, tokenizer = load_model(file, dtype=torch.float32, device="cpu")
    theirs = Theirs(c, file)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        assert ids == theirs.encode(prompt)
        start = len(ids)
        with torch.no_grad():
            for _ in range(STEPS):
                ids.append(int(model(torch.tensor([ids]), last=1).argmax()))
            ours = model(torch.tensor([ids[:-1]]))[0]
        wanted = theirs.logits(ids[:-1], ours.shape[1])
        same = (ours.argmax(-1) == wanted.argmax(-1))[start - 1 :]
        gap = (ours - wanted).abs().max() / wanted.abs().max()
        print(f"text      {what}: {int(same.sum())} of {len(same)} greedy tokens equal, largest "
              f"difference of logits {gap:.1e}: {tokenizer.decode(ids)!r:.90}")  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="a GGUF file of a Llama; default: SmolLM2's")
    file = parser.parse_args().file or fetch("smollm2-135m")
    c = library()
    check_weights(c)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        check_ids(c, folder)
        mixed, plain = folder / "mixed.gguf", folder / "plain.gguf"
        check_text(c, file, file.name)
        kinds = rewritten(c, file, mixed)
        check_text(c, mixed, ", ".join(kinds))
        for source in (file, mixed):
            rewritten(c, source, plain, plain=True)
            check_text(c, plain, f"{source.name} in F32")


if __name__ == "__main__":
    main()
