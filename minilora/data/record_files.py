"""Training records from files and folders: all at once, or one by one."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minilora.data.docstrings import built_in
from minilora.data.encoder import Encoding
from minilora.data.problems import Problem, refuse
from minilora.data.readers import READERS, Row, rows_of, suffix_of
from minilora.data.recognition import resolve
from minilora.files import HubName, download_data, nearest_file, on_hub, read_json

_WHOLE = (".txt", ".json")  # read at once
_SETS = {
    "train": "training",
    "test": "test",
    **dict.fromkeys(("valid", "validation", "dev", "eval"), "validation"),
}
_ABOUT = ("dataset_info.json", "dataset_infos.json", "state.json")
_SPLITS = "dataset_dict.json"  # of Hugging Face datasets, in a folder with one for each split


def files_in(paths: Sequence[str | Path]) -> list[Path]:
    """Return the files, and for a folder those in it, in order of their names.

    Of a folder that Hugging Face datasets saved with splits, and of a data set of the hub, `train`
    is taken.

    Raises:
        FileNotFoundError: nothing of this name.
        ValueError: a folder without any.
        RuntimeError: a data set that can't be downloaded.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if hub := _on_hub(path):
            found += download_data(hub[0], functools.partial(_of_hub, str(path), hub[1]))
            continue
        if not path.is_dir():
            if not (path.exists() or str(path).startswith("@")):
                raise FileNotFoundError(f"found no file {str(path)!r}{nearest_file(path)}")
            found.append(path)
            continue
        folder = path / "train" if (path / _SPLITS).is_file() else path
        inside = [file for file in _listed(folder) if file.is_file() and _is_data(file)]
        tables = [file for file in inside if ".txt" not in file.suffixes]
        inside = tables or inside  # a text beside records is a licence, or says what they are
        if not inside:
            within = [each.name for each in _listed(folder) if each.is_dir()]
            hint = f"; name one of its folders: {', '.join(within[:5])}" if within else ""
            raise ValueError(
                f"{folder}: a folder must hold files of data ({', '.join(READERS)}), found "
                f"none{hint}"
            )
        _check_one_set(str(folder), inside, "name the files to read")
        numbered = [file.name for file in inside if _stem(file.name)[1]]  # as the hub's are
        if len(sets := _training_sets(numbered)) > 1:
            raise ValueError(
                f"{folder} must hold one training set, found {', '.join(sets[:6])}; name the files "
                f"of one, as in {folder / sets[0]}-*"
            )
        found += inside
    return found


def unread_in(paths: Sequence[str | Path], found: Sequence[Path]) -> list[str]:
    """Return what `files_in` left out of folders, but for hidden files and descriptions."""
    read = [file.parts for file in found]
    return [
        str(each)
        for path in map(Path, paths)
        if path.is_dir()
        for each in sorted(path.iterdir())
        if not each.name.startswith(".") and each.name not in (*_ABOUT, _SPLITS)
        if not any(file[: len(each.parts)] == each.parts for file in read)
    ]


def _check_one_set(name: str, files: Sequence[Path], to_do: str) -> None:
    """Refuse files of which some are held out by their names, and others are not."""
    splits = {_split(file) or "other" for file in files}
    if len(splits) > 1 and splits - {"training", "other"}:
        named = ", ".join(file.name for file in files[:6])
        raise ValueError(
            f"{name}: the files of a folder are read as one set, found by their names "
            f"{' and '.join(sorted(splits))} data ({named}); {to_do}"
        )


def _on_hub(path: Path) -> tuple[HubName, str] | None:
    """Return the data set of the hub that a name means, `owner/name` or a folder in it, or None."""
    first, *rest = path.parts or ("",)
    is_file = path.suffix.lower() in (*READERS, ".gz")
    if not rest or is_file or path.exists():
        return None
    name = on_hub("/".join((first, rest[0])))
    return None if name is None else (name, "/".join(rest[1:]))


def _of_hub(name: str, folder: str, paths: list[str], whole: bool = True) -> list[str]:
    """Return which files of a data set on the hub are read: those of its training split.

    `folder` may also be a file without what tells its parts and kind apart, as `data/train_sft`.
    `whole` is whether these are all of its paths, and not what was fetched before.
    """
    inside = [
        path
        for path in paths
        if not folder or path.startswith(f"{folder}/") or _stem(path)[0] == folder
    ]
    data = [path for path in inside if _is_data(Path(path))]
    data = [path for path in data if ".txt" not in Path(path).suffixes] or data
    data = [path for path in data if _split(Path(path)) == "training"] or data
    parents = sorted({Path(path).parent.as_posix() for path in data})
    if len(parents) != 1:
        found = f"them in {', '.join(parents[:6])}" if parents else f"none of {', '.join(READERS)}"
        raise ValueError(
            f"'{name}' must be a data set of the hub, or a folder of one, with files of data in "
            f"one place, found {found}; name one as OWNER/NAME/FOLDER"
        )
    _check_one_set(name, list(map(Path, data)), "download them, and name the files to read")
    if len(sets := _training_sets(data)) > 1:
        raise ValueError(
            f"'{name}' must have one training set, found {', '.join(sets[:6])}; name one as "
            f"OWNER/NAME/{sets[0]}"
        )
    cut_short = any(len(data) < _stem(path)[1] for path in data)
    held_out = not folder and _split(Path(data[0])) in ("test", "validation")
    if not whole and (cut_short or held_out):
        raise ValueError(
            f"'{name}': the hub can't be reached, and of its files these alone were fetched "
            f"before: {', '.join(sorted(data)[:3])}; connect, or name a folder or set "
            f"(OWNER/NAME/FOLDER)"
        )
    return sorted(data)


def _training_sets(paths: Sequence[str]) -> list[str]:
    """Return the sets that training files are parts of, by what their paths begin with."""
    return sorted({_stem(path)[0] for path in paths if _split(Path(path)) == "training"})


def _stem(path: str) -> tuple[str, int]:
    """Return a file's path but for its part's number and its kind, and of how many it is one."""
    number = r"(?:[-_.]?\d+(?:-of-(\d+)(?:-[0-9a-f]{16})?)?)?"  # and a part's hash
    found = re.fullmatch(rf"(.*?){number}(?:\.[A-Za-z]+)+", path)
    return (found[1], int(found[2] or 0)) if found else (path, 0)


def _split(file: Path) -> str | None:
    """Return the set that a file's name says it is of, None where it says nothing."""
    words = re.split(r"[^a-z]+", file.name.lower())
    return next((name for word, name in _SETS.items() if word in words), None)


def _listed(folder: Path) -> list[Path]:
    """Return the files of a folder; of one that datasets saved those that it names, no caches."""
    state = folder / "state.json"
    if not state.is_file():
        return sorted(folder.iterdir())
    names = [each.get("filename") for each in read_json(state).get("_data_files") or []]
    return [folder / Path(str(name)).name for name in names]


def _is_data(file: Path) -> bool:
    # Hugging Face datasets keep descriptions beside the data.
    hidden = file.name.startswith(".") or file.name in _ABOUT
    return not hidden and suffix_of(file) in READERS


def read_rows(
    paths: Sequence[str | Path], options: Encoding
) -> tuple[list[tuple[str, dict[str, Any]]], list[Problem], list[str]]:
    """Return the records of files with their places, the rows that were left out, and notes."""
    rows: list[tuple[str, dict[str, Any]]] = []
    problems: list[Problem] = []
    unreadable: list[Problem] = []
    notes: list[str] = []
    for file in map(Path, paths):
        try:
            for where, row in checked(file, options):
                if isinstance(row, ValueError):
                    problems.append((where, str(row)))
                elif isinstance(row, UserWarning):
                    notes.append(f"{where}: {row}")
                else:
                    rows.append((where, row))
        except ValueError as error:
            unreadable.append((str(file), str(error)))
    refuse(unreadable, "cannot read the data")
    refuse(problems, "cannot read the data", options.skip_bad, len(rows) + len(problems))
    return rows, problems, notes


def checked(file: Path, options: Encoding) -> Iterator[Row]:
    """Yield the rows of a file; those whose shape is wrong as the ValueError that says so."""
    name = str(file)
    for where, row in built_in(name) if name.startswith("@") else rows_of(file):
        try:
            if not isinstance(row, (ValueError, UserWarning)):
                shape, record = resolve(row, options.fields)
                shape.check(record)
            yield where, row
        except ValueError as error:
            yield where, error


def check_streamed(files: Sequence[str | Path]) -> None:
    """Raise ValueError unless all files are there and can be read row by row."""
    for file in files_in(files):
        if str(file).startswith("@"):
            continue
        if suffix_of(file) not in READERS or suffix_of(file) in _WHOLE:
            rows = ", ".join(kind for kind in READERS if kind not in _WHOLE)
            raise ValueError(f"{file}: only {rows} files can be streamed; leave --stream away")
        if not file.is_file():
            raise ValueError(f"{file}: must be a regular file, found another kind there")
