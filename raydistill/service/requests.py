"""Requests as they come over the wire -> what a job needs. Nothing is written before all of it is checked."""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from raydistill.artifacts import fingerprint
from raydistill.config.serve import LimitsConfig
from raydistill.errors import InvalidValue, RequestRefused
from raydistill.service.bundle import BundleCard, ShapeCard
from raydistill.service.catalog import Catalog
from raydistill.service.store import NewJob

SIZE = re.compile(r"^[0-9]{1,5}x[0-9]{1,5}$")
ONE_KEY = re.compile(r"([^\[\]]+)((?:\[[^\[\]]*\])*)")
LARGEST_SEED = 2**63 - 1


class VideoRequest(BaseModel):
    """The body of POST /v1/videos, JSON or form. Only the prompt must be given."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: str = Field(min_length=1, description="what the video shows")
    model: str | None = Field(None, description="one of GET /v1/models; the first by default")
    seconds: float | None = Field(None, description="length; the number of frames follows")
    size: str | None = Field(None, pattern=SIZE.pattern, description="WIDTHxHEIGHT")
    width: int | None = Field(None, ge=1, le=16384)
    height: int | None = Field(None, ge=1, le=16384)
    num_frames: int | None = Field(None, ge=1, le=100000)
    fps: int | None = Field(None, ge=1, le=240)
    num_inference_steps: int | None = Field(None, ge=1, le=1000, description="1, 2, 4, 8 as the model has")
    plan: str | None = Field(None, max_length=64, description="a plan by name, such as 2+tail")
    seed: int | None = Field(None, ge=0, le=LARGEST_SEED, description="drawn and reported if not given")
    guidance_scale: float | None = Field(None, description="fixed by distillation: 1, or the model's")
    flow_shift: float | None = Field(None, description="fixed by distillation")
    boundary_ratio: float | None = Field(None, description="fixed by distillation")
    negative_prompt: str | None = Field(None, description="refused: guidance is fixed by distillation")
    input_reference: Any = Field(None, description="refused: models here make videos of text")
    user: str | None = Field(None, max_length=256, description="ignored")

    @field_validator("*", mode="before")
    @classmethod
    def no_truth_values(cls, value: Any) -> Any:
        """True is no number here, whatever Python says."""
        if isinstance(value, bool):
            raise ValueError("true and false are no values here")
        return value


FIELDS = tuple(VideoRequest.model_fields)
WRAPPERS = ("extra_params", "extra_body")
"""Objects whose fields count as the request's own."""
SAME = ({"plan", "num_inference_steps"}, {"size", "width", "height"}, {"num_frames", "seconds"})
"""Fields that say one thing in several words."""


def refuse(message: str, param: str | None = None, code: str = "invalid_value") -> RequestRefused:
    """Make the answer 400."""
    return RequestRefused(400, code, message, param)


def read_json(body: bytes) -> dict[str, Any]:
    """Parse a JSON body. Raises RequestRefused."""

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        values = json.loads(body, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        raise refuse(f"the body is not JSON: {str(error)[:200]}", code="invalid_json") from error
    if not isinstance(values, dict):
        raise refuse("the body has to be a JSON object", code="invalid_json")
    return values


def read_form(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Nest a form's fields: `a[b]` is a field of an object, `a[]` an item of a list. May refuse."""
    out: dict[str, Any] = {}
    for key, value in pairs:
        match = ONE_KEY.fullmatch(key)
        inner = re.findall(r"\[([^\[\]]*)\]", match[2]) if match else []
        if match is None or len(inner) > 4:
            raise refuse(f"{key[:80]!r} is no name of a field", code="unknown_parameter")
        _put(out, [match[1], *inner], value)
    return out


def _put(into: dict[str, Any], path: list[str], value: Any) -> None:
    for name, following in pairwise(path):
        kind = list if following == "" else dict
        held = into.setdefault(name, kind())
        if not isinstance(held, kind):
            raise refuse(f"'{path[0][:80]}' is given in two forms", path[0])
        if isinstance(held, list):
            held.append(value)  # deeper structure inside lists has no meaning here
            return
        into = held
    if path[-1] in into:
        raise refuse(f"'{path[-1][:80]}' is given twice", path[-1])
    into[path[-1]] = value


def parse(
    values: Mapping[str, Any], limits: LimitsConfig, inherited: Mapping[str, Any] | None = None
) -> VideoRequest:
    """Check names and types; wrappers are opened first. Raises RequestRefused with the field's name.

    inherited: values of another request, for what this one does not say, in those or in other words.
    """
    given = _opened(values)
    try:
        request = VideoRequest.model_validate({**given, **_kept(inherited or {}, given)})
    except ValidationError as error:
        raise _explained(error) from error
    _require_text(request, limits)
    if request.negative_prompt:
        raise refuse(
            "not supported: the guidance of these models is fixed by distillation", "negative_prompt"
        )
    if request.input_reference is not None:
        raise refuse("these models make videos of text alone", "input_reference")
    return request


def _kept(inherited: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    said = {name for name, value in given.items() if value is not None}
    said = said.union(*(words for words in SAME if words & said))
    return {name: value for name, value in inherited.items() if name not in said}


def _opened(values: Mapping[str, Any]) -> dict[str, Any]:
    """Put the fields of wrappers beside the others. Raises RequestRefused."""
    flat = dict(values)
    for wrapper in WRAPPERS:
        if (inner := flat.pop(wrapper, None)) is None:
            continue
        if isinstance(inner, str):
            inner = read_json(inner.encode("utf-8", "replace"))
        if not isinstance(inner, Mapping):
            raise refuse(f"'{wrapper}' has to be an object", wrapper)
        for name, value in inner.items():
            if name in flat:
                raise refuse(f"'{str(name)[:80]}' is given twice", str(name)[:80])
            flat[name] = value
    return flat


def _explained(error: ValidationError) -> RequestRefused:
    # An unknown name first: it may be the reason why another is missing.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    name = ".".join(str(part) for part in first["loc"])[:80] or "body"
    if first["type"] == "extra_forbidden":
        near = get_close_matches(name, FIELDS, n=1, cutoff=0.5)
        hint = f": did you mean '{near[0]}'?" if near else f"; known are {', '.join(FIELDS)}"
        return refuse(f"unknown parameter {name!r}{hint}", name, "unknown_parameter")
    if first["type"] == "missing":
        return refuse(f"'{name}' must be given", name, "missing_parameter")
    wrong = first["msg"].removeprefix("Value error, ")
    return refuse(f"{name}: {'WIDTHxHEIGHT, such as 832x480' if name == 'size' else wrong}", name)


def _require_text(request: VideoRequest, limits: LimitsConfig) -> None:
    """Refuse what no database and no text encoder takes."""
    if len(request.prompt) > limits.prompt_chars:
        raise refuse(
            f"the prompt has more than {limits.prompt_chars} characters", "prompt", "prompt_too_long"
        )
    if not request.prompt.strip():
        raise refuse("the prompt is empty", "prompt")
    for name in ("prompt", "model", "plan"):
        text = getattr(request, name) or ""
        if "\0" in text or any(0xD800 <= ord(one) < 0xE000 for one in text):
            raise refuse(f"'{name}' holds a character that is no text: NUL, or half of a pair", name)


def new_id() -> str:
    """An id that cannot be guessed."""
    return f"video_{secrets.token_hex(16)}"


def resolve(
    request: VideoRequest,
    catalog: Catalog,
    limits: LimitsConfig,
    tenant: str,
    *,
    remixed_from: str | None = None,
) -> NewJob:
    """Choose the bundle, plan and shape, draw a seed, and reckon the cost.

    Raises RequestRefused for what the bundle was not made for, or what costs too much.
    """
    job = new_id()
    model = catalog.model(request.model)
    card = catalog.choose(model, job)
    try:
        plan = card.plan_for(request.num_inference_steps, request.plan)
        shape = _shape(request, card)
        card.require_same(
            plan,
            flow_shift=request.flow_shift,
            boundary_ratio=request.boundary_ratio,
            guidance_scale=request.guidance_scale,
        )
    except InvalidValue as wrong:
        code = "unsupported_size" if wrong.key in ("size", "num_frames", "seconds") else "invalid_value"
        raise refuse(
            f"{wrong.key}={str(wrong.value)[:80]} cannot be: {wrong.expected}", wrong.key, code
        ) from wrong
    passes = card.plans[plan].passes
    cost = passes * shape.frames * shape.height * shape.width / 1e6
    if cost > limits.cost:
        message = f"this video costs {cost:.6g} (passes times megapixels); {limits.cost:.6g} is the most"
        raise refuse(message, "num_inference_steps", "cost_too_high")
    made = {
        "prompt": request.prompt,
        "bundle": card.label,
        "plan": plan,
        "seed": secrets.randbelow(2**31) if request.seed is None else request.seed,
        "fps": card.fps,
        "passes": passes,
        **asdict(shape),
        "latent": list(shape.latent),
    }
    return NewJob(
        id=job,
        tenant=tenant,
        model=model,
        bundle=card.label,
        request=made,
        request_hash=fingerprint([remixed_from, request.model_dump(mode="json", exclude_none=True)]),
        num_steps=card.plans[plan].num_steps,
        cost=cost,
        remixed_from=remixed_from,
    )


def _shape(request: VideoRequest, card: BundleCard) -> ShapeCard:
    if request.fps not in (None, card.fps):
        raise InvalidValue("fps", request.fps, f"{card.fps}, as the model was trained")
    width, height = request.width, request.height
    if request.size:
        sized = tuple(int(one) for one in request.size.split("x"))
        if (width or sized[0], height or sized[1]) != sized:
            raise InvalidValue("size", request.size, "it differs from width and height: give one")
        width, height = sized
    frames = request.num_frames
    if request.seconds is not None:
        sizes = [s for s in card.shapes if width in (None, s.width) and height in (None, s.height)]
        fitting = [s.frames for s in sizes if abs(s.frames / card.fps - request.seconds) < 0.5]
        if sizes and not (fitting if frames is None else frames in fitting):
            lengths = ", ".join(dict.fromkeys(f"{s.frames / card.fps:g}" for s in sizes))
            raise InvalidValue(
                "seconds", f"{request.seconds:g}", f"one of {lengths} seconds at {card.fps} fps"
            )
        if sizes and frames is None:
            frames = min(fitting, key=lambda n: abs(n / card.fps - (request.seconds or 0.0)))
    return card.shape_for(frames, height, width)
