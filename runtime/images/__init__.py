"""Images: PNG files with their parameters, images that callers give, masks, pixels for CLIP."""

from .png import GenerationParameters as GenerationParameters
from .png import read_parameters as read_parameters
from .png import sheet as sheet
from .png import write_png as write_png
