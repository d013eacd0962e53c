"""FineTuneFlow: from a dataset to a fine-tuned language model that is shown to be better.

The public Python face. Importing it loads neither torch nor transformers; each name is imported
from its room when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that owns it
_FACE = {
    "RunConfig": "finetuneflow.config",
    "load_config": "finetuneflow.config",
    "FineTuneFlowError": "finetuneflow.errors",
    "Workspace": "finetuneflow.workspace",
    "train": "finetuneflow.training.run",
    "resume": "finetuneflow.training.run",
}
__all__ = ["__version__", *_FACE]

if TYPE_CHECKING:
    from finetuneflow.config import RunConfig, load_config
    from finetuneflow.errors import FineTuneFlowError
    from finetuneflow.training.run import resume, train
    from finetuneflow.workspace import Workspace


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
