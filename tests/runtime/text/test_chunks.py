"""Weighted and long prompts: against the rule of the web UI written with transformers, and against compel."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentrt.engines.errors import InvalidRequestError
from latentrt.runtime import Bundle, Pipeline
from latentrt.runtime.cli import main
from latentrt.runtime.images.png import read_parameters
from latentrt.runtime.inputs.create import create_request
from latentrt.runtime.text.chunks import MOST_CHUNKS, cut, joined
from latentrt.runtime.text.tokenizers import ClipTokenizer

GATE = 45.0  # dB
SEED, STEPS = 7, 2
Captured = pytest.CaptureFixture[str]
Chunk = Sequence[tuple[str, float]]
LONG = "a red apple, a green leaf and a cat on a boat, " * 9

# What is written, and what it is to mean: chunks of texts with weights, put down by hand.
CASES: Mapping[str, tuple[str, str, Sequence[Chunk]]] = {
    "weights": ("weighted", "(red apple:1.4) on [a boat]", [[("red apple", 1.4), ("on", 1), ("a boat", 1 / 1.1)]]),
    "nested": ("weighted", "((cat) leaf:0.5), boat", [[("cat", 0.55), ("leaf", 0.5), (", boat", 1)]]),
    "escaped": ("weighted", r"a \(cat\)", [[("a (cat)", 1)]]),
    "break": ("weighted", "a cat BREAK (a boat:1.3) BREAK", [[("a cat", 1)], [("a boat", 1.3)]]),
    "brackets as they are": ("long", "a (cat:1.5)", [[("a (cat:1.5)", 1)]]),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(emoji_source: Path) -> ClipTokenizer:
    """CLIP's, of the emoji model."""
    return ClipTokenizer.load(emoji_source / "tokenizer")


class Letters:
    """A tokenizer: a number for each letter but blanks, seven tokens in a chunk, 1 and 2 around, 0 behind."""

    max_length = 7

    def encode(self, text: str, max_length: int | None = None) -> NDArray[np.int64]:
        return np.array([1, *self.words(text), 2, *[0] * 7][:7], np.int64)

    def words(self, text: str) -> list[int]:
        return [ord(letter) for letter in text if letter != " "]


def rows(prompt: str, syntax: str = "weighted") -> list[str]:
    """The chunks of a prompt: letters, ``<`` and ``>`` for special tokens, ``.`` for padding."""
    names = {1: "<", 2: ">", 0: "."}
    return ["".join(names.get(each) or chr(each) for each in row) for row in cut(prompt, syntax, Letters()).tokens]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", ["<>....."]),
        ("abcde", ["<abcde>"]),
        ("abcdef", ["<abcde>", "<f>...."]),
        ("ab BREAK c", ["<ab>...", "<c>...."]),
        ("BREAK a", ["<>.....", "<a>...."]),
        ("a BREAK BREAK b", ["<a>....", "<>.....", "<b>...."]),
        ("abcdef BREAK", ["<abcde>", "<f>...."]),
        ("BREAK", ["<>....."]),
        ("(ab:2)cd[ef]", ["<abcde>", "<f>...."]),
    ],
)
def test_prompts_are_cut_into_chunks(prompt: str, expected: list[str]) -> None:
    """Each chunk is framed and padded like a prompt; a break begins the next one, the last of all nothing."""
    assert rows(prompt) == expected


def test_long_prompts_keep_their_brackets() -> None:
    """Without weights nothing is syntax, not even a break."""
    assert rows("(a:2)BREAK", "long") == ["<(a:2)>", "<BREAK>"]


def test_weights_go_with_their_tokens() -> None:
    """Special tokens and padding weigh 1, and a prompt whose tokens all do has no weights."""
    found = cut("ab(cdef:2)", "weighted", Letters())
    assert found.weights is not None
    np.testing.assert_array_equal(found.weights, [[1, 1, 1, 2, 2, 2, 1], [1, 2, 1, 1, 1, 1, 1]])
    assert cut("ab(cd:1)", "weighted", Letters()).weights is None


def test_chunks_have_an_end() -> None:
    """What exceeds the most chunks is cut off and counted."""
    found = cut("a" * (5 * MOST_CHUNKS + 3), "long", Letters())
    assert (len(found.tokens), found.truncated) == (MOST_CHUNKS, 3)


def test_many_pieces_take_no_longer_than_a_text() -> None:
    """Pieces that no chunk has room for are counted, but not tokenised one by one."""

    class Counted(Letters):
        calls = 0

        def words(self, text: str) -> list[int]:
            self.calls += 1
            return super().words(text)

    tokenizer = Counted()
    found = cut("(a)b" * 10_000, "weighted", tokenizer)
    assert (len(found.tokens), found.truncated) == (MOST_CHUNKS, 20_000 - 5 * MOST_CHUNKS)
    assert tokenizer.calls < 100


def test_any_prompt_is_cut(tokenizer: ClipTokenizer) -> None:
    """Chunks of random marks are framed, padded, and no more than there may be."""
    draw = random.Random(0)
    for _ in range(2000):
        prompt = "".join(draw.choices("()[]\\: .1aBé😀", k=draw.randint(0, 60))) + draw.choice(["", " BREAK ", "(a:2)"])
        tokens = cut(prompt * draw.choice([1, 1, 9]), "weighted", tokenizer).tokens
        assert 1 <= len(tokens) <= MOST_CHUNKS
        assert set(tokens[:, 0]) == {tokenizer.encode("")[0]}
        assert (tokens == tokenizer.end_token_id).any(axis=1).all()


def test_the_mean_of_each_chunk_stays() -> None:
    """Weights change the share of tokens, not how strong a text is; weights that cancel out do no harm."""
    states = np.random.default_rng(0).normal(0.3, 1, (2, 4, 5)).astype(np.float32)
    weights = np.array([[1, 1.5, 0.2, 1], [1, 1, 1, 1]], np.float32)
    found = joined(states, weights).reshape(states.shape)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), states.mean(axis=(1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(found[1], states[1])
    cancelling = np.ones((1, 2, 3), np.float32)
    np.testing.assert_array_equal(joined(cancelling, np.array([[1, -1]], np.float32))[0, 1], -1)


@pytest.mark.parametrize("value", ["a1111", 1, ["weighted"]])
def test_an_unknown_syntax(tiny: Any, value: Any) -> None:
    """It is refused with those that there are."""
    manifest = Bundle.open(tiny.bundle("sd1")).manifest
    with pytest.raises(InvalidRequestError, match=r"prompt_syntax is .*, expected one of plain, long, weighted"):
        create_request(manifest, "a", prompt_syntax=value)


def reference(tokenizer: Any, encoder: Any, chunks: Sequence[Chunk], count: int, state: int | None) -> torch.Tensor:
    """The web UI's rule: states of chunks times weights, means restored, side by side; empty chunks behind."""
    found = []
    for chunk in [*chunks, *[[]] * (count - len(chunks))]:
        ids, weights = [tokenizer.bos_token_id], [1.0]
        for text, weight in chunk:
            words = tokenizer(text, add_special_tokens=False).input_ids
            ids, weights = ids + words, weights + [weight] * len(words)
        ids.append(tokenizer.eos_token_id)
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        weights += [1.0] * (77 - len(weights))
        with torch.no_grad():
            output = encoder(torch.tensor([ids]), output_hidden_states=True)
        states = output.last_hidden_state if state is None else output.hidden_states[state]
        before = states.mean()
        states = states * torch.tensor(weights)[None, :, None]
        found.append(states * (before / states.mean()))
    return torch.cat(found, dim=1)


def pooled(tokenizer: Any, encoder: Any, chunk: Chunk) -> torch.Tensor:
    """The projected state of a chunk."""
    ids = tokenizer("".join(text + " " for text, _ in chunk), padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        return torch.as_tensor(encoder(ids).text_embeds)


def psnr(pictures: NDArray[np.uint8], expected: NDArray[np.float32]) -> float:
    """In dB."""
    error = np.square(pictures.astype(np.float64) - np.round(expected * 255)).mean()
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


class Models:
    """A tiny checkpoint here and in diffusers."""

    def __init__(self, tiny: Any, kind: str, pipeline: str) -> None:
        self.kind = kind
        self.ours = Pipeline.load(tiny.bundle(kind), "onnxruntime")
        self.theirs = getattr(diffusers, pipeline).from_pretrained(tiny.source(kind), local_files_only=True)
        self.theirs.set_progress_bar_config(disable=True)
        self.theirs.scheduler = diffusers.EulerDiscreteScheduler.from_config(self.theirs.scheduler.config)

    def draw(self, prompt: str, **options: Any) -> NDArray[np.uint8]:
        """Our picture."""
        return self.ours(prompt, sampler="euler", seed=SEED, steps=STEPS, guidance=4.0, **options).images

    def expect(self, **embeds: Any) -> NDArray[np.float32]:
        """diffusers' picture of embeddings."""
        generator = torch.Generator().manual_seed(SEED)
        size = {"width": 32, "height": 32}
        found = self.theirs(
            **embeds, **size, generator=generator, num_inference_steps=STEPS, guidance_scale=4.0, output_type="np"
        )
        return np.asarray(found.images, np.float32)

    def weighed(self, chunks: Sequence[Chunk], negative: Sequence[Chunk]) -> NDArray[np.float32]:
        """diffusers' picture of two texts by the web UI's rule."""
        count, pipe = max(len(chunks), len(negative)), self.theirs
        if self.kind == "sd1":
            encoded = [reference(pipe.tokenizer, pipe.text_encoder, each, count, None) for each in (chunks, negative)]
            return self.expect(prompt_embeds=encoded[0], negative_prompt_embeds=encoded[1])
        pairs = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
        encoded = [
            torch.cat([reference(*pair, each, count, -2) for pair in pairs], dim=-1) for each in (chunks, negative)
        ]
        heads = [pooled(*pairs[1], each[0]) for each in (chunks, negative)]
        return self.expect(
            prompt_embeds=encoded[0],
            negative_prompt_embeds=encoded[1],
            pooled_prompt_embeds=heads[0],
            negative_pooled_prompt_embeds=heads[1],
        )


@pytest.fixture(scope="module", params=[("sd1", "StableDiffusionPipeline"), ("sdxl", "StableDiffusionXLPipeline")])
def models(request: pytest.FixtureRequest, tiny: Any) -> Iterator[Models]:
    """One for each family."""
    found = Models(tiny, *request.param)
    with found.ours:
        yield found


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_that_of_the_web_uis_rule(models: Models, case: str) -> None:
    """Weights, nesting, escapes and breaks on the prompt, and weights on the negative prompt."""
    syntax, prompt, chunks = CASES[case]
    negative: Sequence[Chunk] = [[("leaf", 1.2 if syntax == "weighted" else 1)]]
    ours = models.draw(prompt, negative_prompt="(leaf:1.2)" if syntax == "weighted" else "leaf", prompt_syntax=syntax)
    assert psnr(ours, models.weighed(chunks, negative)) >= GATE
    plain = models.draw(prompt, negative_prompt="leaf")
    if case != "brackets as they are":
        assert psnr(ours, plain / np.float32(255)) < GATE, "the syntax makes no difference"


@pytest.mark.heavy
def test_long_prompts_are_those_of_compel(models: Models) -> None:
    """Prompts of two chunks are what compel makes of them where it splits as bluntly."""
    compel = pytest.importorskip("compel")
    providers = pytest.importorskip("compel.embeddings_provider")
    pipe, sdxl = models.theirs, models.kind == "sdxl"
    kinds = compel.ReturnedEmbeddingsType
    encode = compel.Compel(
        tokenizer=[pipe.tokenizer, pipe.tokenizer_2] if sdxl else pipe.tokenizer,
        text_encoder=[pipe.text_encoder, pipe.text_encoder_2] if sdxl else pipe.text_encoder,
        returned_embeddings_type=kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
        if sdxl
        else kinds.LAST_HIDDEN_STATES_NORMALIZED,
        requires_pooled=[False, True] if sdxl else False,
        truncate_long_prompts=False,
        split_long_text_mode=providers.SplitLongTextMode.BRUTAL,
    )
    negative = "a leaf, " * 30
    found = [encode(text) for text in (LONG, negative)]
    states = [each[0] if sdxl else each for each in found]
    embeds = {"prompt_embeds": states[0], "negative_prompt_embeds": states[1]}
    if sdxl:
        embeds |= {"pooled_prompt_embeds": found[0][1], "negative_pooled_prompt_embeds": found[1][1]}
    ours = models.draw(LONG, negative_prompt=negative, prompt_syntax="long")
    assert [each.shape[1] for each in states] == [154, 154]
    assert psnr(ours, models.expect(**embeds)) >= GATE


@pytest.mark.heavy
def test_long_prompts_are_chunks_side_by_side(models: Models, tokenizer: ClipTokenizer) -> None:
    """A prompt of four chunks, cut every 75 tokens, with the negative one padded by empty chunks."""
    words = LONG.split() * 2
    pieces = [pipe_words(models.theirs.tokenizer, words, start) for start in (0, 75, 150, 225)]
    ours = models.draw(" ".join(words), negative_prompt="a leaf", prompt_syntax="long")
    assert cut(" ".join(words), "long", tokenizer).tokens.shape == (4, 77)
    assert psnr(ours, models.weighed(pieces, [[("a leaf", 1)]])) >= GATE


def pipe_words(tokenizer: Any, words: Sequence[str], start: int) -> Chunk:
    """The 75 tokens of a text from one on, as text that has just these tokens."""
    ids = tokenizer(" ".join(words), add_special_tokens=False).input_ids[start : start + 75]
    text = tokenizer.decode(ids)
    assert tokenizer(text, add_special_tokens=False).input_ids == ids
    return [(text, 1)]


@pytest.mark.heavy
def test_no_negative_prompt_is_as_long(tiny: Any) -> None:
    """Where no negative prompt is zeros, they are as many as the prompt has states."""
    with Pipeline.load(tiny.bundle("sdxl"), "onnxruntime") as pipe:
        run = pipe.start(LONG, prompt_syntax="long", guidance=4.0, seed=0)
        assert [text["text_embeds"].any() for text in run.conditioning] == [False, True]
        lengths = {
            rows.shape[1]
            for name, rows in run.rows.items()
            if rows.ndim > 2 and "text_length" in str(pipe.engines["unet_step"].inputs[name].shape[1])
        }
        assert lengths <= {154}
        assert np.isfinite(pipe(LONG, prompt_syntax="long", steps=1).latents).all()


@pytest.mark.heavy
def test_texts_of_different_lengths_are_drawn_together(tiny: Any) -> None:
    """A batch of a long and a short prompt gives each the picture that it gets alone, in both loops."""
    for loop in ("fused", "plain"):
        with Pipeline.load(tiny.bundle("sd1"), "onnxruntime", loop=loop) as pipe:
            options: dict[str, Any] = {"prompt_syntax": "long", "steps": 2, "sampler": "euler"}
            together = pipe.batch([LONG, "a cat", LONG + "boat"], seed=[3, 4, 5], **options)
            for result, prompt in zip(together, [LONG, "a cat", LONG + "boat"], strict=True):
                alone = pipe(prompt, seed=result.request.seed, **options)
                np.testing.assert_allclose(result.latents, alone.latents, atol=2e-5)


@pytest.mark.heavy
def test_a_weight_of_one_changes_no_bit(tiny: Any) -> None:
    """Text without syntax is drawn as a plain prompt is, from the same entry of the cache."""
    with Pipeline.load(tiny.bundle("sd1"), "onnxruntime") as pipe:
        plain = pipe("a red apple", seed=1, steps=1)
        weighted = pipe("a (red:1) apple", seed=1, steps=1, prompt_syntax="weighted")
        np.testing.assert_array_equal(weighted.images, plain.images)
        assert weighted.timings.prompt == 0
        other = pipe("a (red:1.1) apple", seed=1, steps=1, prompt_syntax="weighted")
        assert other.timings.prompt > 0


@pytest.mark.heavy
def test_what_takes_no_chunks(tiny: Any, tmp_path: Path) -> None:
    """A pipeline of one size takes one chunk, and a graph of one length says so."""
    options = {"prompt_syntax": "long", "steps": 1}
    with Pipeline.load(tiny.bundle("sd1"), "onnxruntime", fixed_size=(32, 32, 1)) as pipe:
        pipe("a cat", **options)
        with pytest.raises(InvalidRequestError, match=r"one chunk of tokens alone.*without fixed_size"):
            pipe(LONG, **options)
    with Pipeline.load(tiny.bundle("sd1"), "onnxruntime") as pipe:
        shape = pipe.family.shape_of
        pipe.family.shape_of = lambda name: (shape(name)[0], 77, *shape(name)[2:])  # type: ignore[method-assign]
        with pytest.raises(
            InvalidRequestError, match=r"takes 2 chunks of tokens, but the unet of this bundle takes 77"
        ):
            pipe(LONG, **options)


def test_openvino_takes_chunks_and_one_fixed_chunk(tiny: Any) -> None:
    """It draws a long prompt, and compiles for one chunk where the size is fixed."""
    pytest.importorskip("openvino")
    options: dict[str, Any] = {"prompt_syntax": "weighted", "steps": 1, "seed": 2}
    with (
        Pipeline.load(tiny.bundle("sd1"), "onnxruntime") as ours,
        Pipeline.load(tiny.bundle("sd1"), "openvino") as pipe,
    ):
        expected = ours(f"(cat:1.3) {LONG}", **options).latents
        np.testing.assert_allclose(pipe(f"(cat:1.3) {LONG}", **options).latents, expected, atol=1e-3)


def test_the_command_line(tiny: Any, tmp_path: Path, capsys: Captured) -> None:
    """The option reaches the request, and the PNG says so where it is not as usual."""
    output = tmp_path / "o.png"
    command = ["generate", str(tiny.bundle("sd1")), "a (cat:1.2)", "--output", str(output), "--steps", "1", "--json"]
    assert main([*command, "--prompt-syntax", "weighted"]) == 0
    assert json.loads(capsys.readouterr().out)["request"]["prompt_syntax"] == "weighted"
    assert "Prompt syntax: weighted" in (read_parameters(output) or "")
    assert main(command) == 0
    assert "syntax" not in (read_parameters(output) or "")
