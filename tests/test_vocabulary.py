# SPDX-License-Identifier: Apache-2.0
"""Trimming a vocabulary: what stays is exactly as before, what goes becomes smaller pieces or "unknown".

With a WordPiece tokenizer like that of multilingual BERT and a Unigram tokenizer like that of XLM-R and E5.
"""

import copy
import json
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from transformers import BertTokenizer, PreTrainedTokenizerFast, Wav2Vec2FeatureExtractor, XLMRobertaTokenizer

from mmser.loading import load_emotion_split
from mmser.vocabulary import choose_tokens, is_written_in, read_texts, scripts_of, trim_tokenizer, trim_vocabulary
from processing_mmser import MMSERProcessor

TEXTS = ["the table is here", "Der Tisch ist da, и всё!", "42 tables"]
WORDS = [
    "the",
    "table",
    "tables",
    "is",
    "here",
    "der",
    "tisch",
    "ist",
    "da",
    "и",
    "всё",
    "42",
    "вот",
    "日本",
    "ჩემი",
    "joy",
]
LETTERS = sorted(set("".join([*WORDS, *TEXTS])) - {" "})


def word_piece():
    """Lower-cases; ids of special tokens in front, and one, [MASK], behind."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *(x.lower() for x in LETTERS), "##s", "##er"]
    pieces += [f"##{x.lower()}" for x in LETTERS] + ["[MASK]"]
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))})


def unigram():
    scores = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("日", -20.0)]
    scores += [(f"▁{word}", -5.0 - len(word) / 10) for word in [*WORDS, "Der", "Tisch"]]
    scores += [(letter, -9.0) for letter in LETTERS if letter != "日"] + [("s", -4.0), ("er", -6.0), ("<mask>", 0.0)]
    return XLMRobertaTokenizer(vocab=list(dict(scores).items()))


TOKENIZERS = {"WordPiece": word_piece, "Unigram": unigram}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def as_before(tokenizer, trimmed, kept, texts):
    """Whether texts become the same tokens, under their new ids."""
    old, new = tokenizer(texts)["input_ids"], trimmed(texts)["input_ids"]
    return [[kept[index] for index in ids] for ids in new] == old


def is_unknown(tokenizer, text):
    """Whether some of `text` is unknown to the tokenizer."""
    return tokenizer.unk_token_id in tokenizer(text)["input_ids"]


def test_texts_are_tokenised_as_before(tokenizer):
    kept = choose_tokens(tokenizer, TEXTS)
    trimmed = trim_tokenizer(tokenizer, kept)
    assert len(trimmed) == len(kept) < len(tokenizer)
    assert as_before(tokenizer, trimmed, kept, TEXTS)
    assert as_before(tokenizer, trimmed, kept, ["the table ☃ is", "☃☃", "☃da"])  # "unknown" is where it was
    for name, token in tokenizer.special_tokens_map.items():
        assert trimmed.special_tokens_map[name] == token
        assert kept[trimmed.convert_tokens_to_ids(token)] == tokenizer.convert_tokens_to_ids(token)


def test_other_words_fall_into_characters_and_other_scripts_do_not(tokenizer):
    kept = choose_tokens(tokenizer, TEXTS, languages=["en", "ru"])
    trimmed = trim_tokenizer(tokenizer, kept)
    assert not is_unknown(trimmed, "joy вот")
    assert len(trimmed.tokenize("joy вот")) >= 6 > len(tokenizer.tokenize("joy вот"))
    assert not is_unknown(tokenizer, "ჩემი")
    assert is_unknown(trimmed, "ჩემი")
    georgian = trim_tokenizer(tokenizer, choose_tokens(tokenizer, TEXTS, languages=["ka"]))
    assert not is_unknown(georgian, "ჩემი joy")  # ASCII is for everybody


def test_languages_alone_keep_whole_scripts(tokenizer):
    kept = choose_tokens(tokenizer, languages=["de", "en"])
    trimmed = trim_tokenizer(tokenizer, kept)
    assert as_before(tokenizer, trimmed, kept, ["the tables, 42", "Der Tisch ist da!", "joy", "xyz", "thetables"])
    assert is_unknown(trimmed, "и") and not is_unknown(tokenizer, "и")


def test_a_size_keeps_the_most_frequent_tokens(tokenizer):
    texts = [TEXTS[0]] * 5 + list(TEXTS)
    whole = choose_tokens(tokenizer, texts)
    with pytest.raises(ValueError, match="number of special tokens") as error:
        choose_tokens(tokenizer, texts, size=1)
    special = set(choose_tokens(tokenizer, texts, size=int(re.findall(r"least (\d+)", str(error.value))[0])))
    assert choose_tokens(tokenizer, texts, size=len(whole) + 9) == whole
    for size in (len(special) + 3, len(whole) // 2):
        kept = choose_tokens(tokenizer, texts, size=size)
        assert len(kept) == size and special <= set(kept) < set(whole)
        counted = Counter(index for ids in tokenizer(texts)["input_ids"] for index in ids)
        letters = Counter("".join(texts).lower())  # the least that a character can count for
        left_out = max(counted[index] for index in set(whole) - set(kept))
        for index in set(kept) - special:
            piece = tokenizer.convert_ids_to_tokens(index).removeprefix("##").removeprefix("▁")
            assert max(counted[index], letters[piece.lower()]) >= left_out, piece
        trimmed = trim_tokenizer(tokenizer, kept)
        assert len(trimmed) == size and trimmed(texts)["input_ids"]


def test_a_size_needs_texts_and_room_for_special_tokens(tokenizer):
    with pytest.raises(ValueError, match="give texts"):
        choose_tokens(tokenizer, languages=["en"], size=100)
    with pytest.raises(ValueError, match=r"at least \d+, the number of special tokens, got 1"):
        choose_tokens(tokenizer, TEXTS, size=1)


def test_it_survives_saving(tokenizer, tmp_path):
    trimmed = trim_tokenizer(tokenizer, choose_tokens(tokenizer, TEXTS))
    trimmed.save_pretrained(tmp_path)
    assert type(tokenizer).from_pretrained(tmp_path)(TEXTS)["input_ids"] == trimmed(TEXTS)["input_ids"]


@torch.no_grad()
def test_the_model_answers_as_before(tokenizer):
    model = tiny_model(text={"vocab_size": len(tokenizer) + 7, "pad_token_id": tokenizer.pad_token_id})
    processor = MMSERProcessor(Wav2Vec2FeatureExtractor(), tokenizer)
    before = copy.deepcopy(model)
    smaller, report = trim_vocabulary(model, processor, texts=iter(TEXTS))
    table, old_table = (m.get_input_embeddings().weight for m in (model, before))
    assert model.config.text_config.vocab_size == len(table) == len(smaller.tokenizer)
    assert model.config.text_config.pad_token_id == smaller.tokenizer.pad_token_id == tokenizer.pad_token_id
    for token, index in smaller.tokenizer.get_vocab().items():
        assert torch.equal(table[index], old_table[tokenizer.convert_tokens_to_ids(token)])
    outputs, expected = model(**smaller(text=TEXTS)), before(**processor(text=TEXTS))
    torch.testing.assert_close(outputs.logits, expected.logits, rtol=0, atol=1e-6)
    assert table.requires_grad
    assert report.tokens_before == len(old_table) and report.tokens_after == len(table)
    saved = report.parameters_before - report.parameters_after
    assert saved == (len(old_table) - len(table)) * table.shape[1] > 0
    assert "tokens" in str(report)


def test_a_tokenizer_that_cannot_be_trimmed_is_refused():
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.BPE(vocab={"<pad>": 0, "<unk>": 1, "a": 2}, merges=[], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")
    with pytest.raises(ValueError, match="BPE"):
        choose_tokens(tokenizer, ["a"])


def test_a_table_smaller_than_the_tokenizer_is_refused():
    tokenizer = word_piece()
    processor = MMSERProcessor(Wav2Vec2FeatureExtractor(), tokenizer)
    with pytest.raises(ValueError, match=r"table of 20 tokens"):
        trim_vocabulary(tiny_model(text={"vocab_size": 20}), processor, texts=TEXTS)


@pytest.mark.parametrize(("texts", "languages", "message"), [(None, None, "either"), ([], None, "single text")])
def test_nothing_to_choose_by(texts, languages, message):
    with pytest.raises(ValueError, match=message):
        choose_tokens(word_piece(), texts, languages)


def test_scripts():
    assert scripts_of(["de", "en"]) == {"LATIN"}
    assert scripts_of(["ja"]) == {"CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA"}
    assert is_written_in("人々", scripts_of(["ja"])) and is_written_in("čaša", scripts_of(["sr"]))
    with pytest.raises(ValueError, match=r"klingon.*am"):
        scripts_of(["de", "klingon"])
    assert is_written_in("Straße, 3 €!", {"LATIN"})
    assert not is_written_in("Straße и", {"LATIN"})
    assert is_written_in("e\u0301", {"LATIN"})  # a combining accent
    assert is_written_in("हिंदी", {"DEVANAGARI"}) and not is_written_in("हिंदी", {"LATIN"})  # with vowel signs
    assert is_written_in("\uff21", {"LATIN"}) and not is_written_in("\uff21", {"GREEK"})  # full width
    assert is_written_in("abc 123", set())


def test_texts_are_read_from_every_kind_of_file(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text('file_name,transcription\nx,"three, drei"\ny,\n', encoding="utf-8")
    (tmp_path / "c.tsv").write_text("text\tlabel\nvier\t1\n", encoding="utf-8")
    rows = [{"text": "not this"}, {"transcription": "fünf", "text": "not this"}, {"transcription": None}]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    texts = list(read_texts(tmp_path / name for name in ("a.txt", "b.csv", "c.tsv", "d.jsonl")))
    assert texts == ["one", "two", "three, drei", "", "vier", "", "fünf", ""]
    (tmp_path / "e.csv").write_text("file_name,label\nx,1\n")
    with pytest.raises(
        ValueError, match=r"e\.csv has no text column 'transcription'; its columns are \['file_name', "
    ):
        list(read_texts([tmp_path / "e.csv"]))
    (tmp_path / "f.csv").write_text("text,label\nx,1,2\n")
    with pytest.raises(ValueError, match=r"f\.csv row 2 has 3 fields, but the header has 2"):
        list(read_texts([tmp_path / "f.csv"]))
    with pytest.raises(ValueError, match=r"\.wav: texts are read from"):
        list(read_texts(["clip.wav"]))
    with pytest.raises(FileNotFoundError):
        list(read_texts([tmp_path / "none.txt"]))


def test_a_column_of_any_name_is_read_where_it_is_named(tmp_path):
    (tmp_path / "anrufe.csv").write_text("Datei;Abschrift;text\na.mp3;Guten Tag;no\n", encoding="utf-8-sig")
    assert list(read_texts([tmp_path / "anrufe.csv"], "Abschrift")) == ["Guten Tag"]
    assert list(read_texts([tmp_path / "anrufe.csv"])) == ["no"]
    with pytest.raises(ValueError, match=r"no text column 'Abschrit'.*--text_column names the one"):
        list(read_texts([tmp_path / "anrufe.csv"], "Abschrit"))


def test_the_export_takes_the_column_and_misses_a_file_at_once(tmp_path, monkeypatch):
    import export_hf
    from mmser import export

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "anrufe.csv").write_text("Datei;Abschrift\na.mp3;Guten Tag\n", encoding="utf-8-sig")
    seen = {}
    monkeypatch.setattr(
        export, "export_checkpoint", lambda *_, **given: seen.update(given) or SimpleNamespace(folder="")
    )
    flags = ["--checkpoint", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--vocabulary_text"]
    export_hf.main([*flags, str(tmp_path / "anrufe.csv"), "--text_column", "Abschrift"])
    assert seen["texts"] == ["Guten Tag"]
    seen.clear()
    with pytest.raises(FileNotFoundError):
        export_hf.main([*flags, str(tmp_path / "none.csv")])
    assert seen == {}


@pytest.mark.parametrize("column", ["transcription", "text", "transcript", "sentence", "Transcript"])
@pytest.mark.parametrize("delimiter", [",", ";"])
def test_tables_are_read_as_in_training(tmp_path, column, delimiter):
    words = [["file_name", "label", column], ["a.wav", "happy", " eins "], ["b.wav", "sad", ""]]
    table = "\n".join(delimiter.join(row) for row in words)
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8-sig")
    for name in ("a.wav", "b.wav"):
        (tmp_path / name).touch()
    assert list(read_texts([tmp_path / "metadata.csv"])) == ["eins", ""]
    assert load_emotion_split(tmp_path, label_names=["happy", "sad"])["text"][:] == ["eins", ""]
