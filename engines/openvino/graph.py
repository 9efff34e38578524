"""Helpers that the rewrites of OpenVINO models share."""

from __future__ import annotations

from typing import Any


def is_plain_3x3(convolution: Any) -> bool:
    """Whether a convolution has a kernel of 3x3 taps, padding of one pixel, and strides and dilations of 1."""
    attributes, kernel = convolution.get_attributes(), convolution.get_input_partial_shape(1)
    ones = ("strides", "pads_begin", "pads_end", "dilations")
    known = kernel.is_static and list(kernel.to_shape())[2:] == [3, 3]
    return known and all(list(attributes[name]) == [1, 1] for name in ones)


def replace(old: Any, new: Any) -> None:
    """Let every user of the output ``old`` use the output ``new``."""
    for user in old.get_target_inputs():
        user.replace_source_output(new)
