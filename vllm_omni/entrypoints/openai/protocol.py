"""The fields of requests. Those of the sampler are derived from the dataclass that declares them."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    create_model,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from vllm_omni.diffusion.engine.engine import Engine
from vllm_omni.errors import InvalidRequestError, nearest_name
from vllm_omni.inputs.data import MAX_STEPS, OmniDiffusionSamplingParams

ImageFormat = Literal["png", "jpeg", "webp"]

_MAX_SECONDS = 600.0

# Tensors do not travel in JSON, the form of the outputs is the server's matter, and OpenAI's name of the last is n.
_NOT_IN_JSON = ("latents", "generator", "output_type", "num_outputs_per_prompt")

# What other programs call these fields, where the nearest name would be another one.
_USUAL_NAMES = {
    "steps": "num_inference_steps",
    "num_steps": "num_inference_steps",
    "cfg_scale": "true_cfg_scale",
    "guidance": "guidance_scale",
    "num_images": "n",
    "num_images_per_prompt": "n",
}


@dataclasses.dataclass(frozen=True)
class AtMost:
    """Of a list: a longer one is refused unread, and the first wrong entry ends the check.

    Else a body of wrong entries makes an error of each, which take 300 to 1,900 times its memory. ``param`` is the name
    of the field in errors, where it is not its own.
    """

    most: int
    param: str | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        param = str(self.param or handler.field_name)

        def check(values: Any) -> Any:
            if isinstance(values, list) and len(values) > self.most:
                text = f"{param} holds {len(values)} entries; at most {self.most} are taken, so shorten it"
                raise InvalidRequestError(text, param=param)
            return values

        entries = {**handler(source), "fail_fast": True}
        return core_schema.no_info_before_validator_function(check, cast(CoreSchema, entries))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "maxItems": self.most}


class StrictModel(BaseModel):
    """A body whose unknown fields are errors that suggest the nearest name, and whose values are not converted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        merged = _with_extra_body(values) if "extra_body" in cls.model_fields else values
        for name in merged:
            if name not in cls.model_fields:
                usual = _USUAL_NAMES.get(str(name), "")
                hint = f"did you mean {usual!r}?" if usual in cls.model_fields else nearest_name(name, cls.model_fields)
                raise InvalidRequestError(f"unknown field {name!r}; {hint}", param=name)
        return {name: value for name, value in merged.items() if value is not None}  # null is absent


def _with_extra_body(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``extra_body`` beside the others, where OpenAI's Python client puts them by itself."""
    merged = dict(values)
    extra = merged.pop("extra_body", None)
    if extra is None:
        return merged
    if not isinstance(extra, Mapping):
        raise InvalidRequestError("extra_body must be a JSON object", param="extra_body")
    if "extra_body" in extra:
        raise InvalidRequestError("extra_body holds another one; put its fields into the first", param="extra_body")
    for name, value in extra.items():
        if name in merged and merged[name] != value:
            raise InvalidRequestError(f"{name} is given twice, at the top and in extra_body; give it once", param=name)
        merged[name] = value
    return merged


def _sampling_fields() -> dict[str, Any]:
    hints = typing.get_type_hints(OmniDiffusionSamplingParams)
    return {
        field.name: (
            _json_type(hints[field.name]) | None,
            Field(default=None, description=field.metadata["help"]),
        )
        for field in dataclasses.fields(OmniDiffusionSamplingParams)
        if field.name not in _NOT_IN_JSON
    }


def _json_type(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) in (None, dict):
        return hint
    return Annotated[list[float], AtMost(MAX_STEPS)]


SamplingFields: type[StrictModel] = create_model("SamplingFields", __base__=StrictModel, **_sampling_fields())


class RequestFields(SamplingFields):  # type: ignore[misc,valid-type]  # mypy knows no model made by create_model
    """What every request for an output may have, but for its prompt."""

    model: str | None = Field(None, description="the served model; absent: the one that is served")
    negative_prompt: str | None = Field(None, description="what to keep away from")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, or auto", examples=["512x512"])
    priority: int = Field(0, ge=-1000, le=1000, description="a lower number is served earlier")
    deadline_s: float | None = Field(None, gt=0, le=1e6, description="seconds from now by which it should be done")
    user: str | None = Field(None, max_length=256, description="whom it is for; the policy 'fair' shares among users")
    extra_body: dict[str, Any] | None = Field(None, description="further fields, as if they stood at the top")

    def sampling_params(self, num_outputs: int | None) -> OmniDiffusionSamplingParams:
        """Raises ``InvalidRequestError`` that names the field."""
        given = {name: getattr(self, name) for name in SamplingFields.model_fields}
        given = {name: value for name, value in given.items() if value is not None}
        if self.size not in (None, "auto"):
            given |= self._size(given)
        return OmniDiffusionSamplingParams(**given, num_outputs_per_prompt=num_outputs)

    @property
    def client(self) -> str:
        """Whom it is for, empty if nobody is named."""
        return self.user or ""

    def _size(self, given: Mapping[str, Any]) -> dict[str, int]:
        width, separator, height = str(self.size).partition("x")
        if not (
            separator
            and str(self.size).isascii()
            and width.isdecimal()
            and height.isdecimal()
            and len(str(self.size)) <= 11
        ):
            raise InvalidRequestError(f"size={self.size!r} must read WIDTHxHEIGHT, as in 1024x768", param="size")
        for name in ("width", "height"):
            if name in given:
                raise InvalidRequestError(f"size and {name} exclude each other; give one of them", param=name)
        return {"width": int(width), "height": int(height)}


class GenerationFields(RequestFields):
    """With a prompt of its own."""

    prompt: str = Field(description="what to show")


class PictureFields(GenerationFields):
    """What a request for pictures may have."""

    n: int | None = Field(None, ge=1, le=16, description="number of pictures; picture i uses seed + i")
    response_format: Literal["b64_json", "url"] = Field("b64_json", description="pictures in the answer, or addresses")
    output_format: ImageFormat = Field("png", description="file format of the pictures")
    output_compression: int | None = Field(None, ge=0, le=100, description="quality of jpeg and webp; 100 is the best")
    background: Literal["auto", "opaque"] = Field(
        "auto", description="auto: as the model makes it; opaque: transparency is laid on white"
    )
    quality: Literal["auto"] = Field("auto", description="use num_inference_steps to choose")
    moderation: Literal["auto"] = Field("auto", description="there is none")
    safety_identifier: str | None = Field(None, max_length=256, description="as user")
    stream: bool = Field(False, description="server-sent events, with partial pictures on the way")
    partial_images: int = Field(0, ge=0, le=3, description="with stream: number of partial pictures")
    stream_progress: bool = Field(
        False, description="with stream: events of progress with the time left and previews, instead of partial_images"
    )

    @model_validator(mode="after")
    def _check_combinations(self) -> PictureFields:
        if self.partial_images and not self.stream:
            raise InvalidRequestError("partial_images needs stream=true", param="partial_images")
        if self.stream_progress and (self.partial_images or not self.stream):
            raise InvalidRequestError(
                "stream_progress needs stream=true and no partial_images", param="stream_progress"
            )
        if self.output_compression is not None and self.output_format == "png":
            raise InvalidRequestError(
                "output_compression has no effect on png, which loses nothing; use jpeg or webp, or leave it out",
                param="output_compression",
            )
        if self.response_format == "url" and self.stream:
            raise InvalidRequestError("a stream holds its pictures; leave response_format out", param="response_format")
        return self

    @property
    def client(self) -> str:
        return self.safety_identifier or super().client


class PictureReference(StrictModel):
    """A picture by its address, or in the text of a data URL."""

    image_url: str = Field(description="data:image/png;base64,... or, from a domain that is allowed, https://...")


class VideoFields(GenerationFields):
    """What a request for a video may have."""

    seconds: str | float | None = Field(None, description="length, instead of num_frames")
    input_reference: PictureReference | None = Field(None, description="the picture that it starts from")

    @field_validator("seconds", mode="before")
    @classmethod
    def _check_seconds(cls, seconds: Any) -> Any:
        # Of a union pydantic would tell the error of each type, under the name of that type.
        if isinstance(seconds, bool) or not isinstance(seconds, (str, int, float)):
            kind = type(seconds).__name__
            raise InvalidRequestError(f"seconds must be a number, or the text of one, not {kind}", param="seconds")
        return seconds

    def video_params(self, engine: Engine) -> OmniDiffusionSamplingParams:
        """Raises ``InvalidRequestError`` that names the field."""
        params = self.sampling_params(1)
        if self.seconds is None:
            return params
        if params.num_frames is not None:
            raise InvalidRequestError("seconds and num_frames exclude each other; give one of them", param="seconds")
        try:
            seconds = float(self.seconds)
        except ValueError:
            seconds = float("nan")
        if not 0 < seconds <= _MAX_SECONDS:
            raise InvalidRequestError(
                f"seconds={self.seconds!r} must be a number above 0 and at most {_MAX_SECONDS:g}", param="seconds"
            )
        params.num_frames = engine.num_frames_of(seconds, params.fps)
        return params
