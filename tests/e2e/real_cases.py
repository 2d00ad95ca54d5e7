"""Runs of the papers' settings on small random pipelines of the same classes."""

import numpy as np
import pipeline_cases
import torch
from job_cases import ROOT

from raydistill.artifacts import fingerprint
from raydistill.latents.encode import Encoder, models_identity
from raydistill.latents.shards import latent_row, write_shard
from raydistill.models.frame_features import FrameNet
from raydistill.models.prompts import PromptEncoder
from raydistill.models.text import save_null
from raydistill.shards import point_to, write_artifact

DCM = {
    "wan21": "wan21_1_3b/dcm.yaml",
    "wan22": "wan21_1_3b/dcm.yaml",
    "hunyuan": "hunyuanvideo/dcm.yaml",
    "cogvideox": "cogvideox_2b/dcm.yaml",
    "modelscope": "cogvideox_2b/dcm.yaml",
    "animatediff": "cogvideox_2b/dcm.yaml",
}
MCM = dict.fromkeys(("wan21", "hunyuan", "cogvideox", "modelscope"), "modelscope/mcm.yaml")
MCM["animatediff"] = "animatediff/mcm.yaml"
UNETS = ("modelscope", "animatediff")
CAPTIONS = ("a red square moves left", "the blue circle", "a circle moves slowly over", "plain")


def write_real_latents(folder, pipeline, *, images=False, length=0, count=4, frames=17, width=48):
    """What jobs/prepare.py makes of four clips, or images, with a pipeline's own codec and captions."""
    text = PromptEncoder(pipeline, length)
    encoder = Encoder(pipeline, text=text, batch_size=4)
    frames = 1 if images else 4 if "unet" in {p.name for p in pipeline.iterdir()} else frames
    clips = [
        np.random.default_rng(i).integers(0, 256, (frames, 32, width, 3), np.uint8) for i in range(count)
    ]
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(count)]
    identity = {"models": models_identity(pipeline, text.identity)}
    rows = [
        latent_row(z, said, caption, f"{caption} {i}")
        for i, ((z, said), caption) in enumerate(zip(encoder(clips, captions), captions, strict=True))
    ]
    shard = write_shard(folder / "x", "part-0", rows, identity, rows_per_group=1)
    save_null(folder / "x", text([""])[0])
    write_artifact(folder / "x", [shard], identity)
    point_to(folder, "x", fingerprint(identity))


def write_inputs(folder, kind):
    """A pipeline, its latents of clips and images, a net for the image critic."""
    pipeline = pipeline_cases.save(folder / "pipeline", kind)
    length = 10 if kind == "cogvideox" else 0
    write_real_latents(folder / "clips", pipeline, length=length)
    write_real_latents(folder / "images", pipeline, images=True, length=length)
    torch.manual_seed(0)
    FrameNet({"shape": 3}, widths=(8, 8, 8, 8)).save(folder / "features")


def settings(folder, kind, method, name):
    """Arguments of jobs/distill.py: the paper's settings, for two steps on two CPU workers."""
    common = {"teacher": folder / "pipeline", "codec": folder / "pipeline", "data": folder / "clips"}
    common |= {"output": folder / name, "save_every": 1, "report_every": 1}
    common |= {"scale.num_workers": 2, "scale.use_gpu": "false", "scale.cpus_per_worker": 0.5}
    common |= {"scale.threads_per_worker": 1}
    small = {"num_steps": 2, "global_batch": 2, "micro_batch": 1, "optimizer.warmup_steps": 0}
    small |= {"optimizer.learning_rate": 1e-3}  # two steps of the paper's would be lost in bfloat16
    if method == "mcm":
        judge = {"appearance.features": folder / "features", "appearance.images_per_step": 2}
        small |= {**judge, "appearance.channels": 8, "lora_rank": 2}
        common |= {"images": folder / "images", "sampling.num_steps": "[1,2]"}
        common |= {f"motion.{key}": value for key, value in small.items()}
        common |= {} if kind in UNETS else {"engine.activation_checkpointing": "true"}
        return arguments(MCM[kind], common)
    common |= {f"{stage}.{key}": value for stage in ("semantic", "detail") for key, value in small.items()}
    common |= {"detail.lora_rank": 2, "detail.critic.channels": 8, "semantic.objective.coherence_stride": 1}
    if kind in UNETS:
        common |= {"detail.objective.adversarial": 0, "detail.objective.feature_matching": 0}
        common |= {"engine.activation_checkpointing": "false"}
    if kind == "cogvideox":  # both experts over one base
        common |= {"semantic.lora_rank": 2, "semantic.lora_alpha": 4}
    if kind == "wan22":  # its networks meet at 0.875; of shift 17 the node below is
        common |= {"boundary": 0.868613139, "experts": "dual_full"}
    return arguments(DCM[kind], common)


def arguments(config, settings):
    """Command line of a job."""
    given = [f"{key}={value}" for key, value in settings.items()]
    return ["--config", ROOT / "jobs" / config, *given]
