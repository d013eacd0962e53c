"""Recipes: known ways to fine-tune, each a YAML file with its sources, its figures and the arithmetic between them.

    schema.py       what a recipe file may say; reading a packaged recipe or a user's own
    settings.py     a recipe's settings as a run configuration, merged with the user's; the same batch on several devices
    arithmetic.py   steps, epochs, warm-up and throughput that follow from the figures; the tables of docs/recipes.md

A recipe never names data or a base model: those are the user's. Where a reference document and the primary source
differ, both stand in the file and the settings follow the primary source.
"""

from finetuneflow.knowledge.recipes.arithmetic import Arithmetic, Sums, recipe_arithmetic, recipe_tables
from finetuneflow.knowledge.recipes.schema import (
    Figures,
    Phase,
    Recipe,
    Span,
    load_recipe,
    load_recipe_text,
    recipe_names,
)
from finetuneflow.knowledge.recipes.settings import (
    build_with_recipe,
    complete_values,
    find_phase,
    load_phase,
    merge,
    recipe_config,
    recipe_for_devices,
)

__all__ = [
    "Arithmetic",
    "Figures",
    "Phase",
    "Recipe",
    "Span",
    "Sums",
    "build_with_recipe",
    "complete_values",
    "find_phase",
    "load_phase",
    "load_recipe",
    "load_recipe_text",
    "merge",
    "recipe_arithmetic",
    "recipe_config",
    "recipe_for_devices",
    "recipe_names",
    "recipe_tables",
]
