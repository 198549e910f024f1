"""The examples: their parts one by one, then each as its user runs it."""

import json
import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_rnn.examples import language_model, textgen
from fused_rnn.examples.corpus import (
    chunks,
    compressed_sizes,
    load_text,
    split,
    streams,
    unigram_entropy,
)
from fused_rnn.examples.tokenizer import Tokenizer

CAT_SAT = Path(__file__).parent / "data" / "cat_sat.txt"
TINY = ["--hidden", "16", "--embedding", "8", "--device", "cpu"]


# Tokens


@given(st.text())
@settings(deadline=None)
def test_characters_decode_to_the_same_text(text: str) -> None:
    tokenizer = Tokenizer.from_text("char", text)
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


@given(st.data(), st.text(min_size=1))
@settings(deadline=None)
def test_words_in_any_order_decode_to_the_same_tokens(data: st.DataObject, text: str) -> None:
    tokenizer = Tokenizer.from_text("word", text)
    known = st.integers(1, len(tokenizer) - 1) if len(tokenizer) > 1 else st.nothing()
    ids = data.draw(st.lists(known))
    assert tokenizer.encode(tokenizer.decode(ids)).tolist() == ids


def test_words_are_words_marks_and_line_breaks() -> None:
    tokenizer = Tokenizer("word", ["<unk>"])
    tokens = tokenizer.split("Don't go (yet):\n  3 mats!")
    assert tokens == ["don't", "go", "(", "yet", ")", ":", "\n", "3", "mats", "!"]
    tokenizer = Tokenizer.from_text("word", "don't go (yet)!")
    assert tokenizer.decode(tokenizer.encode("Don't  go ( yet ) !").tolist()) == "don't go (yet)!"


def test_unknown_tokens_are_named_once() -> None:
    tokenizer = Tokenizer.from_text("word", "the cat")
    assert tokenizer.unknown("the dog saw the dog") == ["dog", "saw"]
    assert tokenizer.encode("the dog").tolist() == [tokenizer.vocabulary.index("the"), 0]


def test_level_is_checked() -> None:
    with pytest.raises(ValueError, match="level must be one of"):
        Tokenizer("sentence", [])


# The corpus


def test_default_corpus_and_its_split() -> None:
    text = load_text()
    learned, held_out = split(text)
    assert learned + held_out == text
    assert len(text) > 100_000
    assert len(held_out) == round(len(text) / 10)


@pytest.mark.parametrize(("count", "batch", "length"), [(101, 4, 7), (100, 3, 33), (9, 1, 100)])
def test_streams_continue_from_chunk_to_chunk(count: int, batch: int, length: int) -> None:
    inputs, targets = streams(torch.arange(count), batch)
    torch.testing.assert_close(targets, inputs + 1)
    assert inputs.shape == ((count - 1) // batch, batch)
    pieces = list(chunks(inputs, targets, length))
    torch.testing.assert_close(torch.cat([x for x, _ in pieces]), inputs)
    for (_, before), (after, _) in pairwise(pieces):
        torch.testing.assert_close(after[0], before[-1])


def test_training_passes_see_every_token() -> None:
    torch.manual_seed(0)
    endless = language_model.batches(torch.arange(10), batch=1, chunk=4)
    passes = [next(endless) for _ in range(30)]
    seen = {int(token) for inputs, _, _ in passes for token in inputs}
    assert seen == set(range(10))
    assert [fresh for _, _, fresh in passes] == [i % 3 == 0 for i in range(30)]


def test_streams_refuse_too_short_a_text() -> None:
    with pytest.raises(ValueError, match="too few"):
        streams(torch.arange(4), 4)


def test_unigram_entropy_of_known_texts() -> None:
    assert unigram_entropy("aaaa") == 0
    assert unigram_entropy("abcd" * 5) == pytest.approx(2)


def test_compressors_know_the_training_text_and_count_characters() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = "".join(chr(97 + int(i)) for i in torch.randint(26, (3000,), generator=generator))
    seen, unseen = compressed_sizes(noise, noise), compressed_sizes(noise, noise[::-1])
    for name in ("zlib", "bz2", "lzma"):
        # Random letters cost log2(26) bits each, less only where they are met again.
        assert seen[name] < 0.75 * unseen[name], name
        assert math.log2(26) * 0.95 < unseen[name] < 1.1 * math.log2(26), name
    # An umlaut is two bytes, but one character.
    wide = noise.replace("a", "ä").replace("b", "ü")
    for name, bits in compressed_sizes(wide, wide[::-1]).items():
        assert math.log2(26) * 0.95 < bits < 1.3 * math.log2(26), name


# Sampling


def test_temperature_zero_takes_the_likeliest() -> None:
    assert language_model.probabilities(torch.tensor([0.1, 3.0, 2.9]), temperature=0).tolist() == [
        0,
        1,
        0,
    ]


def test_temperature_sharpens_and_never_overflows() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(language_model.probabilities(logits), logits.softmax(0))
    assert language_model.probabilities(logits, 0.5)[2] > logits.softmax(0)[2]
    assert language_model.probabilities(logits, 1e-45).tolist() == [0, 0, 1]


def test_top_k_restricts_the_support() -> None:
    chances = language_model.probabilities(torch.tensor([4.0, 1.0, 3.0, 3.0, 3.0]), top_k=2)
    assert (chances > 0).sum() == 2  # ties do not let a third one in
    assert chances[0] > 0
    assert chances.sum() == pytest.approx(1)
    logits = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(language_model.probabilities(logits, top_k=9), logits.softmax(0))


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_bad_temperature(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        language_model.probabilities(torch.zeros(2), temperature)


def test_bad_top_k() -> None:
    with pytest.raises(ValueError, match="top_k"):
        language_model.probabilities(torch.zeros(2), top_k=0)


# The model


def tiny(
    level: str = "char",
) -> tuple[language_model.LanguageModel, Tokenizer, language_model.Config]:
    torch.manual_seed(0)
    config = language_model.Config(level=level, hidden=8, embedding=4)
    tokenizer = Tokenizer.from_text(level, CAT_SAT.read_text())
    return language_model.LanguageModel(config, len(tokenizer)), tokenizer, config


def test_same_seed_same_text() -> None:
    model, tokenizer, _ = tiny()

    def write(seed: int) -> str:
        generator = torch.Generator().manual_seed(seed)
        return language_model.Writer(model, tokenizer, "The cat").write(50, generator=generator)

    assert write(1) == write(1) != write(2)
    assert write(1).startswith("The cat")
    assert len(write(1)) == len("The cat") + 50


def test_unknown_is_never_written() -> None:
    model, tokenizer, _ = tiny("word")
    with torch.no_grad():
        model.score.bias[0] = 100.0
    writer = language_model.Writer(model, tokenizer)
    assert all(token != "<unk>" for token, _ in writer.predict(1000))
    assert "unk" not in writer.write(20)


def test_evaluation_does_not_depend_on_the_chunk() -> None:
    model, tokenizer, _ = tiny()
    ids = tokenizer.encode(CAT_SAT.read_text())
    whole = language_model.evaluate(model, ids, chunk=len(ids))
    assert language_model.evaluate(model, ids, chunk=7) == pytest.approx(whole, rel=1e-5)
    assert model.training


def test_checkpoint_gives_the_same_predictions(tmp_path: Path) -> None:
    model, tokenizer, config = tiny()
    language_model.save(tmp_path / "model.pt", model, tokenizer, config)
    again, its_tokenizer, its_config = language_model.load(tmp_path / "model.pt")
    assert its_config == config
    assert its_tokenizer.vocabulary == tokenizer.vocabulary
    ids = tokenizer.encode("The cat sat").unsqueeze(1)
    assert torch.equal(again(ids)[0], model(ids)[0])


def test_budget() -> None:
    assert language_model.Budget(steps=10).spent(5, 1e9) == 0.5
    assert language_model.Budget(seconds=10).spent(5, 20) == 2
    assert language_model.Budget(steps=0).spent(0, 0) == 1


# textgen from the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("textgen")
    flags = ["--corpus", str(CAT_SAT), "--steps", "20", "--length", "5", "--out", str(out)]
    assert textgen.main([*TINY, *flags]) == 0
    return out


def test_textgen_leaves_results(trained: Path) -> None:
    assert (trained / "curve.png").stat().st_size > 5000
    report = json.loads((trained / "metrics.json").read_text())
    assert report["training"]["steps"] == 20
    assert set(report["bits_per_character"]) == {"model", "unigram", "zlib", "bz2", "lzma"}
    losses = [bits for _, bits in report["curve"]["train"]]
    assert all(math.isfinite(bits) for bits in losses)
    assert losses[-1] < losses[0]


def test_textgen_writes_from_a_checkpoint(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--load", str(trained / "model.pt"), "--out", str(tmp_path / "none")]
    flags += ["--device", "cpu", "--prompt", "The cat", "--length", "30"]
    texts = []
    for extra in ([], ["--steps", "0"], ["--seed", "1"]):
        assert textgen.main(flags + extra) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("The cat")
    assert not (tmp_path / "none").exists()


def test_textgen_trains_on_from_a_checkpoint(trained: Path, tmp_path: Path) -> None:
    flags = ["--load", str(trained / "model.pt"), "--corpus", str(CAT_SAT), "--device", "cpu"]
    assert textgen.main([*flags, "--steps", "2", "--length", "0", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["config"]["hidden"] == 16


def test_textgen_stops_in_time(tmp_path: Path) -> None:
    flags = ["--corpus", str(CAT_SAT), "--minutes", "0.005", "--length", "0"]
    assert textgen.main([*TINY, *flags, "--layers", "2", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["training"]["seconds"] < 10


def test_textgen_trains_a_fixed_number_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock decides only where it is asked to."""
    monkeypatch.setattr(textgen, "STEPS", 3)
    flags = [*TINY, "--corpus", str(CAT_SAT), "--length", "0", "--out", str(tmp_path)]
    assert textgen.main(flags) == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["training"]["steps"] == 3


def test_textgen_learns_the_same_again(trained: Path, tmp_path: Path) -> None:
    flags = [*TINY, "--corpus", str(CAT_SAT), "--steps", "20", "--length", "5"]
    reports = [json.loads((trained / "metrics.json").read_text())]
    for seed in ("0", "1"):
        assert textgen.main([*flags, "--seed", seed, "--out", str(tmp_path)]) == 0
        reports.append(json.loads((tmp_path / "metrics.json").read_text()))
    first, same, other = (report["curve"] for report in reports)
    assert first == same != other


def test_textgen_shows_the_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--corpus", str(CAT_SAT), "--length", "0", "--out", str(tmp_path)]
    assert textgen.main([*flags, "--steps", "2"]) == 0
    assert re.search(r"100%.* 00:\d\d, 00:00 left, step 2", capsys.readouterr().err)


def test_textgen_says_who_does_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--corpus", str(CAT_SAT), "--length", "0", "--out", str(tmp_path)]
    assert textgen.main([*flags, "--steps", "2"]) == 0
    assert "the model is worse than unigram, zlib: train" in capsys.readouterr().out
    known = {"unigram": 4.5, "zlib": 1.9, "bz2": 1.5, "lzma": 1.4}
    assert textgen.better_ones(1.7, known) == []  # bz2 and lzma see farther back
    assert textgen.better_ones(2.4, known) == ["zlib"]


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_the_cat_sat_on_the_mat(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--corpus", str(CAT_SAT), "--level", "word", "--cell", kind, "--hidden", "64"]
    flags += ["--steps", "300", "--lr", "1e-2", "--device", "cpu", "--out", str(tmp_path)]
    assert textgen.main([*flags, "--predict", "The cat sat on the"]) == 0
    answers = capsys.readouterr().out.split("after 'The cat sat on the':\n")[1].splitlines()
    assert len(answers) == 5
    assert answers[0].endswith("'mat'")
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["perplexity"] > 1
    assert 0 < report["out_of_vocabulary"] < 1
    assert "bits_per_character" not in report


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus", "missing.txt"], "missing.txt"),
        (["--corpus", "empty.txt"], "holds no text"),
        (["--corpus", "short.txt"], "too short"),
        (["--corpus", "latin.txt"], "not UTF-8"),
        (["--corpus", "good.txt", "--prompt", "a cät"], "not in the vocabulary: 'ä'"),
        (["--corpus", "good.txt", "--level", "word", "--predict", "the cow"], "vocabulary: 'cow'"),
        (["--corpus", "line.txt", "--level", "word"], "empty prompt"),
        (["--corpus", "strange.txt", "--level", "word"], "none of the held-out"),
        (["--temperature", "-1"], "--temperature: must be in"),
        (["--temperature", "nan"], "--temperature: must be in"),
        (["--temperature", "warm"], "--temperature: invalid number"),
        (["--hidden", "0"], "--hidden: must be at least 1"),
        (["--dropout", "1"], "--dropout: must be in"),
        (["--top-k", "0"], "--top-k: must be at least 1"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used"),
        (["--device", "meta"], "--device: 'meta' cannot be used"),
        (["--steps", "1", "--minutes", "1"], "not allowed with"),
        (["--steps", "0"], "nothing to train"),
        (["--minutes", "0"], "nothing to train"),
        (["--load", "missing.pt"], "missing.pt"),
        (["--load", "good.txt"], "not a checkpoint"),
        (["--load", "other.pt"], "not a checkpoint"),
        (["--load", "good.pt", "--hidden", "9"], "drop --hidden"),
        (["--load", "good.pt", "--steps", "1"], "does not know"),
    ],
)
def test_textgen_refuses(
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.txt").write_text(CAT_SAT.read_text())
    Path("empty.txt").write_text("\n ")
    Path("short.txt").write_text("a b")
    Path("line.txt").write_text("a b " * 20)
    Path("strange.txt").write_text("a b\n" * 18 + "x y z xx")
    Path("latin.txt").write_bytes("Köln".encode("latin-1"))
    language_model.save(Path("good.pt"), *tiny())
    torch.save({"weights": {}}, "other.pt")
    with pytest.raises(SystemExit) as stop:
        textgen.main(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not Path("runs").exists()


# forecast
