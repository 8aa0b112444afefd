"""Records in every usual shape, made into examples and batches."""

from minilora.data.batches import IGNORE, Batch, Batches, Example, as_examples, learned_labels, pad
from minilora.data.data_files import DataFiles, check_streamed, streamed
from minilora.data.packing import pack
from minilora.data.records import encode_prompt, encode_records, read_records, warn_of_control
from minilora.data.streaming import Stream, StreamBatches

__all__ = [
    "IGNORE",
    "Batch",
    "Batches",
    "DataFiles",
    "Example",
    "Stream",
    "StreamBatches",
    "as_examples",
    "check_streamed",
    "encode_prompt",
    "encode_records",
    "learned_labels",
    "pack",
    "pad",
    "read_records",
    "streamed",
    "warn_of_control",
]
