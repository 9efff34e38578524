"""Options (``declaration``, ``kinds``) are the same in every place that knows them, as they are declared."""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime.bundle.manifest import SAFETY_CHECKER, TINY_DECODER, Defaults, Latent, Manifest
from latentrt.runtime.cli import generate
from latentrt.runtime.cli.request_arguments import add_request_arguments, options_of
from latentrt.runtime.families import FAMILIES
from latentrt.runtime.images.reading import PictureRecord
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.inputs.options_table import families_with, options_table
from latentrt.runtime.inputs.parameters import generation_parameters
from latentrt.runtime.inputs.request_file import document, schema
from latentrt.runtime.pipeline import DrawOptions
from latentrt.runtime.request.control import Control
from latentrt.runtime.request.kinds import (
    Choice,
    Controls,
    Flag,
    Fraction,
    InputImage,
    Levels,
    Limits,
    Number,
    Pair,
    Side,
    Text,
    Tiles,
    Whole,
)
from latentrt.runtime.request.options import (
    FAMILY_OPTIONS,
    OPTIONS,
    Option,
    RequestOptions,
    require_known,
    require_needed,
)
from latentrt.runtime.request.request import Request
from latentrt.runtime.vae.tiling import Tiling

MANIFEST = cast(
    Manifest,
    SimpleNamespace(
        latent=Latent(4, 8, 0.18215, 0.0),
        defaults=Defaults("dpmpp-2m", steps=20, guidance=7.5, width=512, height=768, clip_skip=0),
        family="stable-diffusion",
        components=dict.fromkeys((SAFETY_CHECKER, TINY_DECODER)),
        settings={"guidance": "classifier-free"},
    ),
)
LIMITS = Limits(MANIFEST, 8)
# What a request records besides its options.
BESIDES = {"prompt", "classifier_free", "embeddings", "loras"}
IN_PARAMETERS = {
    *("negative_prompt", "steps", "guidance", "seed", "sampler", "width", "height", "clip_skip"),  # in every PNG's text
    *("control", "ip_adapter_image", "ip_adapter_scale"),  # in entries of several options
    *("images", "denoising_start", "denoising_end", "output", "decoder"),  # the text says nothing of these
}

every_option = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)


def example(option: Option) -> tuple[str, Any]:
    """A value that asks for something: as the command line has it, and as a request does."""
    kind = option.kind
    match kind:
        case Whole():
            return str(kind.least + 1), kind.least + 1
        case Side():
            return "64", 64
        case Fraction():
            return "0.5", 0.5
        case Number():
            return f"{(kind.least + kind.most) / 2:g}", (kind.least + kind.most) / 2
        case Flag():
            return "", True
        case Choice():
            return kind.words[-1], kind.words[-1]
        case Text():
            return "a leaf", "a leaf"
        case Pair():
            return f"64{kind.between}32", (64, 32)
        case Levels():
            return "900,100", (900.0, 100.0)
        case InputImage():
            return "a.png", PictureRecord("0" * 64, "a.png")
        case Controls():
            return "edges=a.png", (Control(PictureRecord("0" * 64, "a.png"), "edges"),)
        case Tiles():
            return "64", Tiling(64, 16)
    raise AssertionError(f"{option.name} is of a kind that this test does not know: {kind}")


def plain(hint: Any) -> set[Any]:
    """The types that a type allows, apart from ``None``; sequences are tuples."""
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    found = set()
    for kind in kinds:
        sequence = typing.get_origin(kind) is not None and issubclass(typing.get_origin(kind), Sequence)
        open_ended = sequence and typing.get_origin(kind) is not tuple
        found.add(tuple[typing.get_args(kind)[0], ...] if open_ended else kind)
    return found - {types.NoneType}


@every_option
def test_an_option_is_declared_well(option: Option) -> None:
    """It has a phrase that says what it is, a kind, a default that fits, and needs options that there are."""
    assert option.help
    assert not option.help.endswith(".")
    assert option.help[0].islower() or not option.help[0].isalpha()
    assert not option.details or option.details.endswith(".")
    assert option.optional or option.default is not None, "without a default it cannot be left out"
    if option.default is not None and not isinstance(option.kind, Controls):
        assert option.kind.check(option.name, option.default, LIMITS) == option.default
    assert option.needs is None or option.needs in OPTIONS
    assert option.shown_default, "people must know what happens without it"
    if option.from_bundle:
        assert option.name in {each.name for each in dataclasses.fields(Defaults)}


@every_option
def test_a_request_has_a_field_of_each_option(option: Option) -> None:
    """The field has the option's default and one of its types."""
    fields = {each.name: each for each in dataclasses.fields(Request)}
    assert option.name in fields, "add a field to Request"
    allowed, kept = plain(option.hint), typing.get_type_hints(Request)[option.name]
    assert plain(kept) <= allowed
    assert types.NoneType not in typing.get_args(kept) or option.optional
    default = fields[option.name].default
    if default is not dataclasses.MISSING and option.name != "output":  # which follows from denoising_end
        assert default == option.default


def test_a_request_has_no_other_fields() -> None:
    """Whatever else it records is known here by name, and no option is missing from the keywords of a call."""
    assert {each.name for each in dataclasses.fields(Request)} == {*OPTIONS, *BESIDES}
    assert RequestOptions.__annotations__.keys() == OPTIONS.keys()
    assert DrawOptions.__annotations__.keys() >= OPTIONS.keys()


@every_option
def test_a_wrong_value_is_refused_by_name(option: Option) -> None:
    """Checks come from the declaration: nothing is taken as it is."""
    if isinstance(option.kind, Controls):
        pytest.skip("control is checked where its images are read")
    with pytest.raises(InvalidRequestError, match=f"{option.name}|the size of tiles"):
        create_request(MANIFEST, "a", **cast(Any, {option.name: object()}))


@every_option
def test_a_value_is_kept(option: Option) -> None:
    """A request holds what was given, or says that the family lacks the option."""
    _, value = example(option)
    needed = dict[str, Any]()
    each = option
    while each.needs is not None:
        each = OPTIONS[each.needs]
        needed[each.name] = example(each)[1]
    asked = {**needed, option.name: value}
    if option.name == "guidance_start":
        asked["guidance_end"] = 1.0
    if not all(name in FAMILIES["stable-diffusion"].options for name in asked if OPTIONS[name].by_family):
        with pytest.raises(InvalidRequestError, match=f"have no {option.name}, only"):
            create_request(MANIFEST, "a", **cast(Any, asked))
        return
    request = create_request(MANIFEST, "a", **cast(Any, asked))
    assert getattr(request, option.name) == value
    assert option.used(value)
    assert document(request)[option.name] is not None


@every_option
def test_the_command_line_has_each_option(option: Option) -> None:
    """An argument of its name reads the example, and its help is the declaration's."""
    parser = argparse.ArgumentParser()
    add_request_arguments(parser)
    if not option.flag:
        assert option.name in {"denoising_start", "denoising_end", "output", "vae_tiling"}
        return
    text, value = example(option)
    flag = f"--{option.name.replace('_', '-')}"
    given = options_of(parser.parse_args([flag, *([text] if text else [])]))
    if isinstance(option.kind, InputImage):
        value = text
    if isinstance(option.kind, Controls):
        value = [Control("a.png", "edges")]
    assert given == {option.name: value}
    assert option.help in " ".join(parser.format_help().split())
    whole = argparse.ArgumentParser()
    generate.add_arguments(whole)
    assert f"{flag} " in whole.format_help()


@every_option
def test_the_schema_describes_each_option(option: Option) -> None:
    """Its entry has the declaration's words, and the choices where there are any."""
    entry = schema()["properties"][option.name]
    assert option.help[1:] in entry["description"]
    if isinstance(option.kind, Choice):
        choices = [each["enum"] for each in entry.get("anyOf", [entry]) if "enum" in each]
        assert choices == [list(option.kind.words)]


@every_option
def test_the_text_of_a_png_says_what_was_asked_for(option: Option) -> None:
    """An option that asks for something has an entry; one that asks for nothing has none."""
    if option.name in IN_PARAMETERS:
        assert option.title == ""
        return
    nothing = create_request(MANIFEST, "a", seed=7)
    asked = dataclasses.replace(nothing, **{option.name: example(option)[1]})
    text, without = (generation_parameters(each, "model").to_text() for each in (asked, nothing))
    assert f"{option.title}: " in text
    assert f"{option.title}: " not in without


def test_the_manual_has_a_row_for_each_option() -> None:
    """The table lists all options in the order of the declaration, and no cell is empty."""
    rows = [line.strip("| \n").split(" | ") for line in options_table().splitlines()]
    assert [row[0] for row in rows[2:]] == [f"`{name}`" for name in OPTIONS]
    assert all(len(row) == len(rows[0]) and all(row) for row in rows)


def test_families_have_only_options_that_are_declared_for_them() -> None:
    """Every option that some families lack is one that another has, and the manual names those."""
    for family in FAMILIES.values():
        assert family.options <= set(FAMILY_OPTIONS)
    for name in FAMILY_OPTIONS:
        owners = [known for known, family in FAMILIES.items() if name in family.options]
        assert owners
        assert families_with(OPTIONS[name]) in ("all", ", ".join(f"`{owner}`" for owner in owners))


def test_an_unknown_option_is_refused() -> None:
    """The sentence names the first in the alphabet, and all that are known."""
    with pytest.raises(InvalidRequestError, match="unknown option 'sharpnes'; known options: negative_prompt, steps, "):
        require_known({"steps": 3, "tone": 1, "sharpnes": 1})


def test_an_option_without_the_one_that_it_needs_is_refused() -> None:
    """The sentence names what is missing first: a blur needs a mask, and a mask an image."""
    with pytest.raises(
        InvalidRequestError, match="mask_blur is given without image, the image to begin with; give both"
    ):
        require_needed({"mask_blur": 2.0})
    image = PictureRecord("0" * 64)
    with pytest.raises(InvalidRequestError, match="mask_blur is given without mask, the image of the same size"):
        require_needed({"mask_blur": 2.0, "image": image})
    require_needed({"mask_blur": 2.0, "image": image, "mask": image})


def test_bounds_read_well() -> None:
    """Large powers of two are written as such, and choices as words."""
    assert OPTIONS["seed"].kind.bounds == "0 to 2**64 - 1"
    assert OPTIONS["strength"].summary.endswith("(above 0 and up to 1; default: the family's; 1 with a mask)")
    assert re.search(r"\(ddim, .*; default: the bundle's\)$", OPTIONS["sampler"].summary)
    assert OPTIONS["safety"].summary.endswith("(default: off)")
