"""Moved to :mod:`latentrt.runtime.components.engine_choice`; this name keeps working."""

from .components.engine_choice import ENGINES as ENGINES
from .components.engine_choice import EngineSettings as EngineSettings
from .components.engine_choice import choose_engine as choose_engine
from .components.engine_choice import make_engine as make_engine
