# SPDX-License-Identifier: Apache-2.0
"""Train a small cased WordPiece tokenizer, as BERT's, on the training transcripts of a corpus folder.

python demo/train_tokenizer.py demo_output/corpus demo_output/tokenizer

The same transcripts give the same tokenizer.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from tokenizers.trainers import WordPieceTrainer
from transformers import BertTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(corpus: Path, vocab_size: int = 2000) -> BertTokenizer:
    """Train on the column `transcription` of `corpus/train/metadata.csv`, and on no other split."""
    with open(corpus / "train" / "metadata.csv", encoding="utf-8", newline="") as file:
        sentences = [row["transcription"] for row in csv.DictReader(file)]
    return _tokenizer(learn_pieces(sentences, vocab_size))


def learn_pieces(sentences: Sequence[str], vocab_size: int) -> list[str]:
    """The pieces of a WordPiece vocabulary in the order of their ids."""
    backend = _tokenizer(SPECIAL_TOKENS).backend_tokenizer
    normalized = map(backend.normalizer.normalize_str, sentences)
    words = {word for text in normalized for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)}
    # The trainer numbers letters inside words as it meets them in a hash map, and settles ties by these numbers: each
    # run would learn other pieces. Given as special tokens they are numbered in our order
    inner_letters = [f"##{letter}" for letter in sorted({letter for word in words for letter in word[1:]})]
    trainer = WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*SPECIAL_TOKENS, *inner_letters], show_progress=False
    )
    backend.train_from_iterator(sentences, trainer)
    vocabulary = backend.get_vocab()
    return sorted(vocabulary, key=vocabulary.__getitem__)


def _tokenizer(pieces: Sequence[str]) -> BertTokenizer:
    return BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}, do_lower_case=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with train/metadata.csv")
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--vocab_size", type=int, default=2000, help="largest number of pieces")
    arguments = parser.parse_args()
    tokenizer = train_tokenizer(arguments.corpus, arguments.vocab_size)
    tokenizer.save_pretrained(arguments.output)
    print(f"The tokenizer with {len(tokenizer)} pieces is in {arguments.output}")


if __name__ == "__main__":
    main()
