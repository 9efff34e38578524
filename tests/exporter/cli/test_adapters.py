"""Command-line options that name the files of adapters."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.exporter.adapters.base import AdapterFiles
from latentrt.exporter.adapters.controlnet import ControlNetFile, ControlNetFiles
from latentrt.exporter.adapters.ip_adapter import IpAdapterFiles
from latentrt.exporter.adapters.lora import LoraFiles
from latentrt.exporter.adapters.registry import ADAPTERS
from latentrt.exporter.adapters.safety_checker import SafetyCheckerFiles
from latentrt.exporter.adapters.tiny_vae import TinyVaeFiles
from latentrt.exporter.cli.adapters import adapters_of, add_adapters
from latentrt.runtime.lora.reading import LoraFile

ALL = "--lora a.safetensors --lora b.safetensors:0.5 --tiny-vae c --controlnet depth=d --ip-adapter e.safetensors"
ALL += " --image-encoder f --safety-checker g"


def parsed(line: str) -> tuple[AdapterFiles, ...]:
    parser = argparse.ArgumentParser()
    add_adapters(parser)
    return adapters_of(parser.parse_args(line.split()))


def test_every_kind_has_its_options() -> None:
    """Each kind gets the values of its own options, in the order of the table; no option gives no adapter."""
    assert parsed("") == ()
    assert parsed(ALL) == (
        LoraFiles((LoraFile(Path("a.safetensors"), 1.0), LoraFile(Path("b.safetensors"), 0.5))),
        TinyVaeFiles(Path("c")),
        ControlNetFiles((ControlNetFile("depth", Path("d")),)),
        IpAdapterFiles(Path("e.safetensors"), Path("f")),
        SafetyCheckerFiles(Path("g")),
    )
    assert parsed("") == (), "values of one command line do not stay for the next"


@pytest.mark.parametrize("flag", [option.flag for kind in ADAPTERS for option in kind.options if not option.repeated])
def test_an_option_that_is_given_twice(flag: str) -> None:
    """Only an option that says so may be repeated."""
    with pytest.raises(InvalidRequestError, match=rf"^{flag} is given 2 times; give it once$"):
        parsed(f"{flag} one {flag} two")
