# SPDX-License-Identifier: Apache-2.0
"""Draw `docs/architecture.svg`. The sizes in it are the defaults of `MMSERConfig`.

python docs/draw_architecture.py
"""

import sys
from html import escape
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

from configuration_mmser import MMSERConfig

PICTURE = Path(__file__).with_name("architecture.svg")
# White text on these colours and lines in mid grey are legible on a white page and on a black one
COLOURS = {"input": "#57606a", "audio": "#0969da", "text": "#8250df", "both": "#1a7f37", "head": "#bc4c00"}
LINE = "#848d97"


def box(x: int, y: int, width: int, colour: str, title: str, *lines: str) -> str:
    """A filled box: a title in bold, and lines under it. Its height follows from the number of lines."""
    weights = ["bold", *["normal"] * len(lines)]
    texts = [
        f'<text x="{x + width / 2:g}" y="{y + 26 + 21 * row}" font-weight="{weights[row]}">{escape(line)}</text>'
        for row, line in enumerate((title, *lines))
    ]
    height = 41 + 21 * len(lines)
    place = f'x="{x}" y="{y}" width="{width}" height="{height}"'
    return "\n".join([f'<rect {place} rx="8" fill="{COLOURS[colour]}"/>', *texts])


def arrow(*points: tuple[int, int]) -> str:
    """A line through the points with a head at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="2.5" marker-end="url(#head)"/>'


def draw(config: MMSERConfig) -> str:
    """The architecture of `config` as the text of an SVG file."""
    num_labels, fused, features = len(config.id2label or {}), config.fusion_hidden_size, config.feature_size
    audio_size, text_size = (cast(Any, encoder).hidden_size for encoder in (config.audio_config, config.text_config))
    attention = f"{config.cross_attention_hidden_size} wide, {config.cross_attention_heads} heads"
    parts = [
        box(30, 20, 440, "input", "recording", "input_values [B,T] or input_features [B,mels,T]"),
        box(510, 20, 440, "input", "transcript", "input_ids [B,L]"),
        arrow((250, 82), (250, 106)),
        arrow((730, 82), (730, 106)),
        box(
            *(30, 110, 440, "audio", "audio encoder"),
            "wav2vec2, HuBERT, WavLM, data2vec-audio, Whisper",
            "learned sum of its standardised layers",
            f"audio states [B,Ta,{audio_size}]",
        ),
        box(
            *(510, 110, 440, "text", "text encoder"),
            "any BERT-like model",
            "its last layer",
            f"text states [B,L,{text_size}]",
        ),
        arrow((190, 214), (190, 258)),
        arrow((790, 214), (790, 258)),
        arrow((330, 214), (650, 258)),
        arrow((650, 214), (330, 258)),
        box(30, 262, 440, "audio", "CrossModalAttention", f"audio attends to text, {attention}"),
        box(510, 262, 440, "text", "CrossModalAttention", f"text attends to audio, {attention}"),
        arrow((250, 324), (250, 348)),
        arrow((730, 324), (730, 348)),
        box(30, 352, 440, "audio", "AttentiveStatsPooling", f"mean and deviation over time [B,{2 * audio_size}]"),
        box(510, 352, 440, "text", "AttentiveStatsPooling", f"mean and deviation over time [B,{2 * text_size}]"),
        arrow((250, 414), (250, 438)),
        arrow((730, 414), (730, 438)),
        box(30, 442, 920, "both", "FusionLayer", f"gated; knows which modality is missing: fused [B,{fused}]"),
        arrow((395, 504), (395, 528)),
        arrow((890, 504), (890, 618)),
        box(
            *(30, 532, 730, "both", "DeepClassifier"),
            f"{config.classifier_num_layers} residual blocks: features [B,{features}], then logits [B,{num_labels}]",
        ),
        *(arrow((x, 594), (x, 618)) for x in (90, 238, 438, 650)),
        arrow((760, 563), (812, 563), (812, 618)),
        box(30, 622, 120, "head", "logits", f"[B,{num_labels}]", "÷ temperature"),
        box(160, 622, 156, "head", "UncertaintyHead", "uncertainty [B,1]", "in [0,1]"),
        box(326, 622, 224, "head", "ClassAnchorClustering", "anchor_distances", f"[B,{num_labels}]"),
        box(
            560, 622, 180, "head", "PrototypeMemory", f"{config.prototypes_per_class} per class,", "for the loss only"
        ),
        box(750, 622, 200, "head", "OpenMax", "open_set_probabilities", f"[B,{num_labels + 1}], unknown last"),
    ]
    head = (
        '<marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="5" markerHeight="5" orient="auto">'
        f'<path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/></marker>'
    )
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 725" role="img" text-anchor="middle" '
            'font-family="Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif" font-size="15" fill="#ffffff">',
            "<title>The architecture of MMSER, with the shapes of its tensors</title>",
            f"<defs>{head}</defs>",
            *parts,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(MMSERConfig()), encoding="utf-8")
    print(PICTURE)
