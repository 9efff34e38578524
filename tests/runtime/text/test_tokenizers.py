"""The oracles are transformers' tokenizers, CLIP on the words that the emoji example trains, T5 on few words."""

from __future__ import annotations

import importlib.util
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTokenizer
from transformers import T5Tokenizer as TheirT5Tokenizer

from latentrt.engines.errors import BundleError, InvalidRequestError, SourceError
from latentrt.exporter.source import tokenizers as exporters
from latentrt.exporter.source.tokenizers import read_tokenizer
from latentrt.runtime.text.tokenizers import MAX_PROMPT_BYTES, ClipTokenizer, T5Tokenizer, load_tokenizer

MODEL = Path(__file__).parents[3] / "examples" / "emoji" / "training" / "model.py"
CAPTIONS = [
    "a red apple",
    "grinning face with smiling eyes",
    "the person's red heart",
    "flag: Côte d'Ivoire",
    "12 cats",
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's tokenizer directory as diffusers lays it out."""
    spec = importlib.util.spec_from_file_location("emoji_model", MODEL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    directory = tmp_path_factory.mktemp("source")
    module.train_tokenizer(CAPTIONS, directory)
    return directory


@pytest.fixture(scope="module")
def reference(source: Path) -> Any:
    return CLIPTokenizer.from_pretrained(str(source))


@pytest.fixture(scope="module")
def directory(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's tokenizer directory, written as the exporter writes it."""
    target = tmp_path_factory.mktemp("tokenizer")
    reference.backend_tokenizer.save(str(target / "tokenizer.json"))
    return target


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> ClipTokenizer:
    return ClipTokenizer.load(directory)


def expected(reference: Any, texts: list[str]) -> np.ndarray:
    return np.array(reference(texts, padding="max_length", truncation=True)["input_ids"])


def generated(count: int, seed: int) -> list[str]:
    """Prompts of words, scripts and trouble, joined by all kinds of whitespace."""
    rng = random.Random(seed)

    def character(low: int, high: int) -> Callable[[], str]:
        return lambda: "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 4)))

    pieces: list[Callable[[], str]] = [
        lambda: rng.choice(" ".join(CAPTIONS).split()),
        lambda: rng.choice(["don't", "I'LL", "we're", "cat's", "'d", "they've", "''", "O'Neil's", "\u2019s", "'S"]),
        lambda: rng.choice(["<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "<|endoftext", "</w>", "<|", "|>"]),
        lambda: rng.choice(
            ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "\u2581", "</S>"]
        ),
        lambda: rng.choice(["👩🏽‍🚀", "❤️", "🇨🇮", "👍🏿", "#️⃣", "🫠"]),
        lambda: rng.choice(["e\u0301", "é", "Å", "\u0041\u030a", "ﬁ", "Ǆ", "İ", "ß", "Σς", "ñ\u0303", "가", "각"]),
        lambda: rng.choice(
            ["\0", "\x07", "\x1b[0m", "\u200b", "\u200d", "\ufeff", "\u202e", "\x85", "\U000e0041", "\uffff"]
        ),
        lambda: str(rng.randint(0, 10**6)),
        character(0x21, 0x7E),
        character(0x00, 0xFF),
        character(0x300, 0x36F),
        character(0x4E00, 0x9FFF),
        character(0x1F300, 0x1FAFF),
        character(0xE000, 0x10FFFF),
        lambda: chr(rng.choice([rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])),
    ]
    gaps = ["", " ", " ", " ", "  ", "\t", "\n", "\r\n", "\u3000", "\u00a0", "\u2028", "\x0b", "   "]
    prompts = []
    for _ in range(count):
        length = 300 if rng.random() < 0.01 else rng.randint(0, 24)
        prompts.append("".join(rng.choice(gaps) + rng.choice(pieces)() for _ in range(length)) + rng.choice(gaps))
    return prompts


def test_ten_thousand_prompts_equal_transformers(tokenizer: ClipTokenizer, reference: Any) -> None:
    """Generated prompts of many scripts, lengths and oddities get transformers' ids."""
    prompts = generated(10_000, seed=1)
    ours = tokenizer.encode_batch(prompts)
    assert ours.dtype == np.int64
    assert ours.shape == (10_000, 77)
    np.testing.assert_array_equal(ours, expected(reference, prompts))


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " ",
        "\n\t ",
        "a",
        "  a red  apple ",
        "A RED APPLE",
        "<|endoftext|>",
        "red<|startoftext|>apple",
        "apple " * 300,
    ],
)
def test_edge_prompts_equal_transformers(tokenizer: ClipTokenizer, reference: Any, prompt: str) -> None:
    """Empty, blank, cased, special and overlong prompts get transformers' ids, one by one."""
    np.testing.assert_array_equal(tokenizer.encode(prompt), expected(reference, [prompt])[0])


@pytest.mark.parametrize("words", [74, 75, 76])
def test_truncation_keeps_the_end_token(tokenizer: ClipTokenizer, reference: Any, words: int) -> None:
    """Prompts just below, at and above the limit end as transformers' do, and count says what was cut."""
    prompt = "a " * words
    np.testing.assert_array_equal(tokenizer.encode(prompt), expected(reference, [prompt])[0])
    assert tokenizer.encode(prompt)[-1] == reference.eos_token_id
    assert tokenizer.count(prompt) == words + 2


@pytest.mark.parametrize("max_length", [2, 3, 16, 248])
def test_max_length_is_taken_from_the_caller(directory: Path, reference: Any, max_length: int) -> None:
    """Other lengths than 77 are padded and truncated as transformers does when told the same."""
    ours = ClipTokenizer.load(directory, max_length=max_length)
    prompts = generated(200, seed=2)
    theirs = reference(prompts, padding="max_length", truncation=True, max_length=max_length)["input_ids"]
    np.testing.assert_array_equal(ours.encode_batch(prompts), np.array(theirs))


def test_a_pad_token_other_than_the_end_equals_transformers(source: Path, tmp_path: Path) -> None:
    """SD 2.x and the second encoder of SDXL pad with "!", id 0, thereby a special token that splits words too."""
    reference: Any = CLIPTokenizer.from_pretrained(str(source), pad_token="!")
    prompts = [*generated(5_000, seed=3), "stop! now!!", "!"]
    theirs = expected(reference, prompts)
    # Saved after use, the file carries the call's truncation and padding, which must not matter.
    reference.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["padding"] is not None
    ours = ClipTokenizer.load(tmp_path, pad_token_id=reference.pad_token_id)
    assert ours.pad_token_id == 0
    np.testing.assert_array_equal(ours.encode_batch(prompts), theirs)
    assert ours.count("!") == 3


def test_padding_left_in_the_file_is_not_applied_twice(source: Path, tmp_path: Path) -> None:
    """A file saved with a shorter truncation still gives 77 ids of the whole prompt."""
    reference: Any = CLIPTokenizer.from_pretrained(str(source))
    want = expected(reference, ["a red apple " * 9])
    reference(["a"], padding="max_length", truncation=True, max_length=8)
    reference.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(ClipTokenizer.load(tmp_path).encode_batch(["a red apple " * 9]), want)


def test_an_empty_batch_has_no_rows(tokenizer: ClipTokenizer) -> None:
    """No prompts give an array of no rows, still of the right width."""
    assert tokenizer.encode_batch([]).shape == (0, 77)


def test_ids_stay_below_the_vocabulary_size(tokenizer: ClipTokenizer, reference: Any) -> None:
    """The size that an embedding table must have is what transformers says."""
    assert tokenizer.vocabulary_size == len(reference)
    assert tokenizer.encode_batch(generated(100, seed=4)).max() < tokenizer.vocabulary_size


def test_many_threads_share_one_tokenizer(tokenizer: ClipTokenizer, reference: Any) -> None:
    """Eight threads that encode and count at once get the ids that one gets."""
    prompts = generated(400, seed=5)
    want = expected(reference, prompts)
    with ThreadPoolExecutor(8) as pool:
        rows = [pool.map(tokenizer.encode, prompts) for _ in range(8)]
        counts = list(pool.map(tokenizer.count, prompts))
        for row in rows:
            np.testing.assert_array_equal(np.stack(list(row)), want)
    assert counts == [tokenizer.count(prompt) for prompt in prompts]


@pytest.mark.parametrize("unit", ["apple red ", "a", "😀", "1", "e\u0301", "\u0301", "<|endoftext|>", " ", "<|"])
def test_a_prompt_of_100_kilobytes_is_truncated_quickly(tokenizer: ClipTokenizer, reference: Any, unit: str) -> None:
    """Long prompts of every kind cost time in proportion to their length, and end in transformers' ids."""
    prompt = unit * (100_000 // len(unit.encode("utf-8")))
    begin = time.perf_counter()
    ids = tokenizer.encode(prompt)
    assert time.perf_counter() - begin < 5
    np.testing.assert_array_equal(ids, expected(reference, [prompt])[0])


def test_a_long_prompt_does_not_hold_up_other_threads(tokenizer: ClipTokenizer) -> None:
    """While one thread encodes a prompt of hundreds of kilobytes, others keep running."""
    worker = threading.Thread(target=tokenizer.encode, args=("1" * 300_000,))
    worker.start()
    ticks = 0
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 10


def test_a_prompt_beyond_the_limit_is_refused(tokenizer: ClipTokenizer) -> None:
    """One byte too many, counted in UTF-8, is an InvalidRequestError; the limit itself is served."""
    assert tokenizer.encode(" " * MAX_PROMPT_BYTES).shape == (77,)
    for prompt in (" " * (MAX_PROMPT_BYTES + 1), "é" * (MAX_PROMPT_BYTES // 2 + 1)):
        with pytest.raises(InvalidRequestError, match="1000000"):
            tokenizer.encode(prompt)


@pytest.mark.parametrize("prompt", ["\ud800", "a red \udfff apple", "\ud83d \ude00"])
def test_lone_surrogates_are_refused(tokenizer: ClipTokenizer, prompt: str) -> None:
    """Text that UTF-8 cannot hold is an InvalidRequestError, not an error of the library."""
    with pytest.raises(InvalidRequestError, match="surrogate"):
        tokenizer.encode(prompt)


@pytest.mark.parametrize("prompt", [None, 7, b"a red apple", ["a red apple"]])
def test_prompts_that_are_not_text_are_refused(tokenizer: ClipTokenizer, prompt: Any) -> None:
    """Anything but a string is an InvalidRequestError that names its type."""
    with pytest.raises(InvalidRequestError, match=type(prompt).__name__):
        tokenizer.encode(prompt)


def test_a_string_is_no_batch(tokenizer: ClipTokenizer) -> None:
    """One string where a list belongs is refused instead of being read letter by letter."""
    with pytest.raises(InvalidRequestError, match="list"):
        tokenizer.encode_batch("apple")


def test_a_missing_file_is_a_bundle_error(tmp_path: Path) -> None:
    """A directory without tokenizer.json is named in one sentence."""
    with pytest.raises(BundleError, match=r"tokenizer\.json") as caught:
        ClipTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"{}", b'{"model": 3}', b"[" * 100_000])
def test_a_damaged_file_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    """Empty, cut off, binary, absurdly nested or alien content ends in one sentence that names the file."""
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json") as caught:
        ClipTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_a_bundle_error(directory: Path, tmp_path: Path) -> None:
    """A file cut off anywhere is refused."""
    whole = (directory / "tokenizer.json").read_bytes()
    for part in (0.1, 0.5, 0.9, 0.999):
        (tmp_path / "tokenizer.json").write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(BundleError, match="JSON"):
            ClipTokenizer.load(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("model", "vocab"), {}),
        (("model", "merges"), [["a", "no such token"]]),
        (("model", "continuing_subword_prefix"), "x" * 99),
        (("post_processor",), None),
        (("post_processor", "sep"), ["<|endoftext|>", -1]),
        (("pre_tokenizer", "pretokenizers", 0, "pattern", "Regex"), "((("),
        (("normalizer", "normalizers", 1, "pattern", "Regex"), ""),
        (("added_tokens",), 3),
    ],
)
def test_nonsense_inside_the_file_is_a_bundle_error(
    directory: Path, tmp_path: Path, path: tuple[str | int, ...], value: Any
) -> None:
    """Values that the library rejects, or panics on, come out as one BundleError at load."""
    content = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        ClipTokenizer.load(tmp_path)


def test_tokenizers_of_other_models_are_refused(tmp_path: Path) -> None:
    """A working tokenizer of another kind is a BundleError, since its ids would mean nothing to CLIP."""
    wordlevel = Tokenizer(models.WordLevel({"[CLS]": 0, "[SEP]": 1, "a": 2}, unk_token="a"))
    wordlevel.post_processor = processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    gpt2 = Tokenizer(models.BPE({"a": 0}, []))
    gpt2.pre_tokenizer = pre_tokenizers.ByteLevel()
    unframed = Tokenizer(models.BPE({"a": 0, "a</w>": 1}, [], end_of_word_suffix="</w>"))
    for foreign in (wordlevel, gpt2, unframed):
        foreign.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(BundleError, match="CLIP"):
            ClipTokenizer.load(tmp_path)


@pytest.mark.parametrize("pad", [-1, 10**9])
def test_an_unknown_pad_token_is_a_bundle_error(directory: Path, pad: int) -> None:
    """An id outside the vocabulary is refused at load, not by the text encoder."""
    with pytest.raises(BundleError, match="pad_token_id"):
        ClipTokenizer.load(directory, pad_token_id=pad)


@pytest.mark.parametrize("max_length", [-1, 0, 1])
def test_a_length_without_room_is_a_bundle_error(directory: Path, max_length: int) -> None:
    """Fewer than two ids cannot hold start and end."""
    with pytest.raises(BundleError, match="max_length"):
        ClipTokenizer.load(directory, max_length=max_length)


@pytest.fixture(scope="module")
def t5_source(tiny_models: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source's folder with a spiece.model alone, as old checkpoints have it."""
    return Path(tiny_models.write_spiece(tmp_path_factory.mktemp("tokenizer_3")))


@pytest.fixture(scope="module")
def t5_reference(t5_source: Path) -> Any:
    return TheirT5Tokenizer.from_pretrained(str(t5_source))


@pytest.fixture(scope="module")
def t5_directory(t5_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's folder, written as the exporter writes it."""
    target = tmp_path_factory.mktemp("t5")
    tokenizer: Any = read_tokenizer(t5_source, "t5", "the tokenizer_3 of source")
    (target / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    return target


def t5_expected(reference: Any, texts: list[str], length: int) -> np.ndarray:
    """As diffusers' pipelines of SD3 and FLUX call it."""
    rows = reference(
        texts, padding="max_length", max_length=length, truncation=True, add_special_tokens=True, return_tensors="np"
    )
    return np.asarray(rows.input_ids)


@pytest.mark.parametrize("length", [256, 512])
def test_five_thousand_prompts_equal_transformers_t5(t5_directory: Path, t5_reference: Any, length: int) -> None:
    """Generated prompts, some too long or with special tokens, get transformers' ids at the lengths of SD3 and FLUX."""
    tokenizer = T5Tokenizer.load(t5_directory)
    prompts = [*generated(5_000 if length == 256 else 500, seed=length), "", " ", "a </s> red<pad> apple<extra_id_3>"]
    ours = np.stack([tokenizer.encode(prompt, length) for prompt in prompts])
    assert (ours.dtype, ours.shape) == (np.int64, (len(prompts), length))
    np.testing.assert_array_equal(ours, t5_expected(t5_reference, prompts, length))
    whole = t5_reference(prompts[:300]).input_ids
    assert [tokenizer.count(prompt) for prompt in prompts[:300]] == [len(ids) for ids in whole]
    assert (ours[:, -1] == 1).any(), "none was cut off"


@pytest.mark.parametrize("length", [1, 2, 77])
def test_t5_is_cut_off_before_its_end_token(t5_directory: Path, t5_reference: Any, length: int) -> None:
    """A request may ask for any length; the end token stays, and the rest is padded with id 0."""
    tokenizer = T5Tokenizer.load(t5_directory)
    prompts = ["apple " * 90, "apple", ""]
    ours = np.stack([tokenizer.encode(prompt, length) for prompt in prompts])
    np.testing.assert_array_equal(ours, t5_expected(t5_reference, prompts, length))
    assert (ours[0, -1], ours[2, 0], set(ours[2, 1:])) == (1, 1, set() if length == 1 else {0})


def test_t5_from_either_of_its_files(t5_source: Path, t5_reference: Any, tmp_path: Path) -> None:
    """A tokenizer.json, which newer checkpoints have, gives what spiece.model gives."""
    t5_reference.save_pretrained(tmp_path / "newer")
    assert not (tmp_path / "newer" / "spiece.model").exists()
    prompts = generated(300, seed=6)
    either: list[Any] = [read_tokenizer(path, "t5", "t5") for path in (t5_source, tmp_path / "newer")]
    first, second = (each(prompts).input_ids for each in either)
    assert first == second == t5_reference(prompts).input_ids


def test_a_spiece_model_that_cannot_be_converted(
    t5_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the package that reads it, without any file, and with a damaged one, a sentence says what to do."""
    with pytest.raises(SourceError, match=r"t5 is incomplete: .* has neither tokenizer.json nor spiece.model"):
        read_tokenizer(tmp_path, "t5", "t5")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match="t5 cannot be read") as caught:
        read_tokenizer(tmp_path, "t5", "t5")
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(exporters.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(SourceError, match="pip install sentencepiece"):
        read_tokenizer(t5_source, "t5", "t5")


def test_clip_and_t5_are_not_taken_for_each_other(directory: Path, t5_directory: Path) -> None:
    """A tokenizer of the other kind is refused, and so is a length without room for the end token."""
    with pytest.raises(BundleError, match="expected T5's: 'Unigram'"):
        load_tokenizer(directory, "t5", 512, 0)
    with pytest.raises(BundleError, match="expected CLIP's: 'BPE'"):
        load_tokenizer(t5_directory, "clip", 77, 0)
    with pytest.raises(BundleError, match="a tokenizer of the kind 'bert', expected clip or t5"):
        load_tokenizer(t5_directory, "bert", 77, 0)
    with pytest.raises(BundleError, match="max_length is 0, expected at least 1"):
        T5Tokenizer.load(t5_directory).encode("apple", 0)
