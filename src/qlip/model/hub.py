"""A checkpoint's files from the Hugging Face hub and to it, through its own client and cache.

The client's environment variables hold as everywhere: HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME, HF_TOKEN.
"""

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from qlip.errors import InputError, one_line
from qlip.guarded import weight_files

CONFIG, WEIGHTS, PREPROCESSOR = "config.json", "model.safetensors", "preprocessor_config.json"
INDEX = f"{WEIGHTS}.index.json"  # of weights in shards
COMPANIONS = (
    PREPROCESSOR,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
"""What a checkpoint may lack: how to prepare pictures, and the text vocabulary."""

EXPORT = "export.json"
"""What a folder has that holds a tokenizer as programs for other runtimes."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def fetch(repo: str, revision: str | None = None, sharded: bool = False) -> Path:
    """Bring a checkpoint into the hub's cache; what is there already is not fetched again.

    Without a connection, or in offline mode, the cache alone serves.

    Args:
        repo: "owner/name".
        revision: branch, tag or commit; the main branch by default.
        sharded: whether the weights may be in several files, as those of language models are.

    Returns:
        The folder of the files, all of one commit.

    Raises:
        InputError: the hub, the repository, the revision or a needed file cannot be had; names it.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RemoteEntryNotFoundError

    with _explained(repo, CONFIG, revision):
        folder = Path(hf_hub_download(repo, CONFIG, revision=revision)).parent
    commit = folder.name  # from here on by the commit: a branch may move while files come in
    _fetch_companions(repo, folder)
    index = None
    with _explained(repo, INDEX, commit), suppress(EntryNotFoundError):
        index = hf_hub_download(repo, INDEX, revision=commit) if sharded else None
    if index:
        with _explained(repo, INDEX, commit):
            shards = weight_files(Path(index))
        for shard in shards:
            with _explained(repo, shard, commit):
                hf_hub_download(repo, shard, revision=commit)
        return folder
    with _explained(repo, WEIGHTS, commit):
        try:
            hf_hub_download(repo, WEIGHTS, revision=commit)
        except RemoteEntryNotFoundError as error:
            raise no_weights(repo, HfApi().list_repo_files(repo, revision=commit)) from error
    return folder


def upload(
    folder: Path, files: Sequence[str], repo: str, private: bool, revision: str | None, message: str
) -> str:
    """Put files of a folder into a repository, which is made if need be.

    Args:
        folder: where they lie.
        files: their names; what is in the repository besides stays.
        repo: "owner/name".
        private: let only its owner see it.
        revision: branch, made if need be; the main one by default.
        message: of the commit.

    Returns:
        the page of the repository.

    Raises:
        InputError: there is no token, it may not write there, or the hub cannot be reached; or the repository is
            there already and public, and `private` is asked for.
    """
    from huggingface_hub import HfApi, constants, get_token

    hub = constants.ENDPOINT
    if repo.count("/") != 1:
        raise InputError(f"{repo!r} is no name for a repository: use owner/name")
    if not get_token():
        raise InputError(f"you have no token of {hub}: run `hf auth login`, or set HF_TOKEN")
    api = HfApi(endpoint=hub)
    try:
        api.create_repo(repo, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo).private:
            raise InputError(f"{repo} is there already and public: make it private first, or use another name")
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            allow_patterns=list(files),
            revision=revision,
            commit_message=message,
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(_refusal(error, repo)) from error
    return f"{hub}/{repo}" + (f"/tree/{revision}" if revision else "")


def no_weights(place: str, files: Iterable[str]) -> InputError:
    """What is wrong with a place that has no `model.safetensors`, by the files that it has."""
    files = sorted(files)
    if EXPORT in files:
        return InputError(
            f"{place} holds an export and no {WEIGHTS}: pass the tokenizer that it was made from, "
            "or to `qlip tokenize` --engine onnx"
        )
    if INDEX in files:
        return InputError(f"{place} has its weights in shards: join them into one {WEIGHTS}")
    if pickles := [file for file in files if file.endswith(PICKLES)]:
        return InputError(f"{place} has {pickles[0]} and no {WEIGHTS}: {conversion(pickles[0], WEIGHTS)}")
    return InputError(f"{place} has no {WEIGHTS}: it is no QLIP checkpoint, or not all of one")


def conversion(pickle: str, target: str) -> str:
    """Why a pickle is refused, and the line that makes a safetensors file of it."""
    return (
        "loading a pickle can run any code, so convert it once with "
        "import torch; from functools import reduce; from safetensors.torch import save_file; "
        f"s = torch.load({pickle!r}, map_location='cpu', weights_only=True); "
        "s = reduce(lambda s, k: s[k] if isinstance(s.get(k), dict) else s, "
        "('state_dict', 'model_state_dict', 'module', 'model') * 2, s); "
        "s = {k.removeprefix('module.'): v.contiguous().clone() for k, v in s.items() if torch.is_tensor(v)}; "
        f"assert s, 'no tensors found'; save_file(s, {target!r})"
    )


def _fetch_companions(repo: str, folder: Path) -> None:
    """Fetch them before the weights, so that a cache with weights is known to have all that there is."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    commit = folder.name
    for file in COMPANIONS:
        if try_to_load_from_cache(repo, file, revision=commit) is not None:
            continue  # there, or known to be nowhere
        with _explained(repo, file, commit):
            try:
                hf_hub_download(repo, file, revision=commit)
            except RemoteEntryNotFoundError:
                continue
            except LocalEntryNotFoundError:  # no connection
                if not (folder / WEIGHTS).exists() and not (folder / INDEX).exists():
                    raise
                return


@contextmanager
def _explained(repo: str, file: str, revision: str | None) -> Iterator[None]:
    """Make an InputError of whatever the client raises; it lets its HTTP library's and hf_xet's errors through."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(_explanation(error, repo, file, revision)) from error


def _explanation(error: Exception, repo: str, file: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    hub, is_away = constants.ENDPOINT, isinstance(error, errors.LocalEntryNotFoundError)
    cause = (is_away and error.__cause__) or error  # why it had to look in its cache
    reason = one_line(cause)[:300]
    match cause:
        case errors.GatedRepoError():
            return f"{repo} is gated: accept its terms at {hub}/{repo}, then run `hf auth login`"
        case errors.RepositoryNotFoundError():
            return (
                f"{repo} is neither a folder here nor a public repository at {hub}: check the name, "
                "or run `hf auth login` if it is private"
            )
        case errors.RevisionNotFoundError():
            return f"{repo} has no revision {revision!r}: use a branch, tag or commit of {hub}/{repo}"
        case errors.RemoteEntryNotFoundError():
            return f"{repo} has no {file}: it is no QLIP checkpoint, or not all of one"
        case errors.OfflineModeIsEnabled():
            return (
                f"{repo} is no folder here, and its {file} is not in the cache ({constants.HF_HUB_CACHE}): "
                "unset HF_HUB_OFFLINE to fetch it"
            )
        case errors.HfHubHTTPError() if cause.response.status_code in (401, 403):
            return f"{hub} denies access to {file} of {repo} ({reason}): run `hf auth login`"
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"{constants.HF_HUB_CACHE} has no room for {file} of {repo}: free some, or set HF_HOME"
        case _ if is_away:
            return (
                f"{repo} is no folder here, and {hub} does not give its {file} ({reason}): "
                "check the network, or pass a local folder"
            )
    return f"{file} of {repo} cannot be fetched ({reason}): try again, or pass a local folder"


def _refusal(error: Exception, repo: str) -> str:
    """Why the hub did not take an upload."""
    from huggingface_hub import constants, errors

    hub, reason = constants.ENDPOINT, one_line(error)[:300]
    match error:
        case errors.OfflineModeIsEnabled():
            return f"{repo} cannot be written to in offline mode: unset HF_HUB_OFFLINE"
        case errors.HFValidationError():
            return f"{repo!r} is no name for a repository ({reason}): use owner/name"
        case errors.HfHubHTTPError() if error.response.status_code == 401:
            return f"{hub} does not know your token ({reason}): run `hf auth login`, or set HF_TOKEN"
        case errors.HfHubHTTPError() if error.response.status_code in (403, 404):
            return (
                f"{hub} does not let you write to {repo} ({reason}): use a token with the right to write, "
                "or a repository of your own"
            )
        case errors.HfHubHTTPError():
            return f"{hub} does not take {repo} ({reason}): try again"
    return f"{repo} cannot be uploaded to {hub} ({reason}): check the network, and try again"
