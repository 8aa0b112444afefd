"""A tokenizer of one token a byte, and the ids and labels that records must have under it."""

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from minilora.data import read_data
from minilora.text.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END, BEGIN, START, STOP = 256, 257, 258, 259
NAMES = {"<|endoftext|>": END, "<|begin|>": BEGIN, "<|im_start|>": START, "<|im_end|>": STOP}


def byte_tokenizer(template=None, begin=False, eos="<|endoftext|>", merges=(), close=False):
    """A token per byte, in order of GPT-2's alphabet, four control tokens, and the merges."""
    letters = [*ALPHABET.values(), *NAMES, *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(letters)}, [*merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in NAMES])
    if begin or close:
        frame = ["<|begin|>"] * begin + ["$A"] + ["<|endoftext|>"] * close
        backend.post_processor = processors.TemplateProcessing(
            single=" ".join(frame), special_tokens=[("<|begin|>", BEGIN), ("<|endoftext|>", END)]
        )
    return Tokenizer(backend, bos="<|begin|>", eos=eos, chat_template=template)


def _alphabet():
    """GPT-2's printable stand-in for each byte (Radford et al. 2019, encoder.py)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {
        **{byte: chr(byte) for byte in shown},
        **{b: chr(256 + i) for i, b in enumerate(hidden)},
    }


ALPHABET = dict(sorted(_alphabet().items()))


def pieces(*parts):
    """The oracle: ids and labels of (what, learned) pairs; what is text or a control token's id."""
    ids, labels = [], []
    for what, learned in parts:
        found = [what] if isinstance(what, int) else list(what.encode("utf-8"))
        ids += found
        labels += found if learned else [-100] * len(found)
    return ids, labels


def turn(role, content, learned):
    """One ChatML turn; of a learned one the content and the marker that ends it."""
    return [
        (START, False),
        (f"{role}\n", False),
        (content, learned),
        (STOP, learned),
        ("\n", learned),
    ]


def encode_one(record, tokenizer, **options):
    """The ids and labels of the only record, and the report."""
    ((example,), report) = read_data([record], tokenizer, **{"max_length": 10**6, **options})
    return (list(example.input_ids), list(example.labels)), report


def talk(*roles):
    return [{"role": role, "content": f"{i}"} for i, role in enumerate(roles)]
