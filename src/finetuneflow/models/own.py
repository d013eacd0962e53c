"""Models of one's own: a Python file with a config class and a model class, named in the run file by `model.module`.

    provide(path)  ->  run the file once, see what it registers with transformers' Auto classes  ->  OwnArchitecture
    check_model (trial.py)  ->  a loaded model does what the rest relies on
    keep_module / kept_in  ->  the copy in a run directory, by which a finished run is found again

To name a file is to consent to running it, with your rights; no file of a model folder is ever run this way. The bytes
that are hashed are the bytes that are run. `docs/custom-models.md` says what such a file holds. Our own architectures
(`BUILT_IN`) are registered here too, when a base asks for one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import json
import os
import re
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetuneflow.errors import ModelError
from finetuneflow.knowledge.shapes.headers import STATED
from finetuneflow.workspace import write_json

# Architectures that come with FineTuneFlow: model type -> module with a `register()`.
BUILT_IN = {"mamba_swelu": "finetuneflow.models.mamba_swelu"}

MODULE_BYTES = 1_000_000
KEPT_DIR, KEPT_RECORD = "module", "module.json"
PRIVATE_NAME = "finetuneflow_own_"


@dataclass(frozen=True, slots=True)
class OwnArchitecture:
    """What a module file brought: the file as it was run, and the classes it registered."""

    path: Path
    sha256: str
    source: bytes
    model_type: str
    config_class: Any
    model_class: Any
    python: types.ModuleType

    @property
    def file_name(self) -> str:
        """The name of a copy: one that Python can import and any package may hold."""
        return self.path.name if re.fullmatch(r"[A-Za-z]\w{0,60}\.py", self.path.name, re.ASCII) else "own_architecture.py"

    def shape_of(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """What the module's optional `ftf_shape(config)` says of a model's shape; None where it has no such function."""
        function = getattr(self.python, "ftf_shape", None)
        if function is None:
            return None
        with running(Path(str(self.python.__file__)), "ftf_shape"):
            shape = function(dict(config))
        if not isinstance(shape, dict):
            raise invalid(self.path, "its function ftf_shape returns no dictionary", "Return the names and numbers as a dict.")
        wrong = [key for key, value in shape.items() if key not in STATED or type(value) is not int or not 0 <= value < 2**63]
        if wrong:
            raise invalid(
                self.path,
                f"its function ftf_shape returns {wrong[0]!r:.60}: {shape[wrong[0]]!r:.60}",
                f"Return whole numbers (int) under these names: {', '.join(sorted(STATED))}.",
            )
        return shape


_loaded: dict[str, OwnArchitecture] = {}  # by the SHA-256 of the file
_lock = threading.RLock()


def provide(module: str | Path) -> OwnArchitecture:
    """Run a module file, unless this process has run the same bytes, and make its classes the registered ones.

    Raises `ModelError`: MODEL_MODULE_NOT_FOUND, MODEL_MODULE_FAILED (with the line) or MODEL_MODULE_INVALID.
    """
    path = Path(os.path.expanduser(module))
    source = _read(path)
    sha256 = hashlib.sha256(source).hexdigest()
    with _lock:
        own = _loaded.get(sha256) or _run(path, source, sha256)
        _loaded[sha256] = own
        _register(own)
    return own if own.path == path else replace(own, path=path)  # a copy of the file is the same architecture


def provide_built_in(model_type: object) -> None:
    """Register the packaged architecture of that type, if it is one."""
    if isinstance(model_type, str) and model_type in BUILT_IN:
        importlib.import_module(BUILT_IN[model_type]).register()


def causal_class(model_type: str) -> Any | None:
    """The causal model class registered for a type by a module file or by us; None for transformers' own types."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    added: dict[str, Any] = CONFIG_MAPPING._extra_content
    config_class = added.get(model_type)
    return None if config_class is None else MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.get(config_class)


def is_own(config: object) -> bool:
    """Whether a model's configuration is of a class that a module file defined."""
    return type(config).__module__.startswith(PRIVATE_NAME)


# --- running the file -----------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ModelError(
            "MODEL_MODULE_NOT_FOUND",
            f"model.module names {path}, and there is no such file.",
            where=str(path),
            remedy="Check the path: a relative one counts from the folder the command runs in. A run keeps a copy of its file in module/ "
            "of its directory.",
        )
    if path.suffix != ".py" or path.stat().st_size > MODULE_BYTES:
        raise invalid(
            path, f"it is no Python file of at most {MODULE_BYTES:,} bytes", "Name one .py file; weights go into the base folder."
        )
    return path.read_bytes()


def _run(path: Path, source: bytes, sha256: str) -> OwnArchitecture:
    """Execute the file under a private name and collect what it registers.

    While it runs, the registers are empty, so that two versions of a file, or two files that chose the same type,
    do not hinder each other.
    """
    name = PRIVATE_NAME + sha256[:16]
    python = types.ModuleType(name)
    python.__file__ = str(path)
    sys.modules[name] = python  # dataclasses, pickle and transformers look a class's module up by name
    with _empty_registers() as registered:
        try:
            with running(path, "the import"):
                exec(compile(source, str(path), "exec", dont_inherit=True), python.__dict__)
                if not registered() and callable(getattr(python, "register", None)):
                    python.register()
            model_type, config_class, model_class = _the_one(path, registered())
        except BaseException:
            sys.modules.pop(name, None)
            raise
    _require_classes(path, model_type, config_class, model_class)
    model_class._auto_class = None  # else saving a model would copy code beside the weights and ask for it to be run
    config_class._auto_class = None
    return OwnArchitecture(path, sha256, source, model_type, config_class, model_class, python)


@contextlib.contextmanager
def running(path: Path, what: str) -> Iterator[None]:
    """An exception of the user's code as a `ModelError` that names the line; out of memory passes through."""
    try:
        yield
    except ModelError:
        raise
    except (Exception, SystemExit) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        line = _line_in(path, error)
        where = f"{path}:{line}" if line else str(path)
        if isinstance(error, ValueError) and "already used by a Transformers" in str(error):
            raise _taken(path, str(error)) from error
        if isinstance(error, AttributeError) and "'NoneType' object has no attribute '__name__'" in str(error):
            raise invalid(
                path, "its model class names no configuration", "Write `config_class = MyConfig` in the class."
            ) from error
        raise ModelError(
            "MODEL_MODULE_FAILED",
            f"{path.name}: {what} fails with {type(error).__name__}: {str(error)[:300] or 'no message'}.",
            where=where,
            remedy=f"Mend that line; `python {path.name}` shows the whole trace. A module is one file: it cannot import its neighbours.",
        ) from error


def _line_in(path: Path, error: BaseException) -> int | None:
    """The last line of the file on the way to an error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else None


@contextlib.contextmanager
def _empty_registers() -> Iterator[Callable[[], dict[str, tuple[Any, Any]]]]:
    """Inside, the Auto classes know transformers' own architectures alone; gives a function that tells what was added.

    Afterwards the registers are as they were: what is kept goes in through `_register`.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    configs: dict[str, Any] = CONFIG_MAPPING._extra_content
    models: dict[Any, Any] = MODEL_FOR_CAUSAL_LM_MAPPING._extra_content
    before_configs, before_models = dict(configs), dict(models)
    configs.clear()
    models.clear()
    try:
        yield lambda: {model_type: (config_class, models.get(config_class)) for model_type, config_class in configs.items()}
    finally:
        configs.clear()
        configs.update(before_configs)
        models.clear()
        models.update(before_models)


def _register(own: OwnArchitecture) -> None:
    """Make the classes the ones that the Auto classes give for this type, in place of another file's."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    CONFIG_MAPPING._extra_content[own.model_type] = own.config_class
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content[own.config_class] = own.model_class


# --- what a file must bring ---------------------------------------------------------------------------

_LINES = "AutoConfig.register(MyConfig.model_type, MyConfig) and AutoModelForCausalLM.register(MyConfig, MyModel)"


def _the_one(path: Path, registered: dict[str, tuple[Any, Any]]) -> tuple[str, Any, Any]:
    if not registered:
        raise invalid(
            path, "it registers no architecture", f"End it with {_LINES}, or define a function register() that does so."
        )
    if len(registered) > 1:
        raise invalid(
            path, f"it registers several architectures ({', '.join(sorted(registered))})", "Keep one architecture in each file."
        )
    model_type, (config_class, model_class) = next(iter(registered.items()))
    if model_class is None:
        raise invalid(path, f"it registers the configuration {model_type!r} without a causal language model", f"Add {_LINES}.")
    return model_type, config_class, model_class


def _require_classes(path: Path, model_type: str, config_class: Any, model_class: Any) -> None:
    """What can be seen of the classes before there is a model."""
    from transformers import CONFIG_MAPPING, GenerationMixin, PreTrainedConfig, PreTrainedModel

    if not isinstance(model_type, str) or not model_type:
        raise invalid(path, f"its model_type is {model_type!r:.60}", "Write a name of your own: model_type = 'my_architecture'.")
    if model_type in CONFIG_MAPPING._mapping or model_type in BUILT_IN:
        raise _taken(path, f"{model_type!r} is the type of an architecture that is there already.")
    if not _is_kind_of(config_class, PreTrainedConfig) or not _is_kind_of(model_class, PreTrainedModel):
        raise invalid(
            path,
            f"{_name(config_class)} and {_name(model_class)} are not made from transformers' classes",
            "Derive the configuration from PreTrainedConfig and the model from PreTrainedModel and GenerationMixin.",
        )
    if not issubclass(model_class, GenerationMixin):
        raise invalid(
            path,
            f"{model_class.__name__} cannot generate",
            f"Write `class {model_class.__name__}(PreTrainedModel, GenerationMixin)`.",
        )
    if getattr(model_class, "config_class", None) is not config_class:
        raise invalid(
            path,
            f"{model_class.__name__} is not tied to {config_class.__name__}",
            f"Write `config_class = {config_class.__name__}` in it.",
        )
    if not callable(model_class.forward):
        raise _not_callable(path, model_class, f"its forward is {model_class.forward!r:.60}")
    with running(path, f"a look at forward of {model_class.__name__}"):
        parameters = inspect.signature(model_class.forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    lacking = [name for name in ("input_ids", "attention_mask") if name not in parameters and not takes_all]
    lacking += [] if takes_all or lacking else ["**kwargs"]  # callers say more: use_cache, return_dict, …
    methods = _methods(model_class)
    if "forward" not in methods or lacking:
        what = f"its forward takes no {' and no '.join(lacking)}" if "forward" in methods else "it has no forward"
        raise _not_callable(path, model_class, what)
    if "prepare_inputs_for_generation" not in methods and not {"past_key_values", "cache_params"} & set(parameters):
        raise no_cache(path)


def _is_kind_of(found: Any, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)


def _name(found: Any) -> str:
    return found.__name__ if isinstance(found, type) else f"{found!r:.60}"


def _not_callable(path: Path, model_class: Any, what: str) -> ModelError:
    return invalid(
        path,
        f"{model_class.__name__} cannot be called: {what}",
        "Define forward(self, input_ids, attention_mask=None, **kwargs) that returns an object with logits, "
        "such as CausalLMOutput.",
    )


def _methods(model_class: Any) -> set[str]:
    """Names that the file's own classes define."""
    return {
        name for kind in model_class.__mro__ if not kind.__module__.startswith(("torch.", "transformers.")) for name in vars(kind)
    }


def invalid(path: Path, what: str, remedy: str) -> ModelError:
    return ModelError(
        "MODEL_MODULE_INVALID", f"{path.name} cannot be used as model.module: {what}.", where=str(path), remedy=remedy
    )


def no_cache(path: Path) -> ModelError:
    return invalid(
        path,
        "while it generates it is given the newest token alone, and it keeps nothing of those before",
        "Take past_key_values in forward and return them, or read the whole text at each step: define "
        "prepare_inputs_for_generation(self, input_ids, attention_mask=None, **kwargs) that returns both in a dict.",
    )


def _taken(path: Path, what: str) -> ModelError:
    return ModelError(
        "MODEL_MODULE_INVALID",
        f"{path.name} cannot be used as model.module: {what}",
        where=str(path),
        remedy="Choose another model_type: an architecture that others rely on is never replaced.",
    )


def require_fitting(own: OwnArchitecture, config: dict[str, Any], *, base: str) -> None:
    """Raise unless a base's config.json is of the architecture that the module brings."""
    found, named = str(config.get("model_type")), config.get("architectures") or []
    if found == own.model_type and (not named or own.model_class.__name__ in named):
        return
    is_what = found if found != own.model_type else named[0]
    brings = own.model_type if found != own.model_type else own.model_class.__name__
    raise ModelError(
        "MODEL_MODULE_MISMATCH",
        f"{base} is of the architecture {is_what}, and {own.path.name} brings {brings}.",
        where=str(own.path),
        remedy="Leave model.module out for a model that transformers knows, or name the base folder that was made with this module "
        f"(`ftf model new {own.path.name} --out folder` makes one).",
        context={"base": found, "module": own.model_type},
    )


# --- in a run directory and in an export -----------------------------------------------------------------


def keep_module(module: str | None, folder: Path) -> None:
    """Copy the file that was run into `folder`/module/, and write its hash and type beside it."""
    if module is None:
        return
    own = provide(module)
    kept = folder / KEPT_DIR
    kept.mkdir(parents=True, exist_ok=True)
    (kept / own.file_name).write_bytes(own.source)
    write_json(kept / KEPT_RECORD, record_of(own))


def record_of(own: OwnArchitecture) -> dict[str, str]:
    """What is written down about a module: enough to know whether a file is the same."""
    return {"file": own.file_name, "sha256": own.sha256, "model_type": own.model_type, "model_class": own.model_class.__name__}


def kept_record(run_dir: Path) -> dict[str, str] | None:
    """What `keep_module` wrote down in a run directory; None where the run has no module of its own."""
    path = run_dir / KEPT_DIR / KEPT_RECORD
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {name: str(record[name]) for name in ("file", "sha256", "model_type", "model_class")}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _copy_damaged(run_dir, f"has no readable {KEPT_RECORD} ({error})") from error


def kept_in(run_dir: Path, module: str | None) -> str | None:
    """The module of a run: its own copy, found unchanged; else the file that the run file names."""
    if module is None or (record := kept_record(run_dir)) is None:
        return module
    copy = run_dir / KEPT_DIR / Path(record["file"]).name
    try:
        unchanged = hashlib.sha256(copy.read_bytes()).hexdigest() == record["sha256"]
    except OSError as error:
        raise _copy_damaged(run_dir, f"cannot be read ({error.strerror})") from error
    if not unchanged:
        raise _copy_damaged(run_dir, "is not the file that the run was trained with (its SHA-256 differs)")
    return str(copy)


def _copy_damaged(run_dir: Path, what: str) -> ModelError:
    return ModelError(
        "MODEL_MODULE_INVALID",
        f"The copy of model.module in {run_dir.name}/{KEPT_DIR} {what}.",
        where=str(run_dir / KEPT_DIR),
        remedy="Put the file of that time back there; module.json holds its SHA-256.",
    )


def pack_module(module: str | None, stage: Path) -> dict[str, str] | None:
    """Put a copy into a flat export folder; returns its record for the manifest. The copy is never run from there unasked."""
    if module is None:
        return None
    own = provide(module)
    (stage / own.file_name).write_bytes(own.source)
    return record_of(own)
