"""Passes and seconds of a detail step with the critic's features computed once, against computing them again.

    python tests/bench/bench_features.py [steps]

Both ways run in turn in one process on the small world's shapes; the ratio is what counts.
"""

import sys
import time
from statistics import median

import torch

from raydistill.config.stages import ObjectiveConfig
from raydistill.consistency.schedule import RectifiedFlow, TimeGrid
from raydistill.consistency.solver import guided
from raydistill.experts.detail import CriticInputs, Judges, critic_losses, detail_look
from raydistill.experts.semantic import Networks, Segment, consistency_losses
from raydistill.models.critic import TokenCritic
from raydistill.models.expert import add_detail, copy_trainable
from raydistill.models.wan import build_tiny_teacher
from raydistill.types import Batch


def main(steps: int) -> None:
    """Print passes per step and the ratio of seconds."""
    torch.set_num_threads(1)
    teacher = build_tiny_teacher(0).requires_grad_(False)
    student = add_detail(build_tiny_teacher(0), 8, 16.0, seed=0)
    null_text = torch.zeros(8, 32)
    nets = Networks(student, copy_trainable(student), guided(teacher, null_text, 2.0))
    blocks = range(0, teacher.num_blocks, 2)
    batch = Batch(torch.arange(16), torch.randn(16, 4, 16, 4, 4), torch.randn(16, 8, 32))
    critic = TokenCritic(len(blocks), teacher.transformer.proj_out.in_features, 64)
    judges = Judges(teacher, critic, blocks, teacher.token_grid(batch.latents), "data")
    segment = Segment(RectifiedFlow(), TimeGrid(25), 0.6, 0.0, seed=0)
    objective = ObjectiveConfig(adversarial=0.05, feature_matching=0.1)
    passes: list[int] = []
    teacher.transformer.register_forward_hook(lambda *_: passes.append(1))

    def step(reuse: bool) -> float:
        began = time.perf_counter()
        losses, kept = consistency_losses(
            nets, segment, batch, objective, {"critic": detail_look(judges, segment, objective)}
        )
        seen = kept["critic"]
        losses.total.backward()
        assert seen is not None
        if not reuse:  # as the published code does: two more passes on the same inputs
            with torch.no_grad():
                again = [teacher.features(batch.latents, seen.t, batch.text, blocks)[0] for _ in range(2)]
            seen = CriticInputs(again[0], again[1], seen.t)
        critic_losses(critic, seen, judges.grid).total.backward()
        return time.perf_counter() - began

    step(True), step(False)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    counts = {}
    for _ in range(steps):
        for reuse in (True, False):
            passes.clear()
            seconds[reuse].append(step(reuse))
            counts[reuse] = len(passes)
    ratio = median(seconds[False]) / median(seconds[True])
    print(f"teacher passes per detail step: {counts[True]} with reuse, {counts[False]} without")
    print(f"seconds without reuse / with: {ratio:.2f} (median of {steps}, alternating)")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
