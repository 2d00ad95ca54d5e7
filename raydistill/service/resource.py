"""A job as clients see it: the VideoResource of /v1/videos."""

from typing import Any

from raydistill.service.tables import Job

STATUS = {"queued": "queued", "running": "in_progress", "completed": "completed", "failed": "failed"}
DENOISE_FROM, DENOISE_TO = 5, 90
"""Share of the progress at which denoising begins and ends, in percent."""


def progress(job: Job) -> int:
    """Percent done, 100 only when it is there."""
    if job.state == "completed":
        return 100
    return 0 if job.started_at is None else percent(job.stage, job.step, job.num_steps)


def percent(stage: str, step: int, num_steps: int) -> int:
    """Percent done of a job at this stage."""
    span = DENOISE_TO - DENOISE_FROM
    done = DENOISE_FROM + span * step / max(1, num_steps)
    return {"encode": 1, "denoise": round(done)}.get(stage, 95)


def resource(job: Job, *, ahead: tuple[int, float] | None = None, extended: bool = False) -> dict[str, Any]:
    """Show a job. ahead: how many wait before it, and seconds until it is done, where known.

    Strict clients know four states: what was cancelled has failed with the code `cancelled`, unless the
    client asked for the `extended` ones.
    """
    request = job.request
    failed = job.state in ("failed", "cancelled")
    error = {"code": job.error_code, "message": job.error_message} if failed else None
    status = "cancelled" if extended and job.state == "cancelled" else STATUS.get(job.state, "failed")
    timings = dict(job.timings)
    if job.completed_at is not None:
        timings["total_s"] = job.completed_at - job.created_at
    about = {
        "queue_position": ahead[0] if ahead and job.state == "queued" else None,
        "eta_s": round(ahead[1], 3) if ahead and ahead[1] > 0 and not job.ended else None,
        "stage": None if job.ended else job.stage,
        "expert": job.expert,
        "step": job.step,
        "num_steps": job.num_steps,
        "plan": request["plan"],
        "attempt": job.attempt,
        "seed": request["seed"],
        "num_frames": request["frames"],
        "fps": request["fps"],
        "bundle": job.bundle,
        "timings": timings,
        "latents_sha256": (job.result or {}).get("latents_sha256"),
    }
    return {
        "id": job.id,
        "object": "video",
        "model": job.model,
        "status": status,
        "progress": progress(job),
        "created_at": int(job.created_at),
        "completed_at": None if job.completed_at is None else int(job.completed_at),
        "expires_at": int(job.expires_at) if job.expires_at and job.state == "completed" else None,
        "prompt": request["prompt"],
        "size": f"{request['width']}x{request['height']}",
        "seconds": f"{request['frames'] / request['fps']:g}",
        "remixed_from_video_id": job.remixed_from,
        "error": error,
        "x_raydistill": about,
    }
