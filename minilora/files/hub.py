"""Names on the Hugging Face hub: `owner/name`, `owner/name@revision`, `owner/name:file.gguf`.

What they stand for is downloaded by huggingface_hub into its own cache, shared with transformers
and PEFT, and read from there where there is no network. A folder or file of a name goes first.
"""

import functools
import glob
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from minilora.files.extras import import_extra
from minilora.files.wording import nearest_file, one_line, short

_NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([^\s:@]+))?(?::([^:]+\.gguf))?")
_CACHED = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]([^/\\]+)[/\\]?(.+\.gguf)?$")
_OF_FILES = (".gguf", ".json", ".safetensors")


class HubName(NamedTuple):
    """A model or adapter on the hub.

    Attributes:
        repo: `owner/name`.
        revision: a branch, tag or commit; None is the newest.
        file: a GGUF file in it; None where its own files are meant.
    """

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repo + revision + (f":{self.file}" if self.file else "")


def on_hub(source: str | Path) -> HubName | None:
    """Return what a name says that can only be of the hub: nothing of that name is here."""
    text = source.as_posix() if isinstance(source, Path) else source
    found = _NAME.fullmatch(text)
    if found is None or found[1].endswith(_OF_FILES) or Path(source).exists():
        return None
    return HubName(*found.groups())


def absent(source: str | Path) -> str:
    """Say that nothing of a name is here, and what is most like it."""
    return f"found no folder or file {short(str(source))}{nearest_file(source)}"


def plain_path(source: str) -> str:
    """Return a path that from no folder is taken for a name on the hub, as `models/tiny` would."""
    return f"./{source}" if _NAME.fullmatch(source) and Path(source).exists() else source


def cached_name(path: str | Path) -> HubName | None:
    """Return the name on the hub of a folder or GGUF file in huggingface_hub's cache."""
    found = _CACHED.search(str(path))
    return found and HubName(found[1].replace("--", "/", 1), found[2], found[3])


def download(name: HubName, wanted: Iterable[str], needed: Iterable[str] = ()) -> Path:
    """Bring files of a repository into huggingface_hub's cache, those alone that are not there.

    Args:
        name: of the repository.
        wanted: paths in it; those that it does not have are left out.
        needed: further ones that it must have.

    Returns:
        The folder in the cache that holds them.

    Raises:
        ValueError: there is no such repository or revision, or a needed file is missing.
        RuntimeError: huggingface_hub is missing, the hub can't be reached or refuses, or the disk
            can't take the files.
    """
    hub = import_extra("huggingface_hub", f"{absent(str(name))}; reading it from the hub")
    needed = list(needed)
    patterns = [glob.escape(file) for file in (*wanted, *needed)]
    try:
        folder = Path(
            hub.snapshot_download(name.repo, revision=name.revision, allow_patterns=patterns)
        )
    except Exception as error:  # its own classes, its HTTP library's and OSError
        raise _explained(name, error) from error
    missing = [file for file in needed if not (folder / file).is_file()]
    if missing:
        raise ValueError(
            f"'{name}' must hold {', '.join(missing[:3])}, found no such file on the hub or, "
            f"without a network, in the cache; see {_page(name)}"
        )
    return folder


def download_data(name: HubName, choose: Callable[..., list[str]]) -> list[Path]:
    """Bring files of a data set into huggingface_hub's cache and return where they are.

    Args:
        name: of the data set.
        choose: says which of the paths in it are wanted; those that are there are read from the
            cache where there is no network, and `whole=False` is passed.

    Raises:
        ValueError, RuntimeError: as `download`, and what `choose` raises.
    """
    hub = import_extra("huggingface_hub", f"{absent(str(name))}; reading it from the hub")
    where: dict[str, Any] = {"repo_type": "dataset", "revision": name.revision}
    try:
        paths = hub.HfApi().list_repo_files(name.repo, **where)
    except Exception as error:  # its own classes, its HTTP library's and OSError
        try:  # without a network: what has come before
            none = {"allow_patterns": ["-"], "local_files_only": True}  # else it must be whole
            cached = Path(hub.snapshot_download(name.repo, **none, **where))
        except Exception:
            raise _explained(name, error) from error
        paths = [file.relative_to(cached).as_posix() for file in cached.rglob("*")]
        choose = functools.partial(choose, whole=False)
    wanted = choose(paths)
    patterns = [glob.escape(path) for path in wanted]
    try:
        folder = hub.snapshot_download(name.repo, allow_patterns=patterns, **where)
    except Exception as error:
        raise _explained(name, error) from error
    return [Path(folder, path) for path in wanted]


def _page(name: HubName) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name.repo}"


def _explained(name: HubName, error: Exception) -> Exception:
    """Return an error of huggingface_hub as one line that says what to do."""
    from huggingface_hub import errors

    near = nearest_file(str(name), " (did you mean ")
    here = f"found no folder or file '{name}' here{near and f'{near}?)'}"
    login = "`hf auth login`, or set HF_TOKEN"
    cause: Any = error
    while cause.__cause__ is not None and not isinstance(cause, errors.HfHubHTTPError):
        cause = cause.__cause__
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if isinstance(cause, errors.GatedRepoError):
        return RuntimeError(
            f"'{name.repo}' is gated: accept its conditions at {_page(name)}, then log in with "
            f"{login} to a token that may read it"
        )
    if isinstance(cause, errors.RepositoryNotFoundError):
        return ValueError(
            f"{here}, and the hub has no '{name.repo}' that you may read; check the name, and for "
            f"a private one log in with {login}"
        )
    if isinstance(cause, errors.RevisionNotFoundError):
        return ValueError(
            f"'{name.repo}' has no revision '{name.revision}'; see {_page(name)}/commits/main"
        )
    if isinstance(error, errors.HFValidationError):
        return ValueError(f"{here}, and that is no name of the hub: {one_line(error, 200)}")
    if status in (401, 403):
        return RuntimeError(
            f"the hub refuses '{name.repo}' to your token ({status}); log in with {login}"
        )
    why = one_line(f"{type(cause).__name__}: {cause}", 200)
    if isinstance(cause, errors.OfflineModeIsEnabled):
        why = "HF_HUB_OFFLINE is set"
    elif status is not None:
        why = f"it answered {status}"
    return RuntimeError(
        f"{here}, nor all of it in the cache, and it could not be downloaded ({why}); try again "
        f"with a network: what was downloaded is kept"
    )
