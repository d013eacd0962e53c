"""FineTuneFlow: from a dataset to a fine-tuned language model that is shown to be better.

The public Python face. Importing it loads neither torch nor transformers; each name is imported
from its room when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from finetuneflow.config import RunConfig as RunConfig
    from finetuneflow.config import build_config as build_config
    from finetuneflow.config import load_config as load_config
    from finetuneflow.data.quality import inspect_files as check_data  # noqa: F401 - a public name of this package
    from finetuneflow.errors import FineTuneFlowError as FineTuneFlowError
    from finetuneflow.evaluation.compare import compare as compare
    from finetuneflow.evaluation.measure import evaluate as evaluate
    from finetuneflow.evaluation.suite import load_suite as load_suite
    from finetuneflow.export import export as export
    from finetuneflow.inference import load_generator as load_generator
    from finetuneflow.pipeline_config import build_pipeline as build_pipeline
    from finetuneflow.pipeline_config import load_pipeline as load_pipeline
    from finetuneflow.planning import lint as lint
    from finetuneflow.planning import plan as plan
    from finetuneflow.training.pipeline import resume_pipeline as resume_pipeline
    from finetuneflow.training.pipeline import train_pipeline as train_pipeline
    from finetuneflow.training.run import resume as resume
    from finetuneflow.training.run import train as train
    from finetuneflow.workspace import Workspace as Workspace

# public name -> module that owns it, and its name there
_FACE = {
    "RunConfig": ("finetuneflow.config", "RunConfig"),
    "build_config": ("finetuneflow.config", "build_config"),
    "load_config": ("finetuneflow.config", "load_config"),
    "check_data": ("finetuneflow.data.quality", "inspect_files"),
    "FineTuneFlowError": ("finetuneflow.errors", "FineTuneFlowError"),
    "compare": ("finetuneflow.evaluation.compare", "compare"),
    "evaluate": ("finetuneflow.evaluation.measure", "evaluate"),
    "load_suite": ("finetuneflow.evaluation.suite", "load_suite"),
    "export": ("finetuneflow.export", "export"),
    "load_generator": ("finetuneflow.inference", "load_generator"),
    "build_pipeline": ("finetuneflow.pipeline_config", "build_pipeline"),
    "load_pipeline": ("finetuneflow.pipeline_config", "load_pipeline"),
    "lint": ("finetuneflow.planning", "lint"),
    "plan": ("finetuneflow.planning", "plan"),
    "resume": ("finetuneflow.training.run", "resume"),
    "resume_pipeline": ("finetuneflow.training.pipeline", "resume_pipeline"),
    "train": ("finetuneflow.training.run", "train"),
    "train_pipeline": ("finetuneflow.training.pipeline", "train_pipeline"),
    "Workspace": ("finetuneflow.workspace", "Workspace"),
}
__all__ = ["__version__", *_FACE]


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _FACE[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
