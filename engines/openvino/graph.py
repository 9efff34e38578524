"""What rewriting of OpenVINO models has in common."""

from __future__ import annotations

from typing import Any


def is_plain_3x3(convolution: Any) -> bool:
    """Whether the kernel has 3x3 taps, with one pixel of padding on all sides and nothing skipped."""
    attributes, kernel = convolution.get_attributes(), convolution.get_input_partial_shape(1)
    ones = ("strides", "pads_begin", "pads_end", "dilations")
    known = kernel.is_static and list(kernel.to_shape())[2:] == [3, 3]
    return known and all(list(attributes[name]) == [1, 1] for name in ones)


def replace(old: Any, new: Any) -> None:
    """Let everything that takes one value take another."""
    for user in old.get_target_inputs():
        user.replace_source_output(new)
