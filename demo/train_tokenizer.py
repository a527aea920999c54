# SPDX-License-Identifier: Apache-2.0
"""Train a small cased WordPiece tokenizer, as BERT's, on the training transcripts of a corpus folder.

python demo/train_tokenizer.py demo_output/corpus demo_output/tokenizer
"""

import argparse
import csv
from pathlib import Path

from transformers import BertTokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_tokenizer(corpus: Path, vocab_size: int = 2000) -> BertTokenizer:
    """Train on the column `transcription` of `corpus/train/metadata.csv`, and on no other split."""
    with open(corpus / "train" / "metadata.csv", encoding="utf-8", newline="") as file:
        sentences = [row["transcription"] for row in csv.DictReader(file)]
    empty = BertTokenizer(vocab={token: index for index, token in enumerate(SPECIAL_TOKENS)}, do_lower_case=False)
    return empty.train_new_from_iterator(sentences, vocab_size=vocab_size, show_progress=False)


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
