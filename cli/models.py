"""From what ``--model`` says to a directory with a model."""

import errno
import os
import re
from dataclasses import dataclass
from pathlib import Path

from cli.errors import CommandFailed
from shared.config import BUNDLED_MODEL

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What serving needs: no pickled weights, no other frameworks' formats, no code."""
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model on this machine, and the name that it is served under unless told otherwise."""

    directory: Path
    name: str


def resolve_model(model: str | None) -> Model:
    """The model that ``--model`` names: none, a directory, or the id of one on the Hub.

    One on the Hub is downloaded unless it is in the cache already; the progress is shown on stderr.
    Raises ``CommandFailed`` if there is no such model, or it is not one that can be served.
    """
    if model is None:
        return _checked(BUNDLED_MODEL, BUNDLED_MODEL.name)
    path = Path(os.path.expanduser(model))  # unlike Path's, it leaves an unknown ~user alone
    if path.is_dir():
        path = path.resolve()
        return _checked(path, path.name)
    if not _HUB_ID.fullmatch(model) or path.exists():
        raise CommandFailed(
            f"--model={model}: neither a directory nor a Hugging Face id like Qwen/Qwen3-0.6B"
        )
    return _checked(_fetch(model), model)


def _checked(directory: Path, name: str) -> Model:
    if not (directory / "config.json").is_file():
        raise CommandFailed(
            f"{directory}: no config.json, so not a model in Hugging Face form; give the directory "
            "that has it, or a Hugging Face id like Qwen/Qwen3-0.6B"
        )
    weights = sorted(directory.glob("*.safetensors"))
    if not weights:
        raise CommandFailed(
            f"{directory}: no *.safetensors; weights in other formats are not read, transformers "
            "writes these with model.save_pretrained(DIRECTORY)"
        )
    for file in weights:
        with file.open("rb") as data:
            if data.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise CommandFailed(
                    f"{file}: only a pointer of Git LFS; fetch the file itself with `git lfs pull`"
                )
    return Model(directory=directory, name=name)


def _fetch(hub_id: str) -> Path:
    """The files of ``hub_id`` in the cache, downloaded if they are not there."""
    from huggingface_hub import errors, snapshot_download

    # What the hub's HTTP client raises when the network fails in the middle.
    network_error: type[Exception] = getattr(errors, "HTTPError", errors.HfHubHTTPError)
    what = f"--model={hub_id}"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except errors.HFValidationError as error:
        raise CommandFailed(f"{what}: not a Hugging Face id like Qwen/Qwen3-0.6B") from error
    except errors.GatedRepoError as error:
        raise CommandFailed(
            f"{what}: access must be asked for at https://huggingface.co/{hub_id}; "
            "then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CommandFailed(
            f"{what}: there is no such directory here, and no such model on the Hugging Face Hub "
            "(if it is private, log in with `hf auth login`)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, network_error) as error:
        raise CommandFailed(
            f"{what}: the Hugging Face Hub cannot be reached, and the model is not in the cache "
            f"({_first_line(error.__cause__ or error)}). Check the network, or give a directory"
        ) from error
    except OSError as error:
        hint = "free some room" if error.errno == errno.ENOSPC else "see that it can be written"
        raise CommandFailed(
            f"{what}: cannot be kept ({error}); {hint}, or let HF_HOME name another directory"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0]
