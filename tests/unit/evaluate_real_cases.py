"""What an evaluation of real teachers needs: small random pipelines, clips for them, students, a CLIP."""

import pipeline_cases
import torch
from export_cases import FLOW, GRIDS, save_real_student, text_length
from pipeline_cases import GUIDANCE, tokenizer
from real_cases import write_real_latents
from transformers import CLIPConfig, CLIPModel

from raydistill.config.evaluate import EvaluateConfig, LatencyConfig, PicturesConfig
from raydistill.consistency.schedule import TimeGrid
from raydistill.models.folders import codec_digest, teacher_digest
from raydistill.models.prompts import PromptEncoder, prompts_identity
from raydistill.models.teacher import load_teacher
from raydistill.sampler import build_plan
from raydistill.student import Card, save_student

CLIPS = 4
SHIFT = 17.0


def write_clip(folder, size=28):
    """A whole CLIP with its tokenizer, drawn at random."""
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    text = {**layers, **special, "vocab_size": 16, "max_position_embeddings": 12}
    vision = {**layers, "image_size": size, "patch_size": 14}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=3)).save_pretrained(folder)
    tokenizer(12).save_pretrained(folder)
    return folder


def write_inputs(folder, kind, method):
    """folder/pipeline, folder/student of it, folder/data with twice as many clips as are sampled."""
    student, pipeline = save_real_student(folder, kind, method)
    sizes = {"frames": 9, "width": 8 * pipeline_cases.latents_of(kind).shape[-1]}
    write_real_latents(folder / "data", pipeline, length=text_length(kind), count=2 * CLIPS, **sizes)
    return student, pipeline


def make_config(folder, kind, method, **changes):
    """Settings of an evaluation of the student in a folder that `write_inputs` filled."""
    values = {
        "data": f"{folder}/data",
        "teacher": f"{folder}/pipeline",
        "codec": f"{folder}/pipeline",
        "students": {method.split()[0]: [f"{folder}/student"]},
        "output": f"{folder}/evaluation",
        "num_clips": CLIPS,
        "teacher_steps": (4, 2),
        "student_steps": (4, 2),
        "semantic_tail": (),
        "head_detail": (),
        "guidance_scale": GUIDANCE,
        "shift": GRIDS.get(kind, FLOW).shift,
        "batch_size": 3,
        "num_draws": 20,
        "threads": 1,
        "latency": LatencyConfig(rounds=0),
        "pictures": PicturesConfig(captions=1, strip_captions=1),
    }
    return EvaluateConfig(**(values | changes))


def save_twin(folder, pipeline):
    """A student that is its teacher without guidance, in four steps of the teacher's own."""
    grid, text = TimeGrid(4, shift=SHIFT), PromptEncoder(pipeline)
    sources = {"teacher": teacher_digest(pipeline), "codec": codec_digest(pipeline)}
    card = Card(
        kind="single",
        boundary=None,
        grid=grid,
        guidance_scale=1.0,
        latent_shape=(16, 3, 4, 6),
        text_shape=tuple(text([""]).shape[1:]),
        sources={**sources, "text": prompts_identity(pipeline)},
    )
    save_student(folder, card, load_teacher(pipeline), None, {4: build_plan(4, None, grid)}, text([""])[0])
    return str(folder)
