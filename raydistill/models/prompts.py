"""Captions by a pipeline's own tokenizers and text encoders, as the pipeline itself embeds them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from raydistill.artifacts import fingerprint
from raydistill.errors import InvalidValue, MissingArtifact
from raydistill.models.folders import TEXT, located, model_digest, read_index
from raydistill.models.protocols import TextEncoder
from raydistill.models.text import WordVectors
from raydistill.types import Text

LENGTHS = {"WanPipeline": 512, "HunyuanVideoPipeline": 256, "CogVideoXPipeline": 226}
"""Tokens of a caption in each pipeline's own call; CLIP's length is its tokenizer's."""
CLIPS = ("TextToVideoSDPipeline", "AnimateDiffPipeline")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def prompts_identity(pipeline: str | Path, length: int = 0, precision: str = "fp32") -> dict[str, Any]:
    """Return what shapes a pipeline's embeddings, read from its files: contents, not where they lie.

    `length` in tokens; 0 is the pipeline's own. Raises MissingArtifact, InvalidValue.
    """
    folder = located(pipeline, TEXT)
    kind = read_index(folder).get("_class_name", "no pipeline")
    if kind not in (*LENGTHS, *CLIPS):
        known = ", ".join((*LENGTHS, *CLIPS))
        raise MissingArtifact(f"encode.text: {folder} is {kind}: expected the folder of a {known}")
    if length and kind in CLIPS:
        raise InvalidValue("encode.text_length", length, f"0: {kind}'s captions have CLIP's length")
    parts = {part: model_digest(folder / part) for part in TEXT if (folder / part).is_dir()}
    if not parts:
        raise MissingArtifact(f"encode.text: {folder} has neither of {', '.join(TEXT)}: copy them")
    digest = fingerprint(parts)
    return {"kind": kind, "digest": digest, "length": length or LENGTHS.get(kind, 0), "precision": precision}


class PromptEncoder:
    """A pipeline's text encoders on one device."""

    def __init__(
        self,
        pipeline: str | Path,
        length: int = 0,
        precision: str = "fp32",
        *,
        device: str | torch.device = "cpu",
    ):
        """Load them, safetensors only; nothing else of the pipeline. Raises MissingArtifact, InvalidValue."""
        self.identity: Mapping[str, Any] = prompts_identity(pipeline, length, precision)
        import diffusers  # here: the driver asks for the identity alone

        folder, self.device = located(pipeline, TEXT), device
        parts = {n for n, value in read_index(folder).items() if isinstance(value, list)}
        unused: dict[str, Any] = {name: None for name in parts if name not in TEXT}
        try:
            self._pipeline = getattr(diffusers, self.identity["kind"]).from_pretrained(
                folder, **unused, use_safetensors=True, dtype=PRECISIONS[precision]
            )
        except (OSError, ValueError) as broken:
            raise MissingArtifact(f"encode.text: {folder} holds no whole text encoder: {broken}") from broken
        self._pipeline.to(device)

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> Text:
        """Embed captions: float32 (b, l, d) on the CPU; HunyuanVideo's two in one, see `pack_text`."""
        prompts, kind, length = list(captions), self.identity["kind"], self.identity["length"]
        if kind in CLIPS:
            text = self._pipeline.encode_prompt(prompts, self.device, 1, False)[0]
        elif kind == "HunyuanVideoPipeline":
            from raydistill.models.hunyuan import pack_text

            states, pooled, mask = self._pipeline.encode_prompt(
                prompts, device=self.device, max_sequence_length=length
            )
            text = pack_text(states, pooled, mask.bool())
        else:
            text = self._pipeline.encode_prompt(
                prompts, do_classifier_free_guidance=False, max_sequence_length=length, device=self.device
            )[0]
        return text.float().cpu()


def build_text(
    pipeline: str | Path,
    *,
    num_tokens: int,
    width: int,
    length: int = 0,
    precision: str = "fp32",
    device: str = "cpu",
) -> TextEncoder:
    """Build the encoder of captions: a pipeline's own, or without one word vectors of these sizes."""
    if not pipeline:
        return WordVectors(num_tokens, width)
    return PromptEncoder(pipeline, length, precision, device=device)
