"""An exported folder to a repository on the hub: private unless asked otherwise; nothing there is deleted."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_dpo import __version__
from lora_dpo.errors import RunError, UserError
from lora_dpo.export.card.names import paths_in, without_tokens
from lora_dpo.training import Display

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
"""Ends of files that transformers and PEFT load weights by."""
TELLING = ("adapter_config.json", "trained_on.json", "config.json", "export_report.json", "Modelfile")
"""Files in which a path of the user's machine may stand."""
NAMED = 5
"""So many files are named; of more there is a count."""


def check_push(repo_id: str) -> str:
    """The access token that a push to this repository takes; asked before anything is made or sent.

    Raises RunError for a name that is none, in offline mode, and where there is no token.
    """
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if repo_id.count("/") > 1:
        raise RunError(
            f"--push {repo_id!r} is no name of a repository: it has more than one /; give user/name"
        )
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise RunError(f"--push {repo_id!r} is no name of a repository (user/name): {error}") from None
    if "/" not in repo_id:
        raise RunError(f"--push {repo_id!r} names no user or organization: give user/name")
    if constants.is_offline_mode():
        raise RunError("--push needs the network, which HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids")
    try:
        token = get_token()
    except Exception as error:  # a keyless login that was asked for and fails
        raise RunError(f"--push gets no access token: {_cause(error)}") from error
    if not token:
        raise RunError(
            "--push needs an access token of the hub that may write: run `hf auth login`, or set HF_TOKEN"
        )
    return token


def push(folder: Path, repo_id: str, *, public: bool = False, display: Display) -> str:
    """Upload an exported folder's files to a model repository; returns its address.

    A repository that isn't there is made, private unless `public`. In one that is there, files of the same
    name are replaced, which is said, and nothing is deleted. Raises RunError where it is public without
    `public`, where it holds other weights that loaders would mix with these, and for whatever the hub or the
    network refuse; the folder stays as it is.
    """
    token = check_push(repo_id)
    files = own_files(folder)
    from huggingface_hub import HfApi

    api = HfApi(token=token, library_name="lora_dpo", library_version=__version__)
    try:
        there = _existing(api, repo_id)
        if there is not None:
            _check_existing(there, repo_id, files, public, display)
        for file, path in _told_paths(folder):
            display.say(f"note: {file} names {path}, a path of this machine, and is uploaded as it is")
        url = api.create_repo(repo_id, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=f"lora_dpo {__version__}")
    except UserError:
        raise
    except Exception as error:  # the hub, the network and the uploader have many ways to fail
        raise RunError(f"{folder} is exported, but not pushed to {repo_id}: {_cause(error)}") from error
    return str(url)


def own_files(folder: Path) -> set[str]:
    """The names of all files in an exported folder, with slashes.

    Raises RunError where it holds none, or something that leads elsewhere.
    """
    found = sorted(folder.rglob("*")) if folder.is_dir() else []
    for path in found:
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            name = path.relative_to(folder)
            raise RunError(f"{folder} is not pushed: {name} in it is no ordinary file and may lead elsewhere")
    files = {path.relative_to(folder).as_posix() for path in found if path.is_file()}
    if not files:
        raise RunError(f"{folder} is not pushed: there are no files in it")
    return files


def _existing(api: HfApi, repo_id: str) -> ModelInfo | None:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return api.model_info(repo_id)
    except GatedRepoError:  # it is there, and isn't this user's
        raise
    except RepositoryNotFoundError:
        return None


def _check_existing(
    there: ModelInfo, repo_id: str, files: Collection[str], public: bool, display: Display
) -> None:
    """Raise RunError where pushing would publish what wasn't meant to be public, or mix two models; say what
    is replaced.
    """
    if not there.private and not public:
        raise RunError(
            f"{repo_id} is there already and public: add --public if that is meant, or name another"
        )
    if there.private and public:
        display.say(f"{repo_id} is private and stays so: it is made public in its settings on the hub")
    names = {item.rfilename for item in there.siblings or ()}
    if any(name.endswith(WEIGHTS) for name in files):
        others = sorted(n for n in names - set(files) if n.endswith(WEIGHTS) and "/" not in n)
        if others:
            raise RunError(
                f"{repo_id} holds other weights ({_listed(others)}), which would lie beside these and be"
                " mixed with them: delete them there, or name another repository"
            )
    replaced = sorted(names & set(files))
    if replaced:
        display.say(f"replaced in {repo_id}: {_listed(replaced)}; its history keeps what was there")


def _listed(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _told_paths(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, path) for paths of this machine that the folder's files name."""
    for name in TELLING:
        try:
            text = (folder / name).read_text(encoding="utf-8")
        except (OSError, ValueError):
            continue
        yield from ((name, path) for path in dict.fromkeys(paths_in(text)))


def _cause(error: Exception) -> str:
    """What went wrong, on one line: the hub's own words where it has some."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hint = {
            401: "it does not know the token: run `hf auth login` again, or set another HF_TOKEN",
            403: "the token may not write there",
        }.get(status)
        said = " ".join((error.server_message or "").split())
        return without_tokens("; ".join(part for part in (f"the hub answers {status}", hint, said) if part))
    lines = [f"{type(error).__name__}: {line}" if line else type(error).__name__ for line in _lines(error)]
    return without_tokens("; ".join(dict.fromkeys(lines)))


def _lines(error: BaseException | None) -> Iterator[str]:
    """The first line of an error's message, and of what it was raised from."""
    while error is not None:
        yield next(iter(str(error).strip().splitlines()), "")
        error = error.__cause__
