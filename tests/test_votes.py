# SPDX-License-Identifier: Apache-2.0
"""Tests of mmser.votes and of what is done with votes: reading, the loss, examples, the cache, runs, evaluation."""

import csv
import json
from fractions import Fraction

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import log_softmax
from tiny import tiny_batch
from tiny import tiny_model as any_model
from tiny_corpus import JOINT, NAMES, bring, read_rows, tiny_flags, tiny_model, tiny_processor, write_table

import train_hf
from losses_mmser import class_balanced_focal_loss, class_balanced_weights
from mmser.arguments import EVALUATION_ARGUMENTS, parse_arguments
from mmser.batches import MMSERDataCollator
from mmser.caching import CachedStatesDataset, EncoderStateCache
from mmser.evaluation_run import load_clips
from mmser.examples import EmotionDataset, class_counts
from mmser.loading import load_emotion_dataset
from mmser.sources import DataColumns
from mmser.votes import normalise_votes, read_votes, vote_columns

pytestmark = pytest.mark.usefixtures("quiet", "seeded")

# --- one row ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        (None, {}),
        (["votes"], {"votes": None}),
        (["happy", "sad"], {"happy": "happy", "sad": "sad"}),
        (["happy=H", "sad = S", "angry"], {"H": "happy", "S": "sad", "angry": "angry"}),
    ],
)
def test_vote_columns(given, columns):
    assert vote_columns(given) == columns


@pytest.mark.parametrize(
    "given", [["happy=H"], ["happy=H", "happy=S"], ["happy=H", "sad=H"], ["happy", "happy"], [], ["=H", "sad"]]
)
def test_vote_columns_that_say_too_little(given):
    with pytest.raises(ValueError, match="--label_distribution_columns takes one column of votes, or two or more"):
        vote_columns(given)


@pytest.mark.parametrize(
    ("cell", "votes"),
    [
        ("happy;sad;happy", {"happy": 2, "sad": 1}),
        ("happy | happy,sad", {"happy": 2, "sad": 1}),
        ('["happy", "sad", "happy"]', {"happy": 2, "sad": 1}),
        (["happy", "sad", "unknown", None, -1], {"happy": 1, "sad": 1}),
        ("[1, 2, 1, -1]", {"1": 2, "2": 1}),
        ([1.0, 2], {"1": 1, "2": 1}),
        ('{"happy": 0.7, "sad": "0.3", "angry": null}', {"happy": 0.7, "sad": 0.3, "angry": 0}),
        ({"happy": 2, "sad": None, "unknown": 7}, {"happy": 2, "sad": 0}),
        ("happy", {"happy": 1}),
        (1, {"1": 1}),
    ],
)
def test_a_cell_of_votes(cell, votes):
    assert read_votes({"votes": cell}, {"votes": None}, "row 1") == votes


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("", "row 1 has no vote that counts in 'votes'"),
        (None, "row 1 has no vote that counts in 'votes'"),
        ("unknown;-1", "row 1 has no vote that counts in 'votes'"),
        ({"happy": 0}, "row 1 has no vote that counts in 'votes'"),
        ({"happy": 1e308, "sad": 1e308}, "votes that are too many to add up"),
        ("[0.7, 0.3]", "row 1: 'votes': a list holds votes, .* got 0.7; write shares as an object"),
        ([["happy"]], "a list holds votes"),
        ("[happy]", "row 1: 'votes' is no JSON"),
        ({"happy": -1}, "row 1: 'votes': votes and shares are numbers of 0 or more, or empty for 0, got -1"),
        ({"happy": "many"}, "numbers of 0 or more, or empty for 0, got 'many'"),
        ({"happy": float("inf")}, "numbers of 0 or more, or empty for 0, got inf"),
        ({"happy": float("nan"), "sad": 1}, "numbers of 0 or more, or empty for 0, got nan"),
        (
            '{"happy": NaN, "sad": 1}',
            "row 1: 'votes': votes and shares are numbers of 0 or more, or empty for 0, got nan",
        ),
        ({"happy": True}, "numbers of 0 or more, or empty for 0, got True"),
        ({"happy": [1]}, r"numbers of 0 or more, or empty for 0, got \[1\]"),
    ],
)
def test_a_bad_cell_is_named(cell, message):
    with pytest.raises(ValueError, match=message):
        read_votes({"votes": cell}, {"votes": None}, "row 1")


def test_a_column_for_each_class():
    columns = {"h": "happy", "s": "sad", "a": "angry"}
    assert read_votes({"h": "2", "s": "", "a": " "}, columns, "row 1") == {"happy": 2, "sad": 0, "angry": 0}
    with pytest.raises(
        ValueError, match="row 1: 's': votes and shares are numbers of 0 or more, or empty for 0, got '-2'"
    ):
        read_votes({"h": "2", "s": "-2", "a": "1"}, columns, "row 1")
    for missing in ("nan", "NaN", float("nan")):  # a sum that failed, and no share of 0
        with pytest.raises(ValueError, match=f"row 1: 's': votes and shares are .*, or empty for 0, got {missing!r}"):
            read_votes({"h": "2", "s": missing, "a": "1"}, columns, "row 1")
    with pytest.raises(ValueError, match="row 1 has no vote that counts in 'h', 's', 'a'"):
        read_votes({"h": "0", "s": "", "a": None}, columns, "row 1")


@given(st.lists(st.integers(0, 9), min_size=4, max_size=4).filter(any), st.integers(-1, 3))
def test_shares_and_majority(numbers, own):
    """Against exact fractions: the first of the largest, unless the row's own label is one of them."""
    shares, label = normalise_votes(dict(zip(NAMES, numbers, strict=True)), NAMES[own] if own >= 0 else "", NAMES, "r")
    exact = [Fraction(number, sum(numbers)) for number in numbers]
    np.testing.assert_allclose(shares, [float(share) for share in exact], rtol=1e-15)
    tied = [index for index, share in enumerate(exact) if share == max(exact)]
    assert label == (own if own in tied else tied[0])


def test_ties_of_shares_are_found_in_spite_of_rounding():
    shares = {"neutral": 0.1 + 0.2, "happy": 0.3, "sad": 0.4 - 0.1, "angry": 0.1}
    assert len(set(shares.values())) > 2
    assert normalise_votes(shares, "sad", NAMES, "r")[1] == 2
    assert normalise_votes(shares, "no agreement", NAMES, "r")[1] == 0
    assert normalise_votes(shares, "angry", NAMES, "r")[1] == 0


def test_spellings_and_ids_of_one_class_are_added():
    assert normalise_votes({"Happy": 1, "happy ": 1, "1": 1, "sad": 1}, "", NAMES, "r") == ([0, 0.75, 0.25, 0], 1)
    with pytest.raises(ValueError, match="r: unknown label 'bored'"):
        normalise_votes({"bored": 1}, "", NAMES, "r")


# --- whole tables ----------------------------------------------------------------------------------------------------


def voted(corpus, folder, change=lambda row, votes: None, form="columns"):
    """The corpus with three votes for each clip's class and one for the next class, without its labels."""
    for split in ("train", "validation", "test"):
        rows = []
        for row in read_rows(corpus, split):
            own = NAMES.index(row.pop("label"))
            votes = {name: 0 for name in NAMES} | {NAMES[own]: 3, NAMES[(own + 1) % 4]: 1}
            change(row, votes)
            cells = {f"n_{name}": number for name, number in votes.items()}
            if form == "list":
                cells = {"votes": json.dumps([name for name, number in votes.items() for _ in range(number)])}
            rows.append({key: value for key, value in row.items() if key != "split"} | cells)
        write_table(folder / split / "metadata.csv", bring(rows, folder / split))
    return folder


COLUMNS = [f"{name}=n_{name}" for name in NAMES]


@pytest.mark.parametrize(("form", "columns"), [("columns", COLUMNS), ("list", ["votes"])])
def test_votes_take_the_place_of_labels(corpus, tmp_path, form, columns):
    data, names = load_emotion_dataset(voted(corpus, tmp_path, form=form), label_distribution_columns=columns)
    plain, _ = load_emotion_dataset(corpus)
    assert names == NAMES
    for split, table in data.items():
        assert table["labels"] == plain[split]["labels"]
        shares = np.array(table["class_shares"])
        own = np.array(table["labels"])
        assert (shares[np.arange(len(own)), own] == 0.75).all() and (shares.sum(axis=1) == 1).all()
        assert (shares[np.arange(len(own)), (own + 1) % 4] == 0.25).all()
    assert "class_shares" not in plain["train"].column_names


def test_labels_reorder_the_shares(corpus, tmp_path):
    order = ["angry", "sad", "happy", "neutral"]
    folder = voted(corpus, tmp_path)
    data, names = load_emotion_dataset(folder, label_distribution_columns=COLUMNS, label_names=order)
    plain, _ = load_emotion_dataset(folder, label_distribution_columns=COLUMNS)
    assert names == order
    np.testing.assert_array_equal(np.array(data["train"]["class_shares"])[:, ::-1], plain["train"]["class_shares"])
    assert [order[label] for label in data["train"]["labels"]] == [NAMES[x] for x in plain["train"]["labels"]]


def test_a_bad_row_of_votes_is_named_or_left_out(corpus, tmp_path):
    def spoil(row, votes):
        if row["file_name"].endswith("/1_2.wav"):
            votes.update(dict.fromkeys(votes, 0))

    folder = voted(corpus, tmp_path, spoil)
    with pytest.raises(ValueError, match=r"1 bad row .*\n  train/metadata.csv row \d+ has no vote that counts"):
        load_emotion_dataset(folder, label_distribution_columns=COLUMNS)
    data, _ = load_emotion_dataset(folder, label_distribution_columns=COLUMNS, on_bad_example="skip")
    assert len(data["train"]) == 31
    with pytest.raises(ValueError, match=r"has no column 'n_bored' .*--label_distribution_columns.*its columns are"):
        load_emotion_dataset(folder, label_distribution_columns=[*COLUMNS, "bored=n_bored"])


def test_a_vote_for_none_of_the_classes_is_an_error_that_counts_its_rows(corpus, tmp_path):
    folder = voted(corpus, tmp_path, form="list")
    with pytest.raises(ValueError, match=r"unknown label 'angry'; allowed: neutral, happy, sad \(28 rows"):
        load_emotion_dataset(
            folder, label_distribution_columns=["votes"], label_names=NAMES[:3], on_bad_example="skip"
        )


def test_class_counts_are_the_sums_of_the_shares(corpus, tmp_path):
    def only_first(row, votes):
        votes.update(neutral=6, happy=4, sad=0, angry=1)

    data, _ = load_emotion_dataset(voted(corpus, tmp_path, only_first), label_distribution_columns=COLUMNS)
    assert set(data["train"]["labels"]) == {0}
    assert class_counts(data["train"], 4) == class_counts(EmotionDataset(data["train"]), 4) == [17, 12, 0, 3]


def test_hub_data_with_lists_of_class_ids(corpus, tmp_path):
    """Ids mean the names that the data set declares for them, also where the model has another order."""
    declared = ["sad", "neutral", "happy", "angry"]
    rows = read_rows(corpus, "train")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "speaker": datasets.Value("string"),
            "votes": datasets.List(datasets.ClassLabel(names=declared)),
        }
    )
    own = [declared.index(row["label"]) for row in rows]
    table = {
        "text": [f"{row['transcription']} {i}" for i, row in enumerate(rows)],
        "speaker": [row["speaker"] for row in rows],
        "votes": [[label, label, (label + 1) % 4, -1] for label in own],
    }
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "data" / "train.parquet")
    options = {"dataset_name": str(tmp_path), "label_distribution_columns": ["votes"]}
    columns = DataColumns(audio=None, text="text")
    data, names = load_emotion_dataset(**options, columns=columns, validation_fraction=0, test_fraction=0)
    assert names == NAMES
    assert [NAMES[label] for label in data["train"]["labels"]] == [row["label"] for row in rows]
    second = [NAMES.index(declared[(label + 1) % 4]) for label in own]
    shares = np.array(data["train"]["class_shares"])
    np.testing.assert_allclose(shares[np.arange(len(rows)), second], 1 / 3)

    stream, _ = load_emotion_dataset(**options, columns=columns, label_names=NAMES, streaming=True)
    streamed = list(stream["train"])
    assert [row["labels"] for row in streamed] == data["train"]["labels"]
    np.testing.assert_array_equal([row["class_shares"] for row in streamed], shares)


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.fixture
def logits():
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0)) * 3


def one_hot(labels):
    return torch.nn.functional.one_hot(labels, 4).float()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 2.0, 0.8]])
def test_focal_loss_against_a_distribution(logits, gamma, weights):
    """Against a loop in float64; of one-hot rows it is exactly that of the labels, with its gradient."""
    shares = torch.rand(12, 4).double()
    shares[3] = torch.tensor([0, 0.5, 0.5, 0])
    shares = shares / shares.sum(dim=1, keepdim=True)
    log_p = log_softmax(logits.double().numpy(), axis=1)
    weight = np.ones(4) if weights is None else np.array(weights)
    expected = np.mean(
        [
            sum(-q[c] * weight[c] * (1 - np.exp(row[c])) ** gamma * row[c] for c in range(4))
            for q, row in zip(shares.numpy(), log_p, strict=True)
        ]
    )
    weights = None if weights is None else torch.tensor(weights)
    labels = torch.arange(12) % 4
    found = class_balanced_focal_loss(logits, labels, weights, gamma, shares)
    assert found.item() == pytest.approx(expected, rel=1e-6)

    hard, soft = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    class_balanced_focal_loss(hard, labels, weights, gamma).backward()
    loss = class_balanced_focal_loss(soft, labels, weights, gamma, one_hot(labels))
    assert loss.item() == class_balanced_focal_loss(logits, labels, weights, gamma).item()
    loss.backward()
    torch.testing.assert_close(soft.grad, hard.grad, rtol=1e-6, atol=1e-8)


OFF = {f"{name}_loss_weight": 0.0 for name in ("anchor", "uncertainty", "prototype")}


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_of_a_model_against_shares(smoothing):
    counts = [400, 30, 10, 200]
    model = any_model(dropout=False, class_counts=counts, label_smoothing=smoothing)
    batch = tiny_batch(model, [3000, 2500, 3000, 1800], [5, 3, 6, 0])
    shares = torch.tensor([[0.5, 0.25, 0.25, 0], [0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4], [0, 0.5, 0.5, 0]])
    outputs = model(**batch, class_shares=shares)
    log_p, q = log_softmax(outputs.logits.double().numpy(), axis=1), shares.double().numpy()
    smoothed = (1 - smoothing) * q + smoothing / 4
    assert outputs.losses["cross_entropy"].item() == pytest.approx(-(smoothed * log_p).sum(1).mean(), rel=1e-6)
    weights = np.array(class_balanced_weights(counts, model.config.class_balanced_beta))
    focal = -0.3 * (q * weights * (1 - np.exp(log_p)) ** 2 * log_p).sum(axis=1).mean()
    assert outputs.losses["focal"].item() == pytest.approx(focal, rel=1e-6)

    majority = model(**batch, labels=torch.tensor([0, 3, 3, 1]))
    for name in ("anchor", "uncertainty", "prototype"):
        assert outputs.losses[name] == majority.losses[name]
    given = model(**batch, labels=torch.tensor([0, 3, 3, 2]), class_shares=shares)
    assert given.losses["anchor"] != outputs.losses["anchor"]
    assert given.losses["cross_entropy"] == outputs.losses["cross_entropy"]


@torch.no_grad()
def test_a_mixture_of_clips_mixes_their_shares(monkeypatch):
    model = any_model(dropout=False, mixup_alpha=0.4, **OFF).train()
    monkeypatch.setattr(model, "_draw_mixture", lambda size: (0.7, torch.tensor([2, 0, 1])))
    shares = torch.tensor([[0.5, 0.25, 0.25, 0], [0, 0, 0, 1], [0.1, 0.2, 0.3, 0.4]])
    outputs = model(**tiny_batch(model, [3000, 2500, 3000], [5, 3, 6]), class_shares=shares)
    mixed = 0.9 * (0.7 * shares + 0.3 * shares[[2, 0, 1]]).double().numpy() + 0.025
    log_p = log_softmax(outputs.logits.double().numpy(), axis=1)
    assert outputs.losses["cross_entropy"].item() == pytest.approx(-(mixed * log_p).sum(1).mean(), rel=1e-6)


@torch.no_grad()
def test_one_hot_shares_are_labels():
    model = any_model(dropout=False, class_counts=[4, 3, 2, 1], supervised_contrastive_loss_weight=0.3)
    labels = torch.tensor([0, 3, 3, 1])
    batch = tiny_batch(model, [3000, 2500, 3000, 1800], [5, 3, 6, 0])
    hard, soft = model(**batch, labels=labels), model(**batch, class_shares=one_hot(labels))
    for name, part in hard.losses.items():
        assert soft.losses[name].item() == pytest.approx(part.item(), rel=1e-6), name
    assert soft.loss.item() == pytest.approx(hard.loss.item(), rel=1e-6)


@pytest.mark.parametrize(
    "shares", [[[0.5, 0.4, 0.3, 0.2]], [[1.5, -0.5, 0, 0]], [[float("nan"), 0, 0, 1]], [[0.5, 0.5]], [[1, 0, 0, 0]]]
)
def test_shares_that_are_none_are_refused(shares):
    model = any_model()
    batch = tiny_batch(model, [3000], [5])
    shares = torch.tensor(shares)
    if shares.shape[1] == 4 and shares.is_floating_point():
        match = "Each row of `class_shares` must be shares that sum to 1"
    else:
        match = r"`class_shares` must be a float tensor of shape \(1, 4\)"
    with pytest.raises(ValueError, match=match):
        model(**batch, class_shares=shares)


# --- examples, the cache, runs ---------------------------------------------------------------------------------------


def test_examples_and_batches_carry_the_shares_also_from_the_cache(corpus, tmp_path):
    data, _ = load_emotion_dataset(voted(corpus, tmp_path / "data"), label_distribution_columns=COLUMNS)
    model, processor = tiny_model(dropout=False).eval(), tiny_processor()
    model.freeze_audio_encoder()
    model.freeze_text_encoder()
    plain = EmotionDataset(data["validation"])
    cached = CachedStatesDataset(plain, EncoderStateCache(tmp_path / "states", model, processor))
    collate = MMSERDataCollator(processor)
    batches = [collate([dataset[index] for index in range(4)]) for dataset in (plain, cached)]
    for batch in batches:
        assert batch["class_shares"].dtype == torch.float32
        np.testing.assert_array_equal(batch["class_shares"], data["validation"][:4]["class_shares"])
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in batches]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # the states are kept in float16


@pytest.fixture
def train(corpus, tokenizer, tmp_path):
    def call(folder, **flags):
        arguments = tiny_flags(folder, tmp_path / "out", tokenizer, **flags)
        return train_hf.main([*arguments, "--label_distribution_columns", *COLUMNS])

    return call


def test_a_run_on_votes(corpus, tmp_path, train, tokenizer):
    """It is judged by the majority; a run on one-hot votes is the run on the labels."""

    def certain(row, votes):
        votes.update({name: int(number == 3) for name, number in votes.items()})

    results = train(voted(corpus, tmp_path / "soft"))
    assert results["test"]["model"]["clips"] == 16
    assert json.loads((tmp_path / "out" / "config.json").read_text())["class_counts"] == [8, 8, 8, 8]
    soft = losses_of(tmp_path / "out")
    train(voted(corpus, tmp_path / "certain", certain), overwrite_output_dir=True)
    certainly = losses_of(tmp_path / "out")
    train_hf.main(tiny_flags(corpus, tmp_path / "plain", tokenizer))
    assert losses_of(tmp_path / "plain") == pytest.approx(certainly, abs=2e-4)
    assert certainly != pytest.approx(soft, abs=1e-3)


def losses_of(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [line["loss"] for line in history if "loss" in line]


def test_a_run_does_not_go_on_with_other_votes(corpus, tmp_path, train):
    def more(row, votes):
        votes["angry"] += 1 if votes["angry"] != 3 else 0

    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "no"}
    train(voted(corpus, tmp_path / "a"), **saving)
    train(voted(corpus, tmp_path / "same"), **saving)  # the same votes in another folder
    with pytest.raises(ValueError, match=r"train clips: .* -> "):
        train(voted(corpus, tmp_path / "b", more), **saving)


def test_evaluation_is_against_the_majority(corpus, tmp_path):
    flags = ["--checkpoint", "any", "--data_dir", str(voted(corpus, tmp_path))]
    options, source = parse_arguments(EVALUATION_ARGUMENTS, [*flags, "--label_distribution_columns", *COLUMNS])
    clips = load_clips(source, options, NAMES)
    plain, _ = load_emotion_dataset(corpus)
    assert clips.evaluated["labels"] == plain["test"]["labels"]


def test_a_checkpoint_with_other_classes_learns_from_votes(corpus, tmp_path, train, tokenizer):
    train_hf.main(tiny_flags(corpus, tmp_path / "first", tokenizer, labels=None))
    folder = voted(corpus, tmp_path / "votes")
    with open(folder / "train" / "metadata.csv", encoding="utf-8") as file:
        assert "n_angry" in next(csv.reader(file))
    flags = {name: None for name in ("tokenizer_name", "random_audio_encoder", "audio_config_overrides")}
    flags |= {name: None for name in ("random_text_encoder", "text_config_overrides")}
    order = ["angry", "neutral", "sad", "happy"]
    arguments = tiny_flags(
        folder, tmp_path / "out", tokenizer, model_name_or_path=tmp_path / "first", config_overrides=JOINT, **flags
    )
    train_hf.main([*arguments, "--label_distribution_columns", *COLUMNS, "--labels", *order])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config["id2label"][str(index)] for index in range(4)] == order
