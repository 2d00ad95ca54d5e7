"""Do the tests bite? Each row breaks one line on purpose; the named test must fail on it, and pass without it.

The package is imported again beside the real one, one module of it from changed source, and the test's own file with
it; then the test function is called. A new mutant is a new row.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import Phase, settings

TESTS = Path(__file__).parents[1]
settings.register_profile(
    "mutants", parent=settings.get_profile("ci"), phases=[Phase.generate], report_multiple_bugs=False
)


@dataclass(frozen=True)
class Mutant:
    """One wrong line, and the test that must notice it."""

    name: str
    module: str
    right: str
    """Source text as it stands, exactly once in the module."""
    wrong: str
    killer: str
    """`unit/test_file.py::test_function`, without arguments of its own (Hypothesis' are fine)."""


MOVE = "raydistill.consistency.function"
SCHEDULE = "raydistill.consistency.schedule"
PHASES = "raydistill.consistency.phases"
SOLVER = "raydistill.consistency.solver"
LOSSES = "raydistill.consistency.losses"
AVERAGE = "raydistill.consistency.average"
SAMPLER = "raydistill.sampler"
SEMANTIC = "raydistill.experts.semantic"
DETAIL = "raydistill.experts.detail"
MOTION = "raydistill.consistency.motion"
PLAN = "raydistill.trajectories.plan"
AVERAGES = "raydistill.experts.averages"
LORA = "raydistill.models.lora"

# One row, one line.  # ruff: noqa: E501, RUF100
# fmt: off
MUTANTS = [
    Mutant("sign of the Euler step", MOVE, "return x_t + data", "return x_t - data", "unit/test_solver.py::test_euler_goes_towards_the_data_by_hand"),
    Mutant("t and r swapped in Euler", SOLVER, "return jump(schedule, field(x_t, t, text), x_t, t, r)", "return jump(schedule, field(x_t, t, text), x_t, r, t)", "property/test_laws_of_paths.py::test_euler_is_of_order_one_and_heun_of_order_two"),
    Mutant("t and r swapped in the draw", SCHEDULE, "return times[index], times[index + 1]", "return times[index + 1], times[index]", "unit/test_schedule.py::test_grid_nodes_intervals_and_neighbours"),
    Mutant("network asked at r, not at t", SOLVER, "return jump(schedule, field(x_t, t, text), x_t, t, r)", "return jump(schedule, field(x_t, r, text), x_t, t, r)", "unit/test_solver.py::test_euler_goes_towards_the_data_by_hand"),
    Mutant("Heun without its second pass", SOLVER, "second = field(x_r, r, text)", "second = first", "unit/test_solver.py::test_heun_steps_with_two_passes"),
    Mutant("guidance off by one", SOLVER, "return uncond + guidance_scale * (cond - uncond)", "return cond + guidance_scale * (cond - uncond)", "property/test_laws_of_paths.py::test_guidance_is_affine_and_runs_from_unconditional_to_conditional"),
    Mutant("cond and uncond swapped", SOLVER, "cond, uncond = both.chunk(2)", "uncond, cond = both.chunk(2)", "property/test_laws_of_paths.py::test_the_batched_pass_is_two_passes"),
    Mutant("boundary off by one edge", PHASES, "self.edges[1:], dtype", "self.edges[:-1], dtype", "property/test_laws_of_time.py::test_every_time_has_one_phase_and_a_lower_end"),
    Mutant("boundary given to the semantic expert", PHASES, "<= inner + SAME_TIME", "< inner - SAME_TIME", "unit/test_phases.py::test_a_sample_exactly_at_the_boundary_is_the_detail_experts"),
    Mutant("intervals off by one node", SCHEDULE, "range(self.node(upper), self.node(lower))", "range(self.node(upper) + 1, self.node(lower) + 1)", "property/test_laws_of_time.py::test_experts_partition_the_intervals"),
    Mutant("crossing not refused", SAMPLER, "self.phases.require_no_crossing((one.t, one.s))", "pass", "property/test_laws_of_time.py::test_a_plan_without_the_boundary_is_refused"),
    Mutant("wrong expert at the boundary", SAMPLER, "t <= boundary + SAME_TIME", "t < boundary - SAME_TIME", "unit/test_sampler.py::test_plans_of_2_4_and_8_steps"),
    Mutant("re-noising stops short of the data", SAMPLER, "return min(one.s, end)", "return end", "unit/test_sampler.py::test_the_renoising_path_ends_at_clean_data_too"),
    Mutant("no noise on the re-noising path", SAMPLER, "noise_at(i + 1, tuple(x.shape)).to(x)", "0 * x", "unit/test_sampler.py::test_renoising_keeps_the_law_of_the_data"),
    Mutant("mean becomes sum", LOSSES, "+ c)).flatten(1).mean(dim=1)", "+ c)).flatten(1).sum(dim=1)", "unit/test_losses.py::test_pseudo_huber_by_hand"),
    Mutant("coherence of the guess alone", LOSSES, "error = widen(guess) - widen(goal)", "error = widen(guess)", "property/test_laws_of_losses.py::test_temporal_coherence_ignores_what_is_constant_in_time"),
    Mutant("real and fake swapped", LOSSES, "torch.relu(1 + widen(x))", "torch.relu(1 - widen(x))", "property/test_laws_of_losses.py::test_hinges_push_apart_and_pull_back"),
    Mutant("moving average forgotten", AVERAGE, "target.lerp_(source.to(target), 1 - decay)", "pass", "property/test_laws_of_losses.py::test_moving_average_closed_form"),
    Mutant("decay and its complement swapped", AVERAGE, "source.to(target), 1 - decay)", "source.to(target), decay)", "unit/test_average.py::test_one_step_by_hand"),
    Mutant("averages start from step 1 at full decay", AVERAGES, "mu = min(self.decay, (1 + steps) / (10 + steps))", "mu = self.decay", "unit/test_stages.py::test_averages_follow_their_closed_form"),
    Mutant("merged LoRA forgets the branch", LORA, "base.weight + delta", "base.weight + 0 * delta", "unit/test_expert.py::test_merged_lora_computes_the_same_and_leaves_the_semantic_expert_alone"),
    Mutant("no_grad dropped from the target", SEMANTIC, "with torch.no_grad():", "if True:", "unit/test_draws_of_the_loss.py::test_only_the_student_gets_gradients"),
    Mutant("target is the teacher", SEMANTIC, "nets.target(x_r, r, text)", "nets.teacher(x_r, r, text)", "unit/test_draws_of_the_loss.py::test_the_goal_is_the_targets_jump_from_one_teacher_step_nearer_the_data"),
    Mutant("critic's inputs noised as if they were clean", DETAIL, "return renoise(leaf, noise, a, s), renoise(pair.goal, noise, a, s), a", "return renoise(leaf, noise, a, 0 * s), renoise(pair.goal, noise, a, 0 * s), a", "unit/test_draws_of_the_loss.py::test_against_the_target_both_take_the_straight_line_from_the_segments_end_with_one_noise"),
    Mutant("another noise for the real side", DETAIL, "renoise(pair.goal, noise, a, s), a", "renoise(pair.goal, noise.flip(0), a, s), a", "unit/test_draws_of_the_loss.py::test_against_the_target_both_take_the_straight_line_from_the_segments_end_with_one_noise"),
    Mutant("critic asks the teacher again", DETAIL, "CriticInputs([m.detach() for m in fake_maps], real_maps, a)", "CriticInputs([m.detach() for m in judges.teacher.features(fake, a, batch.text, judges.blocks)[0]], real_maps, a)", "unit/test_draws_of_the_loss.py::test_the_critics_turn_reuses_features_and_reaches_the_critic_alone"),
    Mutant("straight line instead of the exact variance", DETAIL, "fake = diffuse(leaf, noise, a, s, segment.schedule)", "fake = renoise(leaf, noise, a, s)", "unit/test_draws_of_the_loss.py::test_against_data_a_perfect_students_sample_is_as_noisy_as_the_real_one"),
    Mutant("recorded state is read as a clean clip", SEMANTIC, "return torch.where(_over(_of(batch, Origin.RECORDED), x_t), batch.latents, x_t)", "return x_t", "unit/test_motion_draws.py::test_a_recorded_state_is_where_the_path_is"),
    Mutant("data left in the noise at t = 1", SEMANTIC, "x_t = torch.where(_over(t >= 1, x_t), noise, x_t)", "pass", "unit/test_motion_draws.py::test_at_full_noise_the_start_is_noise_alone_on_every_schedule"),
    Mutant("simulated samples start at the video", SEMANTIC, "torch.where(_over(mine[rows], x0), made, x0)", "x0", "unit/test_motion_draws.py::test_simulated_samples_start_at_the_students_own_clip_of_the_caption"),
    Mutant("one guidance scale for all", SEMANTIC, "return low + (high - low) * draws.uniform(self.seed, index, \"guidance\")", "return low + 0 * index.double()", "unit/test_motion_draws.py::test_every_sample_has_a_guidance_scale_of_its_own"),
    Mutant("onlookers' gradient lost", SEMANTIC, "total = total + through - through.detach()", "pass", "unit/test_motion_draws.py::test_what_an_onlooker_says_reaches_the_student_as_a_term_would"),
    Mutant("low-pass lets everything through", MOTION, "return 1 / (1 + (square / CUTOFF**2) ** ORDER)", "return 1 + 0 * square", "property/test_laws_of_motion.py::test_a_checkerboard_is_all_high"),
    Mutant("correlation of a frame with itself", MOTION, "x[:, :, :-1] / math.sqrt(x.shape[1]), x[:, :, 1:]", "x[:, :, 1:] / math.sqrt(x.shape[1]), x[:, :, 1:]", "property/test_laws_of_motion.py::test_correlations_peak_at_a_sprites_displacement"),
    Mutant("a turn is one sample whatever its unit", PLAN, "turn, within = divmod(g, self.unit)", "turn, within = g, 0", "property/test_lane_laws.py::test_per_step_a_step_has_one_lane_and_steps_are_shared_exactly"),
    Mutant("goal is x0, not x at the boundary", SEMANTIC, "torch.full_like(t, self.lower)", "torch.zeros_like(t)", "unit/test_draws_of_the_loss.py::test_times_stay_inside_the_segment_and_reach_every_interval"),
]
# fmt: on


class _ChangedSource(importlib.machinery.SourceFileLoader):
    """Loads one module from its file with one text replaced; never from or into a bytecode cache."""

    def __init__(self, mutant, path):
        super().__init__(mutant.module, path)
        self.mutant = mutant

    def get_code(self, fullname):
        source = self.get_source(fullname)
        assert source is not None
        if source.count(self.mutant.right) != 1:
            raise ImportError(f"'{self.mutant.right}' must be in {fullname} exactly once: renew the mutant")
        return compile(
            source.replace(self.mutant.right, self.mutant.wrong), self.path, "exec", dont_inherit=True
        )


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutant):
        self.mutant = mutant

    def find_spec(self, fullname, path, target=None):
        if fullname != self.mutant.module:
            return None
        origin = importlib.machinery.PathFinder.find_spec(fullname, path).origin
        return importlib.util.spec_from_loader(fullname, _ChangedSource(self.mutant, origin))


@contextmanager
def second_package(mutant=None):
    """Forget the package's modules, let them be imported anew (one of them changed), and put the old ones back."""
    kept = {
        name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "raydistill"
    }
    finders = sys.meta_path[:]
    # No shape checks here: they remember the first package's classes by name, and would take the blame or the credit.
    plain = [finder for finder in finders if not type(finder).__module__.startswith("jaxtyping")]
    sys.meta_path[:] = [_Finder(mutant), *plain] if mutant else plain
    profile = settings.get_current_profile_name()
    settings.load_profile("mutants")
    try:
        yield
    finally:
        settings.load_profile(profile)
        sys.meta_path[:] = finders
        for name in [name for name in sys.modules if name.partition(".")[0] == "raydistill"]:
            del sys.modules[name]
        sys.modules.update(kept)


def run(killer):
    """Call one test function of a freshly loaded test file."""
    path, _, name = killer.partition("::")
    spec = importlib.util.spec_from_file_location("mutants_" + Path(path).stem, TESTS / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    getattr(module, name)()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_killed(mutant):
    # pytest.raises that sees no error fails with pytest.fail.Exception, no AssertionError.
    with second_package(mutant), pytest.raises((AssertionError, pytest.fail.Exception)):
        run(mutant.killer)


@pytest.mark.parametrize("killer", sorted({mutant.killer for mutant in MUTANTS}))
def test_killers_pass_on_the_code_as_it_is(killer):
    with second_package():
        run(killer)
