"""From a name to a folder: the bundled model, a local folder, or a hub repository at one commit.

Of a hub repository the small files come first and are screened; only then the weights are
downloaded. Each way this can fail has its own code and remedy. Tokens are never printed.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuneflow.config import Model
from finetuneflow.errors import FineTuneFlowError, ModelError
from finetuneflow.models import own, screening
from finetuneflow.models.own import OwnArchitecture
from finetuneflow.workspace import disk_full, require_free_bytes

STARTER = "starter"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")

SMALL_FILES = ("*.json", "*.jinja", "*.txt", "*.model", "*.spm")
WEIGHT_FILES = ("*.safetensors",)
# Sub-folders hold other formats (onnx/, original/); consolidated*.safetensors repeats the weights in a vendor's layout.
NEVER = ("*/*", "consolidated*.safetensors", "adapter_*", *(f"*{suffix}" for suffix in screening.PICKLE_SUFFIXES))


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A base model by name.

    `base`: "starter", a folder, or a hub id such as "Qwen/Qwen3-0.6B". `revision`: branch, tag or commit on the hub.
    `trust_remote_code_revision`: consent to run the repository's own code, valid for exactly this commit
    (for a folder: its digest). `module`: the Python file that brings the architecture (see `own.py`).
    """

    base: str
    revision: str | None = None
    trust_remote_code_revision: str | None = None
    module: str | None = None


def source_of(model: Model, run: Path | None = None) -> ModelSource:
    """The base that a run file names; of a run that has begun, with the run's own copy of a module."""
    module = own.kept_in(run, model.module) if run is not None else model.module
    return ModelSource(model.base, model.revision, model.trust_remote_code, module)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A model folder on this disk, screened. `commit` is the hub's commit, or the digest of a local folder.

    `digest` is over the model's files and, where a module file brings the architecture (`module`), over that file too.
    """

    base: str
    path: Path
    commit: str
    from_hub: bool
    config: dict[str, Any]
    digest: str
    run_own_code: bool
    notes: tuple[str, ...] = ()
    module: OwnArchitecture | None = None


def resolve(source: ModelSource) -> Snapshot:
    """The screened folder that `source` names; downloads it when it is on the hub."""
    if source.base == STARTER:
        from finetuneflow.models.starter import starter_path

        return _local_snapshot(source, Path(starter_path()))
    path = Path(os.path.expanduser(source.base))
    if os.path.isdir(path):  # unlike Path.is_dir, it answers False for names that no file system takes
        return _local_snapshot(source, path)
    if os.path.isfile(path):
        raise ModelError(
            "MODEL_NOT_FOUND", f"{source.base} is a file.", remedy="Name the folder that holds config.json and model.safetensors."
        )
    if not HUB_ID.fullmatch(source.base):
        raise _missing_folder(path)
    return _hub_snapshot(source)


def tokenizer_folder(source: ModelSource) -> tuple[Path, bool]:
    """(folder with the tokenizer of `source`, whether its own code may run); no weights are needed or downloaded.

    An architecture that is not known is no hindrance: a tokenizer does without it.
    """
    path = Path(os.path.expanduser(source.base))
    if source.base == STARTER or os.path.exists(path) or not HUB_ID.fullmatch(source.base):
        if os.path.isdir(path) and (not (path / "config.json").exists() or _is_merely_unknown(path)):
            return path, False  # nothing but a tokenizer in it, or nothing else that is known here
        snapshot = resolve(source)
        return snapshot.path, snapshot.run_own_code
    with hub_errors(source):
        repo = _Repository.look_up(source)
        folder = repo.fetch(SMALL_FILES)
        config = screening.read_model_config(folder, base=source.base)
        _module(source, config)
        return folder, _screen(folder, source, config, commit=repo.commit)


def _is_merely_unknown(folder: Path) -> bool:
    """Whether config.json names an architecture that is not known here, and no file asks for code."""
    from transformers import CONFIG_MAPPING

    config = screening.read_json(folder / "config.json")
    model_type = config.get("model_type") if isinstance(config, dict) else None
    known = model_type in CONFIG_MAPPING or model_type in own.BUILT_IN
    return isinstance(model_type, str) and not known and not screening.code_requests(folder)


def model_files(folder: Path) -> list[Path]:
    """The files of a folder that make up the model: what is hashed."""
    found = {path for pattern in (*SMALL_FILES, *WEIGHT_FILES) for path in folder.glob(pattern)} | set(folder.rglob("*.py"))
    return sorted(path for path in found if path.is_file())


# --- local folders ------------------------------------------------------------------------------


def _local_snapshot(source: ModelSource, path: Path) -> Snapshot:
    config = screening.read_model_config(path, base=source.base)
    digest = screening.folder_digest(path, model_files(path))
    module = _module(source, config)
    own_code = _screen(path, source, config, commit=digest)
    screening.weight_files(path, base=source.base)
    notes = (f"A folder has no revisions; {source.revision!r} was not used.",) if source.revision else ()
    notes = (*notes, *_module_note(module))
    return Snapshot(source.base, path, digest, False, config, _with_module(digest, module), own_code, notes, module)


def _module(source: ModelSource, config: dict[str, Any]) -> OwnArchitecture | None:
    """The architecture that the source's module file brings, seen to be the one the base is of."""
    own.provide_built_in(config.get("model_type"))
    if source.module is None:
        return None
    module = own.provide(source.module)
    own.require_fitting(module, config, base=source.base)
    return module


def _module_note(module: OwnArchitecture | None) -> tuple[str, ...]:
    return (f"The architecture {module.model_type} comes from {module.path} (SHA-256 {module.sha256[:12]}).",) if module else ()


def _with_module(digest: str, module: OwnArchitecture | None) -> str:
    """One identity for weights and the code that gives them their meaning."""
    return digest if module is None else f"sha256:{hashlib.sha256(f'{digest} {module.sha256}'.encode()).hexdigest()}"


def _screen(path: Path, source: ModelSource, config: dict[str, Any], *, commit: str) -> bool:
    """Refuse what is not supported or asks for code; True where the folder's own code, by consent, will run."""
    asks = screening.require_consent(
        path, base=source.base, commit=commit, consent=source.trust_remote_code_revision, provided=source.module is not None
    )
    screening.require_supported(config, base=source.base, own_code=asks)
    from transformers import CONFIG_MAPPING

    return asks and config.get("model_type") not in CONFIG_MAPPING


def _missing_folder(path: Path) -> ModelError:
    parent = path.parent if path.parent.is_dir() else None
    nearby = sorted(p.name for p in parent.iterdir() if p.is_dir()) if parent else []
    nearest = difflib.get_close_matches(path.name, nearby, n=3, cutoff=0.4)
    hint = (
        f"Nearest there: {', '.join(str(path.parent / n) for n in nearest)}."
        if nearest
        else f"{path.parent} holds no similar folder."
    )
    return ModelError("MODEL_NOT_FOUND", f"There is no folder {path}.", remedy=hint, context={"nearest": nearest})


# --- the hub --------------------------------------------------------------------------------------


def _hub_snapshot(source: ModelSource) -> Snapshot:
    from huggingface_hub.errors import HFValidationError

    with hub_errors(source):
        try:
            repo = _Repository.look_up(source)
        except HFValidationError as error:
            raise _missing_folder(Path(source.base)) from error
        if repo.sizes and "adapter_config.json" in repo.sizes and "config.json" not in repo.sizes:
            raise screening.is_adapter(source.base, has_config=False)
        folder = repo.fetch(SMALL_FILES)
        config = screening.read_model_config(folder, base=source.base)
        module = _module(source, config)
        own_code = _screen(folder, source, config, commit=repo.commit)
        if repo.sizes is not None and not any(_is_weights(name) for name in repo.sizes):
            raise screening.no_safetensors(source.base, repo.sizes)
        repo.require_room(folder)
        repo.fetch((*SMALL_FILES, *WEIGHT_FILES, *(("*.py",) if own_code else ())))
        repo.remember_revision()
    screening.weight_files(folder, base=source.base)
    digest = _with_module(screening.folder_digest(folder, model_files(folder)), module)
    notes = (*repo.notes, *_module_note(module))
    return Snapshot(source.base, folder, repo.commit, True, config, digest, own_code, notes, module)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not name.startswith(("consolidated", "adapter_"))


@dataclass(frozen=True, slots=True)
class _Repository:
    """One commit of a hub repository: online, with its files and their sizes in bytes, or from the cache (`sizes` None)."""

    source: ModelSource
    commit: str
    sizes: dict[str, int] | None
    notes: tuple[str, ...] = ()

    @classmethod
    def look_up(cls, source: ModelSource) -> _Repository:
        """Ask the hub which commit is meant; when it does not answer, take what the cache knows."""
        from huggingface_hub import HfApi

        try:
            info = HfApi().model_info(source.base, revision=source.revision, files_metadata=True)
        except Exception as error:
            code = classify(error)
            if code not in ("MODEL_OFFLINE", "MODEL_RATE_LIMITED"):
                raise
            return cls._from_cache(source, error, code)
        return cls(source, str(info.sha), {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []})

    @classmethod
    def _from_cache(cls, source: ModelSource, error: Exception, code: str) -> _Repository:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            folder = snapshot_download(
                source.base, revision=source.revision, local_files_only=True, allow_patterns=["config.json"]
            )
        except LocalEntryNotFoundError:
            raise error from None
        why = "The hub could not be reached" if code == "MODEL_OFFLINE" else "The hub limits the rate of requests"
        return cls(source, Path(folder).name, None, (f"{why}; the cached copy (commit {Path(folder).name[:12]}) is used.",))

    def require_room(self, folder: Path) -> None:
        """Refuse before the download what the disk could not hold."""
        sizes = self.sizes or {}
        missing = sum(size for name, size in sizes.items() if _is_weights(name) and not (folder / name).exists())
        require_free_bytes(_cache_dir(), missing)

    def remember_revision(self) -> None:
        """Write down which commit the branch or tag means, so that the cache can answer by the same name offline.

        Done when all files are there: an interrupted update leaves the older, whole copy in use.
        """
        from huggingface_hub import constants
        from huggingface_hub.file_download import repo_folder_name

        revision = self.source.revision or constants.DEFAULT_REVISION
        if COMMIT.fullmatch(revision) or self.sizes is None:
            return
        refs = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=self.source.base, repo_type="model") / "refs"
        target = refs / revision
        if target.resolve().is_relative_to(refs.resolve()):
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(self.commit)

    def fetch(self, patterns: tuple[str, ...]) -> Path:
        """Download (or find in the cache) the files of this commit that match; interrupted downloads are continued."""
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            self.source.base,
            revision=self.commit,
            allow_patterns=list(patterns),
            ignore_patterns=list(NEVER),
            local_files_only=self.sizes is None,
        )
        return Path(folder)


# --- what went wrong ------------------------------------------------------------------------------


@contextlib.contextmanager
def hub_errors(source: ModelSource) -> Iterator[None]:
    """Turn whatever the hub's client raises into one `ModelError` with its own code and remedy."""
    try:
        yield
    except FineTuneFlowError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise disk_full(_cache_dir()) from error
        raise hub_error(source, error) from error
    except Exception as error:
        if classify(error) is None:
            raise
        raise hub_error(source, error) from error


def _cache_dir() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def classify(error: BaseException) -> str | None:
    """The code for an error of the hub's client, looking through its chain of causes; None for anything else."""
    from huggingface_hub import errors

    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, errors.GatedRepoError):
            return "MODEL_ACCESS_DENIED"
        if isinstance(link, errors.RepositoryNotFoundError | errors.RevisionNotFoundError | errors.RemoteEntryNotFoundError):
            return "MODEL_NOT_FOUND"
        status = getattr(getattr(link, "response", None), "status_code", None)
        if status is not None:
            return _by_status(status)
    if any(_is_connection_trouble(link) for link in chain):
        return "MODEL_OFFLINE"
    return None


def _by_status(status: int) -> str:
    known = {401: "MODEL_ACCESS_DENIED", 403: "MODEL_ACCESS_DENIED", 404: "MODEL_NOT_FOUND", 429: "MODEL_RATE_LIMITED"}
    return known.get(status, "MODEL_OFFLINE")


def _is_connection_trouble(error: BaseException) -> bool:
    from huggingface_hub import errors

    if isinstance(error, ConnectionError | TimeoutError | errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        return True
    return type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore", "httpcore2")


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    for _ in range(12):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


def hub_error(source: ModelSource, error: BaseException) -> ModelError:
    """The message a user can act on."""
    code = classify(error) or "MODEL_OFFLINE"
    base, page = source.base, f"{_endpoint()}/{source.base}"
    context: dict[str, Any] = {"base": base, "revision": source.revision}
    if code == "MODEL_ACCESS_DENIED":
        have = "A token was sent, but it does not open this model." if _has_token() else "No token is set."
        message = f"The hub refuses access to {base}: it is gated or private. {have}"
        remedy = (
            f"Open {page}, sign in and accept the licence; then give your token with `hf auth login` or the environment variable HF_TOKEN "
            "(a fine-grained token needs the right to read gated repositories)."
        )
    elif code == "MODEL_NOT_FOUND":
        return _not_on_hub(source, error, context)
    elif code == "MODEL_RATE_LIMITED":
        wait = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After")
        message = f"The hub limits the rate of requests and did not serve {base}."
        remedy = f"Wait {wait + ' seconds' if wait else 'a few minutes'} and try again; signed-in users (`hf auth login`) have a higher limit."
    else:
        message = f"The hub could not be reached, and {base} is not (wholly) in the cache."
        remedy = (
            f"Check the connection to {_endpoint()} (proxy, firewall, HF_ENDPOINT, HF_HUB_OFFLINE) and try again: files that are complete are kept; "
            "or name a local folder; or use the bundled model 'starter'."
        )
    return ModelError(code, message, remedy=remedy, context=context)


def _not_on_hub(source: ModelSource, error: BaseException, context: dict[str, Any]) -> ModelError:
    from huggingface_hub.errors import RevisionNotFoundError

    if any(isinstance(link, RevisionNotFoundError) for link in _chain(error)):
        return ModelError(
            "MODEL_NOT_FOUND",
            f"{source.base} has no revision {source.revision!r}.",
            remedy=f"Leave the revision out for the newest one, or pick a branch, tag or commit from {_endpoint()}/{source.base}/commits/main.",
            context=context,
        )
    nearest = _nearest_on_hub(source.base)
    hint = f"Did you mean {', '.join(nearest)}? " if nearest else ""
    return ModelError(
        "MODEL_NOT_FOUND",
        f"There is neither a folder nor a hub model named {source.base}.",
        remedy=f"{hint}Check the spelling (owner/name, or a path); if the model is private, give a token with `hf auth login` or HF_TOKEN.",
        context=context | {"nearest": nearest},
    )


def _nearest_on_hub(base: str) -> list[str]:
    """Names like `base`, from the hub's search and the cache; empty when nobody answers."""
    from huggingface_hub import HfApi

    known = cached_models()
    with contextlib.suppress(Exception):  # a hint only: no failure here may hide the real message
        known += [model.id for model in HfApi().list_models(search=base.rsplit("/", 1)[-1], limit=20)]
    return difflib.get_close_matches(base, sorted(set(known)), n=3, cutoff=0.4)


def cached_models() -> list[str]:
    """Ids of the hub models in this user's cache."""
    return [path.name.removeprefix("models--").replace("--", "/") for path in _cache_dir().glob("models--*")]


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None
