# SPDX-License-Identifier: Apache-2.0
"""Draw `docs/architecture.svg`. The sizes in it are the defaults of `MMSERConfig`.

python docs/draw_architecture.py
"""

import sys
from html import escape
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from configuration_mmser import MMSERConfig

PICTURE = Path(__file__).with_name("architecture.svg")
# White text on these colours and lines in mid grey are legible on a white page and on a black one
INPUT, AUDIO, TEXT, BOTH, HEAD, LINE = "#57606a", "#0969da", "#8250df", "#1a7f37", "#bc4c00", "#848d97"
START = f"""\
<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 980 725" role="img" text-anchor="middle" \
font-family="Segoe UI, Helvetica, Arial, DejaVu Sans, sans-serif" font-size="15" fill="#ffffff">
<title>The architecture of MMSER, with the shapes of its tensors</title>
<defs><marker id="head" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="5" markerHeight="5" orient="auto">\
<path d="M0,0 L10,5 L0,10 z" fill="{LINE}"/></marker></defs>
"""
ARROWS = (  # the points of each
    *("250,82 250,106", "730,82 730,106", "190,214 190,258", "790,214 790,258", "330,214 650,258", "650,214 330,258"),
    *("250,324 250,348", "730,324 730,348", "250,414 250,438", "730,414 730,438", "395,504 395,528"),
    *("890,504 890,618", *(f"{x},594 {x},618" for x in (90, 238, 438, 650)), "760,563 812,563 812,618"),
)


def box(x: int, y: int, width: int, colour: str, title: str, *lines: str) -> str:
    """A filled box: a title in bold, and lines under it. Its height follows from the number of lines."""
    shape = f'<rect x="{x}" y="{y}" width="{width}" height="{41 + 21 * len(lines)}" rx="8" fill="{colour}"/>\n'
    return shape + "".join(
        f'<text x="{x + width / 2:g}" y="{y + 26 + 21 * row}" font-weight="{"normal" if row else "bold"}">'
        f"{escape(line)}</text>\n"
        for row, line in enumerate((title, *lines))
    )


def draw(config: MMSERConfig) -> str:
    """The architecture of `config` as the text of an SVG file."""
    encoders: Any = config.audio_config, config.text_config
    audio, text = (encoder.hidden_size for encoder in encoders)
    labels, fused, features = len(config.id2label or {}), config.fusion_hidden_size, config.feature_size
    attention = f"{config.cross_attention_hidden_size} wide, {config.cross_attention_heads} heads"
    blocks = f"{config.classifier_num_layers} residual blocks: features [B,{features}], then logits [B,{labels}]"
    models = "wav2vec2, HuBERT, WavLM, data2vec-audio, Whisper"
    layers = "learned sum of its standardised layers"
    boxes = (
        box(30, 20, 440, INPUT, "recording", "input_values [B,T] or input_features [B,mels,T]"),
        box(510, 20, 440, INPUT, "transcript", "input_ids [B,L]"),
        box(30, 110, 440, AUDIO, "audio encoder", models, layers, f"audio states [B,Ta,{audio}]"),
        box(510, 110, 440, TEXT, "text encoder", "any BERT-like model", "its last layer", f"text states [B,L,{text}]"),
        box(30, 262, 440, AUDIO, "CrossModalAttention", f"audio attends to text, {attention}"),
        box(510, 262, 440, TEXT, "CrossModalAttention", f"text attends to audio, {attention}"),
        box(30, 352, 440, AUDIO, "AttentiveStatsPooling", f"mean and deviation over time [B,{2 * audio}]"),
        box(510, 352, 440, TEXT, "AttentiveStatsPooling", f"mean and deviation over time [B,{2 * text}]"),
        box(30, 442, 920, BOTH, "FusionLayer", f"gated; knows which modality is missing: fused [B,{fused}]"),
        box(30, 532, 730, BOTH, "DeepClassifier", blocks),
        box(30, 622, 120, HEAD, "logits", f"[B,{labels}]", "÷ temperature"),
        box(160, 622, 156, HEAD, "UncertaintyHead", "uncertainty [B,1]", "in [0,1]"),
        box(326, 622, 224, HEAD, "ClassAnchorClustering", "anchor_distances", f"[B,{labels}]"),
        box(560, 622, 180, HEAD, "PrototypeMemory", f"{config.prototypes_per_class} per class,", "for the loss only"),
        box(750, 622, 200, HEAD, "OpenMax", "open_set_probabilities", f"[B,{labels + 1}], unknown last"),
    )
    line = f'fill="none" stroke="{LINE}" stroke-width="2.5" marker-end="url(#head)"'
    arrows = (f'<polyline points="{points}" {line}/>\n' for points in ARROWS)
    return "".join((START, *boxes, *arrows, "</svg>\n"))


if __name__ == "__main__":
    PICTURE.write_text(draw(MMSERConfig()), encoding="utf-8")
    print(PICTURE)
