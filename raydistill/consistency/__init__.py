"""The mathematics: tensors in, tensors out; no networks, no config, no cluster.

Papers are cited by these keys:

* RF    rectified flow, Liu et al., arXiv 2209.03003
* DDPM  denoising diffusion, Ho et al., arXiv 2006.11239
* DDIM  implicit models, Song et al., arXiv 2010.02502
* CFG   classifier-free guidance, Ho and Salimans, arXiv 2207.12598
* EDM   design space of diffusion models, Karras et al., arXiv 2206.00364
* PD    progressive distillation (v-prediction), Salimans and Ho, arXiv 2202.00512
* SD3   scaling rectified flow transformers (shift), Esser et al., arXiv 2403.03206
* CM    consistency models, Song et al., arXiv 2303.01469
* iCT   improved consistency training (pseudo-Huber), Song and Dhariwal, arXiv 2310.14189
* LCM   latent consistency models, Luo et al., arXiv 2310.04378
* PCM   phased consistency models, Wang et al., arXiv 2405.18407
* MCM   motion consistency model, Zhai et al., arXiv 2406.06890
* DCM   dual-expert consistency model, Lv et al., arXiv 2506.03123
* FreeInit     low-pass of video noise, Wu et al., arXiv 2312.07537
* GMFlow       correlation of frames, Xu et al., arXiv 2111.13680
* DiffAugment  differentiable augmentation, Zhao et al., arXiv 2006.10738
* WGAN-GP      gradient penalty, Gulrajani et al., arXiv 1704.00028
* GG    geometric GAN (hinge), Lim and Ye, arXiv 1705.02894

Conventions are fixed in `schedule`; every tensor of latents is "b c f h w", every tensor of times is (b,).
"""
