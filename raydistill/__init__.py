"""raydistill: a many-step video diffusion model becomes a sampler of 1 to 8 steps, on a Ray cluster.

    videos, images          a many-step model ("teacher")
         |                             |
      world/      read, decode, cut    |
         |                             |
      latents/    encode, fingerprint  |
         |                             |
    trajectories/ mix by a plan        |
         |                             |
      experts/  <----------------------+     semantic expert, then detail expert
         |
      student.py, sampler.py                 noise and text to latents in 1, 2, 4 or 8 jumps
         |
     evaluation/                             quality against steps, with intervals

Stages meet on disk and import no other stage; `jobs/*.py` run them. Pure mathematics is in `consistency/`,
the networks it is applied to in `models/`. A file's name says whether it knows the cluster: flow.py (Ray
Data), launch.py (Ray Train), engine.py (DeepSpeed), app.py (Ray Serve).
"""

__version__ = "0.1.0"
