# SPDX-License-Identifier: Apache-2.0
"""`handler.py` of a checkpoint: what Hugging Face Inference Endpoints call. It travels alone and imports no MMSER.

`mmser push` copies it beside the weights, and `requirements.txt` with it. The endpoint answers the bytes of an audio
file, sent as audio/wav and its like, and JSON with such a file in base64, with its transcript, or with text alone.
"""

import base64
import binascii
from typing import Any

from transformers import pipeline

OPTIONS = (
    *("top_k", "allowed_labels", "return_uncertainty", "return_set", "return_auxiliary"),
    *("chunk_length_s", "stride_length_s", "batch_size"),
)
FORMS = 'an audio file in base64, {"audio": such a file, "text": "what is said"}, or {"text": "what is said"}'


class EndpointHandler:
    """
    Classifies what is sent to an endpoint.

    Args:
        path (`str`): folder of the checkpoint, with its code.
    """

    def __init__(self, path: str = ""):
        self.classifier: Any = pipeline("audio-classification", model=path, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> Any:
        """
        Args:
            data (`dict`): under `inputs` the bytes of an audio file, the same in base64, a dict with it under `audio`
                and with `text`, either of them alone, or a list of these; under `parameters` options of the pipeline,
                such as `top_k`, and `chunk_length_s` for long recordings.

        Returns:
            What the pipeline returns: labels with their scores, best first, with the uncertainty and whether the clip
            is none of the classes, unless `return_uncertainty` is false.

        Raises:
            ValueError: what cannot be used. The endpoint answers with the sentence.
        """
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f'parameters: send an object, as in {{"top_k": 1}}, not {parameters!r:.80}.')
        unknown = [name for name in parameters if name not in OPTIONS]
        if unknown:
            raise ValueError(f"parameters: there is no {unknown[0]!r}; there are {', '.join(OPTIONS)}.")
        inputs = data.get("inputs")
        items = [_item(one) for one in inputs] if isinstance(inputs, list) else _item(inputs)
        return self.classifier(items, **{"return_uncertainty": True, **parameters})


def _item(value: Any) -> dict[str, Any]:
    """One input as the pipeline takes it. A text is never a path or an address: those of the server are its own."""
    if isinstance(value, dict):
        extra = [name for name in value if name not in ("audio", "text")]
        if extra or not value or not isinstance(value.get("text", ""), str):
            raise ValueError(f"inputs: send {FORMS}.")
        sound = {"bytes": _sound(value["audio"])} if value.get("audio") is not None else {}
        return {**sound, **({"text": value["text"]} if "text" in value else {})}
    return {"bytes": _sound(value)}


def _sound(value: Any) -> bytes:
    """The content of an audio file."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    try:
        if isinstance(value, str):
            return base64.b64decode(value, validate=True)
    except binascii.Error as error:
        raise ValueError(f"inputs: this is no base64. Send {FORMS}.") from error
    raise ValueError(f"inputs: send {FORMS}.")
