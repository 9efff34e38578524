"""The record of a request, and its options."""

from .options import RequestOptions as RequestOptions
from .request import Request as Request
