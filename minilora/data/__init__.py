"""Records in every usual shape, made into examples and batches."""

from minilora.data.batch import Batch, PairBatch, pad, positions_in, worth_sharing
from minilora.data.batches import Batches
from minilora.data.docstrings import docstring_pairs, split
from minilora.data.encoder import Encoding, encode_prompt, warn_of_control
from minilora.data.examples import (
    IGNORE,
    NOT_ONE_TEXT,
    Example,
    Pair,
    as_examples,
    common_prefix,
    first_learned,
    hold_out,
    learned_labels,
)
from minilora.data.inspection import duplicates, endless, lengths, shown
from minilora.data.packing import pack
from minilora.data.reading import DataFiles, read_data, streamed
from minilora.data.record_files import check_streamed, files_in
from minilora.data.shapes import ALPACA
from minilora.data.streaming import Stream, StreamBatches

__all__ = [
    "ALPACA",
    "IGNORE",
    "NOT_ONE_TEXT",
    "Batch",
    "Batches",
    "DataFiles",
    "Encoding",
    "Example",
    "Pair",
    "PairBatch",
    "Stream",
    "StreamBatches",
    "as_examples",
    "check_streamed",
    "common_prefix",
    "docstring_pairs",
    "duplicates",
    "encode_prompt",
    "endless",
    "files_in",
    "first_learned",
    "hold_out",
    "learned_labels",
    "lengths",
    "pack",
    "pad",
    "positions_in",
    "read_data",
    "shown",
    "split",
    "streamed",
    "warn_of_control",
    "worth_sharing",
]
