"""Small random pipelines of the real classes, as diffusers saves them, and how each one denoises."""

import functools
import gc
from pathlib import Path

import torch
import unet_cases
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    TextToVideoSDPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

KINDS = ("wan21", "wan22", "hunyuan", "cogvideox", "modelscope", "animatediff")
WORDS = ("a", "red", "blue", "square", "circle", "moves", "left", "right", "slowly", "over", "the", "plain")
PROMPTS = ["a red square moves left", "the blue circle"]
GUIDANCE = 4.0
"""HunyuanVideo's token of it, 4000, is a number of bfloat16."""
SIZE = {"height": 32, "width": 48, "num_frames": 9}
"""Of a clip, in pixels; the U-Nets' clips have 4 frames."""


def tokenizer(length):
    """Whole words; as CLIP, T5 and Llama do, the last token of a caption is special."""
    vocabulary = {w: i for i, w in enumerate(("<pad>", "<unk>", "<s>", "</s>", *WORDS))}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
    )


def clip_text(width):
    """CLIP's text encoder."""
    torch.manual_seed(5)
    sizes = {"vocab_size": 16, "hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 1}
    return CLIPTextModel(
        CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=77, eos_token_id=3)
    )


def t5(kind=T5EncoderModel, config=T5Config):
    """T5's encoder, or UMT5's."""
    torch.manual_seed(6)
    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return kind(config(**sizes))


def llama():
    """HunyuanVideo's first text encoder; the pipeline takes the state three layers from the end."""
    torch.manual_seed(7)
    return LlamaModel(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
        )
    )


def wan_transformer(seed=0, layers=2):
    """Wan's, with its text of width 16."""
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=32,
    )


def hunyuan_transformer():
    """HunyuanVideo's, with embedded guidance."""
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    )


def cogvideox_transformer(rotary=False):
    """CogVideoX-2B's; `rotary` as the 5B has it."""
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=10,
        use_rotary_positional_embeddings=rotary,
    )


def wan_vae():
    """Wan's autoencoder with its real statistics."""
    torch.manual_seed(3)
    return AutoencoderKLWan(base_dim=8, num_res_blocks=1)


def hunyuan_vae():
    """HunyuanVideo's autoencoder."""
    torch.manual_seed(3)
    kinds = {
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    }
    return AutoencoderKLHunyuanVideo(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, **kinds
    )


def cogvideox_vae():
    """CogVideoX's autoencoder."""
    torch.manual_seed(3)
    return AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8),
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
    )


def image_vae():
    """Stable Diffusion's autoencoder."""
    torch.manual_seed(3)
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=4, **kinds
    )


def flow(shift):
    """The flow-matching scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=shift)


def stirred(net, seed=9):
    """Move every weight off its start: nothing that is zero at first shall hide a difference."""
    rng = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn(p.shape, generator=rng))
    return net


def build(kind):
    """Build the pipeline of a kind."""
    if kind in ("wan21", "wan22"):
        pair = {"transformer_2": stirred(wan_transformer(1)), "boundary_ratio": 0.875}
        return WanPipeline(
            tokenizer(512),
            t5(UMT5EncoderModel, UMT5Config),
            wan_vae(),
            flow(3.0),
            stirred(wan_transformer()),
            **(pair if kind == "wan22" else {}),
        )
    if kind == "hunyuan":
        net = stirred(hunyuan_transformer())
        text = (llama(), tokenizer(512))
        return HunyuanVideoPipeline(*text, net, hunyuan_vae(), flow(7.0), clip_text(8), tokenizer(77))
    if kind == "cogvideox":
        scheduler = CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            clip_sample=False,
        )
        return CogVideoXPipeline(
            tokenizer(226), t5(), cogvideox_vae(), stirred(cogvideox_transformer()), scheduler
        )
    if kind == "modelscope":
        net = stirred(unet_cases.unet3d())
        return TextToVideoSDPipeline(
            image_vae(), clip_text(8), tokenizer(77), net, unet_cases.scheduler("ms")
        )
    assert kind == "animatediff"
    net = stirred(unet_cases.unet_motion())
    return AnimateDiffPipeline(
        image_vae(), clip_text(8), tokenizer(77), net, None, unet_cases.scheduler("ad")
    )


@functools.cache
def cached(kind):
    """Build one once a process, as it would be loaded; take care not to change it."""
    made = build(kind)
    for module in made.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return made


def save(folder, kind):
    """Write the pipeline's folder; return it."""
    build(kind).save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def sampled(pipeline, kind, noise, num_steps, **more):
    """Latents that the pipeline itself makes of `noise` (b, c, f, h, w), in our layout."""
    f, h, w = noise.shape[2:]
    frames = f if kind in ("modelscope", "animatediff") else 4 * (f - 1) + 1
    size = {"height": 8 * h, "width": 8 * w, "num_frames": frames}
    pipeline.set_progress_bar_config(disable=True)
    given = noise.transpose(1, 2) if kind == "cogvideox" else noise
    how = {"num_inference_steps": num_steps, "guidance_scale": GUIDANCE, "latents": given.clone()}
    if kind == "hunyuan":
        how["sigmas"] = [1 - k / num_steps for k in range(num_steps)]
    made = pipeline(PROMPTS, output_type="latent", return_dict=False, **how, **size, **more)[0]
    return made.transpose(1, 2) if kind == "cogvideox" else made


def times_of(pipeline, kind):
    """Times t of the steps that the pipeline took last, and the end of its path."""
    scheduler = pipeline.scheduler
    steps = scheduler.timesteps.double()
    if kind in ("wan21", "wan22", "hunyuan"):
        return [*(steps / 1000).tolist(), 0.0]
    last = 0.0 if kind == "cogvideox" else 0.001
    return [*((steps + 1) / 1000).tolist(), last]


def latents_of(kind, batch=2, seed=1):
    """Normal numbers in the shape of a clip's latents."""
    channels, size = (4, (4, 4, 4)) if kind in ("modelscope", "animatediff") else (16, (3, 4, 6))
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def live():
    """Bytes of all storages that any tensor of this process holds, made since `gc.freeze`."""
    found = {}
    for x in gc.get_objects():
        if issubclass(type(x), torch.Tensor) and x.device.type == "cpu":
            storage = x.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
