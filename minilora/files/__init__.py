"""Files and texts: read with one kind of error, written whole or not at all, worded in one line."""

from minilora.files.json_text import parse_json, read_json, read_json_object, unique_keys
from minilora.files.links import leads_out, open_plain
from minilora.files.tensors import (
    CHECKSUMS,
    Checksums,
    UnwritableError,
    beside,
    is_new,
    leftovers,
    name_beside,
    read_tensors,
    sweep,
    tensor_content,
    tensor_file,
    whole_folder,
    write,
    write_json,
)
from minilora.files.wording import one_line, reading, short

__all__ = [
    "CHECKSUMS",
    "Checksums",
    "UnwritableError",
    "beside",
    "is_new",
    "leads_out",
    "leftovers",
    "name_beside",
    "one_line",
    "open_plain",
    "parse_json",
    "read_json",
    "read_json_object",
    "read_tensors",
    "reading",
    "short",
    "sweep",
    "tensor_content",
    "tensor_file",
    "unique_keys",
    "whole_folder",
    "write",
    "write_json",
]
