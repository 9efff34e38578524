"""Moved to :mod:`latentrt.runtime.inputs.request_file`; this name keeps working."""

from .inputs.request_file import KEYWORD as KEYWORD
from .inputs.request_file import read_png as read_png
from .inputs.request_file import read_request as read_request
from .inputs.request_file import record as record
