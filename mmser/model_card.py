# SPDX-License-Identifier: Apache-2.0
"""The model card of a checkpoint: `model_card_template.md`, filled with its results."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mmser.results import format_results

TEMPLATE = Path(__file__).parent / "model_card_template.md"
NO_LANGUAGE = {"mis", "mul", "und", "zxx"}  # ISO 639-2: no code, several, not determined, none


def _language_codes(names: Iterable[str]) -> list[str] | None:
    """The names that are codes of a language as a model card takes them: two or three letters, without a region."""
    codes = {name.replace("_", "-").split("-")[0].lower() for name in names}
    return sorted(code for code in codes - NO_LANGUAGE if re.fullmatch("[a-z]{2,3}", code)) or None


def write_model_card(results: Mapping[str, Any], output_dir: str | Path) -> Path:
    """Fill `model_card_template.md` with `results` (as in `eval_results.json`) and write it as `README.md`."""
    folder = Path(output_dir)
    split = "test" if "test" in results else "validation"
    scores = results.get(split, {}).get("model", {})
    name = results.get("model_name") or folder.resolve().name
    evaluated = (
        [
            EvalResult(
                task_type="audio-classification",
                dataset_type=results["data"]["type"],
                dataset_name=f"{results['data']['name']} ({split})",
                metric_type="f1",
                metric_name="Weighted F1",
                metric_value=round(scores["weighted_f1"], 4),
            )
        ]
        if scores
        else []
    )
    card_data = ModelCardData(
        language=_language_codes(results["data"]["languages"]),
        license=results.get("license"),
        library_name="transformers",
        pipeline_tag="audio-classification",
        tags=["speech-emotion-recognition", "multimodal", "mmser", "audio", "text"],
        model_name=name,
        eval_results=evaluated or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        name=name,
        results=results,
        scores=scores,
        split=split,
        tables=format_results(results),
    )
    card.save(folder / "README.md")
    return folder / "README.md"
